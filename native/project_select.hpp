// Which entries survive: the bits of one piece, by the method that suits the pattern.
//
// Every method finds a threshold t for each block, no more than N keys above it and at least N not below it; then
//
//   bits = key >= t,  and where ties leave more than N bits:  bits = key > t, and the first ones of key = t
//
// A key is the magnitude's bits as a whole number: it orders as the magnitude does, and NaN above infinity. Keys carry
// NaN payloads; the threshold is cut to the smallest NaN, which makes all NaN equal (a minimum keeps every order).
//
// Included after the instruction set's vectors:
//   Key, lanes               int32 vector
//   every(x)                 x in all lanes
//   larger, smaller          of two vectors, lane by lane
//   at_least(a, b)           bit l: a[l] >= b[l]
//   swapped<S>(v)            lane l gets v[l ^ S]
//   upper<S>(a, b)           a where (l & S) == 0, else b[l ^ S];   lower<S>(a, b): a[l ^ S] where (l & S) == 0, else b
//   spread<M>(v, r)          lane l gets v[l / M * M + r]
//   keys(p), keys(p, c, pad) of the first `lanes` entries, or of c of them with `pad` behind
#pragma once

#include "project_scalar.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

#define NMFLOW_INLINE static inline __attribute__((always_inline))

// ------------------------------------------------------------------------------------------------------------- bits
// Bits of `lanes` entries at `position`, where all bits were zero. Aligned: it is a multiple of lanes.
template <bool Aligned>
NMFLOW_INLINE void put(uint64_t *bits, int64_t position, uint32_t value) {
    if (Aligned && lanes == 16) {
        const uint16_t narrow = (uint16_t)value;
        memcpy((char *)bits + position / 8, &narrow, 2);
    } else if (Aligned && lanes == 8) {
        ((uint8_t *)bits)[position / 8] = (uint8_t)value;
    } else {
        const int shift = position % 64;
        bits[position / 64] |= (uint64_t)value << shift;
        if (shift > 64 - lanes) bits[position / 64 + 1] |= (uint64_t)value >> (64 - shift);
    }
}

NMFLOW_INLINE int count(uint64_t word) { return __builtin_popcountll(word); }

static inline int64_t count_range(const uint64_t *bits, int64_t from, int64_t length) {
    int64_t total = 0;
    for (int64_t i = from; i < from + length;) {
        const int64_t here = 64 - i % 64 < from + length - i ? 64 - i % 64 : from + length - i;
        total += count(bits[i / 64] >> (i % 64) << (64 - here));
        i += here;
    }
    return total;
}

static inline void set_range(uint64_t *bits, int64_t from, int64_t length) {
    for (int64_t i = from; i < from + length;) {
        const int64_t here = 64 - i % 64 < from + length - i ? 64 - i % 64 : from + length - i;
        bits[i / 64] |= ~(uint64_t)0 >> (64 - here) << (i % 64);
        i += here;
    }
}

// The `wanted` lowest of the set bits.
static inline uint32_t lowest(uint32_t set, int64_t wanted) {
    uint32_t taken = 0;
    for (; wanted > 0 && set; --wanted) {
        taken |= set & -set;
        set &= set - 1;
    }
    return taken;
}

// -------------------------------------------------------------------------------------------------------- one block
template <class T>
constexpr int32_t smallest_nan = (int32_t)T::infinity + 1;

template <class T>
NMFLOW_INLINE Key keys_from(const T *w, int64_t i, int64_t m, int32_t pad) {
    return i + lanes <= m ? keys(w + i) : keys(w + i, m - i, pad);
}

// Ties: the bits of a block of m entries anew, from its threshold.
template <class T>
static __attribute__((noinline)) void trim(const T *w, int64_t n, int64_t m, int32_t threshold, uint64_t *bits,
                                           int64_t position) {
    const Key least = every(threshold), nan = every(smallest_nan<T>), above = every(threshold + 1);
    int64_t wanted = n;
    for (int64_t i = 0; i < m; i += lanes) wanted -= count(at_least(smaller(keys_from(w, i, m, -1), nan), above));
    for (int64_t i = 0; i < m; i += lanes) {
        const Key key = smaller(keys_from(w, i, m, -1), nan);
        const uint32_t larger = at_least(key, above), equal = at_least(key, least) & ~larger;
        const uint32_t keep = larger | lowest(equal, wanted);
        wanted -= count(equal);
        const int64_t width = m - i < lanes ? m - i : lanes, at = position + i;
        const uint64_t field = ((uint64_t)1 << width) - 1;
        const int shift = at % 64;
        bits[at / 64] = (bits[at / 64] & ~(field << shift)) | (uint64_t)keep << shift;
        if (shift + width > 64) {
            uint64_t &next = bits[at / 64 + 1];
            next = (next & ~(field >> (64 - shift))) | (uint64_t)keep >> (64 - shift);
        }
    }
}

// The bits of a block from its threshold.
template <bool Aligned, class T>
NMFLOW_INLINE void mark(const T *w, int64_t n, int64_t m, int32_t threshold, uint64_t *bits, int64_t position) {
    const Key least = every(threshold);
    int64_t found = 0;
    for (int64_t i = 0; i < m; i += lanes) {
        const uint32_t keep = at_least(Aligned ? keys(w + i) : keys_from(w, i, m, -1), least);
        put<Aligned>(bits, position + i, keep);
        found += count(keep);
    }
    if (__builtin_expect(found != n, 0)) trim(w, n, m, threshold, bits, position);
}

template <class T>
static inline int32_t cut_nan(int32_t key) {
    return key < smallest_nan<T> ? key : smallest_nan<T>;
}

// Halves the keys' range until a bound has N keys not below it, or is the N-th key itself. Any N, any M.
template <class T>
static int32_t bisect(const T *w, int64_t n, int64_t m) {
    Key most = every(0), least = every(INT32_MAX);
    for (int64_t i = 0; i < m; i += lanes) {
        most = larger(most, keys_from(w, i, m, 0));
        least = smaller(least, keys_from(w, i, m, INT32_MAX));
    }
    int32_t low = least[0], high = most[0];
    for (int l = 1; l < lanes; ++l) {
        low = least[l] < low ? least[l] : low;
        high = most[l] > high ? most[l] : high;
    }
    while (low < high) {  // at least N keys >= low, fewer than N > high
        const int32_t middle = high - (high - low) / 2;
        const Key bound = every(middle);
        int64_t found = 0;
        int64_t i = 0;
        for (; i + lanes <= m; i += lanes) found += count(at_least(keys(w + i), bound));
        if (i < m) found += count(at_least(keys(w + i, m - i, -1), bound));
        if (found == n) return middle;
        if (found > n)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// ---------------------------------------------------------------------------------------------------------- sorting
template <int A, int B>
NMFLOW_INLINE void order(Key *v) {  // the larger first
    const Key most = larger(v[A], v[B]);
    v[B] = smaller(v[A], v[B]);
    v[A] = most;
}

template <int From, int To, int Step, int Apart>
NMFLOW_INLINE void order_steps(Key *v) {
    if constexpr (From + Apart < To) {
        order<From, From + Apart>(v);
        order_steps<From + Step, To, Step, Apart>(v);
    }
}

// Batcher's odd-even merge sort, descending, of Count vectors lane by lane.
template <int From, int Count, int Apart>
NMFLOW_INLINE void odd_even_merge(Key *v) {
    if constexpr (2 * Apart < Count) {
        odd_even_merge<From, Count, 2 * Apart>(v);
        odd_even_merge<From + Apart, Count, 2 * Apart>(v);
        order_steps<From + Apart, From + Count, 2 * Apart, Apart>(v);
    } else {
        order<From, From + Apart>(v);
    }
}

template <int From, int Count>
NMFLOW_INLINE void sort(Key *v) {
    if constexpr (Count > 1) {
        sort<From, Count / 2>(v);
        sort<From + Count / 2, Count / 2>(v);
        odd_even_merge<From, Count, 1>(v);
    }
}

template <int From, int Count>
NMFLOW_INLINE void bitonic_merge(Key *v) {
    if constexpr (Count > 1) {
        order_steps<From, From + Count, 1, Count / 2>(v);
        bitonic_merge<From, Count / 2>(v);
        bitonic_merge<From + Count / 2, Count / 2>(v);
    }
}

constexpr int sorted = 16;  // vectors that are sorted together

// Lane l of v[i] and lane i of v[l] change places, within groups of Size lanes and Size vectors.
template <int Size, int Step = 1>
NMFLOW_INLINE void transpose(Key *v) {
    if constexpr (Step < Size) {
        for (int i = 0; i < Size; ++i) {
            if (i & Step) continue;
            const Key a = v[i], b = v[i + Step];
            v[i] = upper<Step>(a, b);
            v[i + Step] = lower<Step>(a, b);
        }
        transpose<Size, 2 * Step>(v);
    }
}

// ---------------------------------------------------------------------------------------------------------- methods
// The first look at W, and a request for what lies a page of 4 KiB ahead, into which no hardware prefetcher follows.
template <class T>
NMFLOW_INLINE Key keys_ahead(const T *w) {
    __builtin_prefetch(reinterpret_cast<const char *>(w) + 4096);
    return keys(w);
}

// One of M, M a divisor of lanes: the largest of every group of lanes. Whole words of bits only.
template <int M, class T>
NMFLOW_INLINE Key group_largest(Key v) {
    if constexpr (M > 1) v = larger(v, swapped<1>(v));
    if constexpr (M > 2) v = larger(v, swapped<2>(v));
    if constexpr (M > 4) v = larger(v, swapped<4>(v));
    if constexpr (M > 8) v = larger(v, swapped<8>(v));
    return smaller(v, every(smallest_nan<T>));
}

template <int M, class T>
static int64_t one_of_few(const T *w, int64_t entries, uint64_t *bits) {
    constexpr uint64_t firsts = ~(uint64_t)0 / (((uint64_t)1 << M) - 1);  // the lowest bit of every block
    int64_t i = 0;
    for (; i + 64 <= entries; i += 64) {
        uint64_t word = 0;
        for (int v = 0; v < 64; v += lanes) {
            const Key key = keys_ahead(w + i + v);
            word |= (uint64_t)at_least(key, group_largest<M, T>(key)) << v;
        }
        bits[i / 64] = word & ~(word - firsts);  // no block is empty, so no borrow leaves one
    }
    return i;
}

// One of M, M a multiple of lanes.
template <class T>
static int64_t one_of_many(const T *w, int64_t m, int64_t entries, uint64_t *bits) {
    int64_t at = 0;
    for (; at + m <= entries; at += m) {
        Key most = keys_ahead(w + at);
        for (int64_t i = lanes; i < m; i += lanes) most = larger(most, keys_ahead(w + at + i));
        mark<true>(w + at, 1, m, group_largest<lanes, T>(most)[0], bits, at);
    }
    return at;
}

// N of M, M a divisor of lanes: M vectors hold `lanes` blocks; transposed, a lane is a block and is sorted.
template <int M, class T>
static int64_t n_of_few(const T *w, int64_t n, int64_t entries, uint64_t *bits) {
    constexpr int per_vector = lanes / M;
    int64_t at = 0;
    for (; at + M * lanes <= entries; at += M * lanes) {
        Key v[M];
        for (int r = 0; r < M; ++r) v[r] = keys_ahead(w + at + r * lanes);
        transpose<M>(v);
        sort<0, M>(v);
        const Key threshold = smaller(v[n - 1], every(smallest_nan<T>));
        int64_t found = 0;
        for (int r = 0; r < M; ++r) {
            const uint32_t keep = at_least(keys(w + at + r * lanes), spread<M>(threshold, r));
            put<true>(bits, at + r * lanes, keep);
            found += count(keep);
        }
        if (__builtin_expect(found != n * lanes, 0))
            for (int b = 0; b < lanes; ++b) {
                const int64_t block = at + b * M;
                if (count_range(bits, block, M) != n)
                    trim(w + block, n, M, threshold[b % per_vector * M + b / per_vector], bits, block);
            }
    }
    return at;
}

// N of M, N or M - N small: a lane is a block again; its entries pass by in sixteens, each sorted and merged into the
// largest sixteen so far. Upwards the keys are complemented: the N-th largest is the (M - N + 1)-th smallest.
template <bool Upwards, bool Whole, class T>
NMFLOW_INLINE Key nth_of_many(const T *w, int64_t n, int64_t m, int64_t blocks) {
    const int32_t pad = Upwards ? INT32_MAX : -1;
    Key best[sorted];
    for (int64_t i = 0; i < m; i += sorted) {
        Key v[sorted];
        for (int half = 0; half < sorted; half += lanes) {
            for (int b = 0; b < lanes; ++b) {
                const int64_t from = i + half;
                if (Whole) {
                    v[half + b] = keys(w + b * m + from);
                    // What comes next: a walk over many blocks side by side, which no hardware prefetcher follows.
                    __builtin_prefetch(w + (lanes + b) * m + from);
                } else if (b < blocks && from < m)
                    v[half + b] = keys_from(w + b * m, from, m, pad);
                else
                    v[half + b] = every(pad);
                if (Upwards) v[half + b] = ~v[half + b];
            }
            transpose<lanes>(v + half);
        }
        sort<0, sorted>(v);
        if (i == 0) {
            for (int k = 0; k < sorted; ++k) best[k] = v[k];
        } else {
            for (int k = 0; k < sorted; ++k) best[k] = larger(best[k], v[sorted - 1 - k]);
            bitonic_merge<0, sorted>(best);
        }
    }
    const Key nth = Upwards ? ~best[m - n] : best[n - 1];
    return smaller(nth, every(smallest_nan<T>));
}

template <bool Upwards, class T>
static int64_t n_of_many(const T *w, int64_t n, int64_t m, int64_t entries, uint64_t *bits) {
    int64_t at = 0;
    const bool whole = m % sorted == 0;
    for (; at + m <= entries;) {
        const int64_t left = (entries - at) / m, blocks = left < lanes ? left : lanes;
        const Key threshold = whole && blocks == lanes ? nth_of_many<Upwards, true>(w + at, n, m, blocks)
                                                       : nth_of_many<Upwards, false>(w + at, n, m, blocks);
        for (int b = 0; b < blocks; ++b, at += m) {
            if (whole)
                mark<true>(w + at, n, m, threshold[b], bits, at);
            else
                mark<false>(w + at, n, m, threshold[b], bits, at);
        }
    }
    return at;
}

// Whole blocks of a piece by the fastest method there is; returns how many entries that were.
template <class T>
static int64_t select_fast(const T *w, int64_t n, int64_t m, int64_t entries, uint64_t *bits) {
    if (n == 1 && m == 2) return one_of_few<2>(w, entries, bits);
    if (n == 1 && m == 4) return one_of_few<4>(w, entries, bits);
    if constexpr (lanes >= 8)
        if (n == 1 && m == 8) return one_of_few<8>(w, entries, bits);
    if constexpr (lanes >= 16)
        if (n == 1 && m == 16) return one_of_few<16>(w, entries, bits);
    if (n == 1 && m % lanes == 0) return one_of_many(w, m, entries, bits);
    if (m == 4) return n_of_few<4>(w, n, entries, bits);
    if constexpr (lanes >= 8)
        if (m == 8) return n_of_few<8>(w, n, entries, bits);
    if constexpr (lanes >= 16)
        if (m == 16) return n_of_few<16>(w, n, entries, bits);
    if (n <= sorted) return n_of_many<false>(w, n, m, entries, bits);
    if (m - n < sorted) return n_of_many<true>(w, n, m, entries, bits);
    return 0;
}

// The survivors of a piece; its last block may be short.
template <class T>
static void select(const T *w, int64_t n, int64_t m, int64_t entries, uint64_t *bits) {
    memset(bits, 0, (size_t)(entries / 64 + 2) * 8);
    if (n == m) return set_range(bits, 0, entries);
    int64_t at = select_fast(w, n, m, entries, bits);
    for (; at < entries; at += m) {
        const int64_t length = m < entries - at ? m : entries - at;
        if (length <= n)
            set_range(bits, at, length);
        else
            mark<false>(w + at, n, length, cut_nan<T>(bisect(w + at, n, length)), bits, at);
    }
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
