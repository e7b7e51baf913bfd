// Writing what was selected, in x86 vectors of either width: a word of bits at a time, past the caches where told.
//
// Included after the instruction set's
//   Floats, Bits, Halves     a vector of float, the same width as plain bits, and half of that
//   load, store, stream      a vector from and to memory; stream bypasses the caches and wants it aligned
//   every(x)                 x in all lanes;  low(v), high(v), joined(low, high): the halves of a vector
//   chosen32(word, a, b)     lane l of 32 bits: a[l] where bit l of word is set, else b[l];  chosen16: of 16 bits
//   ones8(word)              byte l: 1 where bit l of word is set;  not_zero8(v): bit l set where byte l is not 0
//   widened(T(), v)          Halves of bf16 or f16 as Floats;  narrowed(f16(), v): back, to nearest even
//   upper_halves(v)          the upper sixteen bits of every 32
#pragma once

#include "project_scalar.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

typedef uint32_t Unsigned __attribute__((vector_size(sizeof(Bits))));

static inline Halves narrowed(bf16, Floats v) {
    const Unsigned bits = (Unsigned)v;
    const Unsigned rounded = bits + 0x7FFF + (bits >> 16 & 1), quiet = bits | 0x400000;
    return upper_halves((Bits)(v == v ? rounded : quiet));
}

template <bool Stream>
static inline void put(void *to, Bits v) {
    if (Stream)
        stream(to, v);
    else
        store(to, v);
}

template <bool Stream>
static inline void write_word(const Piece<f32> &piece, int64_t i, uint64_t word, float decay) {
    for (int v = 0; v < 64; v += lanes) {
        const Floats w = (Floats)load(piece.w + i + v);
        const Floats pruned = decay == 0 ? every(0.0f) : w * every(decay);  // not w * 0: a pruned NaN is 0 as well
        const Bits out = chosen32(word >> v, (Bits)w, (Bits)pruned);
        if (piece.effective) put<Stream>(piece.effective + i + v, out);
        if (piece.cast) store(piece.cast + i + v, narrowed(bf16(), (Floats)out));
    }
}

template <bool Stream, class T>
static inline void write_word(const Piece<T> &piece, int64_t i, uint64_t word, float decay) {
    if (!piece.effective) return;
    for (int v = 0; v < 64; v += 2 * lanes) {
        const Bits w = load(piece.w + i + v);
        Bits pruned = (Bits)every(0.0f);
        if (decay != 0)
            pruned = joined(narrowed(T(), widened(T(), low(w)) * every(decay)),
                            narrowed(T(), widened(T(), high(w)) * every(decay)));
        put<Stream>(piece.effective + i + v, chosen16(word >> v, w, pruned));
    }
}

// Returns how many of the sixty-four changed. Most often none, which saves memory the writing (and caches nothing). Bytes
// that no bool has are written in any case.
template <bool Stream>
static inline int write_mask(uint8_t *mask, uint64_t word) {
    constexpr int width = sizeof(Bits);
    uint64_t before = 0, other = 0;
    for (int v = 0; v < 64; v += width) {
        const Bits bytes = load(mask + v);
        before |= not_zero8(bytes) << v;
        if (Stream) other |= not_zero8((Bits)(bytes ^ ones8(word >> v)));
    }
    if (Stream && !other) return 0;
    for (int v = 0; v < 64; v += width) put<Stream>(mask + v, ones8(word >> v));
    return __builtin_popcountll(word ^ before);
}

template <bool Stream, class T>
static int64_t write_words_as(const Piece<T> &piece, const uint64_t *bits, int64_t entries, float decay,
                              int64_t &flips) {
    int64_t i = 0;
    for (; i + 64 <= entries; i += 64) {
        if (piece.mask) flips += write_mask<Stream>(piece.mask + i, bits[i / 64]);
        write_word<Stream>(piece, i, bits[i / 64], decay);
    }
    return i;
}

// Entries in sixty-fours; returns how many those were.
template <class T>
static int64_t write_words(const Piece<T> &piece, const uint64_t *bits, int64_t entries, float decay, bool streaming,
                           int64_t &flips) {
    return streaming ? write_words_as<true>(piece, bits, entries, decay, flips)
                     : write_words_as<false>(piece, bits, entries, decay, flips);
}

static inline void finish_streaming(bool streaming) {
    if (streaming) _mm_sfence();
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
