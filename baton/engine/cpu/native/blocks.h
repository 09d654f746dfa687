// Weights of 4 and 8 bits with a scale for each block of columns, as quantized checkpoints have them.
//
// A step is a word of 64 channels as in gemm_pack.h: 8 or 4 integers of one channel along K, the first in the
// lowest bits. A block is the scales of 64 channels, their offsets if there are any, and the steps of its
// columns; the last one of a panel may have fewer columns than the others.
//
//     panels [N / 64][blocks] { scales [64], offsets [64], steps [columns / per_word(type)][64] }
//
// K and the columns of a block are multiples of 8. Scales and offsets are f16 if `halves`, else f32. What an
// integer q means depends on Weight::offset:
//
//     none     q * scale              q is signed, the others not
//     zeros    (q - zero) * scale
//     minima   q * scale + minimum
//
// baton/engine/cpu/blocks.py packs them, and only such that this is exact but for one rounding to f32. So the
// floats are those that the checkpoint is restored to, on every CPU.
#pragma once

#include <algorithm>

#include "gemm_pack.h"

namespace baton {

constexpr int bits_of(WeightType type) { return type == WeightType::q4 ? 4 : 8; }

inline long side_bytes(const Weight& weight) { return CHANNELS * (weight.halves ? 2 : 4); }

// Of what precedes the steps of a block.
inline long head_bytes(const Weight& weight) {
    return side_bytes(weight) * (weight.offset == Offset::none ? 1 : 2);
}

// Of a block that has `columns`.
inline long block_bytes(const Weight& weight, long columns) {
    return head_bytes(weight) + steps_of(weight.type, columns) * CHANNELS * long(sizeof(uint32_t));
}

inline long panel_bytes(const Weight& weight) {
    const long whole = weight.k / weight.block, rest = weight.k % weight.block;
    return whole * block_bytes(weight, weight.block) + (rest ? block_bytes(weight, rest) : 0);
}

inline size_t blocks_bytes(const Weight& weight) {
    return size_t(panels_of(weight.n)) * panel_bytes(weight);
}

// The float of 16 bits. 2^112 moves its exponent to where floats have it, and is exact for the smallest, too.
inline float as_float(uint16_t half) {
    uint32_t bits = uint32_t(half & 0x7fff) << 13;
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude *= 0x1p112f;
    return half & 0x8000 ? -magnitude : magnitude;
}

// Scale or offset number `i` of a block's 64.
inline float side(const char* from, long i, bool halves) {
    return halves ? as_float(get<uint16_t>(from + 2 * i)) : get<float>(from + 4 * i);
}

// One channel in floats, K of them.
inline void unpack_channel(const Weight& weight, long channel, float* to) {
    const int bits = bits_of(weight.type), each = per_word(weight.type);
    const bool is_signed = weight.offset == Offset::none;
    const long lane = channel % CHANNELS;
    const char* block = (const char*)weight.panels + channel / CHANNELS * panel_bytes(weight);
    for (long begin = 0; begin < weight.k; begin += weight.block) {
        const long columns = std::min(weight.block, weight.k - begin);
        const float scale = side(block, lane, weight.halves);
        const float beside = is_signed ? 0.0f : side(block + side_bytes(weight), lane, weight.halves);
        const char* word = block + head_bytes(weight) + lane * sizeof(uint32_t);
        for (long j = 0; j < columns; j++) {
            const uint32_t bare = get<uint32_t>(word + j / each * CHANNELS * sizeof(uint32_t));
            const uint32_t high = bare << (32 - bits - j % each * bits);  // the integer is in the highest bits
            const float number = is_signed ? float(int32_t(high) >> (32 - bits)) : float(high >> (32 - bits));
            to[begin + j] = weight.offset == Offset::minima ? number * scale + beside : (number - beside) * scale;
        }
        block += block_bytes(weight, columns);
    }
}

}  // namespace baton
