// Vectors of one level: floats and 32-bit integers in LANES, bytes in 4 * LANES.
//
// Arithmetic is that of the compiler's vector types (GCC and Clang); what they lack is here. A
// block's vector of 64 bytes is PARTS of these. The level is the macro VV_LEVEL.
#pragma once

#include <stdint.h>
#include <string.h>

#define VV_AVX512 1
#define VV_AVX2 2
#define VV_NEON 3
#define VV_PORTABLE 4

#if VV_LEVEL == VV_AVX512 || VV_LEVEL == VV_AVX2
#include <immintrin.h>
#elif VV_LEVEL == VV_NEON
#include <arm_neon.h>
#endif

namespace vv {
namespace {  // every level has its own

#if VV_LEVEL == VV_AVX512
constexpr int LANES = 16;
#elif VV_LEVEL == VV_AVX2
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = 16 / LANES;

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(4 * LANES)));  // pairs of bytes, to shift them
typedef uint8_t vb __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vh __attribute__((vector_size(2 * LANES)));  // LANES numbers of 16 bits
typedef uint8_t quarter_vb __attribute__((vector_size(LANES)));
typedef int8_t quarter_vc __attribute__((vector_size(LANES)));

template <class V>
inline V load(const void *at) {
    V found;
    memcpy(&found, at, sizeof found);
    return found;
}

template <class V>
inline void store(void *at, V value) {
    memcpy(at, &value, sizeof value);
}

inline vf all(float value) { return value - vf{}; }  // 0 + value would be an addition
inline vi all(int32_t value) { return vi{} + value; }
inline vf floats(vi x) { return __builtin_convertvector(x, vf); }
inline vf from_bf16(const uint16_t *at) {
    return (vf)(__builtin_convertvector(load<half_vh>(at), vu) << 16);
}
inline vf from_u8(const uint8_t *at) {
    return floats(__builtin_convertvector(load<quarter_vb>(at), vi));
}
inline vf from_i8(const uint8_t *at) {
    return floats(__builtin_convertvector(load<quarter_vc>(at), vi));
}
inline vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
inline vf larger(vf a, vf b) { return pick(a < b, b, a); }  // a where a is NaN

// acc + the sums of four products each, of 16 columns: four vectors of codes and 16 integers.
// Codes are below 2^BITS, or signed with 8 bits; BIAS was then added to each code.
#if VV_LEVEL == VV_AVX512
constexpr int BIAS = 128;

inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline vf from_f16(const uint16_t *at) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}
inline void sum4(const vf *x, float *out) {
    const __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
    const __m512 s = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 t = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 u = _mm512_add_ps(_mm512_shuffle_ps(s, t, 0x44), _mm512_shuffle_ps(s, t, 0xee));
    const __m256 v = _mm256_add_ps(_mm512_castps512_ps256(u), _mm512_extractf32x8_ps(u, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
template <int BITS>
inline vi dot16(vi acc, const vb *w, const int8_t *x) {
    for (int j = 0; j < 4; ++j) {
        const vb codes = BITS == 8 ? w[j] ^ (uint8_t)0x80 : w[j];
        acc = (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes,
                                      _mm512_set1_epi32(load<int32_t>(x + 4 * j)));
    }
    return acc;
}
#elif VV_LEVEL == VV_AVX2
constexpr int BIAS = 0;

inline vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline vf from_f16(const uint16_t *at) {
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
}
inline void sum4(const vf *x, float *out) {
    const __m256 s = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]);
    const __m256 t = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]), u = _mm256_hadd_ps(s, t);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1)));
}
template <int BITS>
inline vi dot16(vi acc, const vb *w, const int8_t *x) {
    __m256i pair[4];  // sums of two products, below 2^15 with 8 bits
    for (int j = 0; j < 4; ++j) {
        const __m256i codes = (__m256i)w[j], column = _mm256_set1_epi32(load<int32_t>(x + 4 * j));
        pair[j] = BITS == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(codes),
                                                   _mm256_sign_epi8(column, codes))
                            : _mm256_maddubs_epi16(codes, column);
    }
    const __m256i ones = _mm256_set1_epi16(1);
    if (BITS <= 5) {  // four of them still fit in 16 bits: 4 * 2 * 31 * 127 < 2^15
        const __m256i four = _mm256_add_epi16(_mm256_add_epi16(pair[0], pair[1]),
                                              _mm256_add_epi16(pair[2], pair[3]));
        return acc + (vi)_mm256_madd_epi16(four, ones);
    }
    if (BITS == 6) {  // two of them: 2 * 2 * 63 * 127 < 2^15
        acc += (vi)_mm256_madd_epi16(_mm256_add_epi16(pair[0], pair[1]), ones);
        return acc + (vi)_mm256_madd_epi16(_mm256_add_epi16(pair[2], pair[3]), ones);
    }
    for (int j = 0; j < 4; ++j) acc += (vi)_mm256_madd_epi16(pair[j], ones);
    return acc;
}
#elif VV_LEVEL == VV_NEON
constexpr int BIAS = 0;

inline vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline vf from_f16(const uint16_t *at) {
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at)));
}
inline void sum4(const vf *x, float *out) {
    const float32x4_t s = vpaddq_f32((float32x4_t)x[0], (float32x4_t)x[1]);
    vst1q_f32(out, vpaddq_f32(s, vpaddq_f32((float32x4_t)x[2], (float32x4_t)x[3])));
}
template <int BITS>
inline vi dot16(vi acc, const vb *w, const int8_t *x) {
    for (int j = 0; j < 4; ++j) {
        const int8x16_t column = vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(x + 4 * j)));
        acc = (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w[j], column);
    }
    return acc;
}
#else
constexpr int BIAS = 0;

inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline float from_f16(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) {  // infinite or NaN
        const uint32_t bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
        return load<float>(&bits);
    }
    const uint32_t bits = (rest << 13) + (112u << 23), base = 113u << 23;
    if (rest < 0x400u) {  // subnormal: the number is rest * 2^-24
        const uint32_t shifted = (rest << 13) + base;
        const float value = load<float>(&shifted) - load<float>(&base);
        return sign ? -value : value;
    }
    const uint32_t joined = sign | bits;
    return load<float>(&joined);
}
inline vf from_f16(const uint16_t *at) {
    vf found{};
    for (int i = 0; i < LANES; ++i) found[i] = from_f16(at[i]);
    return found;
}
inline void sum4(const vf *x, float *out) {
    for (int i = 0; i < 4; ++i) out[i] = (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]);
}
template <int BITS>
inline vi dot16(vi acc, const vb *w, const int8_t *x) {
    for (int j = 0; j < 4; ++j)
        for (int r = 0; r < LANES; ++r) {
            int32_t dot = 0;
            for (int c = 0; c < 4; ++c) {
                const uint8_t code = w[j][4 * r + c];
                dot += (BITS == 8 ? (int8_t)code : code) * x[4 * j + c];
            }
            acc[r] += dot;
        }
    return acc;
}
#endif

// The sum of all lanes: in the order of sum4, the sums of four vectors.
inline float sum(vf x) {
    const vf four[4] = {x, x, x, x};
    float out[4];
    sum4(four, out);
    return out[0];
}

// The first `count` numbers (at most LANES), zeros after them.
inline vf load_some(const float *at, int64_t count) {
    vf found{};
    memcpy(&found, at, 4 * count);
    return found;
}
inline void store_some(float *at, vf value, int64_t count) { memcpy(at, &value, 4 * count); }

// e^x to a relative error of 2e-7; 0 below -87, NaN where x is.
inline vf exponential(vf x) {
    const vf most = all(88.0f), least = all(-87.3f);
    const vi zero = x < least;
    x = pick(x < least, least, pick(x > most, most, x));
    const vf shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf n = fma(x, all(1.44269504f), shift), whole = n - shift;
    vf r = fma(whole, all(-0.693359375f), x);
    r = fma(whole, all(2.12194440e-4f), r);
    vf p = all(1.9875691500e-4f);  // the polynomial of Cephes' expf
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    const vf power = (vf)(((vu)n << 23) + (127u << 23));
    return pick(zero, vf{}, p * power);
}

}  // namespace
}  // namespace vv
