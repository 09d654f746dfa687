// Runs one tile of queries over its keys, one key block after another.
#pragma once

#include "attention_plan.h"
#include "attention_tile.h"

namespace baton {

// One thread's working memory.
struct AttentionScratch {
    long rows, width;  // width: value_dim rounded up to LANES
    float *keys, *values, *scores, *queries, *outputs, *weights, *largest;
    int64_t *begins, *ends;  // the positions each query sees

    explicit AttentionScratch(const AttentionLayer& layer) {
        rows = std::max(TILE_ROWS, layer.heads / layer.kv_heads);
        width = (layer.value_dim + LANES - 1) / LANES * LANES;
    }

    // Lays out all buffers from `memory` on; returns their size in bytes.
    size_t place(const AttentionLayer& layer, void* memory) {
        uintptr_t start = reinterpret_cast<uintptr_t>(memory), at = start;
        auto take = [&]<typename T>(T*& part, long count) {
            part = reinterpret_cast<T*>(at);
            at += (count * sizeof(T) + 63) / 64 * 64;
        };
        take(keys, layer.key_dim * KEY_BLOCK);
        take(values, KEY_BLOCK * width);
        take(scores, rows * KEY_BLOCK);
        take(queries, rows * layer.key_dim);
        take(outputs, rows * width);
        take(weights, rows * LANES);
        take(largest, rows);
        take(begins, rows);
        take(ends, rows);
        return at - start;
    }
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
        now = KeyBlock(batch, tile.sequence, keys.begin / KEY_BLOCK * KEY_BLOCK, keys);
        for (bool last = false; !last; now = next) {
            last = now.base + KEY_BLOCK >= keys.end;
            coming = last ? after : &tile;
            if (coming != nullptr) {
                Range its = seen(layer, batch, *coming);
                long base = last ? its.begin / KEY_BLOCK * KEY_BLOCK : now.base + KEY_BLOCK;
                next = KeyBlock(batch, coming->sequence, base, its);
            }
            process_block();
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

    // Reads memory in nearly ascending order: the keys of all heads, then their values.
    void process_block() {
        first_row = 0, end_row = rows;  // of each head; queries that see a key of this block
        while (scratch.ends[first_row] <= now.base) first_row++;
        while (scratch.begins[end_row - 1] >= now.base + KEY_BLOCK) end_row--;
        for (long h = 0; h < tile.heads; h++) {
            CacheRows<T> keys = keys_of(now, tile.head + h);
            prefetch_next(keys, h + 1 < tile.heads ? keys_of(now, tile.head + h + 1)
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
                softmax_update(scores(h, row), now.within(scratch.begins[row]),
                      now.within(scratch.ends[row]), layer.softcap, state(h * rows + row),
                      int(scratch.width / LANES));
        for (long h = 0; h < tile.heads; h++) {
            CacheRows<T> values = values_of(now, tile.head + h);
            if (h + 1 < tile.heads) prefetch_next(values, values_of(now, tile.head + h + 1));
            else if (coming != nullptr) prefetch_next(values, keys_of(next, coming->head));
            if (rows <= FEW_ROWS && layer.value_dim == scratch.width) {
                add_values(h, values);
            } else {
                stage_values(values, scratch.width, scratch.values);
                add_values(h, Staged{scratch.values, scratch.width});
            }
        }
    }

    // The key block's rows of one kv head. Until prefetch_next() is called, they prefetch themselves.
    CacheRows<T> rows_of(const KeyBlock& keys, const void* pool, long dim, long head) const {
        const T* start = static_cast<const T*>(pool) + head * head_width<T>(dim);
        const int64_t* slots = keys.slots + keys.begin;
        int count = keys.end - keys.begin;
        long stride = layer.kv_heads * head_width<T>(dim);
        return {start, slots, stride, dim, count, start, slots, stride, count};
    }

    CacheRows<T> keys_of(const KeyBlock& block, long head) const {
        return rows_of(block, layer.keys, layer.key_dim, head);
    }

    CacheRows<T> values_of(const KeyBlock& block, long head) const {
        return rows_of(block, layer.values, layer.value_dim, head);
    }

    // Makes loads of `rows` prefetch `coming`.
    static void prefetch_next(CacheRows<T>& rows, const CacheRows<T>& coming) {
        rows.next_pool = coming.pool;
        rows.next_slots = coming.slots;
        rows.next_stride = coming.stride;
        rows.next_count = coming.count;
    }

    float* queries(long h, long row) const {
        return scratch.queries + (h * rows + row) * layer.key_dim;
    }

    float* scores(long h, long row) const { return scratch.scores + (h * rows + row) * KEY_BLOCK; }

    float* outputs(long h, long row) const {
        return scratch.outputs + (h * rows + row) * scratch.width;
    }

    // Visits the rows of one head in blocks of about equal size.
    template <typename Visit>
    void each_row_block(Visit&& visit) const {
        for (long row = first_row, count; row < end_row; row += count) {
            long blocks = (end_row - row + BLOCK_ROWS - 1) / BLOCK_ROWS;
            count = (end_row - row + blocks - 1) / blocks;
            visit(row, int(count));
        }
    }

    // Scores of a key block whose keys are staged.
    void score(long h) const {
        each_row_block([&](long row, int count) {
            int begin = now.within(scratch.begins[row]) / LANES * LANES;
            int end = now.within(scratch.ends[row + count - 1]);
            Staged from{scratch.keys + begin, KEY_BLOCK};
            multiply(count,
                     Product<Staged>{queries(h, row), layer.key_dim, from, 0, scores(h, row) + begin,
                                     KEY_BLOCK, layer.key_dim, true},
                     (end - begin + LANES - 1) / LANES * LANES);
        });
    }

    // Adds to each row the values of the positions it sees. Positions that all rows of a block see are
    // added for the whole block, the others (at its ends) row by row.
    template <typename Factor>
    void add_values(long h, const Factor& values) const {
        auto add = [&](long row, int count, int begin, int end) {
            if (begin >= end) return;
            multiply(count,
                     Product<Factor>{scores(h, row) + begin, KEY_BLOCK, values, begin - now.begin,
                                     outputs(h, row), scratch.width, end - begin, false},
                     scratch.width);
        };
        each_row_block([&](long row, int count) {
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
    const Tile* coming = nullptr;  // the tile of the next key block
    KeyBlock now, next;
    long first_row = 0, end_row = 0;
};

}  // namespace baton
