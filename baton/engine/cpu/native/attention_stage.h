// Keys and values of a key block, laid out for vectors: keys side by side (one dimension of LANES keys is
// a vector), values below each other. The next rows are prefetched meanwhile.
#pragma once

#include <utility>

#include "attention_narrow.h"

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

    // WIDTH values of a row, as a factor of multiply().
    Part at(long row, long column) const {
        prefetch(after(row) + column);
        const T* head = at(row);
        return scaled(load_part(head + column), head, dim);
    }
};

// Where lane `lane` of a register comes from, made of two: the first WIDTH are lanes of the one, the others of
// the other. zipped: within quarters of 4 lanes, runs of `run` lanes of both in turns, from the lower or
// the upper half of each quarter. parted: the quarters at even or at odd places. All of these are one
// instruction on every CPU.
constexpr int zipped(int run, bool upper, int lane) {
    int within = lane % 4;
    return lane - within + upper * 2 + within % run + within / (2 * run) * run + within / run % 2 * WIDTH;
}

constexpr int parted(bool odd, int lane) { return lane / 4 * 8 + odd * 4 + lane % 4; }

constexpr int source(int run, bool second, int lane) {
    return run < 4 ? zipped(run, second, lane) : parted(second, lane);
}

template <int run, bool second, int... lane>
inline Part mix(Part a, Part b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, source(run, second, lane)...);
}

template <int run>
inline void mix_rows(Part (&rows)[WIDTH]) {
    constexpr auto lanes = std::make_integer_sequence<int, WIDTH>{};
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++)
        if (!(i & run)) {
            Part a = rows[i], b = rows[i + run];
            rows[i] = mix<run, false>(a, b, lanes);
            rows[i + run] = mix<run, true>(a, b, lanes);
        }
    if constexpr (2 * run < WIDTH) mix_rows<2 * run>(rows);
}

// Lane j of row i becomes lane i of row j.
inline void transpose(Part (&rows)[WIDTH]) {
    mix_rows<1>(rows);
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH; i += 4) std::swap(rows[i + 1], rows[i + 2]);
}

// A square of WIDTH keys by as many 32-bit words; a word is one dimension of a key, or two, or four.
template <typename T>
struct Square {
    static constexpr int DIMS = WIDTH * int(sizeof(float) / sizeof(T));
    Part words[WIDTH];

    // Dimensions from `d` on of the keys `rows`; dimensions beyond `dim` read as 0. Not inlined: a third of
    // this part's compilation would be copies of it.
    __attribute__((noinline)) Square(const T* const* rows, long d, long dim) {
        T padded[WIDTH][DIMS];
        const T* starts[WIDTH];
        if (d + DIMS > dim) {
            std::memset(padded, 0, sizeof padded);
            for (int i = 0; i < WIDTH; i++) {
                std::memcpy(padded[i], rows[i] + d, (dim - d) * sizeof(T));
                starts[i] = padded[i];
            }
            rows = starts, d = 0;
        }
        Part some[WIDTH];  // in registers, until all rows are read
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) some[i] = get<Part>(rows[i] + d);
        transpose(some);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) words[i] = some[i];
    }

    // Dimension d + i, a key in each lane.
    Part dimension(int i) const {
        if constexpr (DIMS == WIDTH) return words[i];
        else if constexpr (DIMS == 4 * WIDTH)
            return __builtin_convertvector((PartI)words[i / 4] << (24 - i % 4 * 8) >> 24, Part);
        else return (Part)(i % 2 ? (PartU)words[i / 2] & 0xffff0000 : (PartU)words[i / 2] << 16);
    }
};

// WIDTH keys side by side, from row `row` on. A row outside the block is replaced by the nearest in it.
template <typename T>
class KeyGroup {
   public:
    KeyGroup(const CacheRows<T>& keys, int row) : dim(keys.dim) {
        for (int i = 0; i < WIDTH; i++, row++) {
            int inside = row < 0 ? 0 : row < keys.count ? row : keys.count - 1;
            now[i] = keys.at(inside);
            next[i] = keys.after(inside);
            scales[i] = scale_of(now[i], dim);
        }
    }

    // visit(d, register of dimension d) for all d, ascending.
    template <typename Visit>
    void each_dimension(Visit&& visit) const {
        constexpr int DIMS = Square<T>::DIMS;
        for (long d = 0; d < dim; d += DIMS) {
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) prefetch(next[i] + d);
            Square<T> square(now, d, dim);
            if (d + DIMS <= dim) {
#pragma GCC unroll 32
                for (int i = 0; i < DIMS; i++) visit(d + i, dimension(square, i));
            } else {
                for (int i = 0; d + i < dim; i++) visit(d + i, dimension(square, i));
            }
        }
    }

   private:
    Part dimension(const Square<T>& square, int i) const {
        if constexpr (sizeof(T) == 1) return square.dimension(i) * scales;
        else return square.dimension(i);
    }

    const T *now[WIDTH], *next[WIDTH];
    Part scales;
    long dim;
};

// visit(first column of a KeyGroup) for all columns of a key block whose keys begin at column `first`, up to
// multiples of LANES on both sides. The columns outside get some key too; their scores are not used.
template <typename Visit>
inline void each_group(int first, int count, Visit&& visit) {
    int end = (first + count + LANES - 1) / LANES * LANES;
    for (int column = first / LANES * LANES; column < end; column += WIDTH) visit(column);
}

// to[d][KEY_BLOCK] from column `first` on.
template <typename T>
void stage_keys(const CacheRows<T>& keys, int first, float* to) {
    each_group(first, keys.count, [&](int column) {
        KeyGroup<T>(keys, column - first).each_dimension([&](long d, Part dimension) {
            store(to + d * KEY_BLOCK + column, dimension);
        });
    });
}

// The scores of few rows, without staging: scores[row][KEY_BLOCK] at the same columns.
template <int ROWS, typename T>
void score_keys(const CacheRows<T>& keys, int first, const float* queries, float* scores) {
    each_group(first, keys.count, [&](int column) {
        Part sums[ROWS] = {};
        KeyGroup<T>(keys, column - first).each_dimension([&](long d, Part dimension) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) sums[r] += queries[r * keys.dim + d] * dimension;
        });
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) store(scores + r * KEY_BLOCK + column, sums[r]);
    });
}

// Values below each other, to[row][width], width being their dim rounded up to LANES.
template <typename T>
void stage_values(const CacheRows<T>& values, long width, float* to) {
    for (int i = 0; i < values.count; i++)
        for (long d = 0; d < values.dim; d += LANES) {
            prefetch(values.after(i) + d);
            long left = values.dim - d;
            const T* head = values.at(i);
            Vec some = left < LANES ? load_some(head + d, int(left)) : load(head + d);
            store(to + i * width + d, scaled(some, head, values.dim));
        }
}

}  // namespace baton
