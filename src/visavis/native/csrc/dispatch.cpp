// Which level's kernels this machine runs, and which are in use.
#include "dispatch.h"

#include <string.h>

#include <atomic>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace vv {

#if defined(__x86_64__)
extern const Kernels avx512, avx2;
#elif defined(__aarch64__)
extern const Kernels neon;
#endif
extern const Kernels portable;

namespace {

struct Level {
    const Kernels *kernels;
    bool (*runs)();
};

const Level LEVELS[] = {  // the fastest first
#if defined(__x86_64__)
    {&avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
     }},
    {&avx2,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c");
     }},
#elif defined(__aarch64__)
    {&neon,
     [] {
#if defined(__linux__)
         return (getauxval(AT_HWCAP) & (1UL << 20)) != 0;  // HWCAP_ASIMDDP
#else
         return true;  // every ARM processor that macOS and Windows on ARM support today
#endif
     }},
#endif
    {&portable, [] { return true; }},
};

const Kernels *fastest() {
    for (const Level &level : LEVELS)
        if (level.runs()) return level.kernels;
    return &portable;
}

std::atomic<const Kernels *> chosen{nullptr};

}  // namespace

const Kernels &kernels() {
    const Kernels *found = chosen.load(std::memory_order_acquire);
    if (!found) chosen.store(found = fastest(), std::memory_order_release);
    return *found;
}

}  // namespace vv

VV_API int vv_set_level(const char *name) {
    if (!name || !*name) {
        vv::chosen.store(vv::fastest());
        return 0;
    }
    for (const vv::Level &level : vv::LEVELS)
        if (!strcmp(level.kernels->name, name) && level.runs()) {
            vv::chosen.store(level.kernels);
            return 0;
        }
    return 1;
}

VV_API int vv_interface(void) { return VV_INTERFACE; }

VV_API const char *vv_level(void) { return vv::kernels().name; }

VV_API int vv_scan(const int8_t *codes, const int64_t *rows, int64_t count, int64_t dim,
                   const int16_t *query, int32_t *sums) {
    if (count < 0 || dim < 0) return VV_BAD_SHAPE;
    vv::kernels().scan(codes, rows, count, dim, query, sums);
    return VV_OK;
}
