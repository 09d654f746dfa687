// Products whose weight each row chooses, as in mixtures of experts: of row m, slot s
// out[m, s] = rows[m, s] @ weight[chosen[m, s]].T + bias[chosen[m, s]].
//
// The pairs (m, s) are sorted by expert, and the rows of one expert are multiplied like those of any product
// (gemm_tile.h). So the bits of a pair's result depend on its row and its expert only, not on the other rows
// that chose this expert.
#pragma once

#include "gemm_tile.h"

namespace baton {

// The pairs of one grouped product in the order of their experts, and its tasks: each is one panel of an
// expert for a part of its pairs.
class Groups {
   public:
    static size_t bytes(long pairs, long experts) {
        return sizeof(int32_t) * (pairs + 2 * (experts + 1));
    }

    // Memory for the largest product of a run, bytes() long, and for the tasks of `threads`.
    void place(void* memory, int threads) {
        order = (int32_t*)memory;
        tasks.prepare(0, threads);
    }

    // Sorts the pairs of `m` rows with `k` slots each, for products with `n` channels. `chosen` [m][k] are the
    // numbers of experts. By one thread; barriers separate it from what came before and from begin().
    void sort(const float* chosen, long stride, long m, long k, long experts_, long n, int threads) {
        slots = k;
        experts = experts_;
        all = m * k;
        starts = order + all;
        first_tasks = starts + experts + 1;
        std::fill(starts, starts + experts + 1, 0);
        for (long pair = 0; pair < all; pair++) starts[1 + expert_of(chosen, stride, pair)]++;
        for (long i = 0; i < experts; i++) starts[i + 1] += starts[i];
        std::copy(starts, starts + experts + 1, first_tasks);  // for now: where an expert's next pair goes
        for (long pair = 0; pair < all; pair++)
            order[first_tasks[expert_of(chosen, stride, pair)]++] = int32_t(pair);
        first_tasks[0] = 0;
        for (long i = 0; i < experts; i++)
            first_tasks[i + 1] = first_tasks[i] + int32_t(panels_of(n) * divided(count(i), PART_ROWS));
        tasks.prepare(first_tasks[experts], threads);
    }

    // Each thread's range of the tasks; a barrier separates it from each().
    void begin(const Worker& worker) { tasks.begin(worker); }

    long pairs() const { return all; }
    long count(long expert) const { return starts[expert + 1] - starts[expert]; }

    // Of the pair at a place of the order.
    long row(long place) const { return order[place] / slots; }
    long slot(long place) const { return order[place] % slots; }

    // Calls visit(expert, panel, places) for this thread's tasks until none is left.
    template <typename Visit>
    void each(const Worker& worker, Visit&& visit) {
        for (long task; (task = tasks.take(worker)) >= 0;) {
            const int32_t* after = std::upper_bound(first_tasks, first_tasks + experts + 1, int32_t(task));
            long expert = after - first_tasks - 1, within = task - first_tasks[expert];
            long parts = divided(count(expert), PART_ROWS);
            Range some = share(count(expert), {int(within % parts), int(parts)});
            visit(expert, within / parts, Range{starts[expert] + some.begin, starts[expert] + some.end});
        }
    }

   private:
    // Row work found the number among `experts`; the comparison keeps any other one inside.
    long expert_of(const float* chosen, long stride, long pair) const {
        float number = chosen[pair / slots * stride + pair % slots];
        return number >= 0 && number < experts ? long(number) : 0;
    }

    Tasks tasks;
    int32_t *order = nullptr, *starts = nullptr, *first_tasks = nullptr;
    long slots = 1, experts = 0, all = 0;
};

// Of the rows of all pairs, in the form that is multiplied: see gemm_pack.h; copies where that is floats.
inline size_t grouped_bytes(WeightType type, long pairs, long k) {
    return scales_bytes(type, pairs) + size_t(pairs) * words_of_row(type, k) * sizeof(uint32_t);
}

// Puts the rows of all pairs into `prepared`, in their order. A row of slot s is `slot_stride` floats after
// that of slot s - 1; 0: all slots have the same row. Needs a barrier after it.
template <WeightType type>
void gather_rows(const Groups& groups, const float* rows, long row_stride, long slot_stride, long k,
                 void* prepared, const Worker& worker) {
    Range mine = share(groups.pairs(), worker);
    uint32_t* words = row_words(type, prepared, groups.pairs());
    for (long i = mine.begin; i < mine.end; i++) {
        const float* row = rows + groups.row(i) * row_stride + groups.slot(i) * slot_stride;
        uint32_t* to = words + i * words_of_row(type, k);
        if constexpr (in_place(type)) std::memcpy(to, row, k * sizeof(float));
        else prepare_row<type>(row, k, to, (float*)prepared + i);
    }
}

// One task: multiplied beside each other, then copied to where each pair's result belongs.
template <WeightType type, WeightType form>
inline void multiply_group(const Weight& weight, const Rows& rows, long panel, const Groups& groups,
                           const Range& places, float* out, long out_stride) {
    alignas(64) float results[PART_ROWS * CHANNELS];
    const Rows here{rows.words + places.begin * rows.stride, rows.stride, rows.scales + places.begin};
    multiply_part<type, form>(weight, here, panel, {0, places.end - places.begin}, results, CHANNELS);
    const long first = panel * CHANNELS;
    const size_t bytes = sizeof(float) * std::min<long>(weight.n - first, CHANNELS);
    for (long i = places.begin; i < places.end; i++)
        std::memcpy(out + groups.row(i) * out_stride + groups.slot(i) * weight.n + first,
                    results + (i - places.begin) * CHANNELS, bytes);
}

// out [M][slots][N], this thread's tasks. `weights`: one for each expert, all of one shape.
template <WeightType type>
void multiply_groups(const Weight* weights, const void* prepared, float* out, long out_stride,
                     Groups& groups, const Worker& worker) {
    const Rows rows{row_words(type, prepared, groups.pairs()), words_of_row(type, weights->k),
                    (const float*)prepared};
    groups.each(worker, [&](long expert, long panel, const Range& places) {
        if constexpr (halves(type) && !PAIRS)
            if (groups.count(expert) > 8 * ROWS)
                return multiply_group<type, WeightType::f32>(weights[expert], rows, panel, groups, places,
                                                             out, out_stride);
        multiply_group<type, type>(weights[expert], rows, panel, groups, places, out, out_stride);
    });
}

}  // namespace baton
