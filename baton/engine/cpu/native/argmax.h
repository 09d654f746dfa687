// Greedy sampling: the lowest index of the largest number of each row. Each thread scans the columns of all
// rows whose logits it has just computed, as they are still in its cache.
#pragma once

#include <algorithm>

#include "gemm_pack.h"
#include "threads.h"
#include "vec.h"

namespace baton {

// The largest of `width` numbers; a NaN if one of them is.
inline float largest_of_row(const float* row, long width) {
    Vec top = all(-INFINITY), unsound = {};
    long at = 0;
    for (; at + LANES <= width; at += LANES) {
        Vec value = load(row + at);
        top = max(top, value);
        unsound = select(value == value, unsound, value);
    }
    float result = largest(top), nan = sum(unsound);
    for (; at < width; at++) {
        result = row[at] > result ? row[at] : result;
        nan = row[at] == row[at] ? nan : row[at];
    }
    return nan == nan ? result : nan;
}

// The first index of `value` in the row; 0 if it does not occur, as with a NaN.
inline long first_of_row(const float* row, long width, float value) {
    long at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES) {
        VecI found = {};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) found |= load(row + at + i * LANES) == value;
        if (sum((Vec)(found & 0x3f800000)) > 0) break;  // 1.0 in each lane that equals it
    }
    for (; at < width; at++)
        if (row[at] == value) return at;
    return 0;
}

class Argmax {
   public:
    // rows [count][width], `stride` floats apart; `memory`: bytes(count, threads) of it.
    Argmax(const float* rows, long count, long width, long stride, void* memory)
        : rows(rows), count(count), width(width), stride(stride), found(static_cast<Found*>(memory)) {}

    static size_t bytes(long count, int threads) { return count * threads * sizeof(Found); }

    // Needs a barrier after it, and one before it if other threads wrote the rows.
    void scan(const Worker& worker) const {
        Range panels = share(panels_of(width), worker);
        long begin = panels.begin * CHANNELS, end = std::min(width, panels.end * CHANNELS);
        long some = std::max(0L, end - begin);  // the largest of no numbers is -infinity
        for (long row = 0; row < count; row++) {
            const float* from = rows + row * stride + begin;
            float largest = largest_of_row(from, some);
            found[worker.thread * count + row] = {largest, begin + first_of_row(from, some, largest)};
        }
    }

    // ids [count]; -1 where a number of the row is a NaN or infinity, or all of them are -infinity.
    void reduce(int64_t* ids, const Worker& worker) const {
        Range mine = share(count, worker);
        for (long row = mine.begin; row < mine.end; row++) {
            Found best = found[row];
            bool finite = true;
            for (int thread = 0; thread < worker.threads; thread++) {
                const Found& next = found[thread * count + row];
                finite &= next.largest < INFINITY;  // false for a NaN too
                if (next.largest > best.largest) best = next;
            }
            ids[row] = finite && best.largest > -INFINITY ? best.index : -1;
        }
    }

   private:
    struct Found {
        float largest;
        int64_t index;
    };

    const float* rows;
    long count, width, stride;
    Found* found;
};

}  // namespace baton
