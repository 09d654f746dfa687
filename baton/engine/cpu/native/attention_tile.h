// The arithmetic of attention.h: rows (a query of one head each) over a key block.
// Every sum runs in one order, whatever other rows there are: a score over the dimensions of a key,
// an output over the keys by position.
#pragma once

#include <type_traits>

#include "attention_stage.h"

namespace baton {

constexpr int BLOCK_ROWS = 6, FEW_ROWS = 7;

// Registers side by side for so many rows: their sums stay in registers. Few rows have more of them, so
// that a sum need not wait for the one before it.
constexpr int registers_for(int rows) {
    int most = BLOCK_ROWS * REGISTERS / rows;
    return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

struct Staged {
    const float* rows;
    long stride;

    Part at(long row, long column) const { return load_part(rows + row * stride + column); }
};

// c[r][...] = start + sum over k < count of a[r][k] * b[k][...], k ascending, for some rows and
// registers; the start is what c holds, or 0 when it is `fresh`. b: Staged, or Rows of the pool; its
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

template <int ROWS, int COUNT, typename Factor>
inline void multiply(const Product<Factor>& p, long column) {
    const float* a = p.a;
    float* c = p.c + column;
    Part sums[ROWS][COUNT];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int w = 0; w < COUNT; w++)
            sums[r][w] = p.fresh ? Part{} : load_part(c + r * p.c_stride + w * WIDTH);
    for (long k = 0; k < p.count; k++) {
        Part right[COUNT];
#pragma GCC unroll 8
        for (int w = 0; w < COUNT; w++) right[w] = p.b.at(p.first + k, column + w * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int w = 0; w < COUNT; w++) sums[r][w] += a[r * p.a_stride + k] * right[w];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int w = 0; w < COUNT; w++) store(c + r * p.c_stride + w * WIDTH, sums[r][w]);
}

template <int ROWS, typename Factor>
void multiply(const Product<Factor>& p, long columns) {
    constexpr int count = registers_for(ROWS);
    long column = 0;
    for (; column + count * WIDTH <= columns; column += count * WIDTH)
        multiply<ROWS, count>(p, column);
    for (; column < columns; column += WIDTH) multiply<ROWS, 1>(p, column);
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
inline Part softcapped(Part scores, float cap) {
    Part x = scores / cap;
    Part size = x < 0.0f ? -x : x;
    Part z = x * x;
    Part p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    Part near = p * z * x + x;
    Part far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    Part tanh = x < 0.0f ? -far : far;
    return cap * (size < 0.625f ? near : tanh);
}

// A row's state of the online softmax: the largest score so far, and relative to it the sum of the weights
// (in LANES parts) and of the weighted values.
struct RowState {
    float* largest;
    float* weights;  // [LANES]
    float* output;   // [vectors * LANES]
};

template <int... lane>
constexpr PartI counted(std::integer_sequence<int, lane...>) {
    return PartI{lane...};
}

// Scores, those of places outside [begin, end) replaced by -inf; the first is that of place 0.
inline Part inside(Part scores, int begin, int end) {
    constexpr PartI lane = counted(std::make_integer_sequence<int, WIDTH>{});
    return (lane >= begin) & (lane < end) ? scores : -INFINITY - Part{};
}

// visit(part of a Vec, column, where its scores are) for the vectors of columns [start, end).
template <typename Visit>
inline void each_part(float* scores, int start, int end, Visit&& visit) {
    for (int at = start; at < end; at += LANES)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) visit(p, at + p * WIDTH, scores + at + p * WIDTH);
}

// Online softmax: scores of positions [begin, end) of a key block become weights e^(score - largest);
// others stay as they are. The state is rescaled when the largest score grows. Never inlined, so that
// every caller has the same rounding.
__attribute__((noinline)) inline void softmax_update(float* scores, int begin, int end, float softcap,
                                            const RowState& row, int vectors) {
    const int start = begin / LANES * LANES;
    if (softcap > 0)
        each_part(scores, start, end, [&](int, int, float* at) {
            store(at, softcapped(load_part(at), softcap));
        });
    Part each[PARTS], total[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        each[p] = -INFINITY - Part{};
        total[p] = load_part(row.weights + p * WIDTH);
    }
    each_part(scores, start, end, [&](int p, int column, float* at) {
        Part score = load_part(at);
        if (column < begin || column + WIDTH > end) {
            score = inside(score, begin - column, end - column);
            store(at, score);
        }
        each[p] = each[p] > score ? each[p] : score;
    });
#pragma GCC unroll 4
    for (int half = PARTS / 2; half > 0; half /= 2)
#pragma GCC unroll 2
        for (int p = 0; p < half; p++) each[p] = each[p] > each[p + half] ? each[p] : each[p + half];
    float before = *row.largest, now = largest(each[0]);
    if (before > now) now = before;
    float zero = now == -INFINITY ? 0 : now;  // if all are -inf their weights are 0, not NaN
    if (now != before) {
        float shrink = exp_small(Part{} + (before - zero))[0];
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) total[p] = total[p] * shrink;
        for (int i = 0; i < vectors * LANES; i += WIDTH)
            store(row.output + i, load_part(row.output + i) * shrink);
        *row.largest = now;
    }
    each_part(scores, start, end, [&](int p, int, float* at) {
        Part weight = exp_small(load_part(at) - zero);
        store(at, weight);
        total[p] = total[p] + weight;
    });
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) store(row.weights + p * WIDTH, total[p]);
}

// The row's output: weighted values over the sum of weights, to which a sink adds its own.
__attribute__((noinline)) inline void finish(const RowState& row, const float* sink, long dim,
                                             float* to) {
    float top = *row.largest, weights = sum(load(row.weights)), scale = 1;
    if (sink != nullptr) {
        float now = *sink > top ? *sink : top;
        scale = exp(Part{} + (top - now))[0];
        weights = weights * scale + exp(Part{} + (*sink - now))[0];
    }
    scale = scale / weights;
    long d = 0;
    for (; d + LANES <= dim; d += LANES) store(to + d, load(row.output + d) * scale);
    if (d < dim) store_some(to + d, load(row.output + d) * scale, int(dim - d));
}

}  // namespace baton
