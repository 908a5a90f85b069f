// The product of one block of 16 rows with one or several rows of activations.
//
// Each row's sums are made in the same order however many rows there are: its result is bitwise
// what it is alone. The weights are unpacked once for all of them.
#pragma once

#include "formats.h"
#include "simd.h"

namespace vv {
namespace {

// Codes of a group, of the rows of part p: steps 0 to 3 and steps 4 to 7.
template <class F>
inline void unpack(const uint8_t *codes, int p, vb *low, vb *high) {
    const uint8_t *at = codes + p * 4 * LANES;
    for (int j = 0; j < 4; ++j) {
        const vb both = load<vb>(at + 64 * j);
        if (F::BITS == 8) {
            low[j] = both;
            high[j] = load<vb>(at + 64 * (j + 4));
        } else {
            low[j] = both & (uint8_t)15;
            high[j] = (vb)((vh)both >> 4) & (uint8_t)15;
        }
    }
    if (F::BITS == 5) {
        const vh fifth = load<vh>(at + 256);
        for (int j = 0; j < 4; ++j) {
            low[j] |= (vb)(fifth << (4 - j)) & (uint8_t)16;
            high[j] |= (vb)(fifth >> j) & (uint8_t)16;
        }
    }
    if (F::BITS == 6) {
        const vh first = load<vh>(at + 256), second = load<vh>(at + 320);
        for (int j = 0; j < 4; ++j) {
            const vh a = j < 2 ? first << (4 - 2 * j) : first >> (2 * j - 4);
            const vh b = j < 2 ? second << (4 - 2 * j) : second >> (2 * j - 4);
            low[j] |= (vb)a & (uint8_t)48;
            high[j] |= (vb)b & (uint8_t)48;
        }
    }
}

template <class F, int M>
void packed_rows(const uint8_t *block, int64_t cols, const int8_t *x, const Group *groups,
                 float *out) {
    constexpr int TAKE = F::OFFSET + (F::BITS == 8 ? BIAS : 0), H = F::HALVES;
    const int64_t num = cols / GROUP;
    const uint8_t *scales = block + F::scales_at(cols), *codes = block + F::codes_at(cols);
    vf acc[M][PARTS] = {}, super[PARTS] = {}, super_low[PARTS] = {};
    const int64_t ahead = F::block(cols);
    for (int64_t g = 0; g < num; ++g, scales += F::SCALES, codes += F::CODES) {
        // Have the next block brought meanwhile.
        for (int64_t at = 0; at < F::CODES; at += 64) __builtin_prefetch(codes + ahead + at);
        __builtin_prefetch(scales + ahead);
        for (int p = 0; p < PARTS; ++p) {
            if (F::K && g % (SUPER / GROUP) == 0) {
                const uint16_t *at = (const uint16_t *)(block + g * GROUP / SUPER * F::SUPERS);
                super[p] = from_f16(at + p * LANES);
                if (F::MIN) super_low[p] = from_f16(at + 16 + p * LANES);
            }
            vf scale[H], minimum[H];
            for (int h = 0; h < H; ++h) {
                const uint8_t *at = scales + 16 * h + p * LANES, *lows = at + 16 * H;
                if (!F::K) {
                    scale[h] = from_f16((const uint16_t *)scales + p * LANES);
                    if (F::MIN) minimum[h] = from_f16((const uint16_t *)scales + 16 + p * LANES);
                } else if (F::MIN) {
                    scale[h] = super[p] * from_u8(at);
                    minimum[h] = -(super_low[p] * from_u8(lows));
                } else {
                    scale[h] = super[p] * from_i8(at);
                }
            }
            vb low[4], high[4];
            unpack<F>(codes, p, low, high);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const int8_t *row = x + m * cols + g * GROUP;
                const Group &group = groups[m * num + g];
                vf &sums = acc[m][p];
                if constexpr (H == 1) {
                    const vi dot = dot16<F::BITS>(all(-TAKE * group.sum), low, row);
                    const vi both = dot16<F::BITS>(dot, high, row + 16);
                    sums = fma(floats(both), scale[0] * group.scale, sums);
                    if (F::MIN) sums = fma(minimum[0], all(group.total), sums);
                } else {
                    const vi one = dot16<F::BITS>(all(-TAKE * group.sums[0]), low, row);
                    const vi two = dot16<F::BITS>(all(-TAKE * group.sums[1]), high, row + 16);
                    sums = fma(floats(one), scale[0] * group.scale, sums);
                    sums = fma(floats(two), scale[H - 1] * group.scale, sums);
                    if (F::MIN) {
                        sums = fma(minimum[0], all(group.halves[0]), sums);
                        sums = fma(minimum[H - 1], all(group.halves[1]), sums);
                    }
                }
            }
        }
    }
    for (int m = 0; m < M; ++m)
        for (int p = 0; p < PARTS; ++p) store(out + m * ROWS + p * LANES, acc[m][p]);
}

template <bool BF16>
inline vf load_weights(const void *row, int64_t at, int64_t count) {
    if (count >= LANES)
        return BF16 ? from_bf16((const uint16_t *)row + at) : load<vf>((const float *)row + at);
    if (!BF16) return load_some((const float *)row + at, count);
    uint16_t some[LANES] = {};
    memcpy(some, (const uint16_t *)row + at, 2 * count);
    return from_bf16(some);
}

template <bool BF16, int M>
void plain_rows(const vv_matrix &w, int64_t block, const float *x, float *out) {
    const int64_t cols = w.cols, first = block * ROWS;
    const int64_t rows = w.rows - first < ROWS ? w.rows - first : ROWS;
    for (int64_t r = 0; r < rows; ++r) {
        const char *row = (const char *)w.data + (first + r) * cols * (BF16 ? 2 : 4);
        vf acc[M][2] = {};
        int64_t i = 0;
        for (; i + 2 * LANES <= cols; i += 2 * LANES)
            for (int half = 0; half < 2; ++half) {
                const vf weights = load_weights<BF16>(row, i + half * LANES, LANES);
                for (int m = 0; m < M; ++m) {
                    const vf values = load<vf>(x + m * cols + i + half * LANES);
                    acc[m][half] = fma(weights, values, acc[m][half]);
                }
            }
        for (; i < cols; i += LANES) {
            const int64_t count = cols - i < LANES ? cols - i : LANES;
            const vf weights = load_weights<BF16>(row, i, count);
            for (int m = 0; m < M; ++m)
                acc[m][0] = fma(weights, load_some(x + m * cols + i, count), acc[m][0]);
        }
        for (int m = 0; m < M; ++m) out[m * ROWS + r] = sum(acc[m][0] + acc[m][1]);
    }
}

template <int M>
void rows_of(const vv_matrix &w, int64_t block, const Input &in, int64_t first, float *out) {
    const float *x = in.values + first * in.cols;
    if (w.format == VV_F32) return plain_rows<false, M>(w, block, x, out);
    if (w.format == VV_BF16) return plain_rows<true, M>(w, block, x, out);
    with_format(w.format, 0, [&](auto format) {
        using F = decltype(format);
        packed_rows<F, M>((const uint8_t *)w.data + block * F::block(w.cols), w.cols,
                          in.codes + first * in.cols, in.groups + first * in.cols / GROUP, out);
        return 0;
    });
}

void product(const vv_matrix &w, int64_t block, const Input &in, int64_t first, int64_t count,
             float *out) {
    constexpr int MOST = LANES == 16 ? 8 : 4;
    for (const int64_t end = first + count; first < end;) {
        const int64_t left = end - first;
        const int now = left >= MOST ? MOST : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (now == 8) rows_of<8>(w, block, in, first, out);
        if (now == 4) rows_of<4>(w, block, in, first, out);
        if (now == 2) rows_of<2>(w, block, in, first, out);
        if (now == 1) rows_of<1>(w, block, in, first, out);
        first += now;
        out += now * ROWS;
    }
}

}  // namespace
}  // namespace vv
