// Paged attention on CPUs: a ragged batch of queries over keys and values in blocks of a pool.
//
// A tile is some queries of one sequence, for some of its kv heads. It meets its keys in stretches
// of 64 positions counted from the sequence's first token, so that what a query gets, to the bit, is
// the same alone, in a chunk of any size, beside any neighbours and on any number of threads.
#pragma once

#include <algorithm>
#include <cstddef>

#include "attention_tile.h"
#include "threads.h"

namespace baton {

struct AttentionBatch {            // as baton.engine.batch.Batch
    long sequences;
    const int32_t* query_offsets;    // [B + 1]
    const int32_t* context_lengths;  // [B]: tokens of each sequence once these are in
    const int32_t* block_table;      // [B, table_width]
    long table_width, block_size;
    const int64_t* slots;            // [T]: block * block_size + position within the block
};

enum class CacheType : int { f32 = 0, bf16 = 1 };

struct AttentionLayer {
    CacheType type;
    void* keys;    // [blocks, block_size, kv_heads, key_dim]
    void* values;  // [blocks, block_size, kv_heads, value_dim]
    long heads, kv_heads, key_dim, value_dim;
    float scaling;
    long window;         // 0: none; a query sees itself and the window - 1 before it
    float softcap;       // 0: none
    const float* sinks;  // [heads] or null
};

constexpr long TILE_ROWS = 64;

// Queries [first, first + queries) of a sequence, for kv heads [head, head + heads).
struct Tile {
    long sequence, first, queries, head, heads;
};

// Where one thread keeps what it works on.
struct AttentionScratch {
    long rows, width;  // width: value_dim rounded up to LANES
    float *keys, *values, *scores, *queries, *outputs, *weights, *largest;

    explicit AttentionScratch(const AttentionLayer& layer) {
        rows = std::max(TILE_ROWS, layer.heads / layer.kv_heads);
        width = (layer.value_dim + LANES - 1) / LANES * LANES;
    }

    // Places everything from `memory` on; returns the bytes that takes.
    size_t place(const AttentionLayer& layer, void* memory) {
        char* start = static_cast<char*>(memory);
        char* at = start;
        auto take = [&](float*& part, long floats) {
            part = reinterpret_cast<float*>(at);
            at += (floats * sizeof(float) + 63) / 64 * 64;
        };
        take(keys, layer.key_dim * STRETCH);
        take(values, STRETCH * width);
        take(scores, BLOCK_ROWS * STRETCH);
        take(queries, rows * layer.key_dim);
        take(outputs, rows * width);
        take(weights, rows * LANES);
        take(largest, rows);
        return at - start;
    }
};

// Bytes of scratch a thread needs; it begins at a multiple of 64.
inline size_t attention_scratch_bytes(const AttentionLayer& layer) {
    alignas(64) static char nowhere[64];
    return AttentionScratch(layer).place(layer, nowhere);
}

// First and one past the last position that query `query` of a sequence sees.
inline Range seen(const AttentionLayer& layer, const AttentionBatch& batch, long sequence,
                  long query) {
    long count = batch.query_offsets[sequence + 1] - batch.query_offsets[sequence];
    long end = batch.context_lengths[sequence] - count + query + 1;
    return {layer.window > 0 ? std::max(0L, end - layer.window) : 0, end};
}

inline Range seen(const AttentionLayer& layer, const AttentionBatch& batch, const Tile& tile) {
    return {seen(layer, batch, tile.sequence, tile.first).begin,
            seen(layer, batch, tile.sequence, tile.first + tile.queries - 1).end};
}

// One thread's tiles, in the order of the batch: contiguous shares of about equal work.
class Tiles {
   public:
    Tiles(const AttentionLayer& layer, const AttentionBatch& batch, const Worker& worker)
        : layer(layer), batch(batch), group(layer.heads / layer.kv_heads) {
        long total = 0;
        Tile tile{0, 0, 0, 0, 0};
        while (step(tile)) total += cost(tile) * layer.kv_heads;
        share_begin = total / worker.threads * worker.thread +
                      total % worker.threads * worker.thread / worker.threads;
        share_end = total / worker.threads * (worker.thread + 1) +
                    total % worker.threads * (worker.thread + 1) / worker.threads;
        at = {0, 0, 0, 0, 0};
    }

    // False when there are no more.
    bool next(Tile& tile) {
        while (head == head_end) {
            if (!step(at)) return false;
            long each = cost(at);
            auto heads_before = [&](long work) {
                return std::clamp((work - done + each - 1) / each, 0L, layer.kv_heads);
            };
            head = heads_before(share_begin);
            head_end = heads_before(share_end);
            done += each * layer.kv_heads;
        }
        long together = std::max(1L, TILE_ROWS / (at.queries * group));
        tile = {at.sequence, at.first, at.queries, head, std::min(together, head_end - head)};
        head += tile.heads;
        return true;
    }

   private:
    // On to the next queries, of all heads.
    bool step(Tile& tile) const {
        tile.first += tile.queries;
        for (; tile.sequence < batch.sequences; tile.sequence++, tile.first = 0) {
            const int32_t* offset = batch.query_offsets + tile.sequence;
            long left = offset[1] - offset[0] - tile.first;
            tile.queries = std::min(left, std::max(1L, TILE_ROWS / group));
            if (left > 0) return true;
        }
        return false;
    }

    // Of one head: to lay out a key and a value is as much work as a dozen rows.
    long cost(const Tile& tile) const {
        Range keys = seen(layer, batch, tile);
        return (keys.end - keys.begin) * (tile.queries * group + 12);
    }

    const AttentionLayer& layer;
    const AttentionBatch& batch;
    long group, share_begin, share_end, done = 0, head = 0, head_end = 0;
    Tile at;
};

// Positions base + [begin, end) of a sequence: where they are in the pool.
struct Stretch {
    long base;
    int begin, end;
    int64_t slots[STRETCH];

    Stretch() : base(0), begin(0), end(0) {}

    Stretch(const AttentionBatch& batch, long sequence, long base, const Range& keys)
        : base(base),
          begin(int(std::max(keys.begin - base, 0L))),
          end(int(std::min(keys.end - base, long(STRETCH)))) {
        const int32_t* table = batch.block_table + sequence * batch.table_width;
        long block = (base + begin) / batch.block_size, within = (base + begin) % batch.block_size;
        for (int i = begin; i < end; i++) {
            slots[i] = table[block] * int64_t(batch.block_size) + within;
            if (++within == batch.block_size) block++, within = 0;
        }
    }
};

inline long first_stretch(const Range& keys) { return keys.begin / STRETCH * STRETCH; }

// Rows of one kv head, query by query, meet the stretch that is in scratch.
inline void meet(const AttentionLayer& layer, const AttentionBatch& batch, const Tile& tile,
                 const Stretch& stretch, const AttentionScratch& scratch, long first_row) {
    long group = layer.heads / layer.kv_heads, count = tile.queries * group;
    int vectors = int(scratch.width / LANES);
    auto span = [&](long row) {
        Range all = seen(layer, batch, tile.sequence, tile.first + row / group);
        return Range{std::max(all.begin - stretch.base, 0L),
                     std::min(all.end - stretch.base, long(STRETCH))};
    };
    long row = 0;
    while (row < count && span(row).end <= 0) row++;  // queries before this stretch
    while (count > row && span(count - 1).begin >= STRETCH) count--;  // and far behind it
    for (int rows; row < count; row += rows) {
        long blocks = (count - row + BLOCK_ROWS - 1) / BLOCK_ROWS;
        rows = int((count - row + blocks - 1) / blocks);  // none much smaller than the others
        long from = span(row).begin, until = span(row + rows - 1).end;  // of all rows together
        long all_from = span(row + rows - 1).begin, all_until = span(row).end;  // what each sees
        long at = from / LANES * LANES;
        const float* queries = scratch.queries + (first_row + row) * layer.key_dim;
        std::memset(scratch.scores, 0, rows * STRETCH * sizeof(float));
        add_products(rows, queries, layer.key_dim, scratch.keys + at, STRETCH, scratch.scores + at,
                     STRETCH, layer.key_dim, int((until - at + LANES - 1) / LANES));
        float* outputs = scratch.outputs + (first_row + row) * scratch.width;
        auto add_values = [&](int first, int many, long begin, long end) {
            if (begin < end)
                add_products(many, scratch.scores + first * STRETCH + begin, STRETCH,
                             scratch.values + begin * scratch.width, scratch.width,
                             outputs + first * scratch.width, scratch.width, end - begin, vectors);
        };
        for (int i = 0; i < rows; i++) {
            Range keys = span(row + i);
            long index = first_row + row + i;
            RowState state{scratch.largest[index], scratch.weights + index * LANES,
                           outputs + i * scratch.width};
            weigh(scratch.scores + i * STRETCH, int(keys.begin), int(keys.end), layer.softcap,
                  state, vectors);
            scratch.largest[index] = state.largest;
            add_values(i, 1, keys.begin, std::min(all_from, keys.end));
        }
        add_values(0, rows, all_from, all_until);
        for (int i = 0; i < rows; i++)
            add_values(i, 1, std::max(std::min(all_from, span(row + i).end), all_until),
                       span(row + i).end);
    }
}

template <typename T>
void attend_tile(const AttentionLayer& layer, const AttentionBatch& batch, const Tile& tile,
                 const Tile* after, const float* q, long q_stride, float* out, long out_stride,
                 const AttentionScratch& scratch) {
    long group = layer.heads / layer.kv_heads, rows = tile.queries * group;
    long token = batch.query_offsets[tile.sequence] + tile.first;
    auto each_row = [&](auto&& visit) {
        for (long h = 0, row = 0; h < tile.heads; h++)
            for (long i = 0; i < tile.queries; i++)
                for (long g = 0; g < group; g++, row++)
                    visit(row, token + i, (tile.head + h) * group + g);
    };
    each_row([&](long row, long index, long head) {
        const float* from = q + index * q_stride + head * layer.key_dim;
        float* to = scratch.queries + row * layer.key_dim;
        for (long d = 0; d < layer.key_dim; d++) to[d] = from[d] * layer.scaling;
        std::fill_n(scratch.weights + row * LANES, LANES, 0.0f);
        std::fill_n(scratch.outputs + row * scratch.width, scratch.width, 0.0f);
        scratch.largest[row] = -INFINITY;
    });

    Range keys = seen(layer, batch, tile);
    Stretch now(batch, tile.sequence, first_stretch(keys), keys), next;
    for (;; now = next) {
        bool last = now.base + STRETCH >= keys.end;
        const Tile* coming = last ? after : &tile;
        if (coming != nullptr) {
            Range its = seen(layer, batch, *coming);
            next = Stretch(batch, coming->sequence, last ? first_stretch(its) : now.base + STRETCH,
                           its);
        }
        for (long h = 0; h < tile.heads; h++) {
            int next_end = coming != nullptr && h < coming->heads ? next.end : 0;
            auto stage = [&](const void* pool, long dim) {
                const T* start = static_cast<const T*>(pool);
                const T* then = start + (coming != nullptr ? coming->head + h : 0) * dim;
                return CacheRows<T>{start + (tile.head + h) * dim, layer.kv_heads * dim, now.slots,
                               now.begin, now.end, then, next.slots, next.begin, next_end};
            };
            stage_keys(stage(layer.keys, layer.key_dim), layer.key_dim, scratch.keys);
            stage_values(stage(layer.values, layer.value_dim), layer.value_dim, scratch.width,
                         scratch.values);
            meet(layer, batch, tile, now, scratch, h * rows);
        }
        if (last) break;
    }

    each_row([&](long row, long index, long head) {
        RowState state{scratch.largest[row], scratch.weights + row * LANES,
                       scratch.outputs + row * scratch.width};
        finish(state, layer.sinks ? layer.sinks + head : nullptr, layer.value_dim,
               out + index * out_stride + head * layer.value_dim);
    });
}

// Every query of the batch attends to its keys; write_kv and a barrier came before.
// q [T, heads * key_dim], out [T, heads * value_dim], strides in floats.
inline void attend(const AttentionLayer& layer, const AttentionBatch& batch, const float* q,
                   long q_stride, float* out, long out_stride, void* memory, const Worker& worker) {
    AttentionScratch scratch(layer);
    scratch.place(layer, memory);
    Tiles tiles(layer, batch, worker);
    Tile now, after;
    for (bool more = tiles.next(now); more; now = after) {
        more = tiles.next(after);
        auto run = layer.type == CacheType::f32 ? attend_tile<float> : attend_tile<bf16>;
        run(layer, batch, now, more ? &after : nullptr, q, q_stride, out, out_stride, scratch);
    }
}

template <typename T>
void write_rows(T* pool, const int64_t* slots, const float* rows, long stride, long width,
                const Range& tokens) {
    for (long token = tokens.begin; token < tokens.end; token++) {
        const float* from = rows + token * stride;
        T* to = pool + slots[token] * width;
        long d = 0;
        for (; d + LANES <= width; d += LANES) store(to + d, load(from + d));
        for (; d < width; d++) put(to + d, from[d]);
    }
}

// k [T, kv_heads * key_dim] and v into the pool.
inline void write_kv(const AttentionLayer& layer, const AttentionBatch& batch, const float* k,
                     long k_stride, const float* v, long v_stride, const Worker& worker) {
    Range tokens = share(batch.query_offsets[batch.sequences], worker);
    auto write = [&](void* pool, const float* rows, long stride, long width) {
        if (layer.type == CacheType::f32)
            write_rows(static_cast<float*>(pool), batch.slots, rows, stride, width, tokens);
        else
            write_rows(static_cast<bf16*>(pool), batch.slots, rows, stride, width, tokens);
    };
    write(layer.keys, k, k_stride, layer.kv_heads * layer.key_dim);
    write(layer.values, v, v_stride, layer.kv_heads * layer.value_dim);
}

}  // namespace baton
