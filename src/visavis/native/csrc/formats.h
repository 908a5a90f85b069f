// How packed matrices lie in memory.
//
// Sixteen rows make a block, thirty-two columns a group. A block holds three areas, each padded to
// 64 bytes:
//
//   supers   K types: for each 256 columns  d f16[16], then dmin f16[16] if there are minimums
//   scales   for each group: K types        scale i8 or u8 [HALVES][16], then minimum u8 alike
//                            other types    d f16[16], then m f16[16] if there are minimums
//   codes    for each group: 4 bits         4 vectors of 64 bytes
//                            5 bits         the same, then 1 vector of fifth bits
//                            6 bits         the same, then 2 vectors of fifth and sixth bits
//                            8 bits         8 vectors
//
// Byte 4r + c of a vector belongs to row r. Step k (0 to 7) of a group is its columns 4k to 4k + 3:
//
//   4 bits   vector j: step j in the low halves of the bytes, step j + 4 in the high halves
//   fifth    bit k of a byte: step k
//   sixth    vector j: bits 2i and 2i + 1 of a byte: step 4j + i
//   8 bits   vector k: step k, signed
//
// A value is scale * (code - OFFSET) + minimum, scale and minimum of a K type being d * scale and
// -dmin * minimum. Q3_K is kept as Q6_K with its codes moved, Q2_K with codes of 4 bits.
#pragma once

#include <stdint.h>

#include "api.h"

namespace vv {

constexpr int ROWS = 16, GROUP = 32, SUPER = 256;

template <int bits, int offset, bool super, int halves, bool minimum>
struct Format {
    static constexpr int BITS = bits, OFFSET = offset, HALVES = halves;
    static constexpr bool K = super, MIN = minimum;
    static constexpr int64_t CODES = bits == 8 ? 512 : 256 + 64 * (bits - 4);
    static constexpr int64_t SCALES = (super ? 16 * halves : 32) * (minimum ? 2 : 1);
    static constexpr int64_t SUPERS = super ? (minimum ? 64 : 32) : 0;

    static constexpr int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    static constexpr int64_t scales_at(int64_t cols) { return padded(cols / SUPER * SUPERS); }
    static constexpr int64_t codes_at(int64_t cols) {
        return scales_at(cols) + padded(cols / GROUP * SCALES);
    }
    static constexpr int64_t block(int64_t cols) { return codes_at(cols) + cols / GROUP * CODES; }
    static constexpr bool fits(int64_t cols) { return cols > 0 && cols % (super ? SUPER : GROUP) == 0; }
};

using Q4_0 = Format<4, 8, false, 1, false>;
using Q4_1 = Format<4, 0, false, 1, true>;
using Q5_0 = Format<5, 16, false, 1, false>;
using Q5_1 = Format<5, 0, false, 1, true>;
using Q8_0 = Format<8, 0, false, 1, false>;
using A8 = Format<8, 0, false, 1, true>;
using Q2_K = Format<4, 0, true, 2, true>;
using Q4_K = Format<4, 0, true, 1, true>;
using Q5_K = Format<5, 0, true, 1, true>;
using Q6_K = Format<6, 32, true, 2, false>;

// Call f with a value of a packed format's type; `otherwise` for other formats.
template <class F, class R>
R with_format(int32_t format, R otherwise, F f) {
    switch (format) {
        case VV_Q4_0: return f(Q4_0());
        case VV_Q4_1: return f(Q4_1());
        case VV_Q5_0: return f(Q5_0());
        case VV_Q5_1: return f(Q5_1());
        case VV_Q8_0: return f(Q8_0());
        case VV_Q2_K: return f(Q2_K());
        case VV_Q3_K: return f(Q6_K());
        case VV_Q4_K: return f(Q4_K());
        case VV_Q5_K: return f(Q5_K());
        case VV_Q6_K: return f(Q6_K());
        case VV_A8: return f(A8());
        default: return otherwise;
    }
}

// One group of an activation row made integers: value = scale * code.
struct Group {
    float scale;             // NaN where the row holds what is no finite number
    float total, halves[2];  // scale * the sum of codes: of the group, of its first and second 16
    int32_t sum, sums[2];    // the same sums of codes
    int32_t unused;
};

// Rows that are multiplied: as numbers, and as integers if any matrix is packed.
struct Input {
    const float *values;  // [rows, cols]
    const int8_t *codes;  // [rows, cols]
    const Group *groups;  // [rows, cols / 32]
    int64_t cols;
};

// Keys and values of one head that queries attend to.
struct Attention {
    const void *keys, *values;  // [tokens, head_dim]
    int64_t head_dim;
    bool bf16;
    int64_t window;
};

// What is compiled once for each level of the processor.
struct Kernels {
    const char *name;
    // The products of rows first..first + count of `in` and block `block` of a matrix, [count][16].
    void (*product)(const vv_matrix &, int64_t block, const Input &in, int64_t first, int64_t count,
                    float *out);
    void (*quantize)(const float *x, int64_t cols, int8_t *codes, Group *groups);
    void (*norm)(const float *x, const vv_norm &, int64_t width, bool layer_norm, float eps,
                 float *out);
    void (*rotate)(float *x, const float *cosines, const float *sines, int64_t rotary_dim);
    void (*store)(const float *x, int64_t count, bool bf16, void *out);
    // Queries [rows][head_dim], `stride` apart, of consecutive tokens: the first sees `end` keys,
    // each next one more. `scratch`: rows * (end + rows + 16) floats.
    void (*attend)(const float *queries, int64_t stride, int64_t rows, int64_t end,
                   const Attention &, float *out, int64_t out_stride, float *scratch);
    // gate = activation(gate) * up; up null: gate = activation(gate).
    void (*activate)(float *gate, const float *up, int64_t count, int32_t activation);
    // See vv_scan.
    void (*scan)(const int8_t *codes, const int64_t *rows, int64_t count, int64_t dim,
                 const int16_t *query, int32_t *sums);
};

constexpr int MOST_QUERIES = 4;  // rows of `attend`

}  // namespace vv
