// The instructions of some CPUs for words of bytes and of bf16; each has an equivalent in C++ for CPUs that
// lack it.
#pragma once

#include "gemm_word.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace baton {

// As store(bf16*, Vec), but the instruction makes denormals 0, which vdpbf16ps does anyway.
inline void put_bf16(uint32_t* words, Vec values) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    auto half = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(words, &half, sizeof half);
#else
    store((bf16*)words, values);
#endif
}

// int8: word `i` of BYTE_WORDS, with the sign of its bytes.
inline PartU widened_bytes(PartU words, int i) {
    typedef int16_t Halves __attribute__((vector_size(WIDTH * 4)));
    if constexpr (BYTE_WORDS == 1) return words;
    if constexpr (BYTE_WORDS == 2) return (PartU)((i ? (Halves)words : (Halves)(words << 8)) >> 8);
    return (PartU)((PartI)(words << (24 - 8 * i)) >> 24);
}

// int8: sums are int32, modulo 2^32. Inline assembly: with the intrinsic of vpdpbusd GCC keeps operands and sums
// in memory; and it adds two products to each other before it adds them to a sum, which keeps more of them waiting
// than there are registers.
inline Part add_bytes(Part sums, PartU row, PartU weights) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(row), "v"(weights));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(row), "x"(weights));
#elif defined(__ARM_FEATURE_DOTPROD)
    asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(row), "w"(weights));
#elif defined(__AVX512F__) ? defined(__AVX512BW__) : defined(__AVX2__)
    Part products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sums), "=&v"(products) : "v"(row), "v"(weights));
#else
    sums = (Part)((PartU)sums + row * weights);
#if defined(__x86_64__)
    asm("" : "+x"(sums));
#elif defined(__aarch64__)
    asm("" : "+w"(sums));
#endif
#endif
    return sums;
}

// Two bf16 of a row times those of the channels; the lower one is added first. Only with PAIRS.
#if defined(__AVX512BF16__) && defined(__AVX512F__)
inline Part add_pairs(Part sums, PartU row, PartU weights) {
    return (Part)_mm512_dpbf16_ps((__m512)sums, (__m512bh)row, (__m512bh)weights);
}
#endif

}  // namespace baton
