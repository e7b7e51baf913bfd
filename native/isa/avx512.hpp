// The vector of AVX-512: 16 floats, masks for what is left over, permutations that reach 16 and 32 floats.
#pragma once

#include <immintrin.h>

#define NMFLOW_ISA avx512
#define NMFLOW_REGISTERS 32
#define NMFLOW_TB_VECTORS 8
#define NMFLOW_RV_REGISTERS 8
#include "../vector_types.hpp"

namespace nmflow {
namespace avx512 {

constexpr int lanes = 16;
using V = Vector<lanes>::Float;
using I = Vector<lanes>::Int;

static inline V load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, V v) { _mm512_storeu_ps(p, v); }
static inline V broadcast(float f) { return _mm512_set1_ps(f); }
// Four numbers in every 128 bits, and one of them everywhere.
static inline V load_four(const float *p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int Count>
static inline V load_repeated(const float *p) {
    static_assert(Count == 4 || Count == 8, "there are loads of half a vector and of a quarter");
    if constexpr (Count == 4) return load_four(p);
    if constexpr (Count == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
}
template <int I>
static inline V splat(V four) {
    return _mm512_permute_ps(four, I * 0x55);
}
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }

static inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
static inline V load_first(const float *p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
static inline void store_first(float *p, V v, int64_t count) { _mm512_mask_storeu_ps(p, first(count), v); }

static inline V load_first(const bf16 *p, int64_t count) {
    const __m256i half = _mm256_maskz_loadu_epi16(first(count), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline V load(const bf16 *p) { return load_first(p, lanes); }
static inline void store_first(bf16 *p, V v, int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtepi32_epi16((__m512i)bf16_bits<lanes>(v)));
}
static inline void store(bf16 *p, V v) { store_first(p, v, lanes); }

static inline I load(const uint32_t *p) { return (I)_mm512_loadu_si512(p); }
static inline V gather(const float *x, I index) { return _mm512_i32gather_ps((__m512i)index, x, 4); }

// Entry `index` of the 16 * Regs floats in x; bits of the index above those that say so do not matter.
template <int Regs>
static inline V pick(const V *x, I index) {
    const __m512i i = (__m512i)index;
    if constexpr (Regs == 1) return _mm512_permutexvar_ps(i, x[0]);
    if constexpr (Regs == 2) return _mm512_permutex2var_ps(x[0], i, x[1]);
    if constexpr (Regs == 4) {
        const __mmask16 high = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
        const __m512 low = _mm512_permutex2var_ps(x[0], i, x[1]);
        return _mm512_mask_blend_ps(high, low, _mm512_permutex2var_ps(x[2], i, x[3]));
    }
    if constexpr (Regs == 8) {
        const __mmask16 high = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
        return _mm512_mask_blend_ps(high, pick<4>(x, index), pick<4>(x + 4, index));
    }
}

static inline void transpose(V *r) {
    V t[16];
    for (int i = 0; i < 16; i += 4) {  // 2x2 blocks of pairs, within 128 bits
        const __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
        const __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
    }
    for (int i = 0; i < 4; ++i) {  // 4x4 blocks of 128 bits
        const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xDD);
        const __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xDD);
        r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
        r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
}

}  // namespace avx512
}  // namespace nmflow
