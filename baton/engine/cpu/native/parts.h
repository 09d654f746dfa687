// The parts of a library that are compiled on their own: products of one type of weights, attention over one
// type of cache, row work. So they are compiled side by side, and a library has only those that it was
// asked for (baton/engine/cpu/build.py). One that was not linked has a null address.
#pragma once

#include "attention_plan.h"
#include "gemm_groups.h"
#include "rows.h"

namespace baton {

// See pack_panels(), prepare_rows(), multiply(), gather_rows() and multiply_groups().
struct ProductPart {
    void (*pack)(const void* source, bool is_bf16, long row_stride, long column_stride, long n, long k,
                 void* panels, float* scales, const Worker& worker);
    void (*prepare_rows)(const float* rows, long row_stride, long m, long k, void* prepared,
                         const Worker& worker);
    void (*multiply)(const Weight& weight, const float* rows, long row_stride, const void* prepared,
                     long m, float* out, long out_stride, Parts& parts, const Worker& worker);
    void (*gather_rows)(const Groups& groups, const float* rows, long row_stride, long slot_stride, long k,
                        void* prepared, const Worker& worker);
    void (*multiply_groups)(const Weight* weights, const void* prepared, float* out, long out_stride,
                            Groups& groups, const Worker& worker);
};

// See attention.h.
struct AttentionPart {
    size_t (*scratch_bytes)(const AttentionLayer& layer);
    void (*attend)(const AttentionLayer& layer, const AttentionBatch& batch, const float* q,
                   long q_stride, float* out, long out_stride, void* memory, Tasks& tasks,
                   const Worker& worker);
    void (*write_kv)(const AttentionLayer& layer, const AttentionBatch& batch, const float* k,
                     long k_stride, const float* v, long v_stride, const Worker& worker);
};

#define BATON_WEAK extern __attribute__((weak))
BATON_WEAK const ProductPart product_f32, product_bf16, product_i8, product_w8, product_q4, product_q8;
BATON_WEAK const AttentionPart attention_f32, attention_bf16, attention_i8;

// See run_rows(); always linked.
void run_row_part(const Op* ops, long count, const RowView& rows, Range range);

inline const ProductPart* product_part(WeightType type) {
    switch (type) {
        case WeightType::f32: return &product_f32;
        case WeightType::bf16: return &product_bf16;
        case WeightType::i8: return &product_i8;
        case WeightType::w8: return &product_w8;
        case WeightType::q4: return &product_q4;
        case WeightType::q8: return &product_q8;
    }
    return nullptr;
}

inline const AttentionPart* attention_part(CacheType type) {
    switch (type) {
        case CacheType::f32: return &attention_f32;
        case CacheType::bf16: return &attention_bf16;
        case CacheType::i8: return &attention_i8;
    }
    return nullptr;
}

template <WeightType type>
constexpr ProductPart product_part_of() {
    return {[](const void* source, bool is_bf16, long row_stride, long column_stride, long n, long k,
               void* panels, float* scales, const Worker& worker) {
                if constexpr (blocked(type)) return;  // Python packs them (baton/engine/cpu/blocks.py)
                else if (is_bf16)
                    pack_panels<type>(static_cast<const bf16*>(source), row_stride, column_stride, n, k,
                                      panels, scales, worker);
                else
                    pack_panels<type>(static_cast<const float*>(source), row_stride, column_stride, n, k,
                                      panels, scales, worker);
            },
            [](const float* rows, long row_stride, long m, long k, void* prepared, const Worker& worker) {
                if constexpr (!in_place(type))
                    prepare_rows<type>(rows, row_stride, m, k, prepared, worker);
            },
            multiply<type>, gather_rows<type>, multiply_groups<type>};
}

}  // namespace baton
