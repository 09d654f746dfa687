// Products of weights that have a scale for each block of columns (blocks.h).
//
// Each integer becomes the float that it stands for, in a register, and is multiplied as that: an output is one
// chain of additions in the order of K, as in gemm_tile.h. So a product has the bits of one with the same
// weights in f32. One or two rows are multiplied while a block is read; for more of them some columns
// are widened to floats first, which L1 holds.
#pragma once

#include "blocks.h"
#include "gemm_tile.h"

namespace baton {

constexpr int DIRECT_ROWS = 2;
constexpr int BLOCK_REGISTERS = 4;   // channels side by side, in registers
constexpr long WIDE_COLUMNS = 64;    // widened at a time: 16 KiB
constexpr long MANY_COLUMNS = 256;   // the same with several tiles of rows

// 16-bit floats of some channels.
inline Part widened_halves(PartH halves) {
#if defined(__AVX512F__)
    Part result;
    asm("vcvtph2ps %1, %0" : "=v"(result) : "v"(halves));
    return result;
#elif defined(__F16C__) && defined(__AVX__)
    Part result;
    asm("vcvtph2ps %1, %0" : "=x"(result) : "x"(halves));
    return result;
#else
    PartU words = __builtin_convertvector(halves, PartU);
    Part magnitude = (Part)((words & 0x7fff) << 13) * 0x1p112f;
    return (Part)((PartU)magnitude | (words & 0x8000) << 16);
#endif
}

// Scales or offsets of WIDTH channels from number `i` on.
inline Part sides(const char* from, long i, bool halves) {
    return halves ? widened_halves(get<PartH>(from + 2 * i)) : get<Part>(from + 4 * i);
}

// Integer `i` of each word, as a float.
template <WeightType type, bool is_signed>
inline Part number(PartU words, int i) {
    constexpr int bits = bits_of(type);
#if defined(__AVX512F__)
    if constexpr (type == WeightType::q4) {  // a table of 16 floats, of which the lowest 4 bits choose
        constexpr float above = is_signed ? -8 : 8;
        const Part table = {0, 1, 2, 3, 4, 5, 6, 7, above, above + 1, above + 2, above + 3,
                            above + 4, above + 5, above + 6, above + 7};
        Part result;
        asm("vpermps %2, %1, %0" : "=v"(result) : "v"(words >> (bits * i)), "v"(table));
        return result;
    }
#endif
    if constexpr (is_signed)
        return __builtin_convertvector((PartI)(words << (32 - bits - bits * i)) >> (32 - bits), Part);
    return __builtin_convertvector((PartI)(words >> (bits * i) & ((1u << bits) - 1)), Part);
}

template <WeightType type, Offset offset>
inline Part restored(PartU words, int i, Part scale, Part beside) {
    const Part bare = number<type, offset == Offset::none>(words, i);
    if constexpr (offset == Offset::minima) return bare * scale + beside;
    else if constexpr (offset == Offset::zeros) return (bare - beside) * scale;
    else return bare * scale;
}

// M rows times `columns` of a block, for BLOCK_REGISTERS * WIDTH channels. `head`: their scales; `steps`: their
// words; `sums` [M][stride] are those of the columns before.
template <WeightType type, Offset offset, int M>
__attribute__((noinline)) void multiply_block(const char* head, long beside, bool halves, const uint32_t* steps,
                                              long columns, const float* rows, long row_stride, float* sums,
                                              long stride) {
    constexpr int each = per_word(type);
    Part scale[BLOCK_REGISTERS], offsets[BLOCK_REGISTERS] = {}, tile[M][BLOCK_REGISTERS];
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_REGISTERS; v++) {
        scale[v] = sides(head, v * WIDTH, halves);
        if constexpr (offset != Offset::none) offsets[v] = sides(head + beside, v * WIDTH, halves);
#pragma GCC unroll 2
        for (int r = 0; r < M; r++) tile[r][v] = get<Part>(sums + r * stride + v * WIDTH);
    }
    for (const uint32_t* end = steps + columns / per_word(type) * CHANNELS; steps < end; steps += CHANNELS) {
#pragma GCC unroll 4
        for (int line = 0; line < BLOCK_REGISTERS * WIDTH * 4; line += 64)
            __builtin_prefetch((const char*)steps + AHEAD + line);
        PartU words[BLOCK_REGISTERS];
#pragma GCC unroll 4
        for (int v = 0; v < BLOCK_REGISTERS; v++) words[v] = get<PartU>(steps + v * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < each; i++) {
            Part weights[BLOCK_REGISTERS];
#pragma GCC unroll 4
            for (int v = 0; v < BLOCK_REGISTERS; v++)
                weights[v] = restored<type, offset>(words[v], i, scale[v], offsets[v]);
#pragma GCC unroll 2
            for (int r = 0; r < M; r++) {
                const Part row = get<float>(rows + r * row_stride + i) - Part{};
#pragma GCC unroll 4
                for (int v = 0; v < BLOCK_REGISTERS; v++) tile[r][v] = tile[r][v] + row * weights[v];
            }
        }
        rows += per_word(type);
    }
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_REGISTERS; v++)
#pragma GCC unroll 2
        for (int r = 0; r < M; r++) put(sums + r * stride + v * WIDTH, tile[r][v]);
}

// Columns of a panel in floats, steps of f32, from inside one block on or over several.
template <WeightType type, Offset offset>
inline void widen_block(const char* head, long beside, bool halves, const uint32_t* steps, long columns, float* to) {
    constexpr int each = per_word(type);
    for (int v = 0; v < CHANNELS; v += WIDTH) {
        const Part scale = sides(head, v, halves);
        const Part offsets = offset == Offset::none ? Part{} : sides(head + beside, v, halves);
        for (long step = 0; step < columns / per_word(type); step++) {
            const PartU words = get<PartU>(steps + step * CHANNELS + v);
#pragma GCC unroll 8
            for (int i = 0; i < each; i++)
                put(to + (step * each + i) * CHANNELS + v,
                    restored<type, offset>(words, i, scale, offsets));
        }
    }
}

// Calls visit(head, steps, columns) for the parts of a panel's blocks that lie in columns [begin, end).
template <WeightType type, typename Visit>
inline void each_block(const Weight& weight, const char* panel, long begin, long end, Visit&& visit) {
    const long whole = block_bytes(weight, weight.block);
    for (long at = begin; at < end;) {
        const long inside = at % weight.block, columns = std::min(weight.block - inside, end - at);
        const char* head = panel + at / weight.block * whole;
        const char* steps = head + head_bytes(weight) + inside / per_word(type) * STEP_BYTES;
        visit(head, (const uint32_t*)steps, columns);
        at += columns;
    }
}

// All columns of a panel at once, for M rows.
template <WeightType type, Offset offset, int M>
inline void multiply_rows(const Weight& weight, const char* panel, const Edge& edge, const float* rows,
                          long row_stride, float* out, long out_stride, int channels) {
    alignas(64) float sums[M][CHANNELS];
    for (int r = 0; r < M; r++) std::memcpy(sums[r], edge.start, sizeof sums[r]);
    const long beside = side_bytes(weight);
    const bool halves = weight.halves;
    each_block<type>(weight, panel, 0, weight.k, [&](const char* head, const uint32_t* steps, long columns) {
        for (int v = 0; v < CHANNELS; v += BLOCK_REGISTERS * WIDTH)
            multiply_block<type, offset, M>(head + v * (halves ? 2 : 4), beside, halves, steps + v, columns, rows,
                                            row_stride, sums[0] + v, CHANNELS);
        rows += columns;
    });
    for (int r = 0; r < M; r++) std::memcpy(out + r * out_stride, sums[r], channels * sizeof(float));
}

// Many rows: some columns are widened, and multiplied as floats.
template <WeightType type, Offset offset>
inline void multiply_widened(const Weight& weight, const char* panel, const Edge& edge, const Rows& rows,
                             const Range& part, float* out, long out_stride, int channels) {
    alignas(64) float wide[MANY_COLUMNS * CHANNELS];
    const long count = part.end - part.begin, beside = side_bytes(weight);
    const int tiles = int(divided(count, ROWS));
    const long most = tiles > 1 ? MANY_COLUMNS : WIDE_COLUMNS;
    for (long begin = 0; begin < weight.k; begin += most) {
        const long end = std::min(begin + most, weight.k);
        float* to = wide;
        const char* packed = nullptr;
        each_block<type>(weight, panel, begin, end, [&](const char* head, const uint32_t* steps, long columns) {
            widen_block<type, offset>(head, beside, weight.halves, steps, columns, to);
            to += columns * CHANNELS;
            packed = (const char*)(steps + columns / per_word(type) * CHANNELS);
        });
        Chunk chunk{(const uint32_t*)wide, end - begin, begin == 0, end == weight.k, nullptr, 0};
        for (int tile = 0; tile < tiles; tile++) {
            Range some = share(count, {tile, tiles});
            const long row = part.begin + some.begin;
            // What follows in memory, a part of it with each tile.
            chunk.stride = divided((bits_of(type) + 1) * CHANNELS / 8, tiles);
            chunk.ahead = packed + tile * chunk.steps * chunk.stride;
            Rows here{rows.words + row * rows.stride + begin, rows.stride, nullptr};
            multiply_chunk<WeightType::f32, WeightType::f32>(here, int(some.end - some.begin), chunk, edge,
                                                             out + row * out_stride, out_stride, channels);
        }
    }
}

template <WeightType type, Offset offset>
inline void multiply_offset(const Weight& weight, const Rows& rows, long panel, const Range& part, float* out,
                            long out_stride) {
    const char* packed = (const char*)weight.panels + panel * panel_bytes(weight);
    const Edge edge = edge_of(weight, panel);
    const int channels = int(std::min<long>(weight.n - panel * CHANNELS, CHANNELS));
    const float* first = (const float*)rows.words + part.begin * rows.stride;
    float* to = out + part.begin * out_stride;
    switch (part.end - part.begin) {
        case 0: return;
        case 1:
            return multiply_rows<type, offset, 1>(weight, packed, edge, first, rows.stride, to, out_stride, channels);
        case 2:
            return multiply_rows<type, offset, 2>(weight, packed, edge, first, rows.stride, to, out_stride, channels);
        default: return multiply_widened<type, offset>(weight, packed, edge, rows, part, out, out_stride, channels);
    }
}

template <WeightType type>
void multiply_blocks(const Weight& weight, const Rows& rows, long panel, const Range& part, float* out,
                     long out_stride) {
    switch (weight.offset) {
        case Offset::none: return multiply_offset<type, Offset::none>(weight, rows, panel, part, out, out_stride);
        case Offset::zeros: return multiply_offset<type, Offset::zeros>(weight, rows, panel, part, out, out_stride);
        case Offset::minima: return multiply_offset<type, Offset::minima>(weight, rows, panel, part, out, out_stride);
    }
}

}  // namespace baton
