// Threads that run one function together.
//
// They sleep between two runs and wait actively, for a moment, only within one. A team is used by
// one caller at a time: another that comes meanwhile runs its function alone. After a fork the
// child makes a team of its own.
//
// A function is a row of phases, each cut into pieces that threads claim. A phase ends when all its
// pieces are done, whoever did them: a thread that the system lets wait delays the others only
// while it is within a piece, and one that comes late finds no pieces and goes on to the phase that
// is current.
#pragma once

#include <stdint.h>

#include <atomic>

namespace vv {

// What the threads of a run share.
struct Run {
    explicit Run(int size) : size(size) {}
    const int size;
    alignas(64) std::atomic<uint64_t> state{0};  // the phase, and how many pieces are claimed
    alignas(64) std::atomic<int64_t> done{0};    // pieces of the phase

    void wait(uint64_t phase) const;
};

// One thread's way through a run.
class Member {
  public:
    Member(Run &run, int number) : number(number), size(run.size), run_(run) {}
    const int number, size;

    // Do piece(0) to piece(count - 1), all threads together; then one thread alone does after().
    template <class Piece, class After>
    void phase(int64_t count, Piece piece, After after) {
        if (count < 1) count = 0;
        if (size == 1) {
            for (int64_t i = 0; i < count; ++i) piece(i);
            after();
            return;
        }
        const uint64_t pieces = count ? (uint64_t)count : 1;  // of none, one that does nothing
        int64_t mine = 0;
        for (uint64_t state = run_.state.load(std::memory_order_acquire);;) {
            if (state >> 32 != phase_ || (state & 0xffffffffu) >= pieces) break;
            if (!run_.state.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel))
                continue;
            if (count) piece((int64_t)(state & 0xffffffffu));
            ++mine;
            state = run_.state.load(std::memory_order_acquire);
        }
        if (mine && run_.done.fetch_add(mine, std::memory_order_acq_rel) + mine == (int64_t)pieces) {
            after();
            run_.done.store(0, std::memory_order_relaxed);
            run_.state.store((uint64_t)(uint32_t)(phase_ + 1) << 32, std::memory_order_release);
        } else {
            run_.wait(phase_);
        }
        ++phase_;
    }
    template <class Piece>
    void phase(int64_t count, Piece piece) {
        phase(count, piece, [] {});
    }

  private:
    Run &run_;
    uint32_t phase_ = 0;
};

using Work = void (*)(void *context, Member &member);

// Let up to `threads` threads, the caller among them, call work(context, member).
void run_together(int threads, Work work, void *context);

// The same for something that is called as work(member).
template <class F>
void together(int threads, F &&work) {
    run_together(
        threads, [](void *context, Member &member) { (*(F *)context)(member); }, &work);
}

}  // namespace vv
