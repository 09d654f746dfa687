// A program: one forward of a model as a list of stages over packed weights and a paged KV pool, run by a
// single call. Made by baton/engine/cpu/assemble.py; its file is described in program_file.h.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "abi.h"
#include "argmax.h"
#include "parts.h"
#include "pool.h"
#include "program_check.h"
#include "program_file.h"

namespace baton {

// Memory that grows and never shrinks, aligned for vectors.
class ScratchBuffer {
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
          buffers_(spec_.buffer_count),
          product_tasks_(spec_.weight_count),
          attention_tasks_(spec_.layer_count) {
        for (Weight& weight : weights_) {
            placed(weight.panels);
            placed(weight.scales);
            placed(weight.bias);
        }
        for (AttentionLayer& layer : layers_) placed(layer.sinks);
        for (const Table& table : of<Table>(spec_.tables, spec_.table_count)) {
            tables_.push_back(static_cast<const float*>(table.data));
            placed(tables_.back());
        }
    }

    // Stages first..last-1. 0, or 1 if memory is short. The lock allows one run at a time, because buffers_
    // is a member, and ctypes releases the GIL, so several threads may call this at once.
    int run(const ForwardArgs& args, long first, long last, int threads, ThreadPool& pool) {
        std::lock_guard<std::mutex> one_run(running_);
        if (!place(args, first, last, threads)) return 1;
        Barrier barrier;
        pool.run(threads, [&](const Worker& worker) {
            if (first == 0) read_inputs(args, worker);
            for (long i = first; i < last; i++) begin(stages_[i], worker);
            for (long i = first; i < last; i++) {
                barrier.wait(worker.threads);
                step(stages_[i], args, worker, barrier);
            }
            if (args.argmax) find_argmax(args, worker, barrier);
        });
        return 0;
    }

  private:
    template <typename T>
    std::vector<T> of(int64_t offset, int64_t count) const {
        const T* first = reinterpret_cast<const T*>(file_ + offset);
        return std::vector<T>(first, first + count);
    }

    // Turns an offset into an address.
    template <typename T>
    void placed(const T*& pointer) const {
        if (pointer) pointer = reinterpret_cast<const T*>(file_ + reinterpret_cast<intptr_t>(pointer));
    }
    void placed(const void*& pointer) const {
        if (pointer) pointer = file_ + reinterpret_cast<intptr_t>(pointer);
    }

    // Sets up the buffers for this forward's rows; false if memory is short.
    bool place(const ForwardArgs& args, long first, long last, int threads) {
        float* logit_rows = args.arena + spec_.token_floats * args.tokens;
        for (long i = 0; i < spec_.buffer_count; i++) {
            const BufferSpec& spec = specs_[i];
            bool of_logit_rows = spec.kind == BufferKind::logit_rows;
            float* rows = of_logit_rows ? logit_rows + spec.offset * args.logit_count
                                   : args.arena + spec.offset * args.tokens;
            buffers_[i] = {spec.kind == BufferKind::logits ? args.logits : rows, spec.width};
            if (spec.kind == BufferKind::logits) logits_width_ = spec.width;
        }
        size_t prepared = 0, attending = 0;
        for (long i = first; i < last; i++) {
            const Stage& stage = stages_[i];
            if (stage.kind == StageKind::product) {
                const Weight& weight = weights_[stage.first];
                prepared = std::max(prepared, rows_bytes(weight.type, rows_of(stage, args), weight.k));
                product_tasks_[stage.first].prepare(weight, rows_of(stage, args), threads);
            } else if (stage.kind == StageKind::attend) {
                attending = std::max(attending, attention(stage).scratch_bytes(layers_[stage.first]));
                prepare_attention(attention_tasks_[stage.first], threads);
            }
        }
        attending_ = (attending + 63) / 64 * 64;
        own_ = (std::max<size_t>(attending_, spec_.scratch_floats * sizeof(float)) + 63) / 64 * 64;
        prepared_ = prepared_buffer_.of(prepared + 64);
        scratch_ = scratch_buffer_.of(own_ * threads + 64);
        argmax_ = argmax_buffer_.of(Argmax::bytes(args.logit_count, threads) + 64);
        return prepared_ && scratch_ && argmax_;
    }

    // Each thread takes its range of a stage's tasks; a barrier follows.
    void begin(const Stage& stage, const Worker& worker) {
        if (stage.kind == StageKind::product) product_tasks_[stage.first].begin(worker);
        if (stage.kind == StageKind::attend) attention_tasks_[stage.first].begin(worker);
    }

    static long rows_of(const Stage& stage, const ForwardArgs& args) {
        return stage.of_logit_rows ? args.logit_count : args.tokens;
    }

    float* at(const TensorRef& ref) const { return buffers_[ref.buffer].rows + ref.offset; }
    long stride(const TensorRef& ref) const { return buffers_[ref.buffer].width; }

    // Ids and positions become values of their rows; as floats they are exact up to 2^24.
    void read_inputs(const ForwardArgs& args, const Worker& worker) const {
        Range mine = share(args.tokens, worker);
        for (long i = 0; i < spec_.buffer_count; i++) {
            BufferKind kind = specs_[i].kind;
            if (kind != BufferKind::ids && kind != BufferKind::positions) continue;
            const int64_t* from = kind == BufferKind::ids ? args.ids : args.positions;
            for (long row = mine.begin; row < mine.end; row++)
                buffers_[i].rows[row] = float(from[row]);
        }
    }

    void step(const Stage& stage, const ForwardArgs& args, const Worker& worker, Barrier& barrier) {
        long rows = rows_of(stage, args);
        char* own = scratch_ + own_ * worker.thread;
        switch (stage.kind) {
            case StageKind::rows: {
                RowView view{buffers_.data(), tables_.data(), args.logit_rows,
                          reinterpret_cast<float*>(own)};
                return run_row_part(ops_.data() + stage.first, stage.count, view, share(rows, worker));
            }
            case StageKind::product: {
                const Weight& weight = weights_[stage.first];
                if (rows_bytes(weight.type, rows, weight.k)) {
                    product_part(weight.type)->prepare_rows(at(stage.a), stride(stage.a), rows, weight.k,
                                                            prepared_, worker);
                    barrier.wait(worker.threads);
                }
                return product_part(weight.type)
                    ->multiply(weight, at(stage.a), stride(stage.a), prepared_, rows, at(stage.to),
                               stride(stage.to), product_tasks_[stage.first], worker);
            }
            case StageKind::write_kv:
                return attention(stage).write_kv(layer_of(stage, args), args.attention, at(stage.a),
                                                 stride(stage.a), at(stage.b), stride(stage.b), worker);
            case StageKind::attend:
                return attention(stage).attend(layer_of(stage, args), args.attention, at(stage.a),
                                               stride(stage.a), at(stage.to), stride(stage.to), own,
                                               attention_tasks_[stage.first], worker);
        }
    }

    void find_argmax(const ForwardArgs& args, const Worker& worker, Barrier& barrier) const {
        Argmax rows(args.logits, args.logit_count, logits_width_, logits_width_, argmax_);
        barrier.wait(worker.threads);
        rows.scan(worker);
        barrier.wait(worker.threads);
        rows.reduce(args.argmax, worker);
    }

    const AttentionPart& attention(const Stage& stage) const {
        return *attention_part(layers_[stage.first].type);
    }

    AttentionLayer layer_of(const Stage& stage, const ForwardArgs& args) const {
        AttentionLayer layer = layers_[stage.first];
        layer.keys = args.keys[stage.first];
        layer.values = args.values[stage.first];
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
    std::mutex running_;
    std::vector<Buffer> buffers_;  // of the current run
    std::vector<Parts> product_tasks_;    // of each product
    std::vector<Tasks> attention_tasks_;  // of each layer
    ScratchBuffer prepared_buffer_, scratch_buffer_, argmax_buffer_;
    char *prepared_ = nullptr, *scratch_ = nullptr, *argmax_ = nullptr;
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

// See abi.h.
const AbiEntry* baton_abi() {
    static const AbiEntry table[] = {ABI_ATTENTION ABI_PROGRAM {nullptr, 0}};
    return table;
}

// What is wrong with a program's file (see program_check.h), or null. Call before baton_program_new.
const char* baton_program_fault(const char* file, int64_t bytes) {
    return ProgramCheck(file, bytes).fault();
}

// The file's memory is the caller's and must outlive the program.
void* baton_program_new(const char* file) { return new Program(file); }

void baton_program_free(void* program) { delete static_cast<Program*>(program); }

int baton_program_run(void* program, const ForwardArgs* args, int64_t first, int64_t last,
                      int32_t threads) {
    return static_cast<Program*>(program)->run(*args, first, last, threads, threads_of_process());
}

int64_t baton_packed_bytes(int32_t type, int64_t n, int64_t k) {
    return packed_bytes(WeightType(type), n, k);
}

void baton_pack(int32_t type, const void* source, int32_t is_bf16, int64_t row_stride,
                int64_t column_stride, int64_t n, int64_t k, void* panels, float* scales,
                int32_t threads) {
    threads_of_process().run(threads, [&](const Worker& worker) {
        product_part(WeightType(type))
            ->pack(source, is_bf16, row_stride, column_stride, n, k, panels, scales, worker);
    });
}
}
