// The three dtypes as bits, and the writing of a piece's last entries one by one: what every instruction set shares.
// Included once an instruction set, so that no function compiled for one is linked into another.
#pragma once

#include <stdint.h>
#include <string.h>

namespace nmflow {
namespace NMFLOW_ISA {

struct f32 {
    uint32_t bits;
    static constexpr uint32_t magnitude = 0x7FFFFFFF, infinity = 0x7F800000;
};
struct bf16 {
    uint16_t bits;
    static constexpr uint32_t magnitude = 0x7FFF, infinity = 0x7F80;
};
struct f16 {
    uint16_t bits;
    static constexpr uint32_t magnitude = 0x7FFF, infinity = 0x7C00;
};

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float widen(f32 v) { return as_float(v.bits); }
static inline float widen(bf16 v) { return as_float((uint32_t)v.bits << 16); }
static inline float widen(f16 v) {
    const uint32_t sign = (uint32_t)(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7FFF;
    if (magnitude >= f16::infinity) return as_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    const float value = as_float(magnitude << 13) * as_float(0x77800000);  // 2^112: half's exponents are 112 lower
    return as_float(sign | as_bits(value));
}

// To nearest, ties to even; a NaN stays a quiet NaN.
static inline void narrow(float value, f32 &to) { to.bits = as_bits(value); }
static inline void narrow(float value, bf16 &to) {
    const uint32_t bits = as_bits(value);
    to.bits = (uint16_t)(value == value ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40);
}
static inline void narrow(float value, f16 &to) {
    const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    uint32_t half;
    if (magnitude > 0x7F800000) {
        half = 0x7E00 | (magnitude >> 13 & 0x3FF);
    } else if (magnitude >= 0x477FF000) {  // 65520, the first that rounds to infinity
        half = f16::infinity;
    } else if (magnitude < 0x38800000) {  // below 2^-14: adding 1/2 lines the last bit up with half's
        half = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000;
    } else {
        half = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    }
    to.bits = (uint16_t)(sign | half);
}

template <class T>
static inline T scaled(T w, float decay) {
    T to;
    to.bits = 0;
    if (decay != 0) narrow(widen(w) * decay, to);
    return to;
}

template <class T>
struct Piece {
    const T *w;
    T *effective;   // or null
    uint8_t *mask;  // or null
    bf16 *cast;     // or null
};

// Writes the entries [from, to) of a piece and returns how many of its mask changed.
template <class T>
static int64_t write_each(const Piece<T> &piece, const uint64_t *bits, int64_t from, int64_t to, float decay) {
    int64_t flips = 0;
    for (int64_t i = from; i < to; ++i) {
        const bool keep = bits[i / 64] >> (i % 64) & 1;
        const T out = keep ? piece.w[i] : scaled(piece.w[i], decay);
        if (piece.mask) {
            flips += keep != (piece.mask[i] != 0);
            piece.mask[i] = keep;
        }
        if (piece.effective) piece.effective[i] = out;
        if (piece.cast) narrow(widen(out), piece.cast[i]);
    }
    return flips;
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
