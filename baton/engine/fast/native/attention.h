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
    int64_t *begins, *ends;  // the positions each query sees

    explicit AttentionScratch(const AttentionLayer& layer) {
        rows = std::max(TILE_ROWS, layer.heads / layer.kv_heads);
        width = (layer.value_dim + LANES - 1) / LANES * LANES;
    }

    // Places everything from `memory` on; returns the bytes that takes.
    size_t place(const AttentionLayer& layer, void* memory) {
        uintptr_t start = reinterpret_cast<uintptr_t>(memory), at = start;
        auto take = [&]<typename T>(T*& part, long count) {
            part = reinterpret_cast<T*>(at);
            at += (count * sizeof(T) + 63) / 64 * 64;
        };
        take(keys, layer.key_dim * STRETCH);
        take(values, STRETCH * width);
        take(scores, rows * STRETCH);
        take(queries, rows * layer.key_dim);
        take(outputs, rows * width);
        take(weights, rows * LANES);
        take(largest, rows);
        take(begins, rows);
        take(ends, rows);
        return at - start;
    }
};

// Bytes of scratch a thread needs; it begins at a multiple of 64.
inline size_t attention_scratch_bytes(const AttentionLayer& layer) {
    return AttentionScratch(layer).place(layer, nullptr);
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

// Positions base + [begin, end) of a sequence, and where they are in the pool.
struct Stretch {
    long base = 0;
    int begin = 0, end = 0;
    int64_t slots[STRETCH];

    Stretch() = default;

    Stretch(const AttentionBatch& batch, long sequence, long base, const Range& keys)
        : base(base), begin(within(keys.begin)), end(within(keys.end)) {
        const int32_t* table = batch.block_table + sequence * batch.table_width;
        long block = (base + begin) / batch.block_size, place = (base + begin) % batch.block_size;
        for (int i = begin; i < end; i++) {
            slots[i] = table[block] * int64_t(batch.block_size) + place;
            if (++place == batch.block_size) block++, place = 0;
        }
    }

    int within(long position) const { return int(std::clamp(position - base, 0L, long(STRETCH))); }
};

template <typename T>
class TileRun {
   public:
    TileRun(const AttentionLayer& layer, const AttentionBatch& batch, const Tile& tile,
            const AttentionScratch& scratch)
        : layer(layer), batch(batch), tile(tile), scratch(scratch),
          group(layer.heads / layer.kv_heads), rows(tile.queries * group) {}

    void run(const Tile* after, const float* q, long q_stride, float* out, long out_stride) {
        begin(q, q_stride);
        Range keys = seen(layer, batch, tile);
        now = Stretch(batch, tile.sequence, keys.begin / STRETCH * STRETCH, keys);
        for (bool last = false; !last; now = next) {
            last = now.base + STRETCH >= keys.end;
            coming = last ? after : &tile;
            if (coming != nullptr) {
                Range its = seen(layer, batch, *coming);
                long base = last ? its.begin / STRETCH * STRETCH : now.base + STRETCH;
                next = Stretch(batch, coming->sequence, base, its);
            }
            meet();
        }
        finish_all(out, out_stride);
    }

   private:
    template <typename Visit>
    void each_row(Visit&& visit) const {
        long row = 0, token = batch.query_offsets[tile.sequence] + tile.first;
        for (long h = tile.head; h < tile.head + tile.heads; h++)
            for (long i = 0; i < tile.queries; i++)
                for (long g = 0; g < group; g++) visit(row++, token + i, h * group + g);
    }

    void begin(const float* q, long q_stride) const {
        for (long row = 0; row < rows; row++) {
            Range its = seen(layer, batch, tile.sequence, tile.first + row / group);
            scratch.begins[row] = its.begin;
            scratch.ends[row] = its.end;
        }
        each_row([&](long row, long token, long head) {
            const float* from = q + token * q_stride + head * layer.key_dim;
            float* to = scratch.queries + row * layer.key_dim;
            for (long d = 0; d < layer.key_dim; d++) to[d] = from[d] * layer.scaling;
            std::fill_n(scratch.weights + row * LANES, LANES, 0.0f);
            std::fill_n(scratch.outputs + row * scratch.width, scratch.width, 0.0f);
            scratch.largest[row] = -INFINITY;
        });
    }

    RowState state(long row) const {
        return {scratch.largest + row, scratch.weights + row * LANES,
                scratch.outputs + row * scratch.width};
    }

    void finish_all(float* out, long out_stride) const {
        each_row([&](long row, long token, long head) {
            finish(state(row), layer.sinks ? layer.sinks + head : nullptr, layer.value_dim,
                   out + token * out_stride + head * layer.value_dim);
        });
    }

    // Memory is read about in its own order: the keys of all heads, then their values.
    void meet() {
        first_row = 0, end_row = rows;  // of each head; queries that see something of the stretch
        while (scratch.ends[first_row] <= now.base) first_row++;
        while (scratch.begins[end_row - 1] >= now.base + STRETCH) end_row--;
        for (long h = 0; h < tile.heads; h++) {
            CacheRows<T> keys = keys_of(now, tile.head + h);
            announce(keys, h + 1 < tile.heads ? keys_of(now, tile.head + h + 1)
                                              : values_of(now, tile.head));
            if (rows <= FEW_ROWS) {
                with_rows(int(rows), [&](auto count) {
                    score_keys<count>(keys, now.begin, queries(h, 0), scores(h, 0));
                });
            } else {
                stage_keys(keys, now.begin, scratch.keys);
                score(h);
            }
        }
        for (long h = 0; h < tile.heads; h++)
            for (long row = first_row; row < end_row; row++)
                weigh(scores(h, row), now.within(scratch.begins[row]),
                      now.within(scratch.ends[row]), layer.softcap, state(h * rows + row),
                      int(scratch.width / LANES));
        for (long h = 0; h < tile.heads; h++) {
            CacheRows<T> values = values_of(now, tile.head + h);
            if (h + 1 < tile.heads) announce(values, values_of(now, tile.head + h + 1));
            else if (coming != nullptr) announce(values, keys_of(next, coming->head));
            if (rows <= FEW_ROWS && layer.value_dim == scratch.width) {
                add_values(h, values);
            } else {
                stage_values(values, scratch.width, scratch.values);
                add_values(h, Staged{scratch.values, scratch.width});
            }
        }
    }

    // The stretch's rows of one kv head; nothing better known, they themselves come next.
    CacheRows<T> rows_of(const Stretch& stretch, const void* pool, long dim, long head) const {
        const T* start = static_cast<const T*>(pool) + head * dim;
        const int64_t* slots = stretch.slots + stretch.begin;
        int count = stretch.end - stretch.begin;
        long stride = layer.kv_heads * dim;
        return {start, slots, stride, dim, count, start, slots, stride, count};
    }

    CacheRows<T> keys_of(const Stretch& stretch, long head) const {
        return rows_of(stretch, layer.keys, layer.key_dim, head);
    }

    CacheRows<T> values_of(const Stretch& stretch, long head) const {
        return rows_of(stretch, layer.values, layer.value_dim, head);
    }

    static void announce(CacheRows<T>& rows, const CacheRows<T>& coming) {
        rows.next_pool = coming.pool;
        rows.next_slots = coming.slots;
        rows.next_stride = coming.stride;
        rows.next_count = coming.count;
    }

    float* queries(long h, long row) const {
        return scratch.queries + (h * rows + row) * layer.key_dim;
    }

    float* scores(long h, long row) const { return scratch.scores + (h * rows + row) * STRETCH; }

    float* outputs(long h, long row) const {
        return scratch.outputs + (h * rows + row) * scratch.width;
    }

    // Blocks of rows of one head, none much smaller than the others.
    template <typename Visit>
    void each_block(Visit&& visit) const {
        for (long row = first_row, count; row < end_row; row += count) {
            long blocks = (end_row - row + BLOCK_ROWS - 1) / BLOCK_ROWS;
            count = (end_row - row + blocks - 1) / blocks;
            visit(row, int(count));
        }
    }

    // Scores of the stretch, whose keys are staged.
    void score(long h) const {
        each_block([&](long row, int count) {
            int begin = now.within(scratch.begins[row]) / LANES * LANES;
            int end = now.within(scratch.ends[row + count - 1]);
            Staged from{scratch.keys + begin, STRETCH};
            multiply(count,
                     Product<Staged>{queries(h, row), layer.key_dim, from, 0, scores(h, row) + begin,
                                     STRETCH, layer.key_dim, true},
                     (end - begin + LANES - 1) / LANES * LANES);
        });
    }

    // Each row adds the values of the positions it sees: those that all rows of a block see
    // together, others (at its ends) row by row.
    template <typename Factor>
    void add_values(long h, const Factor& values) const {
        auto add = [&](long row, int count, int begin, int end) {
            if (begin >= end) return;
            multiply(count,
                     Product<Factor>{scores(h, row) + begin, STRETCH, values, begin - now.begin,
                                     outputs(h, row), scratch.width, end - begin, false},
                     scratch.width);
        };
        each_block([&](long row, int count) {
            int all_begin = now.within(scratch.begins[row + count - 1]);
            int all_end = now.within(scratch.ends[row]);
            for (long one = row; one < row + count; one++)
                add(one, 1, now.within(scratch.begins[one]),
                    std::min(all_begin, now.within(scratch.ends[one])));
            add(row, count, all_begin, all_end);
            for (long one = row; one < row + count; one++) {
                int end = now.within(scratch.ends[one]);
                add(one, 1, std::max(std::min(all_begin, end), all_end), end);
            }
        });
    }

    const AttentionLayer& layer;
    const AttentionBatch& batch;
    const Tile& tile;
    const AttentionScratch& scratch;
    const long group, rows;  // rows of one kv head
    const Tile* coming = nullptr;  // whose stretch is the next
    Stretch now, next;
    long first_row = 0, end_row = 0;
};

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
        const Tile* then = more ? &after : nullptr;
        if (layer.type == CacheType::f32)
            TileRun<float>(layer, batch, now, scratch).run(then, q, q_stride, out, out_stride);
        else
            TileRun<bf16>(layer, batch, now, scratch).run(then, q, q_stride, out, out_stride);
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
