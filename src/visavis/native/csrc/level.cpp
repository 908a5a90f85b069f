// The kernels of one level. Compiled once for each, with VV_LEVEL and the processor's flags.
#include <math.h>

#include "attention.h"
#include "formats.h"
#include "product.h"
#include "simd.h"

namespace vv {
namespace {

void quantize(const float *x, int64_t cols, int8_t *codes, Group *groups) {
    const vf shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t g = 0; g < cols / GROUP; ++g, x += GROUP, codes += GROUP) {
        vf most{}, wrong{};
        for (int i = 0; i < GROUP; i += LANES) {
            const vf value = load<vf>(x + i);
            most = larger(most, (vf)((vi)value & 0x7fffffff));
            wrong += value * 0.0f;  // NaN where a value is infinite or NaN
        }
        float lane[LANES], largest = 0;
        store(lane, most);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
        largest = lane[0];
        const bool finite = sum(wrong) == 0.0f, zero = !finite || largest < 1e-30f;
        const float scale = !finite ? NAN : zero ? 0.0f : largest / 127.0f;
        const float inverse = zero ? 0.0f : 127.0f / largest;
        vi added[2] = {};
        for (int i = 0; i < GROUP; i += LANES) {
            const vi code = zero ? vi{} : (vi)(load<vf>(x + i) * inverse + shift) - 0x4b400000;
            store(codes + i, __builtin_convertvector(code, quarter_vc));
            added[i / 16] += code;
        }
        // As floats they are exact: at most 16 * 127.
        const int32_t sums[2] = {(int32_t)sum(floats(added[0])), (int32_t)sum(floats(added[1]))};
        Group &group = groups[g];
        group.scale = scale;
        group.sum = sums[0] + sums[1];
        group.total = scale * (float)group.sum;
        for (int h = 0; h < 2; ++h) {
            group.sums[h] = sums[h];
            group.halves[h] = scale * (float)sums[h];
        }
    }
}

void norm(const float *x, const vv_norm &norm, int64_t width, bool layer, float eps, float *out) {
    const int64_t whole = width / LANES * LANES, rest = width - whole;
    float mean = 0;
    if (layer) {
        vf total{};
        for (int64_t i = 0; i < whole; i += LANES) total += load<vf>(x + i);
        mean = sum(total + load_some(x + whole, rest)) / (float)width;
    }
    vf squares{};
    for (int64_t i = 0; i < whole; i += LANES) {
        const vf value = load<vf>(x + i) - mean;
        squares = fma(value, value, squares);
    }
    float centred[LANES] = {};
    for (int64_t i = 0; i < rest; ++i) centred[i] = x[whole + i] - mean;
    squares = fma(load<vf>(centred), load<vf>(centred), squares);
    const float scale = 1.0f / sqrtf(sum(squares) / (float)width + eps);
    for (int64_t i = 0; i < width; ++i) out[i] = (x[i] - mean) * scale * norm.weight[i];
    if (norm.bias)
        for (int64_t i = 0; i < width; ++i) out[i] += norm.bias[i];
}

void rotate(float *x, const float *cosines, const float *sines, int64_t rotary_dim) {
    const int64_t half = rotary_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] + b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

void store_row(const float *x, int64_t count, bool bf16, void *out) {
    if (!bf16) {
        memcpy(out, x, 4 * count);
        return;
    }
    uint16_t *at = (uint16_t *)out;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = load<uint32_t>(x + i);
        const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;  // to nearest even
        at[i] = (uint16_t)(x[i] == x[i] ? rounded : 0x7fc0u);
    }
}

inline vf activated(vf x, int32_t kind) {
    switch (kind) {
        case VV_SILU: return x / (1.0f + exponential(-x));
        case VV_QUICK_GELU: return x / (1.0f + exponential(x * -1.702f));
        case VV_RELU: return pick(x < 0.0f, vf{}, x);
        case VV_GELU_TANH: {  // (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
            const vf u = x * (fma(x * x, all(0.044715f), all(1.0f)) * 0.7978845608f);
            return x / (1.0f + exponential(u * -2.0f));
        }
        default: {
            vf found{};
            for (int i = 0; i < LANES; ++i)
                found[i] = x[i] * 0.5f * (1.0f + erff(x[i] * 0.70710678f));
            return found;
        }
    }
}

void activate(float *gate, const float *up, int64_t count, int32_t kind) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vf value = activated(load<vf>(gate + i), kind);
        store(gate + i, up ? value * load<vf>(up + i) : value);
    }
    if (i == count) return;
    vf value = activated(load_some(gate + i, count - i), kind);
    if (up) value *= load_some(up + i, count - i);
    store_some(gate + i, value, count - i);
}

// Compilers turn the inner loop into products of pairs of 16-bit numbers; memory is the limit.
void scan(const int8_t *codes, const int64_t *rows, int64_t count, int64_t dim,
          const int16_t *query, int32_t *sums) {
    constexpr int64_t AHEAD = 8;  // rows that are fetched before they are needed
    for (int64_t i = 0; i < count; ++i) {
        const int8_t *row = codes + (rows ? rows[i] : i) * dim;
        if (rows && i + AHEAD < count) {
            const int8_t *next = codes + rows[i + AHEAD] * dim;
            for (int64_t j = 0; j < dim; j += 64) __builtin_prefetch(next + j);
        }
        int32_t sum = 0;
        for (int64_t j = 0; j < dim; ++j) sum += (int32_t)row[j] * query[j];
        sums[i] = sum;
    }
}

}  // namespace

#if VV_LEVEL == VV_AVX512
extern const Kernels avx512 = {"avx512",
#elif VV_LEVEL == VV_AVX2
extern const Kernels avx2 = {"avx2",
#elif VV_LEVEL == VV_NEON
extern const Kernels neon = {"neon",
#else
extern const Kernels portable = {"portable",
#endif
    product, quantize, norm, rotate, store_row, attend, activate, scan};

}  // namespace vv
