// Vectors of 16 floats, in the compiler's own vector types, and parts of them that fit one register. The
// same source runs on AVX2, NEON and AVX-512; gemm_word.h adds CPU-specific instructions for products.
//
// Where a Vec is larger than a register, GCC keeps it in memory and loads and stores it around each
// operation. So loops that run for every score or product work on Parts.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace baton {

constexpr int LANES = 16;

// One register of the CPU. A tile of 6 rows has REGISTERS of them side by side, which leaves some for the
// factors.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 4;
#elif defined(__AVX__)
constexpr int WIDTH = 8, REGISTERS = 2;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, REGISTERS = 4;
#else
constexpr int WIDTH = 4, REGISTERS = 2;
#endif
constexpr int PARTS = LANES / WIDTH;  // of a Vec

template <int COUNT>
struct Vectors {
    typedef float Floats __attribute__((vector_size(4 * COUNT)));
    typedef int32_t Ints __attribute__((vector_size(4 * COUNT)));
    typedef uint32_t Words __attribute__((vector_size(4 * COUNT)));
    typedef uint16_t Halves __attribute__((vector_size(2 * COUNT)));
    typedef int8_t Bytes __attribute__((vector_size(COUNT)));
};

typedef Vectors<LANES>::Floats Vec;
typedef Vectors<LANES>::Ints VecI;
typedef Vectors<LANES>::Words VecU;
typedef Vectors<LANES>::Halves VecH;
typedef Vectors<WIDTH>::Floats Part;
typedef Vectors<WIDTH>::Ints PartI;
typedef Vectors<WIDTH>::Words PartU;
typedef Vectors<WIDTH>::Halves PartH;

template <typename T>
inline T get(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// The vectors of integers that go with V.
template <typename V>
using Beside = Vectors<sizeof(V) / sizeof(float)>;

// bfloat16: the upper half of a float.
struct bf16 {
    uint16_t bits;
};

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

inline Part load_part(const float* from) {
    Part result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline Part load_part(const bf16* from) {
    PartH half;
    std::memcpy(&half, from, sizeof half);
    return (Part)(__builtin_convertvector(half, PartU) << 16);
}

template <typename V>
inline void store(float* to, V value) {
    std::memcpy(to, &value, sizeof value);
}

inline void put(float* to, Part value) { store(to, value); }

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

template <int half, typename V, int... lane>
inline V halves_swapped(V v, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(v, v, (lane ^ half)...);
}

// Reduces all lanes to one number, always in the same order, so that sums are reproducible: lanes that are
// `half` apart first. V: Vec or Part.
template <int half, typename V, typename Both>
inline float reduce(V v, Both&& both) {
    if constexpr (half == 0) return v[0];
    else {
        constexpr auto lanes = std::make_integer_sequence<int, sizeof(V) / sizeof(float)>{};
        return reduce<half / 2>(both(v, halves_swapped<half>(v, lanes)), both);
    }
}

inline float sum(Vec value) {
    return reduce<LANES / 2>(value, [](Vec a, Vec b) { return a + b; });
}

template <typename V>
inline float largest(V value) {
    return reduce<sizeof(V) / sizeof(float) / 2>(value, [](V a, V b) { return a > b ? a : b; });
}

// e^x within 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, the rest by a polynomial
// (coefficients of Cephes' expf). Below -87.3 it is 0; a NaN stays NaN, because comparisons with it
// are false. For x <= 88. V: Vec or Part.
template <typename V>
inline V exp_small(V x) {
    using Words = typename Beside<V>::Words;
    V least = -87.5f - V{};
    V clamped = least > x ? least : x;
    V shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to the nearest
    V n = shifted - 12582912.0f;
    V r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    V p = 1.9875691500e-4f - V{};
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Words power = ((Words)shifted << 23) + 0x3f800000;  // n's lowest bits become the exponent of 2^n
    return x < -87.3f ? V{} : p * (V)power;
}

// The same for every x: above 88.7 it is infinity.
template <typename V>
inline V exp(V x) {
    V most = 88.8f - V{};
    return x > 88.7f ? INFINITY - V{} : exp_small(most < x ? most : x);
}

}  // namespace baton
