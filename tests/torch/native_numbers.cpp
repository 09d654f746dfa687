// Native code against arithmetic in double, without Python: for CPUs that are emulated (make test-arm64). A
// program of its own: prints the table of baton_abi() and what was right, and exits with 1 at the first number
// that is further off than rounding explains, or that depends on the batch or the number of threads.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "../../baton/engine/cpu/native/attention_bf16.cpp"
#include "../../baton/engine/cpu/native/attention_f32.cpp"
#include "../../baton/engine/cpu/native/gemm.h"
#include "../../baton/engine/cpu/native/product_bf16.cpp"
#include "../../baton/engine/cpu/native/product_f32.cpp"
#include "../../baton/engine/cpu/native/product_i8.cpp"
#include "../../baton/engine/cpu/native/product_w8.cpp"
#include "../../baton/engine/cpu/native/program.cpp"
#include "../../baton/engine/cpu/native/rows.cpp"

namespace {

constexpr double UNIT = 1.0 / (1 << 24);  // of rounding to float
const char* NAMES[] = {"f32", "bf16", "i8", "w8"};
std::mt19937 dice(7);

std::vector<float> randoms(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> found(count);
    for (float& each : found) each = normal(dice);
    return found;
}

void expect(bool right, const char* what, const char* of, double found, double wanted) {
    if (right) return;
    std::fprintf(stderr, "wrong: %s of %s: %.9g instead of %.9g\n", what, of, found, wanted);
    std::exit(1);
}

template <typename T>
T* aligned(std::vector<char>& memory, size_t bytes) {
    memory.resize(bytes + 64);
    uintptr_t start = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<T*>((start + 63) / 64 * 64);
}

struct Problem {
    WeightType type;
    long n, k;
    std::vector<float> source, bias, scales;
    std::vector<char> memory;
    Weight weight;

    Problem(WeightType type, long n, long k)
        : type(type), n(n), k(k), source(randoms(n * k)), bias(randoms(n)), scales(n) {
        void* panels = aligned<void>(memory, packed_bytes(type, n, k));
        for (int thread = 2; thread >= 0; thread--)
            pack(type, source.data(), k, 1, n, k, panels, scales.data(), {thread, 3});
        weight = {type, n, k, panels, scaled(type) ? scales.data() : nullptr, bias.data()};
    }

    std::vector<float> times(const float* rows, long m, int threads) const {
        std::vector<char> prepared_memory;
        std::vector<float> out(m * n);
        void* prepared = aligned<void>(prepared_memory, rows_bytes(type, m, k) + 64);
        Parts parts;
        Barrier barrier;
        parts.prepare(weight, m, threads);
        threads_of_process().run(threads, [&](const Worker& worker) {
            prepare_rows(type, rows, k, m, k, prepared, worker);
            parts.begin(worker);
            barrier.wait(worker.threads);
            multiply(weight, rows, k, prepared, m, out.data(), n, parts, worker);
        });
        return out;
    }

    // What |result - exact| can be at most; derived in test_native_gemm.py.
    double bound(double exact_of_sizes, double row_sizes, double row_largest, long channel) const {
        const float* of = source.data() + channel * k;
        double largest = 0, sizes = 0;
        for (long j = 0; j < k; j++) largest = std::max(largest, std::fabs(double(of[j]))), sizes += std::fabs(of[j]);
        const double chain = 2 * (k + 2) * UNIT * (exact_of_sizes + std::fabs(bias[channel]));
        const double step = largest / 127, halves = row_sizes * step / 2;
        switch (type) {
            case WeightType::f32: return chain;
            case WeightType::bf16: return 1.01 * chain + (1.0 / 128 + 1.0 / 65536) * exact_of_sizes;
            case WeightType::w8:
                return 1.0001 * halves + (1.0 / 256 + 1.0 / 32768) * (exact_of_sizes + halves) + 1.01 * chain;
            default: {
                const double all = halves + row_largest / 127 * (sizes + k * step / 2) / 2;
                return 1.0001 * all + 16 * UNIT * (exact_of_sizes + all + std::fabs(bias[channel]));
            }
        }
    }
};

void products(WeightType type, long n, long k) {
    const Problem problem(type, n, k);
    const long m = 61;  // so many that chunks are widened
    const auto rows = randoms(m * k), out = problem.times(rows.data(), m, 3);
    for (long i = 0; i < m; i++) {
        const float* row = rows.data() + i * k;
        double largest = 0, row_sizes = 0;
        for (long j = 0; j < k; j++) largest = std::max(largest, std::fabs(double(row[j]))), row_sizes += std::fabs(row[j]);
        for (long channel = 0; channel < n; channel++) {
            double exact = problem.bias[channel], sizes = 0;
            for (long j = 0; j < k; j++) {
                double product = double(row[j]) * problem.source[channel * k + j];
                exact += product, sizes += std::fabs(product);
            }
            const float found = out[i * n + channel];
            expect(std::fabs(found - exact) <= problem.bound(sizes, row_sizes, largest, channel), "a product",
                   NAMES[int(type)], found, exact);
        }
    }
    for (long first = 0, some = 1; first + some <= m; first += some, some = some % 8 + 1) {
        const auto apart = problem.times(rows.data() + first * k, some, 1 + int(some) % 3);
        for (long i = 0; i < some * n; i++)
            expect(apart[i] == out[first * n + i], "a product of fewer rows", NAMES[int(type)], apart[i],
                   out[first * n + i]);
    }
}

template <typename T>
void attention(CacheType type, long window, float softcap, bool with_sinks) {
    const long heads = 6, kv_heads = 2, key_dim = 40, value_dim = 24, block = 16, width = 12;
    const std::vector<int32_t> offsets{0, 1, 30, 31}, contexts{150, 29, 70};
    std::vector<int32_t> table(3 * width);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), dice);
    auto slot = [&](int b, long i) { return table[b * width + i / block] * block + i % block; };
    std::vector<int64_t> slots;
    for (int b = 0; b < 3; b++)
        for (int i = contexts[b] - (offsets[b + 1] - offsets[b]); i < contexts[b]; i++) slots.push_back(slot(b, i));
    const long tokens = long(slots.size()), places = 3 * width * block;
    std::vector<T> keys(places * kv_heads * key_dim), values(places * kv_heads * value_dim);
    auto fill = [](std::vector<T>& to) {
        auto from = randoms(to.size());
        for (size_t i = 0; i < to.size(); i++) put(&to[i], from[i]);
    };
    fill(keys), fill(values);
    const auto sinks = randoms(heads), q = randoms(tokens * heads * key_dim);
    const auto k = randoms(tokens * kv_heads * key_dim), v = randoms(tokens * kv_heads * value_dim);
    const AttentionBatch batch{3, offsets.data(), contexts.data(), table.data(), width, block, slots.data()};
    const AttentionLayer layer{type, keys.data(), values.data(), heads, kv_heads, key_dim, value_dim, 0.2f,
                               window, softcap, with_sinks ? sinks.data() : nullptr};
    std::vector<float> out;
    for (int threads : {1, 3}) {
        std::vector<float> now(tokens * heads * value_dim);
        std::vector<char> memory;
        const size_t each = (attention_scratch_bytes(layer) + 63) / 64 * 64;
        char* scratch = aligned<char>(memory, each * threads);
        Tasks tasks;
        prepare_attention(tasks, threads);
        Barrier barrier;
        threads_of_process().run(threads, [&](const Worker& worker) {
            write_kv<T>(layer, batch, k.data(), kv_heads * key_dim, v.data(), kv_heads * value_dim, worker);
            tasks.begin(worker);
            barrier.wait(worker.threads);
            attend<T>(layer, batch, q.data(), heads * key_dim, now.data(), heads * value_dim,
                      scratch + worker.thread * each, tasks, worker);
        });
        for (size_t i = 0; i < out.size(); i++)
            expect(out[i] == now[i], "attention by more threads", NAMES[int(type)], now[i], out[i]);
        out = now;
    }
    for (int b = 0; b < 3; b++)
        for (long token = offsets[b]; token < offsets[b + 1]; token++)
            for (long h = 0; h < heads; h++) {
                const long end = contexts[b] - offsets[b + 1] + token + 1, kv = h / (heads / kv_heads);
                const long begin = window > 0 ? std::max(0L, end - window) : 0;
                std::vector<double> scores, exact(value_dim);
                double total = with_sinks ? std::exp(double(sinks[h])) : 0, size = 0;
                for (long at = begin; at < end; at++) {
                    double score = 0;
                    for (long d = 0; d < key_dim; d++)
                        score += double(q[(token * heads + h) * key_dim + d]) * 0.2f *
                                 as_float(keys[(slot(b, at) * kv_heads + kv) * key_dim + d]);
                    if (softcap > 0) score = softcap * std::tanh(score / softcap);
                    scores.push_back(std::exp(score));
                    total += scores.back();
                }
                for (long d = 0; d < value_dim; d++) {
                    for (long at = begin; at < end; at++)
                        exact[d] += scores[at - begin] / total *
                                    as_float(values[(slot(b, at) * kv_heads + kv) * value_dim + d]);
                    size = std::max(size, std::fabs(exact[d]));
                }
                for (long d = 0; d < value_dim; d++) {
                    const float found = out[(token * heads + h) * value_dim + d];
                    expect(std::fabs(found - exact[d]) <= 2e-5 * (size + 0.1), "attention", NAMES[int(type)], found,
                           exact[d]);
                }
            }
}

// One operation on 37 numbers of each row, against its function in double.
void rows() {
    constexpr long width = 37;
    const auto a = randoms(width), b = randoms(width);
    std::vector<float> to(width), scratch(width);
    const std::vector<Buffer> buffers{{const_cast<float*>(a.data()), width},
                                      {const_cast<float*>(b.data()), width},
                                      {to.data(), width}};
    const RowView view{buffers.data(), nullptr, nullptr, scratch.data()};
    auto at = [](int buffer) { return Operand{Place::value, buffer, 0, width, 1}; };
    auto check = [&](const char* name, OpCode code, const std::function<double(double, double)>& exact) {
        Op op{code, 0, 1, width, at(2), at(0), at(1), {}, 0.5f, 0};
        run_row_part(&op, 1, view, {0, 1});
        for (long i = 0; i < width; i++) {
            const double wanted = exact(a[i], b[i]);
            expect(std::fabs(to[i] - wanted) <= 2e-6 * (std::fabs(wanted) + 0.5) || (wanted != wanted && to[i] != to[i]),
                   "row work", name, to[i], wanted);
        }
    };
    auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    auto gelu = [](double x) { return x / 2 * (1 + std::erf(x / std::sqrt(2.0))); };
    auto gelu_tanh = [&](double x) { return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)); };
    check("exp", OpCode::exp, [](double x, double) { return std::exp(x); });
    check("log", OpCode::log, [](double x, double) { return std::log(x); });
    check("abs", OpCode::abs, [](double x, double) { return std::fabs(x); });
    check("sqrt", OpCode::sqrt, [](double x, double) { return std::sqrt(x); });
    check("tanh", OpCode::tanh, [](double x, double) { return std::tanh(x); });
    check("sigmoid", OpCode::sigmoid, [&](double x, double) { return sigmoid(x); });
    check("silu", OpCode::silu, [&](double x, double) { return x * sigmoid(x); });
    check("gelu", OpCode::gelu, [&](double x, double) { return gelu(x); });
    check("gelu_tanh", OpCode::gelu_tanh, [&](double x, double) { return gelu_tanh(x); });
    check("relu", OpCode::relu, [](double x, double) { return x < 0 ? 0 : x; });
    check("cos", OpCode::cos, [](double x, double) { return std::cos(x); });
    check("expm1", OpCode::expm1, [](double x, double) { return std::expm1(x); });
    check("floor", OpCode::floor, [](double x, double) { return std::floor(x); });
    check("above", OpCode::above, [](double x, double) { return x > 0.5; });
    check("add", OpCode::add, [](double x, double y) { return x + 0.5 * y; });
    check("mul", OpCode::mul, [](double x, double y) { return x * y; });
    check("max", OpCode::max, [](double x, double y) { return std::max(x, y); });
    check("silu_mul", OpCode::silu_mul, [&](double x, double y) { return x * sigmoid(x) * y; });

    double mean = 0, squares = 0;
    for (float each : a) mean += each / width;
    for (float each : a) squares += (each - mean) * (each - mean) / width;
    Op norm{OpCode::layer_norm, 0, 1, width, at(2), at(0), at(1), at(1), 1e-5f, 0};
    run_row_part(&norm, 1, view, {0, 1});
    for (long i = 0; i < width; i++) {
        const double wanted = (a[i] - mean) / std::sqrt(squares + 1e-5) * b[i] + b[i];
        expect(std::fabs(to[i] - wanted) <= 1e-5, "row work", "layer_norm", to[i], wanted);
    }
    Op largest{OpCode::largest, 0, 1, width, at(2), at(0), {}, {}, 0, 0};
    run_row_part(&largest, 1, view, {0, 1});
    const float wanted = *std::max_element(a.begin(), a.end());
    expect(to[0] == wanted, "row work", "largest", to[0], wanted);
}

}  // namespace

int main() {
    for (const AbiEntry* entry = baton_abi(); entry->name; entry++)
        std::printf("abi %s %ld\n", entry->name, long(entry->value));
    for (int type = 0; type < 4; type++) {
        products(WeightType(type), 65, 3);
        products(WeightType(type), 130, 67);
        products(WeightType(type), 70, 1101);  // more than a chunk
    }
    std::puts("products: right");
    for (long window : {0L, 37L})
        for (float softcap : {0.0f, 20.0f}) {
            attention<float>(CacheType::f32, window, softcap, softcap > 0);
            attention<bf16>(CacheType::bf16, window, softcap, window > 0);
        }
    std::puts("attention: right");
    rows();
    std::puts("row work: right");
}
