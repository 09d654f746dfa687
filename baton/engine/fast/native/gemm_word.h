// A word: 32 bits of one output channel (or one row) along K, that is 1 float, 2 bf16 or 4 bytes; and
// the instruction that multiplies 16 of them. The only place with instructions by name: each stands
// beside the same thing in C++, for CPUs that lack it.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vec.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace baton {

enum class WeightType : int { f32 = 0, bf16 = 1, i8 = 2 };

constexpr int per_word(WeightType type) {
    return type == WeightType::f32 ? 1 : type == WeightType::bf16 ? 2 : 4;
}

inline VecU all_words(const void* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    return VecU{} + word;
}

inline VecU load_words(const uint32_t* from) {
    VecU words;
    std::memcpy(&words, from, sizeof words);
    return words;
}

// As store(bf16*, Vec), but the instruction makes denormals 0, which vdpbf16ps does anyway.
inline void put_bf16(uint32_t* words, Vec values) {
#ifdef __AVX512BF16__
    auto half = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(words, &half, sizeof half);
#else
    store((bf16*)words, values);
#endif
}

// sums + row * weights, where `row` is one word of a row and `weights` one of each of 16 channels.
// Floats are fused multiply-adds (GCC and clang contract them); bf16 pairs are added low, then high.
template <WeightType type>
inline Vec add_products(Vec sums, const uint32_t* row, VecU weights) {
    VecU word = all_words(row);
    if constexpr (type == WeightType::f32) {
        return sums + (Vec)word * (Vec)weights;
    } else if constexpr (type == WeightType::bf16) {
#ifdef __AVX512BF16__
        return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)word, (__m512bh)weights);
#else
        sums += (Vec)(word << 16) * (Vec)(weights << 16);
        return sums + (Vec)(word & 0xffff0000) * (Vec)(weights & 0xffff0000);
#endif
    } else {  // bytes of the row are unsigned, those of the weight signed; sums are int32, modulo 2^32
#ifdef __AVX512VNNI__
        // As text, for GCC takes the intrinsic's operands from memory and keeps sums there.
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(word), "v"(weights));
        return sums;
#else
        VecU total = (VecU)sums;
        for (int shift = 24; shift >= 0; shift -= 8)
            total += (VecU)((VecI)(weights << shift) >> 24) * ((word << shift) >> 24);
        return (Vec)total;
#endif
    }
}

// One row or channel in int8: value = scale * q with -127 <= q <= 127. What is not finite makes the
// scale NaN, so that the results show it; what is smaller than any model's values is 0.
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
        sum += value * 0.0f;  // 0, or NaN for what is not finite
    }
    return {largest(max), baton::sum(sum) == 0};
}

// To the nearest, ties to even: adding 1.5 * 2^23 leaves the integer in the low bits.
inline VecI quantized(Vec values, float inverse) {
    Vec shifted = values * inverse + 12582912.0f;
    return inverse > 0 ? (VecI)shifted - 0x4b400000 : VecI{};
}

}  // namespace baton
