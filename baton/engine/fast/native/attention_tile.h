// The arithmetic of attention.h: a stretch of keys and values is laid out for vectors, then rows (a
// query of one head each) meet it. Every sum runs in one order, whatever other rows there are: a
// score over the dimensions of a key, an output over the keys by position.
#pragma once

#include <utility>

#include "vec.h"

namespace baton {

constexpr int STRETCH = 64;  // positions; stretches begin at multiples of it
#ifdef __AVX512F__
constexpr int BLOCK_WIDTH = 4;  // vectors: with 6 rows their sums fit into the registers
#else
constexpr int BLOCK_WIDTH = 1;
#endif
constexpr int BLOCK_ROWS = 6, FEW_ROWS = 7;

// By name: gcc drops calls of functions that do nothing but __builtin_prefetch.
inline void prefetch(const void* address) {
#ifdef __x86_64__
    asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(address)));
#else
    __builtin_prefetch(address);
#endif
}

// Rows `slots[0 .. count)` of a pool, and those that come after them. Each load asks for its like
// among the coming rows, so that memory is busy while these are computed.
template <typename T>
struct CacheRows {
    const T* pool;
    const int64_t* slots;
    long stride, dim;
    int count;
    const T* next_pool;
    const int64_t* next_slots;
    long next_stride;
    int next_count;

    const T* at(long row) const { return pool + slots[row] * stride; }

    const T* after(long row) const {
        return next_pool + next_slots[row < next_count ? row : next_count - 1] * next_stride;
    }

    // As the factor of a product: LANES values of a row.
    Vec at(long row, long column) const {
        prefetch(after(row) + column);
        return load(at(row) + column);
    }
};

enum Shuffle { LOW, HIGH, LOW_PAIRS, HIGH_PAIRS, EVEN_QUARTERS, ODD_QUARTERS };

// Lane `lane` of the result: a lane of the first operand, or LANES + one of the second.
constexpr int source(Shuffle kind, int lane) {
    int within = lane % 4, quarter = lane - within;
    switch (kind) {
        case LOW: return quarter + within / 2 + within % 2 * LANES;
        case HIGH: return quarter + 2 + within / 2 + within % 2 * LANES;
        case LOW_PAIRS: return quarter + within % 2 + within / 2 * LANES;
        case HIGH_PAIRS: return quarter + 2 + within % 2 + within / 2 * LANES;
        case EVEN_QUARTERS: return lane % 8 / 4 * 8 + within + lane / 8 * LANES;
        default: return lane % 8 / 4 * 8 + 4 + within + lane / 8 * LANES;
    }
}

template <Shuffle kind, int... lane>
inline Vec shuffled(Vec a, Vec b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, source(kind, lane)...);
}

template <Shuffle kind>
inline Vec shuffle(Vec a, Vec b) {
    return shuffled<kind>(a, b, std::make_integer_sequence<int, LANES>{});
}

// Lane j of row i becomes lane i of row j.
inline void transpose(Vec (&rows)[LANES]) {
    for (int i = 0; i < LANES; i += 4) {
        Vec a = shuffle<LOW>(rows[i], rows[i + 1]), b = shuffle<HIGH>(rows[i], rows[i + 1]);
        Vec c = shuffle<LOW>(rows[i + 2], rows[i + 3]), d = shuffle<HIGH>(rows[i + 2], rows[i + 3]);
        rows[i] = shuffle<LOW_PAIRS>(a, c);
        rows[i + 1] = shuffle<HIGH_PAIRS>(a, c);
        rows[i + 2] = shuffle<LOW_PAIRS>(b, d);
        rows[i + 3] = shuffle<HIGH_PAIRS>(b, d);
    }
    for (int i = 0; i < 4; i++) {
        Vec a = shuffle<EVEN_QUARTERS>(rows[i], rows[i + 4]);
        Vec b = shuffle<ODD_QUARTERS>(rows[i], rows[i + 4]);
        Vec c = shuffle<EVEN_QUARTERS>(rows[i + 8], rows[i + 12]);
        Vec d = shuffle<ODD_QUARTERS>(rows[i + 8], rows[i + 12]);
        rows[i] = shuffle<EVEN_QUARTERS>(a, c);
        rows[i + 4] = shuffle<EVEN_QUARTERS>(b, d);
        rows[i + 8] = shuffle<ODD_QUARTERS>(a, c);
        rows[i + 12] = shuffle<ODD_QUARTERS>(b, d);
    }
}

// A square of LANES keys by as many 32-bit words; a word is one dimension of a key, or two.
template <typename T>
struct Square {
    static constexpr int DIMS = LANES * int(sizeof(float) / sizeof(T));
    Vec words[LANES];

    // Dimensions from `d` on of the keys `rows`; what is beyond `dim` reads as 0.
    Square(const T* const* rows, long d, long dim) {
        for (int i = 0; i < LANES; i++)
            if (d + DIMS <= dim) {
                std::memcpy(&words[i], rows[i] + d, sizeof(Vec));
            } else {
                words[i] = Vec{};
                std::memcpy(&words[i], rows[i] + d, (dim - d) * sizeof(T));
            }
        transpose(words);
    }

    // Dimension d + i, a key in each lane.
    Vec dimension(int i) const {
        if constexpr (DIMS == LANES) return words[i];
        else return (Vec)(i % 2 ? (VecU)words[i / 2] & 0xffff0000 : (VecU)words[i / 2] << 16);
    }
};

// LANES keys side by side, those of the rows from `row` on; beyond both ends some neighbour's.
template <typename T>
class KeyGroup {
   public:
    KeyGroup(const CacheRows<T>& keys, int row) : dim(keys.dim) {
        for (int i = 0; i < LANES; i++, row++) {
            int inside = row < 0 ? 0 : row < keys.count ? row : keys.count - 1;
            now[i] = keys.at(inside);
            next[i] = keys.after(inside);
        }
    }

    // visit(d, vector of dimension d) for all d, ascending.
    template <typename Visit>
    void each_dimension(Visit&& visit) const {
        constexpr int DIMS = Square<T>::DIMS;
        for (long d = 0; d < dim; d += DIMS) {
            for (int i = 0; i < LANES; i++) prefetch(next[i] + d);
            Square<T> square(now, d, dim);
            if (d + DIMS <= dim) {
#pragma GCC unroll 32
                for (int i = 0; i < DIMS; i++) visit(d + i, square.dimension(i));
            } else {
                for (int i = 0; d + i < dim; i++) visit(d + i, square.dimension(i));
            }
        }
    }

   private:
    const T *now[LANES], *next[LANES];
    long dim;
};

// to[d][STRETCH] from column `first` on; the columns on both sides, up to multiples of LANES, get
// some key too: nobody looks at their scores.
template <typename T>
void stage_keys(const CacheRows<T>& keys, int first, float* to) {
    for (int column = first / LANES * LANES; column < first + keys.count; column += LANES)
        KeyGroup<T>(keys, column - first).each_dimension([&](long d, Vec dimension) {
            store(to + d * STRETCH + column, dimension);
        });
}

// The scores of few rows, without staging: scores[row][STRETCH] at the same columns.
template <int ROWS, typename T>
void score_keys(const CacheRows<T>& keys, int first, const float* queries, float* scores) {
    for (int column = first / LANES * LANES; column < first + keys.count; column += LANES) {
        Vec sums[ROWS] = {};
        KeyGroup<T>(keys, column - first).each_dimension([&](long d, Vec dimension) {
            for (int r = 0; r < ROWS; r++) sums[r] += queries[r * keys.dim + d] * dimension;
        });
        for (int r = 0; r < ROWS; r++) store(scores + r * STRETCH + column, sums[r]);
    }
}

// Values below each other, to[row][width], width being their dim rounded up to LANES.
template <typename T>
void stage_values(const CacheRows<T>& values, long width, float* to) {
    for (int i = 0; i < values.count; i++)
        for (long d = 0; d < values.dim; d += LANES) {
            prefetch(values.after(i) + d);
            long left = values.dim - d;
            store(to + i * width + d, left < LANES ? load_some(values.at(i) + d, int(left))
                                                   : load(values.at(i) + d));
        }
}

struct Staged {
    const float* rows;
    long stride;

    Vec at(long row, long column) const { return load(rows + row * stride + column); }
};

// c[r][...] = start + sum over k < count of a[r][k] * b[k][...], k ascending, for some rows and
// vectors; the start is what c holds, or 0 when it is `fresh`. b: Staged, or Rows of the pool; its
// k = 0 is in row `first`.
template <typename Factor>
struct Product {
    const float* a;
    long a_stride;
    const Factor& b;
    long first;
    float* c;
    long c_stride, count;
    bool fresh;
};

template <int ROWS, int WIDTH, typename Factor>
inline void multiply(const Product<Factor>& p, long column) {
    const float* a = p.a;
    float* c = p.c + column;
    Vec sums[ROWS][WIDTH];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < WIDTH; w++)
            sums[r][w] = p.fresh ? Vec{} : load(c + r * p.c_stride + w * LANES);
    for (long k = 0; k < p.count; k++) {
        Vec right[WIDTH];
        for (int w = 0; w < WIDTH; w++) right[w] = p.b.at(p.first + k, column + w * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int w = 0; w < WIDTH; w++) sums[r][w] += a[r * p.a_stride + k] * right[w];
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < WIDTH; w++) store(c + r * p.c_stride + w * LANES, sums[r][w]);
}

template <int ROWS, typename Factor>
void multiply(const Product<Factor>& p, long columns) {
    long column = 0;
    for (; column + BLOCK_WIDTH * LANES <= columns; column += BLOCK_WIDTH * LANES)
        multiply<ROWS, BLOCK_WIDTH>(p, column);
    for (; column < columns; column += LANES) multiply<ROWS, 1>(p, column);
}

// visit(std::integral_constant<int, count>) for 1 <= count <= BLOCK_ROWS.
template <typename Visit>
inline void with_rows(int count, Visit&& visit) {
    switch (count) {
        case 1: return visit(std::integral_constant<int, 1>{});
        case 2: return visit(std::integral_constant<int, 2>{});
        case 3: return visit(std::integral_constant<int, 3>{});
        case 4: return visit(std::integral_constant<int, 4>{});
        case 5: return visit(std::integral_constant<int, 5>{});
        case 6: return visit(std::integral_constant<int, 6>{});
        default: return visit(std::integral_constant<int, 7>{});
    }
}

// columns: a multiple of LANES.
template <typename Factor>
inline void multiply(int rows, const Product<Factor>& product, long columns) {
    with_rows(rows, [&](auto count) { multiply<count>(product, columns); });
}

// cap * tanh(scores / cap): a polynomial near 0 (coefficients of Cephes' tanhf), else by e^2x.
inline Vec softcapped(Vec scores, float cap) {
    Vec x = scores / cap;
    Vec size = select(x < 0.0f, -x, x);
    Vec z = x * x;
    Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    Vec near = p * z * x + x;
    Vec far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    return cap * select(size < 0.625f, near, select(x < 0.0f, -far, far));
}

// What a row has come to: the largest score yet, the sum of the weights (in LANES parts) and of the
// weighted values, both relative to that score.
struct RowState {
    float* largest;
    float* weights;  // [LANES]
    float* output;   // [vectors * LANES]
};

// Scores of positions [begin, end) of a stretch become weights e^(score - largest), others are not
// touched; the state is rescaled when the largest score grows. Never inlined: one code for all.
__attribute__((noinline)) inline void weigh(float* scores, int begin, int end, float softcap,
                                            const RowState& row, int vectors) {
    const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Vec never = Vec{} - INFINITY;
    const int start = begin / LANES * LANES;
    if (softcap > 0)
        for (int at = start; at < end; at += LANES)
            store(scores + at, softcapped(load(scores + at), softcap));
    Vec each = never;
    for (int at = start; at < end; at += LANES) {
        Vec score = load(scores + at);
        if (at < begin || at + LANES > end) {
            score = select((lane >= begin - at) & (lane < end - at), score, never);
            store(scores + at, score);
        }
        each = max(each, score);
    }
    float before = *row.largest, now = largest(each);
    if (before > now) now = before;
    float zero = now == -INFINITY ? 0 : now;  // if all are -inf their weights are 0, not NaN
    Vec total = load(row.weights);
    if (now != before) {
        float shrink = exp(Vec{} + (before - zero))[0];
        total = total * shrink;
        for (int i = 0; i < vectors; i++)
            store(row.output + i * LANES, load(row.output + i * LANES) * shrink);
        *row.largest = now;
    }
    for (int at = start; at < end; at += LANES) {
        Vec weight = exp(load(scores + at) - zero);
        store(scores + at, weight);
        total = total + weight;
    }
    store(row.weights, total);
}

// The row's output: weighted values over the sum of weights, to which a sink adds its own.
__attribute__((noinline)) inline void finish(const RowState& row, const float* sink, long dim,
                                             float* to) {
    float top = *row.largest, weights = sum(load(row.weights)), scale = 1;
    if (sink != nullptr) {
        float now = *sink > top ? *sink : top;
        scale = exp(Vec{} + (top - now))[0];
        weights = weights * scale + exp(Vec{} + (*sink - now))[0];
    }
    scale = scale / weights;
    long d = 0;
    for (; d + LANES <= dim; d += LANES) store(to + d, load(row.output + d) * scale);
    if (d < dim) store_some(to + d, load(row.output + d) * scale, int(dim - d));
}

}  // namespace baton
