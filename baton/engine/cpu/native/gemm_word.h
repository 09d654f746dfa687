// A word: 32 bits of one output channel (or one row) along K, that is 1 float, 2 bf16 or 4 bytes; and
// the instruction that multiplies 16 of them. w8 (weight-only) has bytes in the weights, bf16 in the
// rows, so several words of a row are multiplied by one of a channel. q4 and q8 are in gemm_blocks.h.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace baton {

enum class WeightType : int { f32 = 0, bf16 = 1, i8 = 2, w8 = 3, q4 = 4, q8 = 5 };

constexpr int per_word(WeightType type) {
    if (type == WeightType::q4) return 8;
    return type == WeightType::f32 ? 1 : type == WeightType::bf16 ? 2 : 4;
}

// Whether two bf16 are multiplied at once. Otherwise they are widened to floats, rows in advance. An Intel
// CPU with AVX512-FP16 (from Sapphire Rapids on) has vdpbf16ps, but at half the rate of its floats:
// 84 against 168 GFLOP/s on a core. AMD's Zen 4 and 5 do it at their rate of floats, and twice it.
#if defined(__AVX512BF16__) && defined(__AVX512F__) && !defined(__AVX512FP16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

// Rows of bf16 values, which are floats unless they are multiplied in pairs.
constexpr bool halves(WeightType type) {
    return type == WeightType::bf16 || type == WeightType::w8;
}

// Words of a row for each word of a channel in int8. 1: its four bytes, multiplied at once. 2: they are widened
// to 16 bits, rows in advance, the even two in the first word and the odd two in the second. 4: to 32 bits.
#if (defined(__AVX512F__) && defined(__AVX512VNNI__)) || (defined(__AVXVNNI__) && !defined(__AVX512F__)) || \
    defined(__ARM_FEATURE_DOTPROD)
constexpr int BYTE_WORDS = 1;
#elif defined(__AVX512F__) ? defined(__AVX512BW__) : defined(__AVX2__)
constexpr int BYTE_WORDS = 2;
#else
constexpr int BYTE_WORDS = 4;
#endif

// Whether the bytes of a row are signed. Otherwise 128 is added to them, because vpdpbusd needs that.
#ifdef __ARM_FEATURE_DOTPROD
constexpr bool SIGNED_ROWS = true;
#else
constexpr bool SIGNED_ROWS = false;
#endif

// Words of a row for each word of a channel.
constexpr int row_words_of(WeightType type) {
    if (type == WeightType::i8) return BYTE_WORDS;
    return halves(type) ? per_word(type) / (PAIRS ? 2 : 1) : 1;
}

// Integers with a scale for each block of columns (blocks.h).
constexpr bool blocked(WeightType type) { return type == WeightType::q4 || type == WeightType::q8; }

// Whether rows are multiplied as they are, in floats.
constexpr bool in_place(WeightType type) { return type == WeightType::f32 || blocked(type); }

// Bytes, and a scale for each channel.
constexpr bool scaled(WeightType type) { return type == WeightType::i8 || type == WeightType::w8; }

// In gemm_instructions.h. Products of floats do without it: compiling its headers takes as long as they do.
void put_bf16(uint32_t* words, Vec values);
PartU widened_bytes(PartU words, int i);
Part add_bytes(Part sums, PartU row, PartU weights);
Part add_pairs(Part sums, PartU row, PartU weights);

// Value `i` of each word, bf16 or byte, as a float; exact.
template <WeightType type>
inline Part widened(PartU words, int i) {
    if constexpr (type == WeightType::bf16) return (Part)(i ? words & 0xffff0000 : words << 16);
    return __builtin_convertvector((PartI)(words << (24 - 8 * i)) >> 24, Part);
}

// Bytes 2i and 2i + 1 of each word as two bf16, which hold them exactly.
inline PartU paired(PartU words, int i) {
    return (PartU)widened<WeightType::w8>(words, 2 * i) >> 16 |
           ((PartU)widened<WeightType::w8>(words, 2 * i + 1) & 0xffff0000);
}

// Word `i` of row_words_of() into which the words of WIDTH channels are turned to be multiplied.
template <WeightType type>
inline PartU factor(PartU packed, int i) {
    if constexpr (halves(type) && !PAIRS) return (PartU)widened<type>(packed, i);
    else if constexpr (type == WeightType::w8) return paired(packed, i);
    else if constexpr (type == WeightType::i8) return widened_bytes(packed, i);
    else return packed;
}

// sums + row * weights: a word of a row, in all lanes, times a factor(). Floats are fused multiply-adds (GCC
// and clang contract them).
template <WeightType type>
inline Part add(Part sums, PartU row, PartU weights) {
    if constexpr (type == WeightType::i8) return add_bytes(sums, row, weights);
    else if constexpr (halves(type) && PAIRS) return add_pairs(sums, row, weights);
    else return sums + (Part)row * (Part)weights;
}

// One row or channel in int8: value = scale * q with -127 <= q <= 127. A value that is not finite
// makes the scale NaN, so that the results show it; values smaller than any model's become 0.
struct Quantizer {
    float max = 0;
    bool finite = true;

    void see(float value) {
        float magnitude = std::fabs(value);
        finite &= magnitude <= FLT_MAX;
        max = magnitude > max ? magnitude : max;
    }
    float scale() const { return finite ? max / 127 : NAN; }
    float inverse() const { return finite && max > 1e-35f ? 127 / max : 0; }
};

inline Quantizer seen(const float* row, long k) {
    Vec max = {}, sum = {};
    for (long j = 0; j < k; j += LANES) {
        Vec value = k - j < LANES ? load_some(row + j, int(k - j)) : load(row + j);
        Vec magnitude = (Vec)((VecI)value & 0x7fffffff);
        max = select(magnitude > max, magnitude, max);
        sum += value * 0.0f;  // 0, or NaN if value is not finite
    }
    return {largest(max), baton::sum(sum) == 0};
}

// To the nearest, ties to even: adding 1.5 * 2^23 leaves the integer in the low bits.
inline VecI quantized(Vec values, float inverse) {
    Vec shifted = values * inverse + 12582912.0f;
    return inverse > 0 ? (VecI)shifted - 0x4b400000 : VecI{};
}

}  // namespace baton
