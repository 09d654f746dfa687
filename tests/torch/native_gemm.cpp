// gemm.h for the test: the shares of all threads one after another, so that one which needs another's
// result is seen at once; products by threads that take tasks from each other.
#include <thread>
#include <vector>

#include "../../baton/engine/cpu/native/gemm.h"
#include "../../baton/engine/cpu/native/gemm_blocks.h"
#include "../../baton/engine/cpu/native/gemm_groups.h"

using namespace baton;

extern "C" {

long bytes_of_weight(int type, long n, long k) { return packed_bytes(WeightType(type), n, k); }

long bytes_of_rows(int type, long m, long k) { return rows_bytes(WeightType(type), m, k); }

void pack_weight(int type, int is_bf16, const void* source, long row_stride, long column_stride,
                 long n, long k, void* panels, float* scales, int threads) {
    for (int thread = threads - 1; thread >= 0; thread--) {
        Worker worker{thread, threads};
        if (is_bf16)
            pack(WeightType(type), (const bf16*)source, row_stride, column_stride, n, k, panels,
                 scales, worker);
        else
            pack(WeightType(type), (const float*)source, row_stride, column_stride, n, k, panels,
                 scales, worker);
    }
}

void multiply_rows(int type, long n, long k, const void* panels, const float* scales,
                   const float* bias, const float* rows, long row_stride, void* prepared, long m,
                   float* out, long out_stride, int threads) {
    Weight weight{WeightType(type), n, k, panels, scales, bias};
    for (int thread = threads - 1; thread >= 0; thread--)
        prepare_rows(weight.type, rows, row_stride, m, k, prepared, {thread, threads});
    Parts parts;
    parts.prepare(weight, m, threads);
    for (int thread = 0; thread < threads; thread++) parts.begin({thread, threads});
    std::vector<std::thread> team;
    for (int thread = 1; thread < threads; thread++)
        team.emplace_back([&, thread] {
            multiply(weight, rows, row_stride, prepared, m, out, out_stride, parts, {thread, threads});
        });
    multiply(weight, rows, row_stride, prepared, m, out, out_stride, parts, {0, threads});
    for (auto& each : team) each.join();
}

// A weight of q4 or q8, in `threads`.
void multiply_blocked(int type, long n, long k, long block, int offset, int halves, const void* panels,
                      const float* bias, const float* rows, long row_stride, long m, float* out,
                      long out_stride, int threads) {
    Weight weight{WeightType(type), n, k, panels, nullptr, bias, block, Offset(offset), halves};
    Parts parts;
    parts.prepare(weight, m, threads);
    for (int thread = 0; thread < threads; thread++) parts.begin({thread, threads});
    for (int thread = threads - 1; thread >= 0; thread--)
        multiply(weight, rows, row_stride, nullptr, m, out, out_stride, parts, {thread, threads});
}

long bytes_of_blocks(int type, long n, long k, long block, int offset, int halves) {
    return long(blocks_bytes({WeightType(type), n, k, nullptr, nullptr, nullptr, block, Offset(offset), halves}));
}

// Row `channel` of such a weight, in floats.
void unpack_blocked(int type, long n, long k, long block, int offset, int halves, const void* panels,
                    long channel, float* to) {
    unpack_channel({WeightType(type), n, k, panels, nullptr, nullptr, block, Offset(offset), halves}, channel, to);
}

long bytes_of_pairs(int type, long pairs, long k) { return grouped_bytes(WeightType(type), pairs, k); }

// `panels`, `scales` and `biases`: of each expert; `chosen` [m][slots], `out` [m][slots][n].
void multiply_chosen(int type, long n, long k, long experts, const void* const* panels,
                     const float* const* scales, const float* const* biases, const float* chosen,
                     long slots, const float* rows, long row_stride, long slot_stride, void* prepared,
                     long m, float* out, int threads) {
    std::vector<Weight> weights;
    for (long i = 0; i < experts; i++)
        weights.push_back({WeightType(type), n, k, panels[i], scales ? scales[i] : nullptr, biases[i]});
    std::vector<char> memory(Groups::bytes(m * slots, experts));
    Groups groups;
    groups.place(memory.data(), threads);
    groups.sort(chosen, slots, m, slots, experts, n, threads);
    with_type(WeightType(type), [&]<WeightType t>() {
        for (int thread = threads - 1; thread >= 0; thread--) {
            groups.begin({thread, threads});
            gather_rows<t>(groups, rows, row_stride, slot_stride, k, prepared, {thread, threads});
        }
        std::vector<std::thread> team;
        for (int thread = 0; thread < threads; thread++)
            team.emplace_back([&, thread] {
                multiply_groups<t>(weights.data(), prepared, out, slots * n, groups, {thread, threads});
            });
        for (auto& each : team) each.join();
    });
}

}
