// Products of any type of weights; the work is in gemm_tile.h.
#pragma once

#include "gemm_blocks.h"
#include "gemm_instructions.h"
#include "gemm_tile.h"

namespace baton {

// visit.operator()<type>() for one of the types.
template <typename Visit>
inline void with_type(WeightType type, Visit&& visit) {
    switch (type) {
        case WeightType::f32: return visit.template operator()<WeightType::f32>();
        case WeightType::bf16: return visit.template operator()<WeightType::bf16>();
        case WeightType::i8: return visit.template operator()<WeightType::i8>();
        case WeightType::w8: return visit.template operator()<WeightType::w8>();
        case WeightType::q4: return visit.template operator()<WeightType::q4>();
        case WeightType::q8: return visit.template operator()<WeightType::q8>();
    }
}

// See pack_panels(). Not of q4 and q8, which Python packs.
template <typename T>
inline void pack(WeightType type, const T* source, long row_stride, long column_stride, long n,
                 long k, void* panels, float* scales, const Worker& worker) {
    with_type(type, [&]<WeightType t>() {
        if constexpr (!blocked(t))
            pack_panels<t>(source, row_stride, column_stride, n, k, panels, scales, worker);
    });
}

inline void prepare_rows(WeightType type, const float* rows, long row_stride, long m, long k,
                         void* prepared, const Worker& worker) {
    with_type(type, [&]<WeightType t>() {
        if constexpr (!in_place(t))
            prepare_rows<t>(rows, row_stride, m, k, prepared, worker);
    });
}

inline void multiply(const Weight& weight, const float* rows, long row_stride, const void* prepared,
                     long m, float* out, long out_stride, Parts& parts, const Worker& worker) {
    with_type(weight.type, [&]<WeightType t>() {
        multiply<t>(weight, rows, row_stride, prepared, m, out, out_stride, parts, worker);
    });
}

}  // namespace baton
