// Vectors as the compiler knows them (GCC and Clang), and bfloat16 as its bits: what every instruction set shares.
#pragma once

#include <stdint.h>
#include <string.h>

// Before a loop over vectors in registers: left to itself GCC unrolls it too late to see that, and fills memory with them.
#define NMFLOW_UNROLLED _Pragma("GCC unroll 16")

namespace nmflow {
namespace NMFLOW_ISA {

struct bf16 {
    uint16_t bits;
};

template <int Lanes>
struct Vector {
    typedef float Float __attribute__((vector_size(Lanes * 4)));
    typedef int32_t Int __attribute__((vector_size(Lanes * 4)));
    typedef uint32_t Unsigned __attribute__((vector_size(Lanes * 4)));
};

// 0 ... N-1 as a type, to fill a table with one instantiation for every number.
template <int... Values>
struct Numbers {};
template <int N, int... Values>
struct Count {
    using Below = typename Count<N - 1, N - 1, Values...>::Below;
};
template <int... Values>
struct Count<0, Values...> {
    using Below = Numbers<Values...>;
};

// The upper half of every float, rounded to nearest even; a NaN stays a (quiet) NaN.
template <int Lanes>
static inline typename Vector<Lanes>::Unsigned bf16_bits(typename Vector<Lanes>::Float v) {
    using U = typename Vector<Lanes>::Unsigned;
    const U u = (U)v;
    const U rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return v == v ? rounded : (u >> 16) | 0x40;
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
