// Checks a program's file once, when it is opened: every offset, index and extent stays inside the file and
// inside the buffers of a forward. So a damaged file is refused and made anew, and never read out of bounds.
#pragma once

#include <cstdlib>

#include "blocks.h"
#include "parts.h"
#include "program_file.h"

namespace baton {

class ProgramCheck {
  public:
    ProgramCheck(const char* file, int64_t bytes) : file_(file), bytes_(bytes) {}

    // What is wrong with the file, or null.
    const char* fault() {
        if (bytes_ < int64_t(sizeof(Spec))) return "it is shorter than its head";
        spec_ = reinterpret_cast<const Spec*>(file_);
        if (spec_->file_bytes != bytes_) return "it is not as long as its head states";
        if (!array(spec_->ops, spec_->op_count, ops_) || !array(spec_->stages, spec_->stage_count, stages_) ||
            !array(spec_->buffers, spec_->buffer_count, buffers_) ||
            !array(spec_->weights, spec_->weight_count, weights_) ||
            !array(spec_->layers, spec_->layer_count, layers_) ||
            !array(spec_->tables, spec_->table_count, tables_) ||
            !inside(spec_->info, spec_->info_bytes))
            return "a part lies outside the file";
        if (spec_->stage_count < 1) return "it has no stages";
        if (!size(spec_->token_floats) || !size(spec_->logit_row_floats) || !size(spec_->scratch_floats))
            return "the arena has an impossible size";
        if (!all(buffers_, spec_->buffer_count, &ProgramCheck::buffer)) return "a buffer is outside the arena";
        if (logits_ != 1) return "it has not one buffer of logits";
        if (!all(weights_, spec_->weight_count, &ProgramCheck::weight)) return "a weight is damaged";
        if (!all(layers_, spec_->layer_count, &ProgramCheck::layer)) return "a layer is damaged";
        if (!all(weights_, spec_->weight_count, &ProgramCheck::multiplied) ||
            !all(layers_, spec_->layer_count, &ProgramCheck::attended))
            return "this library was built without a type of its weights or caches";
        if (!all(tables_, spec_->table_count, &ProgramCheck::table)) return "a constant is outside the file";
        if (!all(stages_, spec_->stage_count, &ProgramCheck::stage)) return "a stage is damaged";
        return nullptr;
    }

  private:
    static constexpr int64_t MOST = int64_t(1) << 30;  // of a dimension: products of two do not overflow

    static bool size(int64_t value) { return value >= 0 && value <= MOST; }

    bool inside(int64_t offset, int64_t count, int64_t each = 1) const {
        return offset >= 0 && offset <= bytes_ && count >= 0 && count <= (bytes_ - offset) / each;
    }

    bool inside(const void* offset, int64_t count, int64_t each, int64_t alignment) const {
        intptr_t at = reinterpret_cast<intptr_t>(offset);
        return at > 0 && at % alignment == 0 && inside(at, count, each);
    }

    template <typename T>
    bool array(int64_t offset, int64_t count, const T*& items) const {
        items = reinterpret_cast<const T*>(file_ + offset);
        return offset % int64_t(alignof(T)) == 0 && inside(offset, count, sizeof(T));
    }

    template <typename T>
    bool all(const T* items, int64_t count, bool (ProgramCheck::*sound)(const T&)) {
        for (int64_t i = 0; i < count; i++)
            if (!(this->*sound)(items[i])) return false;
        return true;
    }

    bool buffer(const BufferSpec& it) {
        if (!size(it.width) || !size(it.offset)) return false;
        switch (it.kind) {
            case BufferKind::ids:
            case BufferKind::positions:
                if (it.width != 1) return false;
                [[fallthrough]];
            case BufferKind::tokens: return it.offset + it.width <= spec_->token_floats;
            case BufferKind::logit_rows: return it.offset + it.width <= spec_->logit_row_floats;
            case BufferKind::logits: return it.width > 0 && it.offset == 0 && ++logits_;
        }
        return false;
    }

    bool weight(const Weight& it) {
        if (it.type < WeightType::f32 || it.type > WeightType::q8) return false;
        if (it.n < 1 || it.k < 1 || !size(it.n) || !size(it.k)) return false;
        if (blocked(it.type) && !blocks(it)) return false;
        const size_t bytes = blocked(it.type) ? blocks_bytes(it) : packed_bytes(it.type, it.n, it.k);
        if (!inside(it.panels, bytes, 1, 64)) return false;
        if (it.bias && !inside(it.bias, it.n, sizeof(float), 4)) return false;
        return scaled(it.type) ? inside(it.scales, it.n, sizeof(float), 4) : it.scales == nullptr;
    }

    // Of q4 and q8: whether the sizes that blocks.h computes with are possible.
    static bool blocks(const Weight& it) {
        return it.k % 8 == 0 && it.block >= 8 && it.block % 8 == 0 && size(it.block) &&
               it.offset >= Offset::none && it.offset <= Offset::minima && (it.halves == 0 || it.halves == 1);
    }

    bool layer(const AttentionLayer& it) {
        if (it.type < CacheType::f32 || it.type > CacheType::i8) return false;
        for (long each : {it.heads, it.kv_heads, it.key_dim, it.value_dim})
            if (each < 1 || each > (1 << 20)) return false;
        if (it.heads % it.kv_heads || it.window < 0) return false;
        return it.sinks == nullptr || inside(it.sinks, it.heads, sizeof(float), 4);
    }

    bool multiplied(const Weight& it) { return product_part(it.type) != nullptr; }
    bool attended(const AttentionLayer& it) { return attention_part(it.type) != nullptr; }

    bool table(const Table& it) { return inside(it.data, it.bytes, 1, 4); }

    bool stage(const Stage& it) {
        if (it.first < 0 || it.count < 0 || it.of_logit_rows < 0 || it.of_logit_rows > 1) return false;
        late_ = it.of_logit_rows;
        switch (it.kind) {
            case StageKind::rows:
                return it.first <= spec_->op_count && it.count <= spec_->op_count - it.first &&
                       all(ops_ + it.first, it.count, &ProgramCheck::op);
            case StageKind::product:
                return it.first < spec_->weight_count && floats(it.a, weights_[it.first].k) &&
                       floats(it.to, weights_[it.first].n);
            case StageKind::grouped: return grouped(it);
            case StageKind::write_kv: {
                if (late_ || it.first >= spec_->layer_count) return false;
                const AttentionLayer& layer = layers_[it.first];
                return floats(it.a, layer.kv_heads * layer.key_dim) &&
                       floats(it.b, layer.kv_heads * layer.value_dim);
            }
            case StageKind::attend: {
                if (late_ || it.first >= spec_->layer_count) return false;
                const AttentionLayer& layer = layers_[it.first];
                return floats(it.a, layer.heads * layer.key_dim) &&
                       floats(it.to, layer.heads * layer.value_dim);
            }
        }
        return false;
    }

    bool grouped(const Stage& it) {
        if (it.count < 1 || it.first > spec_->weight_count - it.count) return false;
        if (it.slots < 1 || it.slots > it.count) return false;
        const Weight& weight = weights_[it.first];
        for (int64_t i = it.first; i < it.first + it.count; i++)
            if (weights_[i].type != weight.type || weights_[i].n != weight.n || weights_[i].k != weight.k ||
                weights_[i].block != weight.block || weights_[i].offset != weight.offset ||
                weights_[i].halves != weight.halves)
                return false;
        if (it.slot_stride != 0 && it.slot_stride != weight.k) return false;
        return floats(it.a, it.slot_stride ? it.slots * weight.k : weight.k) && floats(it.b, it.slots) &&
               floats(it.to, it.slots * weight.n);
    }

    // Whether each row of the stage has `width` floats at `ref`.
    bool floats(const TensorRef& ref, int64_t width) const {
        return rows_fit(ref.buffer, late_) && ref.offset >= 0 &&
               ref.offset <= buffers_[ref.buffer].width - width;
    }

    // Whether the buffer has a row for each token, or for each logits row.
    bool rows_fit(int64_t number, bool late) const {
        if (number < 0 || number >= spec_->buffer_count) return false;
        BufferKind kind = buffers_[number].kind;
        return late == (kind == BufferKind::logit_rows || kind == BufferKind::logits);
    }

    bool op(const Op& it) {
        if (!size(it.outer) || !size(it.inner)) return false;
        if (it.to.place != Place::value && it.to.place != Place::scratch) return false;
        switch (it.code) {
            case OpCode::sum:
            case OpCode::mean:
            case OpCode::largest:
                return it.inner > 0 && walk(it.to, it.outer, 1) && walk(it.a, it.outer, it.inner);
            case OpCode::layer_norm:
                return it.inner > 0 && walk(it.to, it.outer, it.inner) && walk(it.a, it.outer, it.inner) &&
                       line(it.b, it.inner) && line(it.c, it.inner);
            case OpCode::topk:
                return it.x >= 1 && it.x <= it.inner && walk(it.to, it.outer, int64_t(it.x)) &&
                       walk(it.a, it.outer, it.inner);
            case OpCode::gather:
                return it.x >= 1 && it.x <= MOST && walk(it.to, it.outer, it.inner) &&
                       walk(it.a, it.outer, int64_t(it.x)) && walk(it.b, it.outer, it.inner);
            case OpCode::scatter:
                return it.x >= 1 && it.x <= MOST && walk(it.to, it.outer, int64_t(it.x)) &&
                       walk(it.a, it.outer, it.inner);
            case OpCode::embed_f32: return embed(it, sizeof(float));
            case OpCode::embed_bf16: return embed(it, sizeof(bf16));
            default: break;
        }
        if (it.code < OpCode::copy || it.code > OpCode::embed_bf16) return false;
        bool two = (it.code >= OpCode::add && it.code <= OpCode::min) || it.code >= OpCode::silu_mul;
        return walk(it.to, it.outer, it.inner) && walk(it.a, it.outer, it.inner) &&
               (!two || walk(it.b, it.outer, it.inner)) &&
               (it.code != OpCode::where || walk(it.c, it.outer, it.inner));
    }

    bool embed(const Op& it, int64_t each) const {
        return line(it.to, it.inner) && walk(it.a, 1, 1) && it.b.place == Place::constant &&
               table_floats(it.b) * int64_t(sizeof(float)) >= it.inner * each && it.b.offset == 0;
    }

    // Whether the contiguous weight or bias of layer_norm is inside its table, if there is one.
    bool line(Operand it, int64_t inner) const {
        it.inner_stride = 1;
        return it.place == Place::none || walk(it, 1, inner);
    }

    // Whether the outer x inner numbers of an operand are inside their row, the scratch or the table.
    bool walk(const Operand& it, int64_t outer, int64_t inner) const {
        int64_t width = 0;
        switch (it.place) {
            case Place::value:
                if (!rows_fit(it.buffer, late_)) return false;
                width = buffers_[it.buffer].width;
                break;
            case Place::gathered:
                if (!late_ || !rows_fit(it.buffer, false)) return false;
                width = buffers_[it.buffer].width;
                break;
            case Place::scratch: width = spec_->scratch_floats; break;
            case Place::constant: width = table_floats(it); break;
            default: return false;
        }
        if (outer == 0 || inner == 0) return true;
        if (it.offset < 0 || it.offset >= width) return false;
        if (std::llabs(it.outer_stride) > MOST || std::llabs(it.inner_stride) > MOST) return false;
        int64_t low = it.offset, high = it.offset;
        for (int64_t step : {(outer - 1) * it.outer_stride, (inner - 1) * it.inner_stride})
            (step < 0 ? low : high) += step;
        return low >= 0 && high < width;
    }

    int64_t table_floats(const Operand& it) const {
        bool known = it.buffer >= 0 && it.buffer < spec_->table_count;
        return known ? tables_[it.buffer].bytes / int64_t(sizeof(float)) : 0;
    }

    const char* file_;
    int64_t bytes_;
    const Spec* spec_ = nullptr;
    const Op* ops_ = nullptr;
    const Stage* stages_ = nullptr;
    const BufferSpec* buffers_ = nullptr;
    const Weight* weights_ = nullptr;
    const AttentionLayer* layers_ = nullptr;
    const Table* tables_ = nullptr;
    int logits_ = 0;
    bool late_ = false;  // the current stage works on logits rows
};

}  // namespace baton
