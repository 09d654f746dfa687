// Native code under load, for sanitizers (make tsan, make asan): the thread pool from several callers at once,
// work stealing, products, attention and a small program, each on 1 to 5 threads and compared bit for bit.
// A program of its own: prints what it did, and exits with 1 at the first difference.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../../baton/engine/cpu/native/attention_bf16.cpp"
#include "../../baton/engine/cpu/native/attention_f32.cpp"
#include "../../baton/engine/cpu/native/gemm.h"
#include "../../baton/engine/cpu/native/product_bf16.cpp"
#include "../../baton/engine/cpu/native/product_f32.cpp"
#include "../../baton/engine/cpu/native/product_i8.cpp"
#include "../../baton/engine/cpu/native/product_w8.cpp"
#include "../../baton/engine/cpu/native/rows.cpp"
#include "../../baton/engine/cpu/native/program.cpp"

namespace {

std::mt19937 dice(7);

std::vector<float> randoms(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> found(count);
    for (float& each : found) each = normal(dice);
    return found;
}

void expect(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

template <typename T>
T* aligned(std::vector<char>& memory, size_t bytes) {
    memory.resize(bytes + 64);
    uintptr_t start = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<T*>((start + 63) / 64 * 64);
}

// Each task is taken exactly once, whoever steals it.
void tasks(int threads) {
    Tasks tasks;
    Barrier barrier;
    for (int round = 0; round < 50; round++) {
        std::vector<std::atomic<int>> taken(1 + round * 7);
        tasks.prepare(long(taken.size()), threads);
        threads_of_process().run(threads, [&](const Worker& worker) {
            tasks.begin(worker);
            barrier.wait(worker.threads);
            for (long task; (task = tasks.take(worker)) >= 0;) taken[task]++;
        });
        for (auto& each : taken) expect(each == 1, "a task was taken twice or never");
    }
}

std::vector<float> product(WeightType type, long m, long n, long k, int threads,
                           const std::vector<float>& source, const std::vector<float>& rows) {
    std::vector<char> memory, prepared_memory;
    Weight weight{type, n, k, aligned<void>(memory, packed_bytes(type, n, k)), nullptr, nullptr};
    std::vector<float> scales(n), out(m * n);
    weight.scales = scaled(type) ? scales.data() : nullptr;
    void* prepared = aligned<void>(prepared_memory, rows_bytes(type, m, k) + 64);
    Parts parts;
    parts.prepare(weight, m, threads);
    Barrier barrier;
    threads_of_process().run(threads, [&](const Worker& worker) {
        pack(type, source.data(), k, 1, n, k, const_cast<void*>(weight.panels), scales.data(), worker);
        if (rows_bytes(type, m, k)) prepare_rows(type, rows.data(), k, m, k, prepared, worker);
        parts.begin(worker);
        barrier.wait(worker.threads);
        multiply(weight, rows.data(), k, prepared, m, out.data(), n, parts, worker);
    });
    return out;
}

void products() {
    for (WeightType type : {WeightType::f32, WeightType::bf16, WeightType::i8, WeightType::w8})
        for (long m : {1L, 5L, 70L}) {
            const long n = 200, k = 133;
            auto source = randoms(n * k), rows = randoms(m * k);
            auto alone = product(type, m, n, k, 1, source, rows);
            for (int threads = 2; threads <= 5; threads++)
                expect(same(product(type, m, n, k, threads, source, rows), alone), "a product");
        }
}

template <typename T>
void attention(CacheType type, long window, float softcap, bool with_sinks) {
    const long heads = 6, kv_heads = 2, key_dim = 40, value_dim = 24, block = 16, width = 12;
    std::vector<int32_t> offsets{0, 1, 30, 31}, contexts{150, 29, 70}, table(3 * width);
    std::iota(table.begin(), table.end(), 0);
    std::vector<int64_t> slots;
    for (int b = 0; b < 3; b++)
        for (int i = contexts[b] - (offsets[b + 1] - offsets[b]); i < contexts[b]; i++)
            slots.push_back(table[b * width + i / block] * block + i % block);
    const long tokens = long(slots.size()), places = 3 * width * block;
    std::vector<T> keys(places * kv_heads * key_dim), values(places * kv_heads * value_dim);
    auto fill = [](std::vector<T>& to) {
        auto from = randoms(to.size());
        for (size_t i = 0; i < to.size(); i++) put(&to[i], from[i]);
    };
    fill(keys), fill(values);
    auto sinks = randoms(heads), q = randoms(tokens * heads * key_dim);
    auto k = randoms(tokens * kv_heads * key_dim), v = randoms(tokens * kv_heads * value_dim);
    AttentionBatch batch{3, offsets.data(), contexts.data(), table.data(), width, block, slots.data()};
    AttentionLayer layer{type, keys.data(), values.data(), heads, kv_heads, key_dim, value_dim, 0.2f,
                         window, softcap, with_sinks ? sinks.data() : nullptr};
    std::vector<float> alone;
    for (int threads = 1; threads <= 5; threads++) {
        std::vector<float> out(tokens * heads * value_dim);
        std::vector<char> memory;
        size_t each = (attention_scratch_bytes(layer) + 63) / 64 * 64;
        char* scratch = aligned<char>(memory, each * threads);
        Tasks tasks;
        prepare_attention(tasks, threads);
        Barrier barrier;
        threads_of_process().run(threads, [&](const Worker& worker) {
            write_kv<T>(layer, batch, k.data(), kv_heads * key_dim, v.data(), kv_heads * value_dim, worker);
            tasks.begin(worker);
            barrier.wait(worker.threads);
            attend<T>(layer, batch, q.data(), heads * key_dim, out.data(), heads * value_dim,
                   scratch + worker.thread * each, tasks, worker);
        });
        if (threads == 1) alone = out;
        expect(same(out, alone), "attention");
    }
}

// A program of three stages (embedding, norm, product), called by several threads at once.
void program() {
    const long vocabulary = 100, width = 48, tokens = 9;
    std::vector<char> file_memory;
    const size_t panels = 64 * 1024, table = 512 * 1024, size = 1024 * 1024;
    char* file = aligned<char>(file_memory, size);
    auto* spec = new (file) Spec{};
    spec->file_bytes = size, spec->token_floats = 2 * width + 16, spec->info = 64;
    auto add = [&, end = int64_t(1024)](auto items, int64_t& offset, int64_t& count) mutable {
        offset = end, count = items.size();
        std::copy(items.begin(), items.end(), reinterpret_cast<decltype(items.data())>(file + end));
        end += (items.size() * sizeof items[0] + 63) / 64 * 64;
    };
    std::vector<BufferSpec> buffers{{BufferKind::ids, 0, 1, 2 * width},
                                    {BufferKind::tokens, 0, width, 0},
                                    {BufferKind::tokens, 0, width, width},
                                    {BufferKind::logits, 0, vocabulary, 0}};
    Operand none{}, ids{Place::value, 0, 0, 0, 0}, x{Place::value, 1, 0, width, 1};
    Operand y{Place::value, 2, 0, width, 1}, embedding{Place::constant, 0, 0, 0, 0};
    std::vector<Op> ops{{OpCode::embed_f32, 0, 1, width, x, ids, embedding, none, 0, 0},
                        {OpCode::layer_norm, 0, 1, width, y, x, none, none, 1e-5f, 0}};
    Operand gathered{Place::gathered, 2, 0, width, 1}, late{Place::value, 4, 0, width, 1};
    buffers.push_back({BufferKind::logit_rows, 0, width, 0}), spec->logit_row_floats = width;
    ops.push_back({OpCode::copy, 0, 1, width, late, gathered, none, none, 0, 0});
    std::vector<Stage> stages{{StageKind::rows, 0, 0, 2, {}, {}, {}},
                              {StageKind::rows, 1, 2, 1, {}, {}, {}},
                              {StageKind::product, 1, 0, 1, {4, 0}, {}, {3, 0}}};
    auto source = randoms(vocabulary * width);
    threads_of_process().run(2, [&](const Worker& worker) {
        pack(WeightType::f32, source.data(), width, 1, vocabulary, width, file + panels, nullptr, worker);
    });
    std::memcpy(file + table, source.data(), source.size() * sizeof(float));
    std::vector<Weight> weights{
        {WeightType::f32, vocabulary, width, reinterpret_cast<void*>(panels), nullptr, nullptr}};
    std::vector<Table> tables{{reinterpret_cast<void*>(table), vocabulary * width * 4}};
    add(ops, spec->ops, spec->op_count), add(stages, spec->stages, spec->stage_count);
    add(buffers, spec->buffers, spec->buffer_count), add(weights, spec->weights, spec->weight_count);
    add(std::vector<AttentionLayer>{}, spec->layers, spec->layer_count);
    add(tables, spec->tables, spec->table_count);
    const char* fault = baton_program_fault(file, size);
    expect(fault == nullptr, fault ? fault : "");
    for (size_t at = 0; at < sizeof(Spec); at += 8)  // damaged heads, for the address sanitizer
        for (int64_t value : {int64_t(-1), int64_t(1) << 31, int64_t(1) << 62}) {
            int64_t before;
            std::memcpy(&before, file + at, 8), std::memcpy(file + at, &value, 8);
            baton_program_fault(file, size);
            std::memcpy(file + at, &before, 8);
        }
    void* made = baton_program_new(file);
    std::vector<std::vector<float>> found(4);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; caller++)
        callers.emplace_back([&, caller] {
            for (int round = 0; round < 20; round++) {
                const long count = 1 + (caller + round) % tokens;  // the last round has 9, 1, 2, 3
                std::vector<int64_t> ids(count), positions(count), rows(count), argmax(count);
                std::iota(ids.begin(), ids.end(), 3), std::iota(rows.begin(), rows.end(), 0);
                std::vector<float> arena(count * (3 * width + 16)), logits(count * vocabulary);
                ForwardArgs args{count, count, ids.data(), positions.data(), rows.data(), {}, nullptr,
                                 nullptr, arena.data(), logits.data(), argmax.data()};
                expect(!baton_program_run(made, &args, 0, 3, 1 + round % 4), "no memory");
                found[caller].assign(logits.begin(), logits.begin() + vocabulary);
            }
        });
    for (auto& each : callers) each.join();
    for (auto& each : found) expect(same(each, found[0]), "a program called by several threads");
    baton_program_free(made);
}

}  // namespace

int main() {
    for (int threads = 1; threads <= 5; threads++) tasks(threads);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; caller++) callers.emplace_back([=] { tasks(2 + caller); });
    for (auto& each : callers) each.join();
    { ThreadPool pool; pool.run(3, [](const Worker&) {}); }  // one that is taken down
    std::puts("tasks and thread pool: right");
    products();
    std::puts("products: right");
    for (long window : {0L, 37L})
        for (float softcap : {0.0f, 20.0f}) {
            attention<float>(CacheType::f32, window, softcap, softcap > 0);
            attention<bf16>(CacheType::bf16, window, softcap, window > 0);
        }
    std::puts("attention: right");
    program();
    std::puts("a program from several threads: right");
}
