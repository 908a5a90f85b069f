// The C interface of the native part: plain structs, pointers and sizes.
//
// Every function may be called from many threads at a time. Functions that return int return 0, or
// one of the error codes below. `library.py` mirrors these declarations.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define VV_API extern "C" __declspec(dllexport)
#else
#define VV_API extern "C" __attribute__((visibility("default")))
#endif

// Changes with every change of this file: a library that was compiled from another one is not used.
#define VV_INTERFACE 3

VV_API int vv_interface(void);

enum vv_error {
    VV_OK = 0,
    VV_BAD_FORMAT = 1,     // a format that is not one of vv_format
    VV_BAD_SHAPE = 2,      // sizes that do not belong together
    VV_CACHE_FULL = 3,     // more tokens than a cache has room for
    VV_OUT_OF_MEMORY = 4,  // no memory for intermediate results
    VV_NOT_FINITE = 5,     // a scale is infinite or NaN; all was packed nevertheless
};

// How a matrix is stored. The first two are rows as they lie in memory; the others are blocks of 16
// interleaved rows (formats.h), made by vv_pack from the GGUF blocks of the same name.
enum vv_format {
    VV_F32 = 0,
    VV_BF16 = 1,
    VV_Q4_0 = 2,
    VV_Q4_1 = 3,
    VV_Q5_0 = 4,
    VV_Q5_1 = 5,
    VV_Q8_0 = 6,
    VV_Q2_K = 7,
    VV_Q3_K = 8,
    VV_Q4_K = 9,
    VV_Q5_K = 10,
    VV_Q6_K = 11,
    VV_A8 = 12,  // ours: of 32 columns d f16, m f16, and codes i8; value = d * code + m
};

struct vv_matrix {
    const void *data;
    int64_t rows, cols;
    int32_t format, unused;
};

// Rows of several matrices below one another; a bias [rows] or null; a low-rank pair that is added,
// low [rank, cols] and high [rows, rank], both VV_F32 or VV_BF16, or both null.
struct vv_linear {
    const vv_matrix *parts;
    int64_t num_parts;
    const float *bias;
    const vv_matrix *low, *high;
};

struct vv_norm {
    const float *weight, *bias;  // a bias only with layer norm; weight null: there is no norm
};

enum vv_activation { VV_SILU = 0, VV_GELU = 1, VV_GELU_TANH = 2, VV_QUICK_GELU = 3, VV_RELU = 4 };

struct vv_layer {
    vv_norm attn_norm, ffn_norm, q_norm, k_norm;  // ffn_norm null: attention and feed-forward
                                                  // read the same norm and are added together
    vv_linear qkv, out, up, down;                 // up: rows of the gate, if gated, then of up
    int32_t heads, kv_heads, ffn_width, unused;
};

struct vv_model {
    const vv_layer *layers;
    vv_norm norm;
    vv_linear head;
    int64_t num_layers, width, head_dim, rotary_dim;
    int64_t window;      // tokens back that a token sees, itself included; 0: all
    int32_t layer_norm;  // 0: RMS norm
    int32_t gated, activation;
    int32_t cache_format;  // VV_F32 or VV_BF16
    float eps;
};

// Consecutive tokens of one sequence, and its cache: for each layer keys and values, each
// [kv_heads, capacity, head_dim].
struct vv_sequence {
    int64_t count, past, capacity;
    void *const *keys;
    void *const *values;
};

// Choose the kernels: "avx512", "avx2", "neon" or "portable"; null or "": the fastest here.
// Returns 0 if this machine runs them, else 1 and changes nothing.
VV_API int vv_set_level(const char *name);
VV_API const char *vv_level(void);

// Bytes that vv_pack writes for a matrix; 0: the format or the number of columns is not packed.
VV_API int64_t vv_packed_bytes(int32_t format, int64_t rows, int64_t cols);
// Bytes of one row of GGUF blocks; 0 as above.
VV_API int64_t vv_stored_bytes(int32_t format, int64_t cols);
// Pack GGUF rows `stored`, `stride` bytes apart, as the rows from `first` on.
// `packed` is what the whole matrix takes.
VV_API int vv_pack(int32_t format, int64_t cols, const uint8_t *stored, int64_t stride,
                   int64_t first, int64_t count, uint8_t *packed);
// Write rows by their numbers: values float32 [count, cols]; or their codes, unsigned but for 8 bits,
// uint8 [count, cols], with scales and minimums of 16 columns each, float32 [count, cols / 16]:
// value = scale * code + minimum. Null: not wanted.
VV_API int vv_unpack(const vv_matrix *matrix, const int64_t *numbers, int64_t count, float *values,
                     uint8_t *codes, float *scales, float *minimums);

// y = x W^T + bias, float32 [count, cols] -> [count, rows of all parts].
VV_API int vv_product(const vv_linear *linear, const float *x, int64_t count, float *y,
                      int32_t threads);

// Inner products of a query int16 [dim] and rows of codes int8 [*, dim]: those whose numbers are in
// `rows`, or the first ones if it is null, int32 [count]. The caller sees to it that no sum overflows:
// 127 times the sum of the query's absolute values is less than 2^31.
VV_API int vv_scan(const int8_t *codes, const int64_t *rows, int64_t count, int64_t dim,
                   const int16_t *query, int32_t *sums);

// Extend sequences by their tokens.
//   x: float32 [T, width], the embeddings of all sequences' tokens; becomes the hidden states
//      after the last norm.
//   cosines, sines: float32 [T, rotary_dim]; the first half of the sines is negated.
//   states: null, or for each layer, number 0 being the embeddings, float32 [T, width] that takes
//      what comes out of it, or null.
//   added: null, or for each layer float32 [T, width] that is added to what comes out of it, or
//      null.
//   scored: numbers of the tokens whose scores are wanted [num_scored].
//   scores: float32 [num_scored, rows of the head].
VV_API int vv_forward(const vv_model *model, const vv_sequence *sequences, int64_t num_sequences,
                      float *x, const float *cosines, const float *sines, float *const *states,
                      const float *const *added, const int64_t *scored, int64_t num_scored, float *scores, int32_t threads);
