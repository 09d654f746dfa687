// What Python and this library must agree on, as a table of names and numbers: sizes of structures, offsets
// of their fields, values of enumerators. structures.py computes the same table from its own declarations.
#pragma once

#include <cstddef>
#include <cstdint>

struct AbiEntry {
    const char* name;  // null: the end of the table
    int64_t value;
};

// clang-format off
#define ABI_SIZE(type) {#type, int64_t(sizeof(type))},
#define ABI_FIELD(type, field) {#type "." #field, int64_t(offsetof(type, field))},
#define ABI_CODE(type, name) {#type "." #name, int64_t(type::name)},

#define ABI_ATTENTION \
    ABI_CODE(CacheType, f32) ABI_CODE(CacheType, bf16) ABI_CODE(CacheType, i8) \
    ABI_SIZE(AttentionBatch) \
    ABI_FIELD(AttentionBatch, sequences) ABI_FIELD(AttentionBatch, query_offsets) \
    ABI_FIELD(AttentionBatch, context_lengths) ABI_FIELD(AttentionBatch, block_table) \
    ABI_FIELD(AttentionBatch, table_width) ABI_FIELD(AttentionBatch, block_size) \
    ABI_FIELD(AttentionBatch, slots) \
    ABI_SIZE(AttentionLayer) \
    ABI_FIELD(AttentionLayer, type) ABI_FIELD(AttentionLayer, keys) \
    ABI_FIELD(AttentionLayer, values) ABI_FIELD(AttentionLayer, heads) \
    ABI_FIELD(AttentionLayer, kv_heads) ABI_FIELD(AttentionLayer, key_dim) \
    ABI_FIELD(AttentionLayer, value_dim) ABI_FIELD(AttentionLayer, scaling) \
    ABI_FIELD(AttentionLayer, window) ABI_FIELD(AttentionLayer, softcap) \
    ABI_FIELD(AttentionLayer, sinks)

#define ABI_OP_CODE(name) ABI_CODE(OpCode, name)
#define ABI_PROGRAM \
    OP_CODES(ABI_OP_CODE) \
    ABI_CODE(Place, none) ABI_CODE(Place, value) ABI_CODE(Place, gathered) \
    ABI_CODE(Place, scratch) ABI_CODE(Place, constant) \
    ABI_CODE(StageKind, rows) ABI_CODE(StageKind, product) ABI_CODE(StageKind, write_kv) \
    ABI_CODE(StageKind, attend) ABI_CODE(StageKind, grouped) \
    ABI_CODE(BufferKind, tokens) ABI_CODE(BufferKind, logit_rows) ABI_CODE(BufferKind, ids) \
    ABI_CODE(BufferKind, positions) ABI_CODE(BufferKind, logits) \
    ABI_CODE(WeightType, f32) ABI_CODE(WeightType, bf16) ABI_CODE(WeightType, i8) \
    ABI_CODE(WeightType, w8) ABI_CODE(WeightType, q4) ABI_CODE(WeightType, q8) \
    ABI_CODE(Offset, none) ABI_CODE(Offset, zeros) ABI_CODE(Offset, minima) \
    ABI_SIZE(Operand) \
    ABI_FIELD(Operand, place) ABI_FIELD(Operand, buffer) ABI_FIELD(Operand, offset) \
    ABI_FIELD(Operand, outer_stride) ABI_FIELD(Operand, inner_stride) \
    ABI_SIZE(Op) \
    ABI_FIELD(Op, code) ABI_FIELD(Op, unused) ABI_FIELD(Op, outer) ABI_FIELD(Op, inner) \
    ABI_FIELD(Op, to) ABI_FIELD(Op, a) ABI_FIELD(Op, b) ABI_FIELD(Op, c) ABI_FIELD(Op, x) \
    ABI_FIELD(Op, y) \
    ABI_SIZE(BufferSpec) \
    ABI_FIELD(BufferSpec, kind) ABI_FIELD(BufferSpec, unused) ABI_FIELD(BufferSpec, width) \
    ABI_FIELD(BufferSpec, offset) \
    ABI_SIZE(TensorRef) \
    ABI_FIELD(TensorRef, buffer) ABI_FIELD(TensorRef, offset) \
    ABI_SIZE(Stage) \
    ABI_FIELD(Stage, kind) ABI_FIELD(Stage, of_logit_rows) ABI_FIELD(Stage, first) \
    ABI_FIELD(Stage, count) ABI_FIELD(Stage, a) ABI_FIELD(Stage, b) ABI_FIELD(Stage, to) \
    ABI_FIELD(Stage, slots) ABI_FIELD(Stage, slot_stride) \
    ABI_SIZE(Weight) \
    ABI_FIELD(Weight, type) ABI_FIELD(Weight, n) ABI_FIELD(Weight, k) ABI_FIELD(Weight, panels) \
    ABI_FIELD(Weight, scales) ABI_FIELD(Weight, bias) \
    ABI_FIELD(Weight, block) ABI_FIELD(Weight, offset) ABI_FIELD(Weight, halves) \
    ABI_SIZE(Table) \
    ABI_FIELD(Table, data) ABI_FIELD(Table, bytes) \
    ABI_SIZE(Spec) \
    ABI_FIELD(Spec, ops) ABI_FIELD(Spec, stages) ABI_FIELD(Spec, buffers) \
    ABI_FIELD(Spec, weights) ABI_FIELD(Spec, layers) ABI_FIELD(Spec, tables) \
    ABI_FIELD(Spec, op_count) ABI_FIELD(Spec, stage_count) ABI_FIELD(Spec, buffer_count) \
    ABI_FIELD(Spec, weight_count) ABI_FIELD(Spec, layer_count) ABI_FIELD(Spec, table_count) \
    ABI_FIELD(Spec, token_floats) ABI_FIELD(Spec, logit_row_floats) \
    ABI_FIELD(Spec, scratch_floats) ABI_FIELD(Spec, info) ABI_FIELD(Spec, info_bytes) \
    ABI_FIELD(Spec, file_bytes) ABI_FIELD(Spec, checksum) \
    ABI_SIZE(ForwardArgs) \
    ABI_FIELD(ForwardArgs, tokens) ABI_FIELD(ForwardArgs, logit_count) \
    ABI_FIELD(ForwardArgs, ids) ABI_FIELD(ForwardArgs, positions) \
    ABI_FIELD(ForwardArgs, logit_rows) ABI_FIELD(ForwardArgs, attention) \
    ABI_FIELD(ForwardArgs, keys) ABI_FIELD(ForwardArgs, values) ABI_FIELD(ForwardArgs, arena) \
    ABI_FIELD(ForwardArgs, logits) ABI_FIELD(ForwardArgs, argmax)
// clang-format on
