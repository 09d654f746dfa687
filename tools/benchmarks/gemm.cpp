// gemm.h with real threads and without Python in between, for tools/benchmarks/gemm.py.
#include <chrono>

#include "../../baton/engine/cpu/native/gemm.h"
#include "../../baton/engine/cpu/native/pool.h"

using namespace baton;

namespace {

ThreadPool& threads_of_process() {
    static ThreadPool* pool = new ThreadPool;  // never destroyed: its threads may still sleep in it
    return *pool;
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

}  // namespace

extern "C" {

long gemm_packed_bytes(int type, long n, long k) { return packed_bytes(WeightType(type), n, k); }

long gemm_rows_bytes(int type, long m, long k) { return rows_bytes(WeightType(type), m, k); }

void gemm_pack(int type, const float* source, long n, long k, void* panels, float* scales,
               int threads) {
    threads_of_process().run(threads, [&](const Worker& worker) {
        pack(WeightType(type), source, k, 1, n, k, panels, scales, worker);
    });
}

// rows [m, k] times each of `count` weights, one after another. Returns the seconds it took.
double gemm_sweep(const Weight* weights, long count, const float* rows, void* prepared, long m,
                  float* out, int threads) {
    Barrier barrier;
    double begun = seconds();
    threads_of_process().run(threads, [&](const Worker& worker) {
        for (long i = 0; i < count; i++) {
            const Weight& weight = weights[i];
            if (rows_bytes(weight.type, m, weight.k)) {
                prepare_rows(weight.type, rows, weight.k, m, weight.k, prepared, worker);
                barrier.wait(worker.threads);
            }
            multiply(weight, rows, weight.k, prepared, m, out, weight.n, worker);
            barrier.wait(worker.threads);
        }
    });
    return seconds() - begun;
}

// Reads `count` floats and does the least with them. Returns the seconds it took.
double read_all(const float* from, long count, float* out, int threads) {
    double begun = seconds();
    threads_of_process().run(threads, [&](const Worker& worker) {
        Range mine = share(count, worker, 4 * LANES);
        Vec sums[4] = {};
        for (long i = mine.begin; i + 4 * LANES <= mine.end; i += 4 * LANES)
            for (int v = 0; v < 4; v++) {
                __builtin_prefetch(from + i + 1024 + v * LANES);
                sums[v] += load(from + i + v * LANES);
            }
        out[worker.thread] = sum(sums[0] + sums[1] + sums[2] + sums[3]);
    });
    return seconds() - begun;
}
}
