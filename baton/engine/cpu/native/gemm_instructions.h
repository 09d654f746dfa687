// The instructions of some CPUs for words of bytes and of bf16; each has an equivalent in C++ for CPUs that
// lack it.
#pragma once

#include "gemm_word.h"

#if defined(__AVX2__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace baton {

// As store(bf16*, Vec), but the instruction makes denormals 0, which vdpbf16ps does anyway.
inline void put_bf16(uint32_t* words, Vec values) {
#ifdef __AVX512BF16__
    auto half = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(words, &half, sizeof half);
#else
    store((bf16*)words, values);
#endif
}

// int8: bytes of the row are unsigned, those of the weights signed; sums are int32, modulo 2^32.
inline Part add_bytes(Part sums, PartU row, PartU weights) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    // Inline assembly: with the intrinsic GCC keeps operands and sums in memory.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(row), "v"(weights));
    return sums;
#elif defined(__AVXVNNI__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(row), "x"(weights));
    return sums;
#elif defined(__AVX2__) && !defined(__AVX512F__)
    typedef int16_t Half __attribute__((vector_size(WIDTH * 4)));  // even and odd bytes, widened
    __m256i even = _mm256_madd_epi16((__m256i)(row & 0x00ff00ff), (__m256i)((Half)(weights << 8) >> 8));
    __m256i odd = _mm256_madd_epi16((__m256i)((row >> 8) & 0x00ff00ff), (__m256i)((Half)weights >> 8));
    return (Part)((PartU)sums + (PartU)even + (PartU)odd);
#else
    PartU total = (PartU)sums;
    for (int shift = 24; shift >= 0; shift -= 8)
        total += (PartU)((PartI)(weights << shift) >> 24) * ((row << shift) >> 24);
    return (Part)total;
#endif
}

// Two bf16 of a row times those of the channels; the lower one is added first. Only with PAIRS.
#if defined(__AVX512BF16__) && defined(__AVX512F__)
inline Part add_pairs(Part sums, PartU row, PartU weights) {
    return (Part)_mm512_dpbf16_ps((__m512)sums, (__m512bh)row, (__m512bh)weights);
}
#endif

}  // namespace baton
