#include "team.h"

#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace vv {
namespace {

constexpr int MOST_THREADS = 256;
constexpr int SPINS = 4000;  // some 50 microseconds, then the thread gives its turn away

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// Wait until `over` says yes.
template <class F>
void wait_actively(F over) {
    for (int tries = 0; !over(); ++tries) {
        if (tries < SPINS)
            pause();
        else
            std::this_thread::yield();
    }
}

struct Team {
    std::mutex busy;   // held by the caller whose function runs
    std::mutex guard;  // of what follows
    std::condition_variable begun;
    uint64_t runs = 0;
    int workers = 0;        // threads that exist
    Run *run = nullptr;     // what may be joined
    std::atomic<int> inside{0};  // threads that have joined
    Work work = nullptr;
    void *context = nullptr;

    void follow(int number) {
        uint64_t seen = 0;
        for (std::unique_lock<std::mutex> lock(guard);;) {
            begun.wait(lock, [&] { return run != nullptr && runs != seen; });
            seen = runs;
            if (number >= run->size) continue;
            Member member(*run, number);
            const Work call = work;
            void *with = context;
            inside.fetch_add(1, std::memory_order_relaxed);
            lock.unlock();
            call(with, member);
            inside.fetch_sub(1, std::memory_order_release);
            lock.lock();
        }
    }

    // Have `wanted` threads beside the caller, or as many as the system gives.
    int grow(int wanted) {
        while (workers < wanted) {
            try {
                std::thread(&Team::follow, this, workers + 1).detach();
            } catch (const std::system_error &) {
                break;
            }
            ++workers;
        }
        return workers < wanted ? workers : wanted;
    }
};

std::atomic<Team *> team{nullptr};

Team *current() {
    Team *found = team.load(std::memory_order_acquire);
    if (found) return found;
    Team *fresh = new (std::nothrow) Team;
    if (!fresh) return nullptr;
    if (team.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return fresh;
    delete fresh;
    return found;
}

#if !defined(_WIN32)
// A child has none of its parent's threads, and locks as they were held: it starts without a team.
void forget() { team.store(nullptr, std::memory_order_release); }
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget);
#endif

}  // namespace

void Run::wait(uint64_t phase) const {
    wait_actively([&] { return state.load(std::memory_order_acquire) >> 32 != phase; });
}

void run_together(int threads, Work work, void *context) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    Team *mine = threads > 1 ? current() : nullptr;
    std::unique_lock<std::mutex> busy;
    if (mine) busy = std::unique_lock<std::mutex>(mine->busy, std::try_to_lock);
    if (!busy.owns_lock()) {
        Run alone(1);
        Member member(alone, 0);
        work(context, member);
        return;
    }
    std::unique_lock<std::mutex> lock(mine->guard);
    Run run(1 + mine->grow(threads - 1));
    mine->run = &run;
    mine->work = work;
    mine->context = context;
    ++mine->runs;
    lock.unlock();
    if (run.size > 1) mine->begun.notify_all();
    Member member(run, 0);
    work(context, member);
    lock.lock();
    mine->run = nullptr;  // nobody joins any more
    lock.unlock();
    wait_actively([&] { return mine->inside.load(std::memory_order_acquire) == 0; });
}

}  // namespace vv
