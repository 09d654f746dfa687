// The arithmetic of attention.h: a stretch of keys and values is laid out for vectors, then rows (a
// query of one head each) meet it. Every sum runs in one order, whatever other rows there are: a
// score over the dimensions of a key, an output over the keys by position.
#pragma once

#include <utility>

#include "vec.h"

namespace baton {

constexpr int STRETCH = 64;  // positions; stretches begin at multiples of it
constexpr int GROUPS = STRETCH / LANES;
#ifdef __AVX512F__
constexpr int BLOCK_ROWS = 6, BLOCK_WIDTH = 4;  // sums that fit into the registers
#else
constexpr int BLOCK_ROWS = 6, BLOCK_WIDTH = 1;
#endif

// Where the rows of a stretch's positions [begin, end) are, and those of the stretch to come.
template <typename T>
struct CacheRows {
    const T* pool;
    long stride;
    const int64_t* slots;  // [STRETCH]
    int begin, end;
    const T* next_pool;
    const int64_t* next_slots;
    int next_begin, next_end;

    const T* at(int position) const { return pool + slots[position] * stride; }

    // Memory is busy with the next stretch while this one is computed.
    void prefetch(int position, long dim) const {
        if (position < next_begin || position >= next_end) return;
        const char* row = reinterpret_cast<const char*>(next_pool + next_slots[position] * stride);
        for (long byte = 0; byte < dim * long(sizeof(T)); byte += 64)
            __builtin_prefetch(row + byte, 0, 2);
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

// Keys side by side: to[d][position]. Of a group of LANES positions those outside [begin, end) get
// some neighbour's key; nobody looks at their scores.
template <typename T>
void stage_keys(const CacheRows<T>& keys, long dim, float* to) {
    for (int group = keys.begin / LANES * LANES; group < keys.end; group += LANES) {
        const T* rows[LANES];
        for (int i = 0; i < LANES; i++) {
            int position = group + i < keys.begin ? keys.begin : group + i;
            rows[i] = keys.at(position < keys.end ? position : keys.end - 1);
            keys.prefetch(group + i, dim);
        }
        for (long d = 0; d < dim; d += LANES) {
            int count = int(dim - d < LANES ? dim - d : LANES);
            Vec square[LANES];
            for (int i = 0; i < LANES; i++)
                square[i] = count == LANES ? load(rows[i] + d) : load_some(rows[i] + d, count);
            transpose(square);
            for (int i = 0; i < count; i++) store(to + (d + i) * STRETCH + group, square[i]);
        }
    }
}

// Values below each other: to[position][width], width being dim rounded up to LANES.
template <typename T>
void stage_values(const CacheRows<T>& values, long dim, long width, float* to) {
    for (int i = values.begin; i < values.end; i++) {
        const T* row = values.at(i);
        values.prefetch(i, dim);
        long d = 0;
        for (; d + LANES <= dim; d += LANES) store(to + i * width + d, load(row + d));
        if (d < dim) store(to + i * width + d, load_some(row + d, int(dim - d)));
    }
}

// c[r][...] += sum over k < count of a[r][k] * b[k][...], k ascending, WIDTH vectors wide.
template <int ROWS, int WIDTH>
inline void add_products(const float* a, long a_stride, const float* b, long b_stride, float* c,
                         long c_stride, long count) {
    Vec sums[ROWS][WIDTH];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < WIDTH; w++) sums[r][w] = load(c + r * c_stride + w * LANES);
    for (long k = 0; k < count; k++) {
        Vec right[WIDTH];
        for (int w = 0; w < WIDTH; w++) right[w] = load(b + k * b_stride + w * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int w = 0; w < WIDTH; w++) sums[r][w] += a[r * a_stride + k] * right[w];
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < WIDTH; w++) store(c + r * c_stride + w * LANES, sums[r][w]);
}

template <int ROWS>
void add_products(const float* a, long a_stride, const float* b, long b_stride, float* c,
                  long c_stride, long count, int vectors) {
    int w = 0;
    for (; w + BLOCK_WIDTH <= vectors; w += BLOCK_WIDTH)
        add_products<ROWS, BLOCK_WIDTH>(a, a_stride, b + w * LANES, b_stride, c + w * LANES,
                                        c_stride, count);
    for (; w < vectors; w++)
        add_products<ROWS, 1>(a, a_stride, b + w * LANES, b_stride, c + w * LANES, c_stride, count);
}

// The same for 1 <= rows <= BLOCK_ROWS.
inline void add_products(int rows, const float* a, long a_stride, const float* b, long b_stride,
                         float* c, long c_stride, long count, int vectors) {
    switch (rows) {
        case 1: return add_products<1>(a, a_stride, b, b_stride, c, c_stride, count, vectors);
        case 2: return add_products<2>(a, a_stride, b, b_stride, c, c_stride, count, vectors);
        case 3: return add_products<3>(a, a_stride, b, b_stride, c, c_stride, count, vectors);
        case 4: return add_products<4>(a, a_stride, b, b_stride, c, c_stride, count, vectors);
        case 5: return add_products<5>(a, a_stride, b, b_stride, c, c_stride, count, vectors);
        default: return add_products<6>(a, a_stride, b, b_stride, c, c_stride, count, vectors);
    }
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
    float largest;
    float* weights;  // [LANES]
    float* output;   // [vectors * LANES]
};

// Scores of positions [begin, end) of a stretch become weights e^(score - largest), others are not
// touched; the state is rescaled when the largest score grows. Never inlined: one code for all.
__attribute__((noinline)) inline void weigh(float* scores, int begin, int end, float softcap,
                                            RowState& row, int vectors) {
    const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Vec never = Vec{} - INFINITY;
    Vec each = never;
    for (int at = begin / LANES * LANES; at < end; at += LANES) {
        Vec score = load(scores + at);
        if (softcap > 0) score = softcapped(score, softcap);
        if (at < begin || at + LANES > end)
            score = select((lane >= begin - at) & (lane < end - at), score, never);
        store(scores + at, score);
        each = max(each, score);
    }
    float before = row.largest, now = largest(each);
    if (before > now) now = before;
    float zero = now == -INFINITY ? 0 : now;  // if all are -inf their weights are 0, not NaN
    Vec total = load(row.weights);
    if (now != before) {
        float shrink = exp(Vec{} + (before - zero))[0];
        total = total * shrink;
        for (int i = 0; i < vectors; i++)
            store(row.output + i * LANES, load(row.output + i * LANES) * shrink);
        row.largest = now;
    }
    for (int at = begin / LANES * LANES; at < end; at += LANES) {
        Vec weight = exp(load(scores + at) - zero);
        store(scores + at, weight);
        total = total + weight;
    }
    store(row.weights, total);
}

// The row's output: weighted values over the sum of weights, to which a sink adds its own.
__attribute__((noinline)) inline void finish(const RowState& row, const float* sink, long dim,
                                             float* to) {
    float top = row.largest, weights = sum(load(row.weights)), scale = 1;
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
