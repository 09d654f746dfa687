// A program: one forward of a model as a list of stages over packed weights and a paged KV pool,
// run by a single call. Made by baton/engine/cpu/program.py, whose ctypes structures mirror these.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "likeliest.h"
#include "pool.h"
#include "rows.h"

namespace baton {

enum class StageKind : int32_t { rows, product, write_kv, attend };
enum class BufferKind : int32_t { tokens, picks, ids, positions, logits };

struct BufferSpec {
    BufferKind kind;
    int32_t unused;
    int64_t width, offset;  // floats of a row; of the buffers before this one, per row
};

struct Spot {
    int64_t buffer, offset;
};

struct Stage {
    StageKind kind;
    int32_t of_picks;      // the rows are those that need logits
    int64_t first, count;  // rows: operations; product: weight; attend: layer
    Spot a, b, to;         // product: rows, -, result; write_kv: key, value; attend: query, -, result
};

// The beginning of a program's file. What it points to, and what the weights, layers and tables
// point to, is told by offsets from here; 0 is nowhere.
struct Spec {
    int64_t ops, stages, buffers, weights, layers, tables;
    int64_t op_count, stage_count, buffer_count, weight_count, layer_count, table_count;
    int64_t token_floats, pick_floats, scratch_floats;  // of the arena per row; per thread
    int64_t info, info_bytes, file_bytes;
};

struct Batch {
    int64_t tokens, picks;
    const int64_t *ids, *positions, *pick_rows;
    AttentionBatch attention;
    void* const* keys;  // of each layer
    void* const* values;
    float* arena;
    float* logits;
    int64_t* likeliest;  // [picks], see likeliest.h; null: not wanted
};

// Memory that grows and never shrinks, aligned for vectors.
class Room {
  public:
    char* of(size_t bytes) {
        if (bytes > size_) {
            data_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
            size_ = data_ ? bytes : 0;
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(char* data) const { std::free(data); }
    };
    std::unique_ptr<char, Free> data_;
    size_t size_ = 0;
};

class Program {
  public:
    explicit Program(const char* file)
        : file_(file),
          spec_(*reinterpret_cast<const Spec*>(file)),
          ops_(of<Op>(spec_.ops, spec_.op_count)),
          stages_(of<Stage>(spec_.stages, spec_.stage_count)),
          specs_(of<BufferSpec>(spec_.buffers, spec_.buffer_count)),
          weights_(of<Weight>(spec_.weights, spec_.weight_count)),
          layers_(of<AttentionLayer>(spec_.layers, spec_.layer_count)),
          tables_(of<const float*>(spec_.tables, spec_.table_count)),
          buffers_(spec_.buffer_count),
          parts_(spec_.weight_count),
          shares_(spec_.layer_count) {
        for (Weight& weight : weights_) {
            placed(weight.panels);
            placed(weight.scales);
            placed(weight.bias);
        }
        for (AttentionLayer& layer : layers_) placed(layer.sinks);
        for (const float*& table : tables_) placed(table);
    }

    // Stages first..last-1. 0, or 1 if memory is out.
    int run(const Batch& batch, long first, long last, int threads, ThreadPool& pool) {
        if (!place(batch, first, last, threads)) return 1;
        Barrier barrier;
        pool.run(threads, [&](const Worker& worker) {
            if (first == 0) take_in(batch, worker);
            for (long i = first; i < last; i++) begin(stages_[i], worker);
            for (long i = first; i < last; i++) {
                barrier.wait(worker.threads);
                step(stages_[i], batch, worker, barrier);
            }
            if (batch.likeliest) find_likeliest(batch, worker, barrier);
        });
        return 0;
    }

  private:
    template <typename T>
    std::vector<T> of(int64_t offset, int64_t count) const {
        const T* first = reinterpret_cast<const T*>(file_ + offset);
        return std::vector<T>(first, first + count);
    }

    // An offset becomes an address.
    template <typename T>
    void placed(const T*& pointer) const {
        if (pointer) pointer = reinterpret_cast<const T*>(file_ + reinterpret_cast<intptr_t>(pointer));
    }
    void placed(const void*& pointer) const {
        if (pointer) pointer = file_ + reinterpret_cast<intptr_t>(pointer);
    }

    // Where everything lies, for so many rows.
    bool place(const Batch& batch, long first, long last, int threads) {
        float* picks = batch.arena + spec_.token_floats * batch.tokens;
        for (long i = 0; i < spec_.buffer_count; i++) {
            const BufferSpec& spec = specs_[i];
            bool of_picks = spec.kind == BufferKind::picks;
            float* rows = of_picks ? picks + spec.offset * batch.picks
                                   : batch.arena + spec.offset * batch.tokens;
            buffers_[i] = {spec.kind == BufferKind::logits ? batch.logits : rows, spec.width};
            if (spec.kind == BufferKind::logits) logits_width_ = spec.width;
        }
        size_t prepared = 0, attending = 0;
        for (long i = first; i < last; i++) {
            const Stage& stage = stages_[i];
            if (stage.kind == StageKind::product) {
                const Weight& weight = weights_[stage.first];
                prepared = std::max(prepared, rows_bytes(weight.type, rows_of(stage, batch), weight.k));
                parts_[stage.first].prepare(weight, rows_of(stage, batch), threads);
            } else if (stage.kind == StageKind::attend) {
                attending = std::max(attending, attention_scratch_bytes(layers_[stage.first]));
                prepare_attention(shares_[stage.first], threads);
            }
        }
        attending_ = (attending + 63) / 64 * 64;
        own_ = (std::max<size_t>(attending_, spec_.scratch_floats * sizeof(float)) + 63) / 64 * 64;
        prepared_ = prepared_room_.of(prepared + 64);
        scratch_ = scratch_room_.of(own_ * threads + 64);
        found_ = found_room_.of(Likeliest::bytes(batch.picks, threads) + 64);
        return prepared_ && scratch_ && found_;
    }

    // What is shared out as the stage goes on; a barrier follows.
    void begin(const Stage& stage, const Worker& worker) {
        if (stage.kind == StageKind::product) parts_[stage.first].begin(worker);
        if (stage.kind == StageKind::attend) shares_[stage.first].begin(worker);
    }

    static long rows_of(const Stage& stage, const Batch& batch) {
        return stage.of_picks ? batch.picks : batch.tokens;
    }

    float* at(const Spot& spot) const { return buffers_[spot.buffer].rows + spot.offset; }
    long stride(const Spot& spot) const { return buffers_[spot.buffer].width; }

    // Ids and positions become values of their rows; as floats they are exact up to 2^24.
    void take_in(const Batch& batch, const Worker& worker) const {
        Range mine = share(batch.tokens, worker);
        for (long i = 0; i < spec_.buffer_count; i++) {
            BufferKind kind = specs_[i].kind;
            if (kind != BufferKind::ids && kind != BufferKind::positions) continue;
            const int64_t* from = kind == BufferKind::ids ? batch.ids : batch.positions;
            for (long row = mine.begin; row < mine.end; row++)
                buffers_[i].rows[row] = float(from[row]);
        }
    }

    void step(const Stage& stage, const Batch& batch, const Worker& worker, Barrier& barrier) {
        long rows = rows_of(stage, batch);
        char* own = scratch_ + own_ * worker.thread;
        switch (stage.kind) {
            case StageKind::rows: {
                RowView view{buffers_.data(), tables_.data(), batch.pick_rows,
                          reinterpret_cast<float*>(own)};
                return run_rows(ops_.data() + stage.first, stage.count, view, share(rows, worker));
            }
            case StageKind::product: {
                const Weight& weight = weights_[stage.first];
                if (rows_bytes(weight.type, rows, weight.k)) {
                    prepare_rows(weight.type, at(stage.a), stride(stage.a), rows, weight.k,
                                 prepared_, worker);
                    barrier.wait(worker.threads);
                }
                return multiply(weight, at(stage.a), stride(stage.a), prepared_, rows, at(stage.to),
                                stride(stage.to), parts_[stage.first], worker);
            }
            case StageKind::write_kv:
                return write_kv(layer_of(stage, batch), batch.attention, at(stage.a),
                                stride(stage.a), at(stage.b), stride(stage.b), worker);
            case StageKind::attend:
                return attend(layer_of(stage, batch), batch.attention, at(stage.a), stride(stage.a),
                              at(stage.to), stride(stage.to), own, shares_[stage.first], worker);
        }
    }

    void find_likeliest(const Batch& batch, const Worker& worker, Barrier& barrier) const {
        Likeliest rows(batch.logits, batch.picks, logits_width_, logits_width_, found_);
        barrier.wait(worker.threads);
        rows.look(worker);
        barrier.wait(worker.threads);
        rows.settle(batch.likeliest, worker);
    }

    AttentionLayer layer_of(const Stage& stage, const Batch& batch) const {
        AttentionLayer layer = layers_[stage.first];
        layer.keys = batch.keys[stage.first];
        layer.values = batch.values[stage.first];
        return layer;
    }

    const char* file_;
    const Spec spec_;
    std::vector<Op> ops_;
    std::vector<Stage> stages_;
    std::vector<BufferSpec> specs_;
    std::vector<Weight> weights_;
    std::vector<AttentionLayer> layers_;
    std::vector<const float*> tables_;
    std::vector<Buffer> buffers_;  // of the run under way
    std::vector<Parts> parts_;     // of each product
    std::vector<Tasks> shares_;    // of each layer's attention
    Room prepared_room_, scratch_room_, found_room_;
    char *prepared_ = nullptr, *scratch_ = nullptr, *found_ = nullptr;
    size_t own_ = 0, attending_ = 0;
    long logits_width_ = 0;
};

ThreadPool& threads_of_process() {
    static ThreadPool* pool = new ThreadPool;  // never destroyed: its threads may still sleep in it
    return *pool;
}

}  // namespace baton

using namespace baton;

extern "C" {

// The file's memory is the caller's and must outlive the program.
void* baton_program_new(const char* file) { return new Program(file); }

void baton_program_free(void* program) { delete static_cast<Program*>(program); }

int baton_program_run(void* program, const Batch* batch, int64_t first, int64_t last,
                      int32_t threads) {
    return static_cast<Program*>(program)->run(*batch, first, last, threads, threads_of_process());
}

int64_t baton_packed_bytes(int32_t type, int64_t n, int64_t k) {
    return packed_bytes(WeightType(type), n, k);
}

void baton_pack(int32_t type, const void* source, int32_t is_bf16, int64_t row_stride,
                int64_t column_stride, int64_t n, int64_t k, void* panels, float* scales,
                int32_t threads) {
    threads_of_process().run(threads, [&](const Worker& worker) {
        if (is_bf16)
            pack(WeightType(type), static_cast<const bf16*>(source), row_stride, column_stride, n, k,
                 panels, scales, worker);
        else
            pack(WeightType(type), static_cast<const float*>(source), row_stride, column_stride, n,
                 k, panels, scales, worker);
    });
}
}
