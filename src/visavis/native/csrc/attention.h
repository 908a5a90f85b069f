// Attention of a few consecutive tokens of one head over the cache.
//
// Scores, then their softmax, then the weighted sum of values, each token's in the order of keys:
// bitwise the same with and without the other tokens.
#pragma once

#include <math.h>

#include "formats.h"
#include "product.h"
#include "simd.h"

namespace vv {
namespace {

// scores[r][s] = queries[r] . keys[s] for s from `start` to `end`, and up to 3 past it of no use.
template <bool BF16, int R>
void score(const float *queries, const Attention &a, int64_t start, int64_t end, float *scores,
           int64_t stride) {
    const int64_t dim = a.head_dim, bytes = dim * (BF16 ? 2 : 4);
    for (int64_t s = start; s < end; s += 4) {
        const char *keys[4];  // past the end the last one again
        for (int64_t j = 0; j < 4; ++j)
            keys[j] = (const char *)a.keys + (s + j < end ? s + j : end - 1) * bytes;
        vf acc[R][4] = {};
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES)
            for (int j = 0; j < 4; ++j) {
                const vf values = load_weights<BF16>(keys[j], i, LANES);
                for (int r = 0; r < R; ++r)
                    acc[r][j] = fma(load<vf>(queries + r * dim + i), values, acc[r][j]);
            }
        if (i < dim)
            for (int j = 0; j < 4; ++j) {
                const vf values = load_weights<BF16>(keys[j], i, dim - i);
                for (int r = 0; r < R; ++r)
                    acc[r][j] = fma(load_some(queries + r * dim + i, dim - i), values, acc[r][j]);
            }
        for (int r = 0; r < R; ++r) sum4(acc[r], scores + r * stride + s);
    }
}

// out[r] += scores[r][s] * values[s] for s from `start` to `end`.
template <bool BF16, int R>
void mix(const float *scores, int64_t stride, const Attention &a, int64_t start, int64_t end,
         float *out, int64_t out_stride) {
    constexpr int WIDE = 4;
    const int64_t dim = a.head_dim, bytes = dim * (BF16 ? 2 : 4);
    int64_t i = 0;
    for (; i + WIDE * LANES <= dim; i += WIDE * LANES) {
        vf acc[R][WIDE];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < WIDE; ++c) acc[r][c] = load<vf>(out + r * out_stride + i + c * LANES);
        for (int64_t s = start; s < end; ++s) {
            const char *value = (const char *)a.values + s * bytes;
            for (int c = 0; c < WIDE; ++c) {
                const vf values = load_weights<BF16>(value, i + c * LANES, LANES);
                for (int r = 0; r < R; ++r)
                    acc[r][c] = fma(all(scores[r * stride + s]), values, acc[r][c]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < WIDE; ++c) store(out + r * out_stride + i + c * LANES, acc[r][c]);
    }
    for (; i < dim; i += LANES) {
        const int64_t count = dim - i < LANES ? dim - i : LANES;
        for (int r = 0; r < R; ++r) {
            vf acc = load_some(out + r * out_stride + i, count);
            for (int64_t s = start; s < end; ++s)
                acc = fma(all(scores[r * stride + s]),
                          load_weights<BF16>((const char *)a.values + s * bytes, i, count), acc);
            store_some(out + r * out_stride + i, acc, count);
        }
    }
}

// Replace scores by e^(score - largest); return 1 / their sum.
inline float softmax(float *scores, int64_t count) {
    vf most = all(-INFINITY);
    float largest = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) most = larger(most, load<vf>(scores + i));
    for (; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
    for (int j = 0; j < LANES; ++j) largest = most[j] > largest ? most[j] : largest;
    vf total{};
    for (i = 0; i + LANES <= count; i += LANES) {
        const vf value = exponential(load<vf>(scores + i) - largest);
        store(scores + i, value);
        total += value;
    }
    if (i < count) {
        store_some(scores + i, exponential(load_some(scores + i, count - i) - largest), count - i);
        total += load_some(scores + i, count - i);  // zeros past the end
    }
    return 1.0f / sum(total);
}

template <bool BF16, int R>
void attend_rows(const float *queries, int64_t stride, int64_t end, const Attention &a, float *out,
                 int64_t out_stride, float *scratch) {
    const int64_t dim = a.head_dim, last = end + R - 1, row = last + LANES;
    const float scale = 1.0f / sqrtf((float)dim);
    float *scores = scratch, *scaled = scratch + R * row;
    int64_t starts[R];
    for (int r = 0; r < R; ++r) {
        for (int64_t i = 0; i < dim; ++i) scaled[r * dim + i] = queries[r * stride + i] * scale;
        for (int64_t i = 0; i < dim; ++i) out[r * out_stride + i] = 0;
        starts[r] = a.window && end + r > a.window ? end + r - a.window : 0;
    }
    score<BF16, R>(scaled, a, starts[0], last, scores, row);
    float inverse[R];
    for (int r = 0; r < R; ++r)
        inverse[r] = softmax(scores + r * row + starts[r], end + r - starts[r]);
    const int64_t common = starts[R - 1] < end ? starts[R - 1] : end;
    for (int r = 0; r < R; ++r)
        if (starts[r] < common)
            mix<BF16, 1>(scores + r * row, row, a, starts[r], common, out + r * out_stride, out_stride);
    mix<BF16, R>(scores, row, a, common, end, out, out_stride);
    for (int r = 0; r < R; ++r) {
        const int64_t from = starts[r] > end ? starts[r] : end;
        if (from < end + r)
            mix<BF16, 1>(scores + r * row, row, a, from, end + r, out + r * out_stride, out_stride);
        for (int64_t i = 0; i < dim; ++i) out[r * out_stride + i] *= inverse[r];
    }
}

void attend(const float *queries, int64_t stride, int64_t rows, int64_t end, const Attention &a,
            float *out, int64_t out_stride, float *scratch) {
    while (rows) {
        if (rows >= 4) {
            (a.bf16 ? attend_rows<true, 4> : attend_rows<false, 4>)(
                queries, stride, end, a, out, out_stride, scratch);
        } else {
            (a.bf16 ? attend_rows<true, 1> : attend_rows<false, 1>)(
                queries, stride, end, a, out, out_stride, scratch);
        }
        const int64_t done = rows >= 4 ? 4 : 1;
        rows -= done;
        end += done;
        queries += done * stride;
        out += done * out_stride;
    }
}

}  // namespace
}  // namespace vv
