// Weights and rows in the form that gemm.h multiplies.
//
// A *step* is the same word (gemm_word.h) of 64 channels, 256 bytes whatever the type. A *panel* is
// all steps of 64 channels, one after another. N and K are padded with 0.
//
//     panels [N / 64][steps][64]     rows [M][steps][row_words_of(type)]
//
// bf16: rows are rounded to bf16. w8: likewise; the weights are bytes with one scale per channel.
// int8: symmetric, one scale per channel and one per row. Unless rows are signed (SIGNED_ROWS) their values
// have an offset of +128. To correct it, a panel's sums start at -128 sum(weight), which is stored after
// the panels. int32 holds a sum exactly up to K = 133,000.
#pragma once

#include <cstddef>

#include "gemm_word.h"
#include "threads.h"

namespace baton {

constexpr int CHANNELS = 64;  // of a panel

// q4, q8: what is beside the scale of each block. none: its integers are signed.
enum class Offset : int32_t { none, zeros, minima };

struct Weight {  // [N, K], packed
    WeightType type;
    long n, k;
    const void* panels;   // packed_bytes() of them, 64-byte aligned
    const float* scales;  // i8, w8: [N], else null
    const float* bias;    // [N] or null
    long block;           // q4, q8: columns that share a scale (blocks.h), else 0
    Offset offset;
    int32_t halves;       // q4, q8: whether their scales and offsets are f16 and not f32
};

inline long panels_of(long n) { return (n + CHANNELS - 1) / CHANNELS; }
inline long steps_of(WeightType type, long k) { return (k + per_word(type) - 1) / per_word(type); }

inline size_t packed_bytes(WeightType type, long n, long k) {
    long starts = type == WeightType::i8;
    return size_t(panels_of(n)) * (steps_of(type, k) + starts) * CHANNELS * sizeof(uint32_t);
}

inline uint32_t* panel_of(WeightType type, const void* panels, long k, long panel) {
    return (uint32_t*)panels + panel * steps_of(type, k) * CHANNELS;
}

// i8: where the sums of a panel start, int32 [64].
inline int32_t* starts_of(const void* panels, long n, long k, long panel) {
    return (int32_t*)panel_of(WeightType::i8, panels, k, panels_of(n)) + panel * CHANNELS;
}

// Up to 16 values of one channel, `stride` elements apart.
template <typename T>
inline Vec gather(const T* from, long stride, int count) {
    float values[LANES] = {};
    for (int i = 0; i < count; i++) values[i] = as_float(from[i * stride]);
    return load(values);
}

// The words of 16 values; i8: `flip` is xored to each byte.
template <WeightType type>
inline void put_words(uint32_t* words, Vec values, float inverse, int8_t flip = 0) {
    if constexpr (type == WeightType::f32) store((float*)words, values);
    if constexpr (type == WeightType::bf16) put_bf16(words, values);
    if constexpr (scaled(type)) {
        typedef int8_t Bytes __attribute__((vector_size(LANES)));
        Bytes bytes = __builtin_convertvector(quantized(values, inverse), Bytes) ^ flip;
        std::memcpy(words, &bytes, sizeof bytes);
    }
}

// The words of a channel of K values, CHANNELS words apart. Of bytes: returns the sum.
template <WeightType type, typename T>
inline int32_t pack_channel(const T* source, long stride, long k, uint32_t* to, float* scale) {
    Quantizer quantizer;
    if constexpr (scaled(type)) {
        for (long j = 0; j < k; j++) quantizer.see(as_float(source[j * stride]));
        *scale = quantizer.scale();
    }
    int32_t sum = 0;
    for (long j = 0; j < k; j += LANES) {
        int count = int(k - j < LANES ? k - j : LANES);
        uint32_t words[LANES];
        put_words<type>(words, gather(source + j * stride, stride, count), quantizer.inverse());
        for (long i = 0; i < steps_of(type, count); i++, to += CHANNELS) {
            *to = words[i];
            if constexpr (type == WeightType::i8)
                for (int byte = 0; byte < 32; byte += 8) sum += int8_t(words[i] >> byte);
        }
    }
    return sum;
}

// Element (i, j) of the weight [N, K] is at source[i * row_stride + j * column_stride], so one that is
// stored [K, N] packs as it is. T is float or bf16. `scales` [N] is written for bytes only.
template <WeightType type, typename T>
inline void pack_panels(const T* source, long row_stride, long column_stride, long n, long k,
                        void* panels, float* scales, const Worker& worker) {
    Range mine = share(panels_of(n), worker);
    for (long panel = mine.begin; panel < mine.end; panel++)
        for (long i = 0; i < CHANNELS; i++) {
            long channel = panel * CHANNELS + i;
            uint32_t* to = panel_of(type, panels, k, panel) + i;
            int32_t sum = 0;
            if (channel < n)
                sum = pack_channel<type>(source + channel * row_stride, column_stride, k, to,
                                         scales + channel);
            else
                for (long step = 0; step < steps_of(type, k); step++) to[step * CHANNELS] = 0;
            if constexpr (type == WeightType::i8) starts_of(panels, n, k, panel)[i] = -128 * sum;
        }
}

// Prepared rows. bf16, w8: words [M][words_of_row()]. i8: scales [M], up to a whole line of the cache,
// then words.
inline size_t scales_bytes(WeightType type, long m) {
    return type == WeightType::i8 ? (m + LANES - 1) / LANES * LANES * sizeof(float) : 0;
}

inline uint32_t* row_words(WeightType type, const void* prepared, long m) {
    return (uint32_t*)((char*)prepared + scales_bytes(type, m));
}

inline long words_of_row(WeightType type, long k) {
    return in_place(type) ? k : steps_of(type, k) * row_words_of(type);
}

inline size_t rows_bytes(WeightType type, long m, long k) {
    if (in_place(type)) return 0;
    return scales_bytes(type, m) + size_t(m) * words_of_row(type, k) * sizeof(uint32_t);
}

// The words of 16 values of a row, of int8.
inline void put_row_bytes(uint32_t* words, Vec values, float inverse) {
    constexpr int offset = SIGNED_ROWS ? 0 : 128;
    if constexpr (BYTE_WORDS == 4) {
        VecI numbers = quantized(values, inverse) + offset;
        std::memcpy(words, &numbers, sizeof numbers);
        return;
    }
    put_words<WeightType::i8>(words, values, inverse, int8_t(offset));  // flipping the highest bit adds 128
    if constexpr (BYTE_WORDS == 2)
        for (int i = LANES / 4 - 1; i >= 0; i--) {
            words[2 * i + 1] = words[i] >> 8 & 0x00ff00ff;
            words[2 * i] = words[i] & 0x00ff00ff;
        }
}

// The words of 16 values of a row.
template <WeightType type>
inline void put_row_words(uint32_t* words, Vec values, float inverse) {
    if constexpr (type == WeightType::i8) put_row_bytes(words, values, inverse);
    else if constexpr (PAIRS) put_bf16(words, values);
    else store((float*)words, rounded(values));
}

template <WeightType type>
inline void prepare_row(const float* row, long k, uint32_t* to, float* scale) {
    float inverse = 0;
    if constexpr (type == WeightType::i8) {
        Quantizer quantizer = seen(row, k);
        *scale = quantizer.scale();
        inverse = quantizer.inverse();
    }
    constexpr int words = LANES / per_word(type) * row_words_of(type);
    long j = 0;
    for (; j + LANES <= k; j += LANES, to += words)
        put_row_words<type>(to, load(row + j), inverse);
    if (j == k) return;
    uint32_t last[LANES];
    put_row_words<type>(last, load_some(row + j, int(k - j)), inverse);
    std::memcpy(to, last, words_of_row(type, k - j) * sizeof(uint32_t));
}

// Converts fp32 rows [M, K] to the form that multiply() reads, rows_bytes() long. Needs a barrier after it.
template <WeightType type>
void prepare_rows(const float* rows, long row_stride, long m, long k, void* prepared,
                  const Worker& worker) {
    Range mine = share(m, worker);
    uint32_t* words = row_words(type, prepared, m);
    for (long row = mine.begin; row < mine.end; row++)
        prepare_row<type>(rows + row * row_stride, k, words + row * words_of_row(type, k),
                          (float*)prepared + row);
}

}  // namespace baton
