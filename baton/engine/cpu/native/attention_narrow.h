// Keys and values in 8 bits, as baton/engine/narrow.py describes them: a head of a token is int8 [dim], and
// behind it the scale as a float. What is read is number * scale in float, so every sum is that of a cache in
// float over the rounded numbers.
#pragma once

#include "vec.h"

namespace baton {

struct i8 {
    int8_t number;
};

// Elements of T that a head of `dim` numbers takes in the pool.
template <typename T>
constexpr long head_width(long dim) {
    return dim;
}

template <>
constexpr long head_width<i8>(long dim) {
    return dim + long(sizeof(float));
}

// The factor of a head's numbers.
template <typename T>
inline float scale_of(const T*, long) {
    return 1;
}

inline float scale_of(const i8* head, long dim) { return get<float>(head + dim); }

// `value` as the head at `from` means it; nothing to do for floats.
template <typename T, typename V>
inline V scaled(V value, const T*, long) {
    return value;
}

template <typename V>
inline V scaled(V value, const i8* head, long dim) {
    return value * scale_of(head, dim);
}

inline Vec load(const i8* from) {
    Vectors<LANES>::Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, VecI), Vec);
}

inline Part load_part(const i8* from) {
    Vectors<WIDTH>::Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, PartI), Part);
}

// One head's numbers to the nearest, ties to even. As bits without a sign, a NaN is larger than infinity and
// that than every number: a head with one of them gets it as its scale.
inline void narrow(i8* to, const float* from, long dim) {
    uint32_t largest = 0;
    for (long d = 0; d < dim; d++) {
        uint32_t bits = get<uint32_t>(from + d) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float scale = get<float>(&largest) / 127.0f;
    if (scale < 1.17549435e-38f) scale = 0;  // the least with all its digits
    bool zero = scale == 0 || largest >= 0x7f800000;
    for (long d = 0; d < dim; d++) {
        float nearest = zero ? 0.0f : from[d] / scale + 12582912.0f;  // 1.5 * 2^23
        int number = zero ? 0 : int(nearest - 12582912.0f);
        to[d].number = int8_t(number > 127 ? 127 : number < -127 ? -127 : number);
    }
    std::memcpy(to + dim, &scale, sizeof scale);
}

}  // namespace baton
