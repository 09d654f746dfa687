// Keys and values of a key block, laid out for vectors: keys side by side (one dimension of LANES keys is
// a vector), values below each other. The next rows are prefetched meanwhile.
#pragma once

#include <utility>

#include "vec.h"

namespace baton {

constexpr int KEY_BLOCK = 64;  // positions; key blocks begin at multiples of it

// Inline assembly, because gcc removes calls to functions that contain only __builtin_prefetch.
inline void prefetch(const void* address) {
#ifdef __x86_64__
    asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(address)));
#else
    __builtin_prefetch(address);
#endif
}

// Rows `slots[0 .. count)` of a pool, and the rows that follow them. Each load prefetches the same place
// of a following row, so that memory is busy during the arithmetic.
template <typename T>
struct CacheRows {
    const T* pool;
    const int64_t* slots;
    long stride, dim;
    int count;
    const T* next_pool;
    const int64_t* next_slots;
    long next_stride;
    int next_count;

    const T* at(long row) const { return pool + slots[row] * stride; }

    const T* after(long row) const {
        return next_pool + next_slots[row < next_count ? row : next_count - 1] * next_stride;
    }

    // As many values of a row as V has, as a factor of multiply().
    template <typename V>
    V at(long row, long column) const {
        prefetch(after(row) + column);
        return load_part<V>(at(row) + column);
    }
};

enum Shuffle { LOW, HIGH, LOW_PAIRS, HIGH_PAIRS, EVEN_QUARTERS, ODD_QUARTERS };

// Lane `lane` of the result: a lane of the first operand, or LANES + one of the second.
constexpr int source(Shuffle kind, int lane) {
    int within = lane % 4, quarter = lane - within;
    switch (kind) {
        case LOW: return quarter + within / 2 + within % 2 * LANES;
        case HIGH: return quarter + 2 + within / 2 + within % 2 * LANES;
        case LOW_PAIRS: return quarter + within % 2 + within / 2 * LANES;
        case HIGH_PAIRS: return quarter + 2 + within % 2 + within / 2 * LANES;
        case EVEN_QUARTERS: return lane % 8 / 4 * 8 + within + lane / 8 * LANES;
        default: return lane % 8 / 4 * 8 + 4 + within + lane / 8 * LANES;
    }
}

template <Shuffle kind, int... lane>
inline Vec shuffled(Vec a, Vec b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, source(kind, lane)...);
}

template <Shuffle kind>
inline Vec shuffle(Vec a, Vec b) {
    return shuffled<kind>(a, b, std::make_integer_sequence<int, LANES>{});
}

// Lane j of row i becomes lane i of row j.
inline void transpose(Vec (&rows)[LANES]) {
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        Vec a = shuffle<LOW>(rows[i], rows[i + 1]), b = shuffle<HIGH>(rows[i], rows[i + 1]);
        Vec c = shuffle<LOW>(rows[i + 2], rows[i + 3]), d = shuffle<HIGH>(rows[i + 2], rows[i + 3]);
        rows[i] = shuffle<LOW_PAIRS>(a, c);
        rows[i + 1] = shuffle<HIGH_PAIRS>(a, c);
        rows[i + 2] = shuffle<LOW_PAIRS>(b, d);
        rows[i + 3] = shuffle<HIGH_PAIRS>(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        Vec a = shuffle<EVEN_QUARTERS>(rows[i], rows[i + 4]);
        Vec b = shuffle<ODD_QUARTERS>(rows[i], rows[i + 4]);
        Vec c = shuffle<EVEN_QUARTERS>(rows[i + 8], rows[i + 12]);
        Vec d = shuffle<ODD_QUARTERS>(rows[i + 8], rows[i + 12]);
        rows[i] = shuffle<EVEN_QUARTERS>(a, c);
        rows[i + 4] = shuffle<EVEN_QUARTERS>(b, d);
        rows[i + 8] = shuffle<ODD_QUARTERS>(a, c);
        rows[i + 12] = shuffle<ODD_QUARTERS>(b, d);
    }
}

// A square of LANES keys by as many 32-bit words; a word is one dimension of a key, or two.
template <typename T>
struct Square {
    static constexpr int DIMS = LANES * int(sizeof(float) / sizeof(T));
    Vec words[LANES];

    // Dimensions from `d` on of the keys `rows`; dimensions beyond `dim` read as 0. Not inlined: a third of
    // this part's compilation would be copies of it.
    __attribute__((noinline)) Square(const T* const* rows, long d, long dim) {
        if (d + DIMS <= dim) {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) std::memcpy(&words[i], rows[i] + d, sizeof(Vec));
        } else {
            for (int i = 0; i < LANES; i++) {
                words[i] = Vec{};
                std::memcpy(&words[i], rows[i] + d, (dim - d) * sizeof(T));
            }
        }
        transpose(words);
    }

    // Dimension d + i, a key in each lane.
    Vec dimension(int i) const {
        if constexpr (DIMS == LANES) return words[i];
        else return (Vec)(i % 2 ? (VecU)words[i / 2] & 0xffff0000 : (VecU)words[i / 2] << 16);
    }
};

// LANES keys side by side, from row `row` on. A row outside the block is replaced by the nearest in it.
template <typename T>
class KeyGroup {
   public:
    KeyGroup(const CacheRows<T>& keys, int row) : dim(keys.dim) {
        for (int i = 0; i < LANES; i++, row++) {
            int inside = row < 0 ? 0 : row < keys.count ? row : keys.count - 1;
            now[i] = keys.at(inside);
            next[i] = keys.after(inside);
        }
    }

    // visit(d, vector of dimension d) for all d, ascending.
    template <typename Visit>
    void each_dimension(Visit&& visit) const {
        constexpr int DIMS = Square<T>::DIMS;
        for (long d = 0; d < dim; d += DIMS) {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) prefetch(next[i] + d);
            Square<T> square(now, d, dim);
            if (d + DIMS <= dim) {
#pragma GCC unroll 32
                for (int i = 0; i < DIMS; i++) visit(d + i, square.dimension(i));
            } else {
                for (int i = 0; d + i < dim; i++) visit(d + i, square.dimension(i));
            }
        }
    }

   private:
    const T *now[LANES], *next[LANES];
    long dim;
};

// to[d][KEY_BLOCK] from column `first` on; the columns on both sides, up to multiples of LANES, get
// some key too; their scores are not used.
template <typename T>
void stage_keys(const CacheRows<T>& keys, int first, float* to) {
    for (int column = first / LANES * LANES; column < first + keys.count; column += LANES)
        KeyGroup<T>(keys, column - first).each_dimension([&](long d, Vec dimension) {
            store(to + d * KEY_BLOCK + column, dimension);
        });
}

// The scores of few rows, without staging: scores[row][KEY_BLOCK] at the same columns.
template <int ROWS, typename T>
void score_keys(const CacheRows<T>& keys, int first, const float* queries, float* scores) {
    for (int column = first / LANES * LANES; column < first + keys.count; column += LANES) {
        Vec sums[ROWS] = {};
        KeyGroup<T>(keys, column - first).each_dimension([&](long d, Vec dimension) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) sums[r] += queries[r * keys.dim + d] * dimension;
        });
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) store(scores + r * KEY_BLOCK + column, sums[r]);
    }
}

// Values below each other, to[row][width], width being their dim rounded up to LANES.
template <typename T>
void stage_values(const CacheRows<T>& values, long width, float* to) {
    for (int i = 0; i < values.count; i++)
        for (long d = 0; d < values.dim; d += LANES) {
            prefetch(values.after(i) + d);
            long left = values.dim - d;
            store(to + i * width + d, left < LANES ? load_some(values.at(i) + d, int(left))
                                                   : load(values.at(i) + d));
        }
}

}  // namespace baton
