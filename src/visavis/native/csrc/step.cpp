// Whole decoders: tokens of several sequences through all layers, in one call.
//
// All threads walk through the layers together; between two phases they wait for one another. Each
// phase is cut into pieces that are claimed one after another, and a piece gives the same whoever
// computes it and whatever other tokens there are.
#include <stdlib.h>
#include <string.h>

#include <new>
#include <vector>

#include "dispatch.h"
#include "team.h"

namespace vv {
namespace {

constexpr int64_t CHUNK = 128;  // tokens that pass through the layers at a time
constexpr int64_t FEW = 2;      // rows that one thread makes ready alone
constexpr int64_t SOME = 8;     // rows that a thread makes ready at a time, of more

bool packed(const vv_linear &linear) {
    for (int64_t i = 0; i < linear.num_parts; ++i)
        if (linear.parts[i].format > VV_BF16) return true;
    return false;
}

int64_t blocks_of(const vv_matrix &matrix) { return (matrix.rows + ROWS - 1) / ROWS; }

int64_t rows_of(const vv_linear &linear) {
    int64_t rows = 0;
    for (int64_t i = 0; i < linear.num_parts; ++i) rows += linear.parts[i].rows;
    return rows;
}

int check(const vv_linear &linear, int64_t rows, int64_t cols) {
    if (linear.num_parts < 1 || (rows && rows_of(linear) != rows)) return VV_BAD_SHAPE;
    for (int64_t i = 0; i < linear.num_parts; ++i) {
        const vv_matrix &part = linear.parts[i];
        if (part.format < VV_F32 || part.format > VV_A8) return VV_BAD_FORMAT;
        if (part.rows < 1 || part.cols != cols) return VV_BAD_SHAPE;
        if (part.format > VV_BF16 && !vv_packed_bytes(part.format, part.rows, cols))
            return VV_BAD_SHAPE;
    }
    if (!linear.low != !linear.high) return VV_BAD_SHAPE;
    if (!linear.low) return VV_OK;
    const vv_matrix &low = *linear.low, &high = *linear.high;
    if (low.format < VV_F32 || low.format > VV_BF16) return VV_BAD_FORMAT;
    if (high.format < VV_F32 || high.format > VV_BF16) return VV_BAD_FORMAT;
    const bool fit = low.rows > 0 && low.cols == cols && high.cols == low.rows;
    return fit && high.rows == rows_of(linear) ? VV_OK : VV_BAD_SHAPE;
}

int64_t rank_of(const vv_linear &linear) { return linear.low ? linear.low->rows : 0; }

// Memory of a thread that calls, kept for its next call.
class Arena {
  public:
    ~Arena() { free(data_); }
    // Forget what was given, and have room for `bytes`; false: there is no memory.
    bool begin(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return true;
        free(data_);
        data_ = malloc(bytes);
        size_ = data_ ? bytes : 0;
        return data_ != nullptr;
    }
    template <class T>
    T *take(int64_t count) {
        const size_t start = ((size_t)data_ + used_ + 63) / 64 * 64 - (size_t)data_;
        used_ = start + sizeof(T) * (size_t)count;
        return (T *)((char *)data_ + start);
    }

  private:
    void *data_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

thread_local Arena arena;

// Room for rows as numbers and as integers.
struct Rows {
    float *values;
    int8_t *codes;
    Group *groups;
    int64_t cols;

    static size_t bytes(int64_t count, int64_t cols) {
        return (size_t)count * ((size_t)cols * 5 + sizeof(Group) * (size_t)(cols / GROUP)) + 256;
    }
    static Rows of(Arena &from, int64_t count, int64_t cols) {
        return {from.take<float>(count * cols), from.take<int8_t>(count * cols),
                from.take<Group>(count * (cols / GROUP)), cols};
    }
    float *row(int64_t r) const { return values + r * cols; }
    void quantize(const Kernels &k, int64_t r) const {
        k.quantize(row(r), cols, codes + r * cols, groups + r * (cols / GROUP));
    }
    Input input() const { return {values, codes, groups, cols}; }
};

// Let the threads do the pieces of a phase, then `next(first, end)` for all rows: in one thread if
// they are few, which saves a phase, else some rows at a time.
template <class Piece, class Next>
void rows_after(Member &member, int64_t pieces, Piece piece, int64_t rows, Next next) {
    if (rows <= FEW) {
        member.phase(pieces, piece, [&] { next((int64_t)0, rows); });
        return;
    }
    member.phase(pieces, piece);
    member.phase((rows + SOME - 1) / SOME, [&](int64_t unit) {
        const int64_t first = unit * SOME;
        next(first, first + SOME < rows ? first + SOME : rows);
    });
}

// What a linear multiplies: rows as numbers and integers, and what its low-rank pair makes of them.
struct Operand {
    Rows rows;
    float *middle;  // [rows, rank]
};

// Make rows first..end of an operand ready for a linear; their values are there.
void make_ready(const Kernels &k, const vv_linear &linear, const Operand &x, int64_t first,
                int64_t end) {
    if (packed(linear))
        for (int64_t r = first; r < end; ++r) x.rows.quantize(k, r);
    const int64_t rank = rank_of(linear);
    alignas(64) float out[SOME * ROWS];
    for (int64_t column = 0; column < rank; column += ROWS) {
        const int64_t columns = rank - column < ROWS ? rank - column : ROWS;
        k.product(*linear.low, column / ROWS, x.rows.input(), first, end - first, out);
        for (int64_t r = first; r < end; ++r)
            memcpy(x.middle + r * rank + column, out + (r - first) * ROWS,
                   sizeof(float) * (size_t)columns);
    }
}

// The product of a linear with rows: y[r] = (or +=) it, y's rows being `stride` apart. It is made in
// pieces, of some blocks each.
struct Product {
    Product(const Kernels &k, const vv_linear &linear, const Operand &x, int64_t count, float *y,
            int64_t stride, bool add, int threads)
        : k(k), linear(linear), x(x), y(y), count(count), stride(stride), add(add) {
        for (int64_t i = 0; i < linear.num_parts; ++i) total += blocks_of(linear.parts[i]);
        grain = total / (8 * threads) + 1;
    }
    const Kernels &k;
    const vv_linear &linear;
    const Operand x;
    float *const y;
    const int64_t count, stride;
    const bool add;
    int64_t total = 0, grain = 1;

    int64_t pieces() const { return (total + grain - 1) / grain; }

    void piece(int64_t number) const {
        const int64_t start = number * grain, end = start + grain < total ? start + grain : total;
        int64_t part = 0, block = start, row = 0;
        for (int64_t n = start; n < end; ++n, ++block) {
            while (block >= blocks_of(linear.parts[part])) {
                block -= blocks_of(linear.parts[part]);
                row += linear.parts[part++].rows;
            }
            for (int64_t c = 0; c < count; c += CHUNK)
                one(linear.parts[part], block, row + block * ROWS, c,
                    count - c < CHUNK ? count - c : CHUNK);
        }
    }

  private:
    // Rows c..c + now and one block of a matrix, whose first row is row `at` of the linear.
    void one(const vv_matrix &matrix, int64_t block, int64_t at, int64_t c, int64_t now) const {
        alignas(64) float out[CHUNK * ROWS], more[CHUNK * ROWS];
        const int64_t rest = matrix.rows - block * ROWS, rows = rest < ROWS ? rest : ROWS;
        const int64_t rank = rank_of(linear);
        k.product(matrix, block, x.rows.input(), c, now, out);
        if (rank) {
            vv_matrix high = *linear.high;
            high.data = (const char *)high.data + at * rank * (high.format == VV_BF16 ? 2 : 4);
            high.rows = rows;
            k.product(high, 0, {x.middle, nullptr, nullptr, rank}, c, now, more);
        }
        if (rank)
            for (int64_t i = 0; i < now * ROWS; ++i) out[i] += more[i];
        for (int64_t r = 0; r < now; ++r) {
            float *to = y + (c + r) * stride + at, *from = out + r * ROWS;
            if (linear.bias)
                for (int64_t i = 0; i < rows; ++i) from[i] += linear.bias[at + i];
            if (add)
                for (int64_t i = 0; i < rows; ++i) to[i] += from[i];
            else
                memcpy(to, from, sizeof(float) * (size_t)rows);
        }
    }
};

struct Step {
    Step(const vv_model &model, const Kernels &k, const vv_sequence *sequences, float *x,
         const float *cosines, const float *sines, float *const *states,
         const float *const *added)
        : model(model), k(k), sequences(sequences), x(x), cosines(cosines), sines(sines),
          states(states), added(added) {}

    const vv_model &model;
    const Kernels &k;
    const vv_sequence *sequences;
    float *x;
    const float *cosines, *sines;
    float *const *states;
    const float *const *added;
    int64_t max_qkv = 0, max_up = 0, max_mixed = 0, max_ffn = 0, max_rank = 0, longest = 1;
    // Of each token: its sequence, and its place in the cache.
    std::vector<int64_t> owner, place;
    // Of the tokens of a chunk. `other` is `normed` for the feed-forward of a parallel block.
    Operand normed{}, other{}, mixed{}, hidden{};
    float *qkv = nullptr, *up = nullptr;
    std::vector<float *> scratch;  // of each thread

    int64_t scratch_size() const {
        return MOST_QUERIES * (longest + MOST_QUERIES + 16 + model.head_dim) + 64;
    }
    size_t bytes(int64_t rows, int threads) const {
        return Rows::bytes(rows, model.width) + Rows::bytes(rows, max_mixed) +
               Rows::bytes(rows, max_ffn) +
               4 * (size_t)(rows * (max_qkv + max_up + 4 * max_rank)) + 1024 +
               (size_t)threads * (4 * (size_t)scratch_size() + 64);
    }
    void place_buffers(Arena &from, int64_t rows, int threads) {
        for (Operand *one : {&normed, &mixed, &hidden}) {
            const int64_t cols = one == &normed ? model.width : one == &mixed ? max_mixed : max_ffn;
            *one = {Rows::of(from, rows, cols), from.take<float>(rows * max_rank)};
        }
        other = {normed.rows, from.take<float>(rows * max_rank)};
        qkv = from.take<float>(rows * max_qkv);
        up = from.take<float>(rows * max_up);
        for (int i = 0; i < threads; ++i) scratch.push_back(from.take<float>(scratch_size()));
    }

    void norm(const vv_norm &with, int64_t token, float *to) const {
        k.norm(x + token * model.width, with, model.width, model.layer_norm != 0, model.eps, to);
    }

    // Norm and turn one head's query or key.
    void turn(float *head, const vv_norm &with, int64_t token) const {
        if (with.weight) k.norm(head, with, model.head_dim, false, model.eps, head);
        k.rotate(head, cosines + token * model.rotary_dim, sines + token * model.rotary_dim,
                 model.rotary_dim);
    }

    // Chunk rows begin..end enter layer `index`, or leave the last one.
    void enter(int64_t index, int64_t first, int64_t begin, int64_t end) const {
        const size_t bytes = sizeof(float) * (size_t)model.width;
        for (int64_t r = begin; r < end; ++r) {
            float *row = x + (first + r) * model.width;
            if (states && states[index])
                memcpy(states[index] + (first + r) * model.width, row, bytes);
            if (index && added && added[index - 1]) {
                const float *more = added[index - 1] + (first + r) * model.width;
                for (int64_t i = 0; i < model.width; ++i) row[i] += more[i];
            }
            const bool last = index == model.num_layers;
            norm(last ? model.norm : model.layers[index].attn_norm, first + r,
                 last ? row : normed.rows.row(r));
        }
        if (index == model.num_layers) return;
        const vv_layer &layer = model.layers[index];
        make_ready(k, layer.qkv, normed, begin, end);
        if (!layer.ffn_norm.weight) make_ready(k, layer.up, other, begin, end);
    }

    // Turn keys and put them into the cache, with their values.
    void remember(int64_t index, int64_t first, int64_t begin, int64_t end) const {
        const vv_layer &layer = model.layers[index];
        const int64_t dim = model.head_dim, kv_heads = layer.kv_heads;
        const bool bf16 = model.cache_format == VV_BF16;
        for (int64_t r = begin; r < end; ++r)
            for (int64_t head = 0; head < kv_heads; ++head) {
                const size_t token = (size_t)(first + r);
                const vv_sequence &sequence = sequences[owner[token]];
                const int64_t at =
                    (head * sequence.capacity + place[token]) * dim * (bf16 ? 2 : 4);
                float *key = qkv + ((layer.heads + 2 * kv_heads) * r + layer.heads + head) * dim;
                turn(key, layer.k_norm, first + r);
                k.store(key, dim, bf16, (char *)sequence.keys[index] + at);
                k.store(key + kv_heads * dim, dim, bf16, (char *)sequence.values[index] + at);
            }
    }

    // Let MOST_QUERIES rows of one head attend.
    void attend(int number, int64_t index, int64_t unit, int64_t first, int64_t count) const {
        const vv_layer &layer = model.layers[index];
        const int64_t dim = model.head_dim, heads = layer.heads, kv_heads = layer.kv_heads;
        const int64_t stride = (heads + 2 * kv_heads) * dim, width = heads * dim;
        const bool bf16 = model.cache_format == VV_BF16;
        const int64_t head = unit % heads, begin = unit / heads * MOST_QUERIES;
        const int64_t end = begin + MOST_QUERIES < count ? begin + MOST_QUERIES : count;
        for (int64_t r = begin; r < end;) {
            const size_t token = (size_t)(first + r);
            int64_t same = 0;  // tokens from here on of the same sequence
            while (r + same < end && owner[token + (size_t)same] == owner[token]) {
                turn(qkv + (r + same) * stride + head * dim, layer.q_norm, first + r + same);
                ++same;
            }
            const vv_sequence &sequence = sequences[owner[token]];
            const int64_t at = head / (heads / kv_heads) * sequence.capacity * dim * (bf16 ? 2 : 4);
            const Attention attention = {(const char *)sequence.keys[index] + at,
                                         (const char *)sequence.values[index] + at, dim, bf16,
                                         model.window};
            k.attend(qkv + r * stride + head * dim, stride, same, place[token] + 1, attention,
                     mixed.rows.values + r * width + head * dim, width, scratch[(size_t)number]);
            r += same;
        }
    }

    void activate(const vv_layer &layer, const Operand &to, int64_t begin, int64_t end) const {
        const int64_t ffn = layer.ffn_width, rows = ffn * (1 + (model.gated != 0));
        for (int64_t r = begin; r < end; ++r) {
            const float *gate = up + r * rows;
            memcpy(to.rows.row(r), gate, sizeof(float) * (size_t)ffn);
            k.activate(to.rows.row(r), model.gated ? gate + ffn : nullptr, ffn, model.activation);
        }
        make_ready(k, layer.down, to, begin, end);
    }

    // Tokens first..first + count, which have entered it, go through layer `index`.
    void layer(Member &member, int64_t index, int64_t first, int64_t count) const {
        const vv_layer &layer = model.layers[index];
        const int64_t dim = model.head_dim, width = model.width, size = member.size;
        const bool parallel = !layer.ffn_norm.weight;
        float *from = x + first * width;
        const auto multiply = [&](const vv_linear &linear, const Operand &with, float *y,
                                  int64_t stride, bool add, auto next) {
            const Product product(k, linear, with, count, y, stride, add, (int)size);
            rows_after(
                member, product.pieces(), [&](int64_t i) { product.piece(i); }, count, next);
        };
        Operand mix = mixed, wide = hidden;
        mix.rows.cols = layer.heads * dim;
        wide.rows.cols = layer.ffn_width;

        multiply(layer.qkv, normed, qkv, (layer.heads + 2 * layer.kv_heads) * dim, false,
                 [&](int64_t begin, int64_t end) { remember(index, first, begin, end); });
        rows_after(
            member, (count + MOST_QUERIES - 1) / MOST_QUERIES * layer.heads,
            [&](int64_t unit) { attend(member.number, index, unit, first, count); }, count,
            [&](int64_t begin, int64_t end) { make_ready(k, layer.out, mix, begin, end); });
        multiply(layer.out, mix, from, width, true, [&](int64_t begin, int64_t end) {
            if (parallel) return;
            for (int64_t r = begin; r < end; ++r)
                norm(layer.ffn_norm, first + r, normed.rows.row(r));
            make_ready(k, layer.up, normed, begin, end);
        });
        multiply(layer.up, parallel ? other : normed, up,
                 layer.ffn_width * (1 + (model.gated != 0)), false,
                 [&](int64_t begin, int64_t end) { activate(layer, wide, begin, end); });
        multiply(layer.down, wide, from, width, true, [&](int64_t begin, int64_t end) {
            enter(index + 1, first, begin, end);
        });
    }

    void chunk(Member &member, int64_t first, int64_t count) const {
        rows_after(
            member, 0, [](int64_t) {}, count,
            [&](int64_t begin, int64_t end) { enter(0, first, begin, end); });
        for (int64_t i = 0; i < model.num_layers; ++i) layer(member, i, first, count);
    }

    void score(Member &member, const int64_t *scored, int64_t count, float *scores) const {
        const int64_t rows = rows_of(model.head), width = model.width;
        for (int64_t first = 0; first < count; first += CHUNK) {
            const int64_t now = count - first < CHUNK ? count - first : CHUNK;
            rows_after(
                member, 0, [](int64_t) {}, now, [&](int64_t begin, int64_t end) {
                    for (int64_t r = begin; r < end; ++r)
                        memcpy(normed.rows.row(r), x + scored[first + r] * width,
                               sizeof(float) * (size_t)width);
                    make_ready(k, model.head, normed, begin, end);
                });
            const Product product(k, model.head, normed, now, scores + first * rows, rows, false,
                                  member.size);
            member.phase(product.pieces(), [&](int64_t i) { product.piece(i); });
        }
    }
};

int check(const vv_model &model) {
    const int64_t dim = model.head_dim, width = model.width;
    if (model.num_layers < 0 || width < 1 || dim < 1 || model.window < 0) return VV_BAD_SHAPE;
    if (model.rotary_dim < 0 || model.rotary_dim > dim || model.rotary_dim % 2) return VV_BAD_SHAPE;
    if (model.cache_format != VV_F32 && model.cache_format != VV_BF16) return VV_BAD_FORMAT;
    int error = check(model.head, 0, width);
    for (int64_t i = 0; i < model.num_layers && !error; ++i) {
        const vv_layer &layer = model.layers[i];
        const int64_t heads = layer.heads, kv = layer.kv_heads, ffn = layer.ffn_width;
        if (heads < 1 || kv < 1 || heads % kv || ffn < 1) return VV_BAD_SHAPE;
        error = check(layer.qkv, (heads + 2 * kv) * dim, width);
        if (!error) error = check(layer.out, width, heads * dim);
        if (!error) error = check(layer.up, ffn * (1 + (model.gated != 0)), width);
        if (!error) error = check(layer.down, width, ffn);
    }
    return error;
}

}  // namespace
}  // namespace vv

using namespace vv;

VV_API int vv_product(const vv_linear *linear, const float *x, int64_t count, float *y,
                      int32_t threads) {
    if (linear->num_parts < 1 || count < 0) return VV_BAD_SHAPE;
    const int64_t cols = linear->parts[0].cols, rows = rows_of(*linear);
    if (const int error = check(*linear, 0, cols)) return error;
    if (!count) return VV_OK;
    const int size = threads < 1 ? 1 : threads > 256 ? 256 : threads;
    const int64_t rank = rank_of(*linear);
    if (!arena.begin(Rows::bytes(count, cols) + 4 * (size_t)(count * rank) + 256))
        return VV_OUT_OF_MEMORY;
    const Kernels &k = kernels();
    Operand with = {Rows::of(arena, packed(*linear) ? count : 0, cols),
                    arena.take<float>(count * rank)};
    with.rows.values = const_cast<float *>(x);  // only read
    together(size, [&](Member &member) {
        rows_after(
            member, 0, [](int64_t) {}, count, [&](int64_t begin, int64_t end) {
                make_ready(k, *linear, with, begin, end);
            });
        const Product product(k, *linear, with, count, y, rows, false, member.size);
        member.phase(product.pieces(), [&](int64_t i) { product.piece(i); });
    });
    return VV_OK;
}

VV_API int vv_forward(const vv_model *model, const vv_sequence *sequences, int64_t num_sequences,
                      float *x, const float *cosines, const float *sines, float *const *states,
                      const float *const *added, const int64_t *scored, int64_t num_scored, float *scores, int32_t threads) {
    if (const int error = check(*model)) return error;
    Step step(*model, kernels(), sequences, x, cosines, sines, states, added);
    try {
        for (int64_t s = 0; s < num_sequences; ++s) {
            const vv_sequence &one = sequences[s];
            if (one.count < 0 || one.past < 0) return VV_BAD_SHAPE;
            if (one.past > one.capacity - one.count) return VV_CACHE_FULL;
            if (one.past + one.count > step.longest) step.longest = one.past + one.count;
            for (int64_t i = 0; i < one.count; ++i) {
                step.owner.push_back(s);
                step.place.push_back(one.past + i);
            }
        }
        const int64_t tokens = (int64_t)step.owner.size();
        for (int64_t i = 0; i < num_scored; ++i)
            if (scored[i] < 0 || scored[i] >= tokens) return VV_BAD_SHAPE;
        if (!tokens) return VV_OK;
        for (int64_t i = 0; i < model->num_layers; ++i) {
            const vv_layer &layer = model->layers[i];
            const int64_t mixed = layer.heads * model->head_dim, ffn = layer.ffn_width;
            const int64_t qkv = mixed + 2 * layer.kv_heads * model->head_dim;
            const int64_t up = ffn * (1 + (model->gated != 0));
            if (mixed > step.max_mixed) step.max_mixed = mixed;
            if (qkv > step.max_qkv) step.max_qkv = qkv;
            if (ffn > step.max_ffn) step.max_ffn = ffn;
            if (up > step.max_up) step.max_up = up;
            for (const vv_linear *one : {&layer.qkv, &layer.out, &layer.up, &layer.down})
                if (rank_of(*one) > step.max_rank) step.max_rank = rank_of(*one);
        }
        if (rank_of(model->head) > step.max_rank) step.max_rank = rank_of(model->head);
        const int64_t most = tokens > num_scored ? tokens : num_scored;
        const int64_t rows = most < CHUNK ? most : CHUNK;
        const int size = threads < 1 ? 1 : threads > 256 ? 256 : threads;
        if (!arena.begin(step.bytes(rows, size))) return VV_OUT_OF_MEMORY;
        step.place_buffers(arena, rows, size);
        together(size, [&](Member &member) {
            for (int64_t first = 0; first < tokens; first += CHUNK)
                step.chunk(member, first, tokens - first < CHUNK ? tokens - first : CHUNK);
            step.score(member, scored, num_scored, scores);
        });
    } catch (const std::bad_alloc &) {
        return VV_OUT_OF_MEMORY;
    }
    return VV_OK;
}
