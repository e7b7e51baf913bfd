// The projection for any machine: vectors of four as the compiler makes them (SSE2, NEON, or plain numbers).
#define NMFLOW_ISA portable_project

#include "project_scalar.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

typedef int32_t Key __attribute__((vector_size(16)));
constexpr int lanes = 4;

static inline Key every(int32_t x) { return Key{x, x, x, x}; }
static inline Key larger(Key a, Key b) { return a > b ? a : b; }
static inline Key smaller(Key a, Key b) { return a < b ? a : b; }
static inline uint32_t at_least(Key a, Key b) {
    const Key set = (a >= b) & Key{1, 2, 4, 8};
    return (uint32_t)(set[0] | set[1] | set[2] | set[3]);
}

template <int S>
static inline Key swapped(Key v) {
    return Key{v[0 ^ S], v[1 ^ S], v[2 ^ S], v[3 ^ S]};
}
template <int S>
static inline Key upper(Key a, Key b) {
    return Key{a[0], S & 1 ? b[1 ^ S] : a[1], S & 2 ? b[2 ^ S] : a[2], b[3 ^ S]};
}
template <int S>
static inline Key lower(Key a, Key b) {
    return Key{a[0 ^ S], S & 1 ? b[1] : a[1 ^ S], S & 2 ? b[2] : a[2 ^ S], b[3]};
}
template <int M>
static inline Key spread(Key v, int r) {
    return every(v[r]);
}

template <class T>
static inline Key keys(const T *p) {
    constexpr uint32_t mask = T::magnitude;
    return Key{(int32_t)(p[0].bits & mask), (int32_t)(p[1].bits & mask), (int32_t)(p[2].bits & mask),
               (int32_t)(p[3].bits & mask)};
}
template <class T>
static inline Key keys(const T *p, int64_t length, int32_t pad) {
    Key key = every(pad);
    for (int64_t l = 0; l < length; ++l) key[l] = (int32_t)(p[l].bits & T::magnitude);
    return key;
}

// ---------------------------------------------------------------------------------------------------------- writing
// 1 in every byte that is not zero.
static inline uint64_t ones(uint64_t bytes) {
    const uint64_t low = 0x7F7F7F7F7F7F7F7F;
    return (((bytes & low) + low) | bytes) >> 7 & 0x0101010101010101;
}

// Eight bytes in memory, byte i bit i: each byte takes a copy of the eight bits and leaves its own standing.
static inline uint64_t bytes_of(uint64_t eight_bits) {
    static const uint8_t own[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    uint64_t place;
    memcpy(&place, own, 8);
    return ones(eight_bits * 0x0101010101010101 & place);
}

// Entries in sixty-fours, in loops that a compiler turns into vectors; returns how many those were.
template <class T>
static int64_t write_words(const Piece<T> &piece, const uint64_t *bits, int64_t entries, float decay, bool,
                           int64_t &flips) {
    int64_t i = 0;
    for (; i + 64 <= entries; i += 64) {
        uint64_t keep[8];
        for (int v = 0; v < 8; ++v) keep[v] = bytes_of(bits[i / 64] >> (v * 8) & 0xFF);
        if (piece.mask)
            for (int v = 0; v < 8; ++v) {
                uint64_t before;
                memcpy(&before, piece.mask + i + v * 8, 8);
                flips += __builtin_popcountll(keep[v] ^ ones(before));
                memcpy(piece.mask + i + v * 8, &keep[v], 8);
            }
        const uint8_t *kept = (const uint8_t *)keep;
        T out[64];
        for (int e = 0; e < 64; ++e) {
            const auto all = (decltype(T::bits))-kept[e];
            out[e].bits = (piece.w[i + e].bits & all) | (scaled(piece.w[i + e], decay).bits & ~all);
        }
        if (piece.effective) memcpy(piece.effective + i, out, sizeof out);
        if (piece.cast)
            for (int e = 0; e < 64; ++e) narrow(widen(out[e]), piece.cast[i + e]);
    }
    return i;
}

static inline void finish_streaming(bool) {}

}  // namespace NMFLOW_ISA
}  // namespace nmflow

#include "project_pieces.hpp"

namespace nmflow {
const ProjectKernels *const project_portable = &NMFLOW_ISA::kernels;
}
