// Rows times a packed weight: out[m, n] = sum over k of rows[m, k] * weight[n, k] + bias[n].
//
// A tile of up to 6 rows and 64 channels stays in registers while the steps of a panel (gemm_pack.h)
// go by, so each output is ONE chain of additions in the order of K. Longer panels are taken in
// chunks of a fixed number of steps that fit L2; the sums wait in `out` meanwhile, unrounded. So the
// bits of an output depend on its row and its channel only: not on M, on the row's place among the
// rows, or on the number of threads.
#pragma once

#include <algorithm>

#include "gemm_pack.h"
#include "tasks.h"

namespace baton {

constexpr int ROWS = 6;         // of a tile, at most
// Steps of a chunk, and of one that is widened: 256 KiB and 128 KiB. Where registers are narrow, several passes
// go over a chunk while the next one is fetched; L2 must hold both, and has 256 KiB on older AVX2 CPUs.
constexpr long CHUNK = WIDTH == LANES ? 1024 : 256;
constexpr long WIDE = WIDTH == LANES ? 512 : 256;
constexpr long STEP_BYTES = CHANNELS * sizeof(uint32_t);
constexpr long AHEAD = 4096;    // prefetch distance in bytes
constexpr long PART_ROWS = 96;  // of a task, roughly

inline long divided(long total, long parts) { return (total + parts - 1) / parts; }

// Registers side by side for a tile of `rows`; with fewer rows there can be more.
constexpr int registers_of(int rows) {
    int registers = REGISTERS;
    while (2 * registers * rows <= ROWS * REGISTERS && 2 * registers * WIDTH <= CHANNELS)
        registers *= 2;
    return registers;
}

// How often such a tile goes over a chunk, each time for other columns.
constexpr int passes_of(int rows) { return CHANNELS / (registers_of(rows) * WIDTH); }

// Initial values of a panel's sums, and the factors and biases applied at the end, for 64 channels.
struct Edge {
    alignas(64) float start[CHANNELS] = {};  // the bias; i8: int32, -128 sum(weight)
    alignas(64) float scale[CHANNELS] = {};  // i8, w8
    alignas(64) float bias[CHANNELS] = {};   // i8, w8
};

inline Edge edge_of(const Weight& weight, long panel) {
    Edge edge;
    long first = panel * CHANNELS;
    size_t bytes = sizeof(float) * (weight.n - first < CHANNELS ? weight.n - first : CHANNELS);
    bool late = scaled(weight.type);  // the sums are scaled before the bias is added
    if (weight.bias) std::memcpy(late ? edge.bias : edge.start, weight.bias + first, bytes);
    if (late) std::memcpy(edge.scale, weight.scales + first, bytes);
    if (weight.type == WeightType::i8 && !SIGNED_ROWS)
        std::memcpy(edge.start, starts_of(weight.panels, weight.n, weight.k, panel),
                    sizeof edge.start);
    return edge;
}

// Words [rows][stride]; i8: and the scale of each row.
struct Rows {
    const uint32_t* words;
    long stride;
    const float* scales;
};

// A chunk of a panel.
struct Chunk {
    const uint32_t* words;
    long steps;
    bool first, last;
    const char* ahead;  // the address to prefetch; moves by `stride` bytes with each step of all passes
    long stride;
};

// A single tile in one pass prefetches a little ahead of itself. Of several tiles or passes each prefetches a
// part of the next chunk, which follows in memory, so that memory is busy while they multiply, and is read in
// its order: a pass reads every fourth line only.
inline void fetch_ahead(Chunk& chunk, const uint32_t* packed, long bytes, int tile, int tiles, int passes) {
    const char* words = (const char*)packed;
    const long each = bytes / chunk.steps;
    chunk.stride = divided(each, tiles);
    chunk.ahead = words + AHEAD;
    if (tiles > 1 || passes > 1) chunk.ahead = words + bytes + chunk.steps * (tile * chunk.stride);
}

// With many rows the chunk is widened once, to steps of floats, instead of once for each tile.
template <WeightType type>
inline void widen(const uint32_t* words, long steps, float* to) {
    for (const uint32_t* end = words + steps * CHANNELS; words < end; words += CHANNELS)
        for (int i = 0; i < per_word(type); i++, to += CHANNELS)
#pragma GCC unroll 16
            for (int v = 0; v < CHANNELS; v += WIDTH)
                put(to + v, widened<type>(get<PartU>(words + v), i));
}

// M rows times a chunk of a panel, as many columns at once as registers hold. `sums` [M][stride] holds
// the sums of the previous chunks. GCC keeps them in registers only if it fully unrolls the loops over
// them, and the function does nothing else.
template <WeightType type, int M>
__attribute__((noinline)) void multiply_tile(Rows rows, Chunk chunk, const float* start, float* sums,
                                             long stride) {
    constexpr int registers = registers_of(M), each = row_words_of(type);
    const long stride_ahead = divided(chunk.stride, passes_of(M));
    for (int pass = 0; pass < passes_of(M); pass++) {
        const int column = pass * registers * WIDTH;
        const uint32_t* words = chunk.words + column;
        const char* ahead = chunk.ahead + pass * chunk.steps * stride_ahead;
        Part tile[M][registers];
#pragma GCC unroll 16
        for (int r = 0; r < M; r++)
#pragma GCC unroll 16
            for (int v = 0; v < registers; v++)
                tile[r][v] = get<Part>((chunk.first ? start : sums + r * stride) + column + v * WIDTH);
        long step = 0;
        do {
#pragma GCC unroll 16
            for (int line = 0; line < registers * WIDTH * 4; line += 64)
                __builtin_prefetch(ahead + line);
#pragma GCC unroll 4
            for (int i = 0; i < each; i++) {
                PartU weights[registers];
#pragma GCC unroll 16
                for (int v = 0; v < registers; v++)
                    weights[v] = factor<type>(get<PartU>(words + v * WIDTH), i);
#pragma GCC unroll 16
                for (int r = 0; r < M; r++) {
                    PartU row = PartU{} + get<uint32_t>(rows.words + r * rows.stride + step * each + i);
#pragma GCC unroll 16
                    for (int v = 0; v < registers; v++)
                        tile[r][v] = add<type>(tile[r][v], row, weights[v]);
                }
            }
            words += CHANNELS;
            ahead += stride_ahead;
        } while (++step < chunk.steps);
#pragma GCC unroll 16
        for (int r = 0; r < M; r++)
#pragma GCC unroll 16
            for (int v = 0; v < registers; v++)
                put(sums + r * stride + column + v * WIDTH, tile[r][v]);
    }
}

template <WeightType type>
inline void multiply_tile(int m, const Rows& rows, const Chunk& chunk, const float* start,
                          float* sums, long stride) {
    switch (m) {
        case 1: return multiply_tile<type, 1>(rows, chunk, start, sums, stride);
        case 2: return multiply_tile<type, 2>(rows, chunk, start, sums, stride);
        case 3: return multiply_tile<type, 3>(rows, chunk, start, sums, stride);
        case 4: return multiply_tile<type, 4>(rows, chunk, start, sums, stride);
        case 5: return multiply_tile<type, 5>(rows, chunk, start, sums, stride);
        case 6: return multiply_tile<type, 6>(rows, chunk, start, sums, stride);
    }
}

// Turns sums into results, in place. i8: converts from int32 and scales; w8: scales.
template <WeightType type>
inline void finish(const Rows& rows, int m, const Edge& edge, float* sums, long stride) {
    for (int r = 0; r < m; r++)
        for (int i = 0; i < CHANNELS; i += LANES) {
            float* at = sums + r * stride + i;
            Vec sum = load(at);
            if constexpr (type == WeightType::i8)
                sum = __builtin_convertvector((VecI)sum, Vec) * rows.scales[r];
            store(at, sum * load(edge.scale + i) + load(edge.bias + i));
        }
}

// `m` <= ROWS rows times a chunk of a panel, of which `channels` are wanted. `form` is the type of the
// chunk: f32 where it has been widened.
template <WeightType type, WeightType form>
inline void multiply_chunk(const Rows& rows, int m, const Chunk& chunk, const Edge& edge,
                           float* out, long out_stride, int channels) {
    float padded[ROWS][CHANNELS];
    const bool whole = channels == CHANNELS;
    float* sums = whole ? out : padded[0];
    const long stride = whole ? out_stride : CHANNELS;
    for (int r = 0; r < m && !whole && !chunk.first; r++)
        std::memcpy(padded[r], out + r * out_stride, channels * sizeof(float));
    multiply_tile<form>(m, rows, chunk, edge.start, sums, stride);
    if constexpr (scaled(type))
        if (chunk.last) finish<type>(rows, m, edge, sums, stride);
    for (int r = 0; r < m && !whole; r++)
        std::memcpy(out + r * out_stride, padded[r], channels * sizeof(float));
}

// The tasks of a product: each is one panel for a part of the rows. Many rows are divided so that the
// threads finish together, few only where there are more threads than panels: each part reads its
// panel again, which costs about as much as three tiles.
class Parts {
   public:
    // See Tasks.
    void prepare(const Weight& weight, long m, int threads) {
        const long panels = panels_of(weight.n);
        const long wanted = divided(2 * threads, panels), possible = divided(m, 3 * ROWS);
        rows = m;
        parts = std::max(divided(m, PART_ROWS), std::min(wanted, possible));
        tasks.prepare(panels * parts, threads);
    }

    void begin(const Worker& worker) { tasks.begin(worker); }

    // Calls visit(panel, rows) for this thread's tasks until none is left.
    template <typename Visit>
    void each(const Worker& worker, Visit&& visit) {
        for (long task; (task = tasks.take(worker)) >= 0;)
            visit(task / parts, share(rows, {int(task % parts), int(parts)}));
    }

   private:
    Tasks tasks;
    long rows = 0, parts = 1;
};

// Of types with steps of one kind only. `form`: the type that the panel has once it is widened.
template <WeightType type, WeightType form>
inline void multiply_steps(const Weight& weight, const Rows& rows, long panel, const Range& part,
                           float* out, long out_stride) {
    constexpr bool widens = form != type;
    constexpr long each = widens ? per_word(type) : 1;  // steps that one step of the weight widens to
    constexpr long most = widens ? WIDE / each : CHUNK;
    alignas(64) float wide[widens ? WIDE * CHANNELS : 1];
    const long steps = steps_of(type, weight.k);
    const long count = part.end - part.begin;
    const uint32_t* words = panel_of(type, weight.panels, weight.k, panel);
    const Edge edge = edge_of(weight, panel);
    const long first = panel * CHANNELS;
    const int channels = int(weight.n - first < CHANNELS ? weight.n - first : CHANNELS);
    for (long step = 0; step < steps; step += most) {
        const uint32_t* packed = words + step * CHANNELS;
        const long some_steps = steps - step < most ? steps - step : most;
        if constexpr (widens) widen<type>(packed, some_steps, wide);
        Chunk chunk{widens ? (const uint32_t*)wide : packed, some_steps * each, step == 0,
                    step + most >= steps, nullptr, 0};
        for (int tile = 0, tiles = int(divided(count, ROWS)); tile < tiles; tile++) {
            Range some = share(count, {tile, tiles});  // as even as possible, all <= ROWS
            long row = part.begin + some.begin;
            const int m = int(some.end - some.begin);
            fetch_ahead(chunk, packed, some_steps * STEP_BYTES, tile, tiles, passes_of(m));
            Rows here{rows.words + row * rows.stride + step * row_words_of(type), rows.stride,
                      rows.scales + row};
            multiply_chunk<type, form>(here, m, chunk, edge, out + row * out_stride, out_stride, channels);
        }
    }
}

// q4 and q8: in gemm_blocks.h.
template <WeightType type>
void multiply_blocks(const Weight& weight, const Rows& rows, long panel, const Range& part, float* out,
                     long out_stride);

// One task, to `out`, where the panel's channels begin. `form`: see multiply_steps().
template <WeightType type, WeightType form>
inline void multiply_part(const Weight& weight, const Rows& rows, long panel, const Range& part,
                          float* out, long out_stride) {
    if constexpr (blocked(type)) return multiply_blocks<type>(weight, rows, panel, part, out, out_stride);
    else return multiply_steps<type, form>(weight, rows, panel, part, out, out_stride);
}

template <WeightType type, WeightType form = type>
inline void multiply_parts(const Weight& weight, const Rows& rows, float* out, long out_stride,
                           Parts& parts, const Worker& worker) {
    parts.each(worker, [&](long panel, const Range& part) {
        multiply_part<type, form>(weight, rows, panel, part, out + panel * CHANNELS, out_stride);
    });
}

// out [M, N] = rows [M, K] @ weight.T + bias, this thread's tasks of `parts`.
// `rows` where they are multiplied in place, else `prepared` by prepare_rows().
template <WeightType type>
void multiply(const Weight& weight, const float* rows, long row_stride, const void* prepared, long m,
              float* out, long out_stride, Parts& parts, const Worker& worker) {
    if constexpr (in_place(type)) {
        Rows words{(const uint32_t*)rows, row_stride, nullptr};
        multiply_parts<type>(weight, words, out, out_stride, parts, worker);
    } else {
        Rows words{row_words(type, prepared, m), words_of_row(type, weight.k), (const float*)prepared};
        if constexpr (halves(type) && !PAIRS)
            if (m > 8 * ROWS)
                return multiply_parts<type, WeightType::f32>(weight, words, out, out_stride, parts, worker);
        multiply_parts<type>(weight, words, out, out_stride, parts, worker);
    }
}

}  // namespace baton
