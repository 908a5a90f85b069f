// Compares the kernels of every level that this processor runs with the portable ones: products of
// all formats, and whole passes. Prints one line a level; for processors that no Python runs on here.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <random>
#include <vector>

#include "../../src/visavis/native/csrc/api.h"

namespace {

std::mt19937 generator(1);

float number() { return std::normal_distribution<float>(0, 1)(generator); }

// Random GGUF blocks whose halves are scales of about 0.01.
std::vector<uint8_t> blocks(int32_t format, int64_t rows, int64_t cols) {
    static const int sizes[] = {18, 20, 22, 24, 34, 84, 110, 144, 176, 210, 36};
    static const int halves[][2] = {{0, 0},   {0, 2},     {0, 0}, {0, 2}, {0, 0},    {80, 82},
                                    {108, 108}, {0, 2}, {0, 2}, {208, 208}, {0, 2}};
    const int kind = format - VV_Q4_0, size = sizes[kind];
    std::vector<uint8_t> found((size_t)(rows * vv_stored_bytes(format, cols)));
    for (uint8_t &byte : found) byte = (uint8_t)generator();
    for (size_t at = 0; at < found.size(); at += (size_t)size)
        for (int half : halves[kind]) {
            found[at + (size_t)half] = (uint8_t)generator();
            found[at + (size_t)half + 1] = (uint8_t)(0x20 | (generator() & 0x83));
        }
    return found;
}

struct Kept {
    std::vector<std::vector<float>> floats;
    std::vector<void *> packed;
    std::vector<std::vector<vv_matrix>> parts;
};

vv_matrix matrix(Kept &kept, int32_t format, int64_t rows, int64_t cols) {
    if (format == VV_F32) {
        kept.floats.emplace_back((size_t)(rows * cols));
        for (float &one : kept.floats.back()) one = number() * 0.1f;
        return {kept.floats.back().data(), rows, cols, format, 0};
    }
    const std::vector<uint8_t> stored = blocks(format, rows, cols);
    const size_t size = (size_t)vv_packed_bytes(format, rows, cols);
    uint8_t *data = (uint8_t *)aligned_alloc(64, (size + 63) / 64 * 64);
    for (size_t i = 0; i < size; ++i) data[i] = 0;
    if (vv_pack(format, cols, stored.data(), vv_stored_bytes(format, cols), 0, rows, data)) exit(3);
    kept.packed.push_back(data);
    return {data, rows, cols, format, 0};
}

vv_linear linear(Kept &kept, int32_t format, int64_t rows, int64_t cols) {
    kept.parts.push_back({matrix(kept, format, rows, cols)});
    return {kept.parts.back().data(), 1, nullptr, nullptr, nullptr};
}

vv_norm norm(Kept &kept, int64_t width) {
    kept.floats.emplace_back((size_t)width, 1.0f);
    return {kept.floats.back().data(), nullptr};
}

std::vector<float> pass(const vv_model &model, int64_t count) {
    std::mt19937 own(7);
    std::normal_distribution<float> normal(0, 1);
    std::vector<float> x((size_t)(count * 256)), cos((size_t)(count * 64)), sin(cos), scores;
    for (float &one : x) one = normal(own);
    for (float &one : cos) one = normal(own);
    for (float &one : sin) one = normal(own);
    std::vector<std::vector<uint16_t>> stores(4, std::vector<uint16_t>((size_t)(2 * count * 64)));
    void *keys[] = {stores[0].data(), stores[1].data()};
    void *values[] = {stores[2].data(), stores[3].data()};
    const vv_sequence sequence = {count, 0, count, keys, values};
    std::vector<int64_t> all;
    for (int64_t i = 0; i < count; ++i) all.push_back(i);
    scores.resize((size_t)(count * 40));
    if (vv_forward(&model, &sequence, 1, x.data(), cos.data(), sin.data(), nullptr, nullptr,
                   all.data(), count, scores.data(), 2))
        exit(4);
    return scores;
}

double away(const std::vector<float> &one, const std::vector<float> &other) {
    double most = 0, size = 0;
    for (size_t i = 0; i < one.size(); ++i) {
        if (!(fabs((double)one[i] - other[i]) <= 1e30)) return INFINITY;
        most = fmax(most, fabs((double)one[i] - other[i]));
        size = fmax(size, fabs((double)other[i]));
    }
    return most / size;
}

}  // namespace

int main() {
    int failed = 0, levels = 0;
    for (const char *name : {"avx512", "avx2", "neon"}) {
        if (vv_set_level(name)) continue;
        ++levels;
        double worst = 0, passes = 0;
        for (int32_t format = VV_F32; format <= VV_A8; ++format) {
            if (format == VV_BF16) continue;
            Kept kept;
            const vv_linear one = linear(kept, format, 45, 512);
            std::vector<float> x(9 * 512), y(9 * 45), expected(9 * 45);
            for (float &value : x) value = number();
            vv_set_level("portable");
            if (vv_product(&one, x.data(), 9, expected.data(), 1)) return 5;
            vv_set_level(name);
            if (vv_product(&one, x.data(), 9, y.data(), 2)) return 5;
            worst = fmax(worst, away(y, expected));
            std::vector<vv_layer> layers;
            for (int i = 0; i < 2; ++i)
                layers.push_back({norm(kept, 256), norm(kept, 256), norm(kept, 64), {}, linear(kept, format, 512, 256),
                                  linear(kept, format, 256, 256), linear(kept, format, 1024, 256),
                                  linear(kept, format, 256, 512), 4, 2, 512, 0});
            const vv_model model = {layers.data(), norm(kept, 256), linear(kept, format, 40, 256), 2,
                                    256, 64, 64, 0, 0, 1, VV_SILU, VV_BF16, 1e-5f};
            vv_set_level("portable");
            const std::vector<float> scores = pass(model, 21);
            vv_set_level(name);
            passes = fmax(passes, away(pass(model, 21), scores));
            for (void *data : kept.packed) free(data);
        }
        const bool good = worst < 1e-5 && passes < 0.05;  // integers may round to the other side
        printf("%s: products %.1e, passes %.1e %s\n", name, worst, passes, good ? "ok" : "FAILED");
        failed += !good;
    }
    printf("%d levels beside the portable one\n", levels);
    return failed;
}
