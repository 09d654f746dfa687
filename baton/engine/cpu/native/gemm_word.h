// A word: 32 bits of one output channel (or one row) along K, that is 1 float, 2 bf16 or 4 bytes; and
// the instruction that multiplies 16 of them. w8 (weight-only) has bytes in the weights, bf16 in the
// rows, so several words of a row are multiplied by one of a channel.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace baton {

enum class WeightType : int { f32 = 0, bf16 = 1, i8 = 2, w8 = 3 };

constexpr int per_word(WeightType type) {
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

// Words of a row for each word of a channel.
constexpr int row_words_of(WeightType type) {
    return halves(type) ? per_word(type) / (PAIRS ? 2 : 1) : 1;
}

// Bytes, and a scale for each channel.
constexpr bool scaled(WeightType type) { return type == WeightType::i8 || type == WeightType::w8; }

// In gemm_instructions.h. Products of floats do without it: compiling its headers takes as long as they do.
void put_bf16(uint32_t* words, Vec values);
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

// A step's weights in the form in which they are multiplied, made once for all rows of a tile.
template <WeightType type>
struct Step {
    static constexpr int parts = row_words_of(type);
    PartU part[parts];  // each is multiplied by a word of a row
    Step() = default;

    explicit Step(PartU packed) {
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            if constexpr (halves(type) && !PAIRS) part[i] = (PartU)widened<type>(packed, i);
            else if constexpr (type == WeightType::w8) part[i] = paired(packed, i);
            else part[i] = packed;
    }

    // sums + row * weights: `parts` words of a row times the words of WIDTH channels. Floats are fused
    // multiply-adds (GCC and clang contract them).
    Part add(Part sums, const uint32_t* from) const {
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++) {
            PartU row = PartU{} + get<uint32_t>(from + i);
            if constexpr (type == WeightType::i8) sums = add_bytes(sums, row, part[i]);
            else if constexpr (halves(type) && PAIRS) sums = add_pairs(sums, row, part[i]);
            else sums += (Part)row * (Part)part[i];
        }
        return sums;
    }
};

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
