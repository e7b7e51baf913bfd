// The loops that only show what an instruction set can do: as many multiply-adds, as many loads as it takes.
#pragma once

#include "kernel.hpp"
#include "vector_types.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

// Ten chains cover the latency of two multiply-add units (5 cycles at most) and leave registers for the operands.
constexpr int chains = 10;

static double total(const V *v, int count) {
    float all[lanes];
    double sum = 0;
    for (int i = 0; i < count; ++i) {
        store(all, v[i]);
        for (int lane = 0; lane < lanes; ++lane) sum += all[lane];
    }
    return sum;
}

static double spin(int64_t rounds, float seed) {
    V sum[chains];
    // Different beginnings, or the compiler would see one chain ten times. The sums tend to 1: no infinity, no denormal.
    for (int i = 0; i < chains; ++i) sum[i] = broadcast(seed + static_cast<float>(i));
    const V half = broadcast(0.5f * seed);
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < chains; ++i) sum[i] = fma(sum[i], half, half);
    return total(sum, chains);
}

// Four quarters side by side, two cache lines at a time: in several places a core reads 10 to 20 % more than in one.
static double read(const float *x, int64_t count) {
    constexpr int places = 4, step = 32;
    const int64_t quarter = count / (places * step) * step;
    V sum[2 * places] = {};
    for (int64_t i = 0; i < quarter; i += step) {
        NMFLOW_UNROLLED
        for (int p = 0; p < places; ++p)
            NMFLOW_UNROLLED
            for (int k = 0; k < step; k += lanes) {
                V &here = sum[2 * p + k / lanes % 2];
                here = here + load(x + p * quarter + i + k);
            }
    }
    double rest = total(sum, 2 * places);
    for (int64_t i = places * quarter; i < count; ++i) rest += x[i];
    return rest;
}

constexpr Ceilings ceilings = {{2.0 * chains * lanes, spin}, read};

}  // namespace NMFLOW_ISA
}  // namespace nmflow
