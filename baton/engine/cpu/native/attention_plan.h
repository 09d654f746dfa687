// The input of attention: the batch and the layer, divided into tiles of queries and blocks of keys.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attention_stage.h"
#include "tasks.h"
#include "threads.h"

namespace baton {

struct AttentionBatch {              // as baton.engine.batch.Batch
    long sequences;
    const int32_t* query_offsets;    // [B + 1]
    const int32_t* context_lengths;  // [B]: tokens of each sequence, with those of this batch
    const int32_t* block_table;      // [B, table_width]
    long table_width, block_size;
    const int64_t* slots;            // [T]: block * block_size + position within the block
};

enum class CacheType : int { f32 = 0, bf16 = 1, i8 = 2 };

struct AttentionLayer {
    CacheType type;
    void* keys;    // [blocks, block_size, kv_heads, head_width(key_dim)]
    void* values;  // [blocks, block_size, kv_heads, head_width(value_dim)]
    long heads, kv_heads, key_dim, value_dim;
    float scaling;
    long window;         // 0: none; a query sees itself and the window - 1 before it
    float softcap;       // 0: none
    const float* sinks;  // [heads] or null
};

constexpr long TILE_ROWS = 128;

// Queries [first, first + queries) of a sequence, for kv heads [head, head + heads).
struct Tile {
    long sequence, first, queries, head, heads;
};

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

// The tiles of a share, in the order of the batch: contiguous, of about equal work.
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
    // Advances to the next queries, all heads.
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

    // The work for one head: staging a key and its value costs as much as a dozen rows.
    long cost(const Tile& tile) const {
        Range keys = seen(layer, batch, tile);
        return (keys.end - keys.begin) * (tile.queries * group + 12);
    }

    const AttentionLayer& layer;
    const AttentionBatch& batch;
    long group, share_begin, share_end, done = 0, head = 0, head_end = 0;
    Tile at;
};

// A key block: positions base + [begin, end) of a sequence, and their slots in the pool.
struct KeyBlock {
    long base = 0;
    int begin = 0, end = 0;
    int64_t slots[KEY_BLOCK];

    KeyBlock() = default;

    KeyBlock(const AttentionBatch& batch, long sequence, long base, const Range& keys)
        : base(base), begin(within(keys.begin)), end(within(keys.end)) {
        const int32_t* table = batch.block_table + sequence * batch.table_width;
        long block = (base + begin) / batch.block_size, place = (base + begin) % batch.block_size;
        for (int i = begin; i < end; i++) {
            slots[i] = table[block] * int64_t(batch.block_size) + place;
            if (++place == batch.block_size) block++, place = 0;
        }
    }

    int within(long position) const { return int(std::clamp(position - base, 0L, long(KEY_BLOCK))); }
};

// Divides a layer's attention into tasks of about equal work, more than there are threads, so that all
// threads finish together.
inline void prepare_attention(Tasks& tasks, int threads) {
    tasks.prepare(threads == 1 ? 1 : 4 * threads, threads);
}

}  // namespace baton
