// RV in float32: a step is a kept weight.
//
// A chunk is the most whole blocks of m that a permutation reaches. Blocks too wide for one are gathered from memory.
// Where the weight's bytes are the time, chunks of 4 or 8 columns take indices of 2 or 3 bits, for more loads of x; see
// isa/avx512_vbmi.cpp for fewer bytes still.
// Included after an isa header, once an instruction set.
#pragma once

#include "row_vector.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

template <int Bits>
struct OfFloats {
    using X = float;
    using Values = Plain;
    static constexpr int per_word = 32 / Bits;
    static constexpr int64_t steps(int64_t kept) { return kept; }
    static inline I next(I index) { return index >> Bits; }
    static inline void put(float *y, V v, int64_t count) { count == lanes ? store(y, v) : store_first(y, v, count); }
};

template <int Regs>
struct InRegisters : OfFloats<bits_below(Regs * lanes)> {
    static constexpr int reach = Regs * lanes, cost = Regs, most_tokens = rv_most_tokens;
    V x[Regs];
    inline void read(const float *p) {
        NMFLOW_UNROLLED
        for (int i = 0; i < Regs; ++i) x[i] = load(p + i * lanes);
    }
    inline void read_first(const float *p, int64_t count) {
        NMFLOW_UNROLLED
        for (int i = 0; i < Regs; ++i) {
            const int64_t here = count - i * lanes;
            x[i] = here <= 0 ? broadcast(0.0f) : load_first(p + i * lanes, least(here, lanes));
        }
    }
    inline V plus(V sum, V value, I index) const { return fma(value, pick<Regs>(x, index), sum); }
};

// A chunk of fewer entries than lanes, again and again: an index has fewer bits, and those above them do not matter.
// Bytes are the time where tokens are few: no tiles of many.
template <int Reach>
struct Repeated : OfFloats<bits_below(Reach)> {
    static constexpr int reach = Reach, cost = 1, most_tokens = 0;
    V x;
    inline void read(const float *p) { x = load_repeated<Reach>(p); }
    inline void read_first(const float *p, int64_t count) {
        float few[Reach] = {};
        for (int64_t i = 0; i < least(count, Reach); ++i) few[i] = p[i];
        read(few);
    }
    inline V plus(V sum, V value, I index) const { return fma(value, pick<1>(&x, index), sum); }
};

template <int Bits>
struct InMemory : OfFloats<Bits> {
    static constexpr int reach = 0, cost = 0, most_tokens = rv_most_tokens;
    const float *x;
    inline void read(const float *p) { x = p; }
    inline void read_first(const float *p, int64_t) { x = p; }
    inline V plus(V sum, V value, I index) const { return fma(value, gather(x, index & ((1 << Bits) - 1)), sum); }
};

static void rv(const Job &job, int64_t begin, int64_t end) {
    const nmflow_layout &l = job.weight->layout;
    if (l.index_bits == 2) return rv_run<Repeated<4>>(job, begin, end);
#if NMFLOW_RV_REGISTERS >= 8
    if (l.index_bits == 3) return rv_run<Repeated<8>>(job, begin, end);
#endif
    if (l.chunk <= lanes) return rv_run<InRegisters<1>>(job, begin, end);
#if NMFLOW_RV_REGISTERS >= 8
    if (l.chunk <= 2 * lanes) return rv_run<InRegisters<2>>(job, begin, end);
    if (l.chunk <= 4 * lanes) return rv_run<InRegisters<4>>(job, begin, end);
    if (l.chunk <= 8 * lanes) return rv_run<InRegisters<8>>(job, begin, end);
#endif
    l.chunk <= 256 ? rv_run<InMemory<8>>(job, begin, end) : rv_run<InMemory<16>>(job, begin, end);
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
