// What happens to a sum before it becomes y: the activation functions, on vectors of any width.
// Included after an isa header, once an instruction set.
#pragma once

#include "kernel.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

// e^v, relative error below 2e-7; clamped to the normal range of float.
static inline V exponential(V v) {
    const V low = broadcast(-87.0f), high = broadcast(88.0f);
    v = v < low ? low : v;
    v = v > high ? high : v;
    const V magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const V shifted = fma(v, broadcast(1.44269504088896f), magic);
    const V whole = shifted - magic;
    V r = fma(whole, broadcast(-0.693359375f), v);  // ln 2 in two parts, the first exact in few bits
    r = fma(whole, broadcast(2.12194440e-4f), r);
    V p = broadcast(1.0f / 5040);
    p = fma(p, r, broadcast(1.0f / 720));
    p = fma(p, r, broadcast(1.0f / 120));
    p = fma(p, r, broadcast(1.0f / 24));
    p = fma(p, r, broadcast(1.0f / 6));
    p = fma(p, r, broadcast(0.5f));
    p = fma(p, r, broadcast(1.0f));
    p = fma(p, r, broadcast(1.0f));
    const I power = ((I)shifted - (I)magic + 127) << 23;
    return p * (V)power;
}

static inline V sigmoid_times(V factor, V v) { return factor / (broadcast(1.0f) + exponential(-v)); }

// erfc(|z|), absolute error below 2e-7 (Abramowitz and Stegun, 7.1.26).
static inline V erfc_of_abs(V z) {
    z = z < broadcast(0.0f) ? -z : z;
    const V t = broadcast(1.0f) / fma(broadcast(0.3275911f), z, broadcast(1.0f));
    V p = broadcast(1.061405429f);
    p = fma(p, t, broadcast(-1.453152027f));
    p = fma(p, t, broadcast(1.421413741f));
    p = fma(p, t, broadcast(-0.284496736f));
    p = fma(p, t, broadcast(0.254829592f));
    return p * t * exponential(-z * z);
}

static inline V gelu(V v) {
    const V tail = broadcast(0.5f) * v * erfc_of_abs(v * broadcast(0.70710678118655f));
    return v < broadcast(0.0f) ? tail : v - tail;
}

// 0.5 v (1 + tanh u) = v sigmoid(2u),  u = sqrt(2 / pi) (v + 0.044715 v^3)
static inline V gelu_tanh(V v) {
    return sigmoid_times(v, broadcast(1.5957691216057f) * v * fma(broadcast(0.044715f) * v, v, broadcast(1.0f)));
}

// In memory and not inlined: the few registers of a matrix kernel are worth more than one store and load here.
static __attribute__((noinline)) void activate(V *v, int count, int activation) {
    switch (activation) {
        case NMFLOW_RELU:  // NaN passes, as it does in torch
            for (int i = 0; i < count; ++i) v[i] = v[i] < broadcast(0.0f) ? broadcast(0.0f) : v[i];
            break;
        case NMFLOW_GELU:
            for (int i = 0; i < count; ++i) v[i] = gelu(v[i]);
            break;
        case NMFLOW_GELU_TANH:
            for (int i = 0; i < count; ++i) v[i] = gelu_tanh(v[i]);
            break;
        case NMFLOW_SILU:
            for (int i = 0; i < count; ++i) v[i] = sigmoid_times(v[i], v[i]);
            break;
        default:
            break;
    }
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
