// The structures that Python builds (baton/engine/cpu/structures.py) and a program's file consists of.
// abi.h exports their sizes, offsets and codes; Python compares those with its own when it loads the library.
#pragma once

#include "attention_plan.h"
#include "gemm_pack.h"
#include "rows.h"

namespace baton {

enum class StageKind : int32_t { rows, product, write_kv, attend, grouped };
enum class BufferKind : int32_t { tokens, logit_rows, ids, positions, logits };

// A matrix of the arena, one line per row: `width` floats, `offset` floats per row behind the first.
struct BufferSpec {
    BufferKind kind;
    int32_t unused;
    int64_t width, offset;
};

// A tensor: floats from `offset` on in each row of a buffer.
struct TensorRef {
    int64_t buffer, offset;
};

struct Stage {
    StageKind kind;
    int32_t of_logit_rows;  // works on the rows that need logits, else on all tokens
    int64_t first, count;   // rows: operations; product: weight; grouped: weights, one per expert;
                            // write_kv, attend: layer
    TensorRef a, b, to;     // product: rows, -, result; write_kv: key, value; attend: query, -, result;
                            // grouped: rows, numbers of experts [slots], results [slots][n]
    int64_t slots, slot_stride;  // grouped: experts of a row, floats between the rows of two slots (0 or k)
};

// A constant of row work: float32, or an embedding as it is.
struct Table {
    const void* data;
    int64_t bytes;
};

// The head of a program's file. Addresses here, and in weights, layers and tables, are offsets from the
// file's beginning; 0 is null.
struct Spec {
    int64_t ops, stages, buffers, weights, layers, tables;
    int64_t op_count, stage_count, buffer_count, weight_count, layer_count, table_count;
    int64_t token_floats, logit_row_floats, scratch_floats;  // of the arena per row; per thread
    int64_t info, info_bytes, file_bytes;
    int64_t checksum;  // of all but weights, biases and tables; written and compared by Python
};

// The arguments of one forward.
struct ForwardArgs {
    int64_t tokens, logit_count;
    const int64_t *ids, *positions;  // [tokens]
    const int64_t* logit_rows;       // [logit_count]: which tokens need logits
    AttentionBatch attention;
    void* const* keys;  // of each layer
    void* const* values;
    float* arena;
    float* logits;    // [logit_count, vocabulary]
    int64_t* argmax;  // [logit_count], see argmax.h; null: not wanted
};

}  // namespace baton
