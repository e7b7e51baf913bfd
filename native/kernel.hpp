// What a kernel is told and how it is found: the seam between the C ABI and the instruction sets.
#pragma once

#include <stddef.h>

#include "nmflow.h"
#include "stream.h"

namespace nmflow {

struct Job {
    const nmflow_weight *weight;
    const void *x, *bias;
    void *y;
    int64_t x_stride, y_stride, tokens;
    bool *out_of_memory;  // set by any thread that gets no scratch; never cleared by one
};

// Does the units [begin, end) of a job: vectors of output rows or of tokens, as the weight's split says.
using Kernel = void (*)(const Job &, int64_t begin, int64_t end);

// See ceilings.hpp. `run` begins its chains at `seed` and returns a sum that nobody needs but the compiler.
struct Spin {
    double flops_of_round;
    double (*run)(int64_t rounds, float seed);
};
struct Ceilings {
    Spin spin;
    double (*read)(const float *x, int64_t count);
};

// The same for a dense weight; units are its rows.
struct StreamJob {
    const nmflow_dense *dense;
    const void *x, *bias;
    void *y;
    int64_t x_stride, y_stride, tokens;
};
using Stream = void (*)(const StreamJob &, int64_t begin, int64_t end);

// How far ahead of itself a loop asks for a weight that it reads once. Hardware prefetchers alone stop at the end of a page.
constexpr int64_t bytes_ahead = 48 * 64;

// Fewer multiplications than this are done before a second thread has woken up.
constexpr int64_t worth_sharing = 16384;

struct Kernels {
    int lanes;          // floats of a vector: tokens of a TB unit, rows of an RV unit
    int rv_reach;       // most columns one RV lookup reaches in float32
    int rv_bf16_reach;  // the same in bfloat16; 0 where there is no such kernel
    Kernel tb, rv, rv_bf16;
    Kernel rv_short;  // float32 values of 24 bits; null where there is no such kernel
    Stream stream;
    const Ceilings *ceilings;
    const Spin *spin_bf16;  // null as rv_bf16 is
};

// One table an instruction set; null where the library was built without it.
const Kernels *kernels_of(int isa);
extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

// Whether this machine permutes bytes (avx512_vbmi), as `rv_short` does.
bool has_vbmi();

// This thread's scratch memory, 64-byte aligned, at least `bytes`; null where there is none. Contents undefined.
void *scratch(size_t bytes);

// Kept weights in the first `cols` columns: whole blocks keep n, a last one of r < m keeps min(n, r).
static inline int64_t kept_in(int64_t cols, int64_t n, int64_t m) {
    const int64_t tail = cols % m;
    return cols / m * n + (tail < n ? tail : n);
}

// What values of 24 bits (`nmflow_layout::value_bits`) look like: a table of exponents in front of them, and beside every
// index, above it, which of them.
constexpr int exponent_bits = 4, exponents = 1 << exponent_bits;
constexpr int64_t short_before = 4 * exponents, short_after = 16;  // bytes: the table, and what a whole load overruns

// Bits of an index below `reach`.
static constexpr int bits_below(int64_t reach) { return reach <= 1 ? 0 : 1 + bits_below((reach + 1) / 2); }

static inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace nmflow
