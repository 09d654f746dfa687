// The arithmetic of attention.h: rows (a query of one head each) over a key block.
// Every sum runs in one order, whatever other rows there are: a score over the dimensions of a key,
// an output over the keys by position.
#pragma once

#include <type_traits>

#include "attention_stage.h"

namespace baton {

#ifdef __AVX512F__
constexpr int BLOCK_WIDTH = 4;  // vectors: with 6 rows their sums fit into the registers
#else
constexpr int BLOCK_WIDTH = 1;
#endif
constexpr int BLOCK_ROWS = 6, FEW_ROWS = 7;

struct Staged {
    const float* rows;
    long stride;

    template <typename V>
    V at(long row, long column) const {
        return get<V>(rows + row * stride + column);
    }
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

// In registers as wide as the CPU's: GCC keeps no longer vectors in registers, and no array that it has not
// unrolled.
template <int ROWS, int VECTORS, typename Factor>
inline void multiply(const Product<Factor>& p, long column) {
    constexpr int PARTS = VECTORS * LANES / WIDTH;
    const float* a = p.a;
    float* c = p.c + column;
    Part sums[ROWS][PARTS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int w = 0; w < PARTS; w++)
            sums[r][w] = p.fresh ? Part{} : get<Part>(c + r * p.c_stride + w * WIDTH);
    for (long k = 0; k < p.count; k++) {
        Part right[PARTS];
#pragma GCC unroll 8
        for (int w = 0; w < PARTS; w++)
            right[w] = p.b.template at<Part>(p.first + k, column + w * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int w = 0; w < PARTS; w++) sums[r][w] += a[r * p.a_stride + k] * right[w];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int w = 0; w < PARTS; w++) put(c + r * p.c_stride + w * WIDTH, sums[r][w]);
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

// A row's state of the online softmax: the largest score so far, and relative to it the sum of the weights
// (in LANES parts) and of the weighted values.
struct RowState {
    float* largest;
    float* weights;  // [LANES]
    float* output;   // [vectors * LANES]
};

// Online softmax: scores of positions [begin, end) of a key block become weights e^(score - largest);
// others stay as they are. The state is rescaled when the largest score grows. Never inlined, so that
// every caller has the same rounding.
__attribute__((noinline)) inline void softmax_update(float* scores, int begin, int end, float softcap,
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
        float shrink = exp_small(Vec{} + (before - zero))[0];
        total = total * shrink;
        for (int i = 0; i < vectors; i++)
            store(row.output + i * LANES, load(row.output + i * LANES) * shrink);
        *row.largest = now;
    }
    for (int at = start; at < end; at += LANES) {
        Vec weight = exp_small(load(scores + at) - zero);
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
