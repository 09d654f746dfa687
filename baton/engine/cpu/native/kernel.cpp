// Attention alone, for models that run in torch: kernel.py calls these through ctypes.
#include <cstdlib>

#include "abi.h"
#include "parts.h"
#include "pool.h"

namespace {

// Never destroyed: at exit its threads may be gone, and after a fork they are.
baton::ThreadPool& pool() {
    static auto* threads = new baton::ThreadPool;
    return *threads;
}

}  // namespace

// See abi.h.
extern "C" const AbiEntry* baton_abi() {
    using namespace baton;
    static const AbiEntry table[] = {ABI_ATTENTION {nullptr, 0}};
    return table;
}

// Returns 0, or 1 if memory for scratch is short.
extern "C" int baton_attend(const baton::AttentionLayer* layer, const baton::AttentionBatch* batch,
                            const float* q, long q_stride, float* out, long out_stride,
                            int threads) {
    const baton::AttentionPart& part = *baton::attention_part(layer->type);
    size_t bytes = (part.scratch_bytes(*layer) + 4095) / 4096 * 4096;
    char* scratch = static_cast<char*>(std::aligned_alloc(4096, bytes * threads));
    if (scratch == nullptr) return 1;
    baton::Tasks tasks;
    baton::prepare_attention(tasks, threads);
    baton::Barrier barrier;
    pool().run(threads, [&](const baton::Worker& worker) {
        tasks.begin(worker);
        barrier.wait(worker.threads);
        part.attend(*layer, *batch, q, q_stride, out, out_stride, scratch + worker.thread * bytes, tasks,
                    worker);
    });
    std::free(scratch);
    return 0;
}

extern "C" void baton_write_kv(const baton::AttentionLayer* layer,
                               const baton::AttentionBatch* batch, const float* k, long k_stride,
                               const float* v, long v_stride, int threads) {
    pool().run(threads, [&](const baton::Worker& worker) {
        baton::attention_part(layer->type)
            ->write_kv(*layer, *batch, k, k_stride, v, v_stride, worker);
    });
}
