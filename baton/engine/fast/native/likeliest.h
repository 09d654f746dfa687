// Greedy sampling: the largest number of each row, and the first place that has it.
#pragma once

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

// Where `value` first stands in the row; 0 if nowhere, as with a NaN.
inline long first_of_row(const float* row, long width, float value) {
    long at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES) {
        VecI found = {};
        for (int i = 0; i < 4; i++) found |= load(row + at + i * LANES) == value;
        if (sum((Vec)(found & 0x3f800000)) > 0) break;  // a 1 in each lane that is it
    }
    for (; at < width; at++)
        if (row[at] == value) return at;
    return 0;
}

// rows [count][width], `stride` floats apart.
inline void likeliest(const float* rows, long count, long width, long stride, float* largest,
                      int64_t* places, const Worker& worker) {
    Range mine = share(count, worker);
    for (long row = mine.begin; row < mine.end; row++) {
        largest[row] = largest_of_row(rows + row * stride, width);
        places[row] = first_of_row(rows + row * stride, width, largest[row]);
    }
}

}  // namespace baton
