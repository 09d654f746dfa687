// Paged attention on CPUs: a ragged batch of queries over keys and values in blocks of a pool.
//
// A tile is some queries of one sequence, for some of its kv heads. It processes its keys in key
// blocks of 64 positions, counted from the sequence's first token. So a query's output is the same, bit for
// bit, alone, in a chunk of any size, beside any neighbours and on any number of threads.
#pragma once

#include "attention_run.h"

namespace baton {

// Bytes of scratch a thread needs; it begins at a multiple of 64.
inline size_t attention_scratch_bytes(const AttentionLayer& layer) {
    return AttentionScratch(layer).place(layer, nullptr);
}

// Runs attention tasks until none is left; together the threads compute every query of the batch.
// write_kv and a barrier come before it. q [T, heads * key_dim], out [T, heads * value_dim], strides in
// floats. T is the layer's type of cache.
template <typename T>
void attend(const AttentionLayer& layer, const AttentionBatch& batch, const float* q,
                   long q_stride, float* out, long out_stride, void* memory, Tasks& tasks,
                   const Worker& worker) {
    AttentionScratch scratch(layer);
    scratch.place(layer, memory);
    for (long task; (task = tasks.take(worker)) >= 0;) {
        Tiles tiles(layer, batch, {int(task), int(tasks.total())});
        Tile now, after;
        for (bool more = tiles.next(now); more; now = after) {
            more = tiles.next(after);
            const Tile* then = more ? &after : nullptr;
            TileRun<T>(layer, batch, now, scratch).run(then, q, q_stride, out, out_stride);
        }
    }
}

template <typename T>
void write_rows(T* pool, const int64_t* slots, const float* rows, long stride, long heads, long dim,
                const Range& tokens) {
    const long width = heads * dim;
    for (long token = tokens.begin; token < tokens.end; token++) {
        const float* from = rows + token * stride;
        T* to = pool + slots[token] * width;
        long d = 0;
        for (; d + LANES <= width; d += LANES) store(to + d, load(from + d));
        for (; d < width; d++) put(to + d, from[d]);
    }
}

inline void write_rows(i8* pool, const int64_t* slots, const float* rows, long stride, long heads,
                       long dim, const Range& tokens) {
    for (long token = tokens.begin; token < tokens.end; token++)
        for (long head = 0; head < heads; head++)
            narrow(pool + (slots[token] * heads + head) * head_width<i8>(dim),
                   rows + token * stride + head * dim, dim);
}

// k [T, kv_heads * key_dim] and v into the pool.
template <typename T>
void write_kv(const AttentionLayer& layer, const AttentionBatch& batch, const float* k,
                     long k_stride, const float* v, long v_stride, const Worker& worker) {
    Range tokens = share(batch.query_offsets[batch.sequences], worker);
    auto write = [&](void* pool, const float* rows, long stride, long dim) {
        write_rows(static_cast<T*>(pool), batch.slots, rows, stride, layer.kv_heads, dim, tokens);
    };
    write(layer.keys, k, k_stride, layer.key_dim);
    write(layer.values, v, v_stride, layer.value_dim);
}

}  // namespace baton
