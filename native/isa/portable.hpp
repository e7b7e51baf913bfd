// The vector of any compiler with vector extensions: 4 floats (NEON, SSE2), everything else written out.
#pragma once

#define NMFLOW_ISA portable
#define NMFLOW_REGISTERS 16
#define NMFLOW_TB_VECTORS 8
#define NMFLOW_RV_REGISTERS 0
#include "../vector_types.hpp"

namespace nmflow {
namespace portable {

constexpr int lanes = 4;
using V = Vector<lanes>::Float;
using I = Vector<lanes>::Int;

static inline V load_first(const float *p, int64_t count) {
    V v = {};
    memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
    return v;
}
static inline void store_first(float *p, V v, int64_t count) { memcpy(p, &v, static_cast<size_t>(count) * 4); }
static inline V load(const float *p) { return load_first(p, lanes); }
static inline void store(float *p, V v) { store_first(p, v, lanes); }
static inline V broadcast(float f) { return V{f, f, f, f}; }
static inline V load_four(const float *p) { return load(p); }
template <int I>
static inline V splat(V four) {
    return broadcast(four[I]);
}
static inline V fma(V a, V b, V c) { return a * b + c; }  // one instruction where the machine has it

static inline V load_first(const bf16 *p, int64_t count) {
    I bits = {};
    for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i].bits) << 16);
    return (V)bits;
}
static inline void store_first(bf16 *p, V v, int64_t count) {
    const auto bits = bf16_bits<lanes>(v);
    for (int64_t i = 0; i < count; ++i) p[i].bits = static_cast<uint16_t>(bits[i]);
}
static inline V load(const bf16 *p) { return load_first(p, lanes); }
static inline void store(bf16 *p, V v) { store_first(p, v, lanes); }

static inline void transpose(V *r) {
    const V a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < lanes; ++i) r[i] = V{a[i], b[i], c[i], d[i]};
}

}  // namespace portable
}  // namespace nmflow
