// Row-local work: the operations on one token between two matrix products (norms, rotary positions,
// activations, residuals, embeddings), as a list of small operations on that token's values, which
// stay in the L1 cache.
#pragma once

#include "threads.h"
#include "vec.h"

namespace baton {

// X(name) for each operation of row work; structures.py numbers the same names (see abi.h).
// clang-format off
#define OP_CODES(X) \
    X(copy) X(neg) X(abs) X(exp) X(log) X(sqrt) X(rsqrt) X(reciprocal) X(tanh) X(sigmoid) X(silu) X(gelu) \
    X(gelu_tanh) X(relu) X(cos) X(sin) X(square) X(cube) X(pow) X(add_to) X(times) \
    X(clamp) X(expm1) X(log1p) X(floor) X(above) X(below)  /* one operand, and perhaps numbers; above: 1 where
                                                     it is more than x, below: less, else 0 */ \
    X(add) X(sub) X(mul) X(div) X(max) X(min)     /* two operands; add: a + x * b */ \
    X(sum) X(mean) X(largest)                     /* over the inner dimension */ \
    X(silu_mul) X(gelu_mul) X(gelu_tanh_mul)      /* of a, times b */ \
    X(where)                                      /* b where a is not 0, else c */ \
    X(layer_norm)                                 /* over the inner dimension; b: weight, c: bias */ \
    X(embed_f32) X(embed_bf16)                    /* row number a of the table b */
// clang-format on

#define OP_CODE_NAME(name) name,
enum class OpCode : int32_t { OP_CODES(OP_CODE_NAME) };
#undef OP_CODE_NAME

enum class Place : int32_t {
    none,
    value,    // a value of this row, in the arena
    gathered,   // as value, but in the token row of this logits row
    scratch,  // this thread's, good until the row is done
    constant  // the same for every row: in a table
};

// The address of `outer` x `inner` numbers: (o, i) is at address + o * outer_stride + i * inner_stride.
struct Operand {
    Place place;
    int32_t buffer;  // which buffer of the arena, or which table
    int64_t offset;  // floats from the buffer's row, the scratch or the table
    int64_t outer_stride, inner_stride;
};

struct Op {
    OpCode code;
    int32_t unused;
    int64_t outer, inner;
    Operand to, a, b, c;
    float x, y;
};

struct Buffer {
    float* rows;
    int64_t width;  // floats of a row
};

struct RowView {
    const Buffer* buffers;
    const float* const* tables;
    const int64_t* logit_rows;  // the token row of each logits row
    float* scratch;        // this thread's
};

inline const float* address(const Operand& at, const RowView& rows, long row) {
    const Buffer& buffer = rows.buffers[at.buffer];
    switch (at.place) {
        case Place::value: return buffer.rows + row * buffer.width + at.offset;
        case Place::gathered: return buffer.rows + rows.logit_rows[row] * buffer.width + at.offset;
        case Place::scratch: return rows.scratch + at.offset;
        case Place::constant: return rows.tables[at.buffer] + at.offset;
        default: return nullptr;
    }
}

// Not inlined, as the ends of rows and strides are rare, and inlined they would be half of the code.
__attribute__((noinline)) inline Vec load_apart(const float* from, int64_t stride, int count) {
    if (stride == 0) return all(*from);
    if (stride == 1) return load_some(from, count);
    float lane[LANES] = {};
    for (int i = 0; i < count; i++) lane[i] = from[i * stride];
    return load(lane);
}

__attribute__((noinline)) inline void store_apart(float* to, int64_t stride, Vec value, int count) {
    float lane[LANES];
    store(lane, value);
    for (int i = 0; i < count; i++) to[i * stride] = lane[i];
}

inline Vec load_strided(const float* from, int64_t stride, int count) {
    return stride == 1 && count == LANES ? load(from) : load_apart(from, stride, count);
}

inline void store_strided(float* to, int64_t stride, Vec value, int count) {
    if (stride == 1 && count == LANES) return store(to, value);
    store_apart(to, stride, value, count);
}

template <typename Function>
inline void map_one(const Op& op, float* to, const float* a, Function function) {
    const bool plain = op.to.inner_stride == 1 && op.a.inner_stride == 1;
    for (long o = 0; o < op.outer; o++) {
        float* row = to + o * op.to.outer_stride;
        const float* from = a + o * op.a.outer_stride;
        long i = 0;
        for (; plain && i + LANES <= op.inner; i += LANES) store(row + i, function(load(from + i)));
        for (; i < op.inner; i += LANES) {
            int count = op.inner - i < LANES ? int(op.inner - i) : LANES;
            Vec value = load_strided(from + i * op.a.inner_stride, op.a.inner_stride, count);
            store_strided(row + i * op.to.inner_stride, op.to.inner_stride, function(value), count);
        }
    }
}

template <typename Function>
inline void map_two(const Op& op, float* to, const float* a, const float* b, Function function) {
    const bool plain =
        op.to.inner_stride == 1 && op.a.inner_stride == 1 && op.b.inner_stride == 1;
    for (long o = 0; o < op.outer; o++) {
        float* row = to + o * op.to.outer_stride;
        const float* left = a + o * op.a.outer_stride;
        const float* right = b + o * op.b.outer_stride;
        long i = 0;
        for (; plain && i + LANES <= op.inner; i += LANES)
            store(row + i, function(load(left + i), load(right + i)));
        for (; i < op.inner; i += LANES) {
            int count = op.inner - i < LANES ? int(op.inner - i) : LANES;
            Vec x = load_strided(left + i * op.a.inner_stride, op.a.inner_stride, count);
            Vec y = load_strided(right + i * op.b.inner_stride, op.b.inner_stride, count);
            store_strided(row + i * op.to.inner_stride, op.to.inner_stride, function(x, y), count);
        }
    }
}

// b where a is not 0, else c: what was not chosen may be infinite or NaN.
inline void map_where(const Op& op, float* to, const float* a, const float* b, const float* c) {
    for (long o = 0; o < op.outer; o++)
        for (long i = 0; i < op.inner; i += LANES) {
            int count = op.inner - i < LANES ? int(op.inner - i) : LANES;
            auto at = [&](const float* from, const Operand& it) {
                return load_strided(from + o * it.outer_stride + i * it.inner_stride, it.inner_stride, count);
            };
            Vec result = select(at(a, op.a) != 0.0f, at(b, op.b), at(c, op.c));
            store_strided(to + o * op.to.outer_stride + i * op.to.inner_stride, op.to.inner_stride, result,
                          count);
        }
}

// Four sums side by side, then one, in the same order for every row.
template <typename Function>
inline float reduce(const float* from, int64_t stride, long inner, Function term) {
    Vec sums[4] = {};
    auto next = [&](long i) { return term(load_strided(from + i * stride, stride, LANES)); };
    long i = 0;
    for (; i + 4 * LANES <= inner; i += 4 * LANES)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) sums[part] += next(i + part * LANES);
#pragma GCC unroll 3
    for (int part = 0; part < 3; part++)
        if (i + LANES <= inner) sums[part] += next(i), i += LANES;
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < inner; i++) total += term(all(from[i * stride]))[0];
    return total;
}

inline float largest_of(const float* from, int64_t stride, long inner) {
    float result = from[0];
    for (long i = 1; i < inner; i++) {
        float next = from[i * stride];
        result = next > result || next != next ? next : result;
    }
    return result;
}

inline void layer_norm(const Op& op, float* to, const float* from, const float* weight,
                       const float* bias) {
    for (long o = 0; o < op.outer; o++, to += op.to.outer_stride, from += op.a.outer_stride) {
        float mean = reduce(from, op.a.inner_stride, op.inner, [](Vec x) { return x; }) / op.inner;
        float spread = reduce(from, op.a.inner_stride, op.inner,
                              [=](Vec x) { return (x - mean) * (x - mean); });
        float scale = 1.0f / std::sqrt(spread / op.inner + op.x);
        for (long i = 0; i < op.inner; i += LANES) {
            int count = op.inner - i < LANES ? int(op.inner - i) : LANES;
            Vec x = load_strided(from + i * op.a.inner_stride, op.a.inner_stride, count);
            Vec result = (x - mean) * scale;
            if (weight) result *= load_strided(weight + i, 1, count);
            if (bias) result += load_strided(bias + i, 1, count);
            store_strided(to + i * op.to.inner_stride, op.to.inner_stride, result, count);
        }
    }
}

template <typename T>
inline void embed(const Op& op, float* to, long number, const T* table) {
    const T* from = table + number * op.inner;
    for (long i = 0; i < op.inner; i += LANES) {
        int count = op.inner - i < LANES ? int(op.inner - i) : LANES;
        store_some(to + i, count == LANES ? load(from + i) : load_some(from + i, count), count);
    }
}

template <float (*function)(float)>
inline Vec each(Vec x) {
    Vec result;
    for (int i = 0; i < LANES; i++) result[i] = function(x[i]);
    return result;
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// 1 - 2 / (e^2x + 1) is exact to 1e-7 of 1, but not of a small x, where the series is.
inline Vec tanh(Vec x) {
    Vec square = x * x;
    Vec series = x + x * square * (-0.333333333f + square * (0.133333333f - square * 0.053968254f));
    return select(square < 0.01f, series, 1.0f - 2.0f / (exp(2.0f * x) + 1.0f));
}

// x/2 (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, to 1.5e-7.
inline Vec gelu(Vec x) {
    Vec z = max(x, -x) * 0.70710678118654752f;
    Vec t = 1.0f / (1.0f + 0.3275911f * z);
    Vec p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f +
                 t * (-1.453152027f + t * 1.061405429f))));
    Vec erf = 1.0f - p * exp(-z * z);
    return 0.5f * x * (1.0f + select(x < 0.0f, -erf, erf));
}

// x/2 (1 + tanh u) is x sigmoid(2u).
inline Vec gelu_tanh(Vec x) {
    return x * sigmoid(x * (1.59576912160573072f + 0.0713548162726f * (x * x)));
}

inline void run_one(const Op& op, const RowView& rows, long row) {
    float* to = const_cast<float*>(address(op.to, rows, row));
    const float* a = address(op.a, rows, row);
    const float* b = address(op.b, rows, row);
    const float x = op.x, y = op.y;
    switch (op.code) {
#define ONE(name, result) \
    case OpCode::name: return map_one(op, to, a, [=](Vec v) -> Vec { return result; })
#define TWO(name, result) \
    case OpCode::name: return map_two(op, to, a, b, [=](Vec v, Vec w) -> Vec { return result; })
        ONE(copy, v);
        ONE(neg, -v);
        ONE(abs, select(v < 0.0f, -v, v));
        ONE(exp, exp(v));
        ONE(log, each<std::log>(v));
        ONE(sqrt, each<std::sqrt>(v));
        ONE(rsqrt, 1.0f / each<std::sqrt>(v));
        ONE(reciprocal, 1.0f / v);
        ONE(tanh, tanh(v));
        ONE(sigmoid, sigmoid(v));
        ONE(silu, v * sigmoid(v));
        ONE(gelu, gelu(v));
        ONE(gelu_tanh, gelu_tanh(v));
        ONE(relu, select(v < 0.0f, Vec{}, v));
        ONE(cos, each<std::cos>(v));
        ONE(sin, each<std::sin>(v));
        ONE(square, v * v);
        ONE(cube, v * v * v);
        case OpCode::pow:
            return map_one(op, to, a, [=](Vec v) {
                for (int i = 0; i < LANES; i++) v[i] = std::pow(v[i], x);
                return v;
            });
        ONE(add_to, v + x);
        ONE(times, v * x);
        ONE(clamp, select(v < x, all(x), select(v > y, all(y), v)));
        ONE(expm1, each<std::expm1>(v));
        ONE(log1p, each<std::log1p>(v));
        ONE(floor, each<std::floor>(v));
        ONE(above, select(v > x, all(1.0f), Vec{}));
        ONE(below, select(v < x, all(1.0f), Vec{}));
        TWO(add, v + x * w);
        TWO(sub, v - w);
        TWO(mul, v * w);
        TWO(div, v / w);
        TWO(max, select(v > w, v, w));
        TWO(min, select(v < w, v, w));
        TWO(silu_mul, v * sigmoid(v) * w);
        TWO(gelu_mul, gelu(v) * w);
        TWO(gelu_tanh_mul, gelu_tanh(v) * w);
#undef ONE
#undef TWO
        case OpCode::sum:
        case OpCode::mean:
            for (long o = 0; o < op.outer; o++) {
                float total = reduce(a + o * op.a.outer_stride, op.a.inner_stride, op.inner,
                                     [](Vec v) { return v; });
                to[o * op.to.outer_stride] = op.code == OpCode::mean ? total / op.inner : total;
            }
            return;
        case OpCode::largest:
            for (long o = 0; o < op.outer; o++)
                to[o * op.to.outer_stride] =
                    largest_of(a + o * op.a.outer_stride, op.a.inner_stride, op.inner);
            return;
        case OpCode::where: return map_where(op, to, a, b, address(op.c, rows, row));
        case OpCode::layer_norm: return layer_norm(op, to, a, b, address(op.c, rows, row));
        case OpCode::embed_f32: return embed(op, to, long(a[0]), b);
        case OpCode::embed_bf16: return embed(op, to, long(a[0]), reinterpret_cast<const bf16*>(b));
    }
}

inline void run_rows(const Op* ops, long count, const RowView& rows, Range range) {
    for (long row = range.begin; row < range.end; row++)
        for (long i = 0; i < count; i++) run_one(ops[i], rows, row);
}

}  // namespace baton
