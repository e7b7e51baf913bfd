// The vector of AVX2 with FMA: 8 floats, a permutation that reaches 8.
#pragma once

#include <immintrin.h>

#define NMFLOW_ISA avx2
#define NMFLOW_REGISTERS 16
#define NMFLOW_TB_VECTORS 12
#define NMFLOW_RV_REGISTERS 1
#include "../vector_types.hpp"

namespace nmflow {
namespace avx2 {

constexpr int lanes = 8;
using V = Vector<lanes>::Float;
using I = Vector<lanes>::Int;

static inline V load(const float *p) { return _mm256_loadu_ps(p); }
static inline void store(float *p, V v) { _mm256_storeu_ps(p, v); }
static inline V broadcast(float f) { return _mm256_set1_ps(f); }
// Four numbers in every 128 bits, and one of them everywhere.
static inline V load_four(const float *p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(p)); }
template <int Count>
static inline V load_repeated(const float *p) {
    static_assert(Count == 4, "half a vector");
    return load_four(p);
}
template <int I>
static inline V splat(V four) {
    return _mm256_permute_ps(four, I * 0x55);
}
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }

static inline __m256i first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline V load_first(const float *p, int64_t count) { return _mm256_maskload_ps(p, first(count)); }
static inline void store_first(float *p, V v, int64_t count) { _mm256_maskstore_ps(p, first(count), v); }

static inline V load(const bf16 *p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline V load_first(const bf16 *p, int64_t count) {
    bf16 whole[lanes] = {};
    memcpy(whole, p, static_cast<size_t>(count) * sizeof(bf16));
    return load(whole);
}
static inline void store(bf16 *p, V v) {
    const __m256i bits = (__m256i)bf16_bits<lanes>(v);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_castsi256_si128(halves));
}
static inline void store_first(bf16 *p, V v, int64_t count) {
    bf16 whole[lanes];
    store(whole, v);
    memcpy(p, whole, static_cast<size_t>(count) * sizeof(bf16));
}

static inline I load(const uint32_t *p) { return (I)_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
static inline V gather(const float *x, I index) { return _mm256_i32gather_ps(x, (__m256i)index, 4); }

// Entry `index` of the 8 floats in x; its bits above the lowest three do not matter.
template <int Regs>
static inline V pick(const V *x, I index) {
    static_assert(Regs == 1, "one register is what the permutation reaches");
    return _mm256_permutevar8x32_ps(x[0], (__m256i)index);
}

static inline void transpose(V *r) {
    V t[8];
    for (int i = 0; i < 8; i += 4) {  // 2x2 blocks of pairs, within 128 bits
        const __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
        const __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}

}  // namespace avx2
}  // namespace nmflow
