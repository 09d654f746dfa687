// Vectors of 16 floats, in the compiler's own vector types: one AVX-512 register, or several
// shorter ones. The same source runs on AVX2, NEON and AVX-512; gemm_word.h adds CPU-specific
// instructions for products.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace baton {

constexpr int LANES = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint32_t VecU __attribute__((vector_size(64)));
typedef uint16_t VecH __attribute__((vector_size(32)));

// bfloat16: the upper half of a float.
struct bf16 {
    uint16_t bits;
};

// One register of the CPU, unlike Vec: sums that are to stay in registers must fit them. A tile of 6
// rows has REGISTERS of them side by side, which leaves some for weights and a row.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 4;
#elif defined(__AVX__)
constexpr int WIDTH = 8, REGISTERS = 2;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, REGISTERS = 4;
#else
constexpr int WIDTH = 4, REGISTERS = 2;
#endif

typedef float Part __attribute__((vector_size(WIDTH * 4)));
typedef int32_t PartI __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t PartU __attribute__((vector_size(WIDTH * 4)));

template <typename T>
inline T get(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void put(float* to, Part value) { std::memcpy(to, &value, sizeof value); }

template <typename V>
inline V load_part(const float* from) {
    return get<V>(from);
}

template <typename V>
inline V load_part(const bf16* from) {
    typedef uint16_t Half __attribute__((vector_size(WIDTH * 2)));
    return (V)(__builtin_convertvector(get<Half>(from), PartU) << 16);
}

inline Vec all(float value) { return value - Vec{}; }  // not +, which would be an instruction: 0 + -0 is 0

inline Vec load(const float* from) {
    Vec result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline Vec load(const bf16* from) {
    VecH half;
    std::memcpy(&half, from, sizeof half);
    return (Vec)(__builtin_convertvector(half, VecU) << 16);
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// To the nearest bf16, ties to even, as torch does; a NaN stays NaN.
inline Vec rounded(Vec value) {
    VecU bits = (VecU)value;
    VecU nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    VecU is_nan = (VecU)(value != value);
    return (Vec)((is_nan & 0x7fc00000) | (~is_nan & nearest));
}

inline void store(bf16* to, Vec value) {
    VecH half = __builtin_convertvector((VecU)rounded(value) >> 16, VecH);
    std::memcpy(to, &half, sizeof half);
}

inline float as_float(float value) { return value; }

inline float as_float(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void put(float* to, float value) { *to = value; }

inline void put(bf16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Loads and stores of `count` < LANES elements; the other lanes read as 0 and are not written.
template <typename T>
inline Vec load_some(const T* from, int count) {
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <typename T>
inline void store_some(T* to, Vec value, int count) {
    T padded[LANES];
    store(padded, value);
    std::memcpy(to, padded, count * sizeof(T));
}

inline Vec select(VecI mask, Vec yes, Vec no) { return mask ? yes : no; }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

// Reduces all lanes to one number, always in the same order, so that sums are reproducible.
template <typename Both>
inline float reduce(Vec v, Both&& both) {
    v = both(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = both(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
    v = both(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
    v = both(v, __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
    return v[0];
}

inline float sum(Vec value) {
    return reduce(value, [](Vec a, Vec b) { return a + b; });
}

inline float largest(Vec value) { return reduce(value, max); }

// e^x within 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, the rest by a polynomial
// (coefficients of Cephes' expf). Below -87.3 it is 0; a NaN stays NaN, because comparisons with it
// are false. For x <= 88.
inline Vec exp_small(Vec x) {
    Vec clamped = max(all(-87.5f), x);
    Vec shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to the nearest
    Vec n = shifted - 12582912.0f;
    Vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    VecU power = ((VecU)shifted << 23) + 0x3f800000;  // n's lowest bits become the exponent of 2^n
    return select(x < -87.3f, Vec{}, p * (Vec)power);
}

// The same for every x: above 88.7 it is infinity.
inline Vec exp(Vec x) { return select(x > 88.7f, all(INFINITY), exp_small(min(all(88.8f), x))); }

}  // namespace baton
