// GGUF blocks as blocks of interleaved rows (formats.h), and rows of these as numbers.
#include <string.h>

#include "formats.h"

namespace vv {
namespace {

// What GGUF stores for 32 columns of one row. K types: scale and minimum are integers.
struct Stored {
    uint8_t codes[GROUP];
    uint16_t d, m;         // f16; of a K type those of the 256 columns around
    uint8_t scale[2], minimum[2];
};

uint16_t half_at(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }

// The 6-bit scale and minimum of group g in the 12 bytes of Q4_K and Q5_K.
void six_bits(const uint8_t *packed, int g, Stored &out) {
    if (g < 4) {
        out.scale[0] = packed[g] & 63;
        out.minimum[0] = packed[g + 4] & 63;
    } else {
        out.scale[0] = (uint8_t)((packed[g + 4] & 15) | (packed[g - 4] >> 6) << 4);
        out.minimum[0] = (uint8_t)((packed[g + 4] >> 4) | (packed[g] >> 6) << 4);
    }
}

// Read group `group` of a stored row. Codes are unsigned, but signed for Q8_0.
void read(int32_t format, const uint8_t *row, int64_t group, Stored &out) {
    const int64_t super = group / 8;
    const int g = (int)(group % 8);
    uint8_t *codes = out.codes;
    switch (format) {
        case VV_Q4_0:
        case VV_Q4_1:
        case VV_Q5_0:
        case VV_Q5_1: {
            const bool minimum = format == VV_Q4_1 || format == VV_Q5_1, five = format >= VV_Q5_0;
            const int head = minimum ? 4 : 2;
            const uint8_t *at = row + group * (head + 16 + (five ? 4 : 0));
            out.d = half_at(at);
            out.m = minimum ? half_at(at + 2) : 0;
            at += head;
            uint32_t fifth = 0;
            if (five) {
                fifth = at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24;
                at += 4;
            }
            for (int i = 0; i < 16; ++i) {
                codes[i] = (uint8_t)((at[i] & 15) | (fifth >> i & 1) << 4);
                codes[i + 16] = (uint8_t)((at[i] >> 4) | (fifth >> (i + 16) & 1) << 4);
            }
            return;
        }
        case VV_Q8_0: {
            const uint8_t *at = row + group * 34;
            out.d = half_at(at);
            memcpy(codes, at + 2, GROUP);
            return;
        }
        case VV_A8: {
            const uint8_t *at = row + group * 36;
            out.d = half_at(at);
            out.m = half_at(at + 2);
            memcpy(codes, at + 4, GROUP);
            return;
        }
        case VV_Q4_K:
        case VV_Q5_K: {
            const bool five = format == VV_Q5_K;
            const uint8_t *at = row + super * (five ? 176 : 144);
            out.d = half_at(at);
            out.m = half_at(at + 2);
            six_bits(at + 4, g, out);
            const uint8_t *low = at + (five ? 48 : 16) + 32 * (g / 2), *fifth = at + 16;
            for (int i = 0; i < GROUP; ++i) {
                codes[i] = g % 2 ? low[i] >> 4 : low[i] & 15;
                if (five) codes[i] |= (uint8_t)((fifth[i] >> g & 1) << 4);
            }
            return;
        }
        case VV_Q6_K: {
            const uint8_t *at = row + super * 210, *low = at + 64 * (g / 4) + 32 * (g % 2);
            const uint8_t *high = at + 128 + 32 * (g / 4);
            for (int i = 0; i < GROUP; ++i) {
                const int four = g % 4 < 2 ? low[i] & 15 : low[i] >> 4;
                codes[i] = (uint8_t)(four | (high[i] >> 2 * (g % 4) & 3) << 4);
            }
            out.scale[0] = at[192 + 2 * g];
            out.scale[1] = at[193 + 2 * g];
            out.d = half_at(at + 208);
            return;
        }
        case VV_Q2_K: {
            const uint8_t *at = row + super * 84, *low = at + 16 + 32 * (g / 4);
            for (int i = 0; i < GROUP; ++i) codes[i] = low[i] >> 2 * (g % 4) & 3;
            for (int h = 0; h < 2; ++h) {
                out.scale[h] = at[2 * g + h] & 15;
                out.minimum[h] = at[2 * g + h] >> 4;
            }
            out.d = half_at(at + 80);
            out.m = half_at(at + 82);
            return;
        }
        default: {  // Q3_K, its codes moved to where those of Q6_K are: -4 becomes 28
            const uint8_t *at = row + super * 110, *low = at + 32 + 32 * (g / 4);
            for (int i = 0; i < GROUP; ++i)
                codes[i] = (uint8_t)(28 + (low[i] >> 2 * (g % 4) & 3) + (at[i] >> g & 1) * 4);
            for (int h = 0; h < 2; ++h) {
                const int n = 2 * g + h;
                const int four = n < 8 ? at[96 + n] & 15 : at[88 + n] >> 4;
                const int two = at[104 + n % 4] >> 2 * (n / 4) & 3;
                out.scale[h] = (uint8_t)((four | two << 4) - 32);
            }
            out.d = half_at(at + 108);
        }
    }
}

void set_half(uint8_t *at, uint16_t value) { memcpy(at, &value, 2); }

template <class F>
void write(uint8_t *block, int64_t cols, int r, int64_t group, const Stored &in) {
    uint8_t *scales = block + F::scales_at(cols) + group * F::SCALES;
    if (F::K) {
        if (group % (SUPER / GROUP) == 0) {
            uint8_t *super = block + group * GROUP / SUPER * F::SUPERS;
            set_half(super + 2 * r, in.d);
            if (F::MIN) set_half(super + 32 + 2 * r, in.m);
        }
        for (int h = 0; h < F::HALVES; ++h) {
            scales[16 * h + r] = in.scale[h];
            if (F::MIN) scales[16 * (F::HALVES + h) + r] = in.minimum[h];
        }
    } else {
        set_half(scales + 2 * r, in.d);
        if (F::MIN) set_half(scales + 32 + 2 * r, in.m);
    }
    uint8_t *codes = block + F::codes_at(cols) + group * F::CODES + 4 * r;
    const uint8_t *from = in.codes;
    if (F::BITS == 8) {
        for (int k = 0; k < 8; ++k) memcpy(codes + 64 * k, from + 4 * k, 4);
        return;
    }
    // Four columns at a time, one in each byte; no bit crosses from byte to byte.
    uint32_t steps[8], fifth = 0, sixth[2] = {};
    memcpy(steps, from, GROUP);
    for (int j = 0; j < 4; ++j) {
        const uint32_t both = (steps[j] & 0x0f0f0f0fu) | (steps[j + 4] & 0x0f0f0f0fu) << 4;
        memcpy(codes + 64 * j, &both, 4);
    }
    if (F::BITS == 5) {
        for (int k = 0; k < 8; ++k) fifth |= (steps[k] >> 4 & 0x01010101u) << k;
        memcpy(codes + 256, &fifth, 4);
    }
    if (F::BITS == 6) {
        for (int k = 0; k < 8; ++k) sixth[k / 4] |= (steps[k] >> 4 & 0x03030303u) << 2 * (k % 4);
        for (int j = 0; j < 2; ++j) memcpy(codes + 256 + 64 * j, &sixth[j], 4);
    }
}

float from_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    uint32_t bits = sign | ((rest << 13) + (112u << 23));
    if (rest >= 0x7c00u) bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
    float value;
    memcpy(&value, &bits, 4);
    if (rest < 0x400u) value = (float)rest * 5.9604644775390625e-8f * (sign ? -1.0f : 1.0f);
    return value;
}

// Rows as numbers or as codes, see vv_unpack; `values` and the others point to one row.
template <class F>
void numbers(const uint8_t *block, int64_t cols, int r, float *values, uint8_t *all_codes,
             float *all_scales, float *minimums) {
    for (int64_t g = 0; g < cols / GROUP; ++g) {
        const uint8_t *scales = block + F::scales_at(cols) + g * F::SCALES;
        const uint8_t *codes = block + F::codes_at(cols) + g * F::CODES + 4 * r;
        uint16_t half;
        float scale[2], minimum[2];
        const uint8_t *d = F::K ? block + g * GROUP / SUPER * F::SUPERS : scales;
        memcpy(&half, d + 2 * r, 2);
        scale[0] = scale[1] = from_half(half);
        memcpy(&half, d + (F::MIN ? 32 : 0) + 2 * r, 2);
        minimum[0] = minimum[1] = from_half(half);
        for (int h = 0; h < 2; ++h) {
            const int at = 16 * (F::HALVES == 2 ? h : 0) + r;
            if (F::K) scale[h] *= F::MIN ? (float)scales[at] : (float)(int8_t)scales[at];
            if (F::K && F::MIN) minimum[h] *= -(float)scales[16 * F::HALVES + at];
            if (all_scales) all_scales[2 * g + h] = scale[h];
            if (minimums) minimums[2 * g + h] = F::MIN ? minimum[h] : scale[h] * -F::OFFSET;
        }
        uint8_t found[GROUP];
        for (int k = 0; k < 8; ++k)
            for (int c = 0; c < 4; ++c) {
                int code = F::BITS == 8 ? codes[64 * k + c]
                                        : codes[64 * (k % 4) + c] >> (k < 4 ? 0 : 4) & 15;
                if (F::BITS == 5) code |= (codes[256 + c] >> k & 1) << 4;
                if (F::BITS == 6) code |= (codes[256 + 64 * (k / 4) + c] >> 2 * (k % 4) & 3) << 4;
                found[4 * k + c] = (uint8_t)code;
            }
        if (all_codes) memcpy(all_codes + g * GROUP, found, GROUP);
        if (!values) continue;
        for (int i = 0; i < GROUP; ++i) {
            const int code = F::BITS == 8 ? (int8_t)found[i] : found[i];
            const float value = scale[i / 16] * (float)(code - F::OFFSET);
            values[g * GROUP + i] = F::MIN ? value + minimum[i / 16] : value;
        }
    }
}

}  // namespace
}  // namespace vv

using namespace vv;

VV_API int64_t vv_packed_bytes(int32_t format, int64_t rows, int64_t cols) {
    return with_format(format, (int64_t)0, [&](auto type) -> int64_t {
        using F = decltype(type);
        return F::fits(cols) ? (rows + ROWS - 1) / ROWS * F::block(cols) : 0;
    });
}

VV_API int64_t vv_stored_bytes(int32_t format, int64_t cols) {
    static const int bytes[] = {18, 20, 22, 24, 34, 84, 110, 144, 176, 210, 36};
    if (format < VV_Q4_0 || format > VV_A8) return 0;
    const int block = format >= VV_Q2_K && format <= VV_Q6_K ? SUPER : GROUP;
    return cols > 0 && cols % block == 0 ? cols / block * bytes[format - VV_Q4_0] : 0;
}

VV_API int vv_pack(int32_t format, int64_t cols, const uint8_t *stored, int64_t stride,
                   int64_t first, int64_t count, uint8_t *packed) {
    if (first < 0 || count < 0) return VV_BAD_SHAPE;
    return with_format(format, (int)VV_BAD_FORMAT, [&](auto type) -> int {
        using F = decltype(type);
        if (!F::fits(cols)) return VV_BAD_SHAPE;
        Stored group;
        bool finite = true;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = first + i;
            uint8_t *block = packed + row / ROWS * F::block(cols);
            for (int64_t g = 0; g < cols / GROUP; ++g) {
                group.m = 0;
                read(format, stored + i * stride, g, group);
                finite = finite && (group.d & 0x7c00) != 0x7c00 && (group.m & 0x7c00) != 0x7c00;
                write<F>(block, cols, (int)(row % ROWS), g, group);
            }
        }
        return finite ? VV_OK : VV_NOT_FINITE;
    });
}

VV_API int vv_unpack(const vv_matrix *matrix, const int64_t *rows, int64_t count, float *values,
                     uint8_t *codes, float *scales, float *minimums) {
    const int64_t cols = matrix->cols, groups = cols / 16;
    for (int64_t i = 0; i < count; ++i)
        if (rows[i] < 0 || rows[i] >= matrix->rows) return VV_BAD_SHAPE;
    return with_format(matrix->format, (int)VV_BAD_FORMAT, [&](auto type) -> int {
        using F = decltype(type);
        if (!F::fits(cols)) return VV_BAD_SHAPE;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = rows[i];
            const uint8_t *block = (const uint8_t *)matrix->data + row / ROWS * F::block(cols);
            numbers<F>(block, cols, (int)(row % ROWS), values ? values + i * cols : nullptr,
                       codes ? codes + i * cols : nullptr, scales ? scales + i * groups : nullptr,
                       minimums ? minimums + i * groups : nullptr);
        }
        return VV_OK;
    });
}
