// The projection in AVX-512 (F, BW, DQ, VL): sixteen keys a vector, sixty-four entries written at a time.
#include "project_kernel.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define NMFLOW_ISA avx512_project

#include <immintrin.h>

#include "project_scalar.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

typedef int32_t Key __attribute__((vector_size(64)));
constexpr int lanes = 16;

static inline Key every(int32_t x) { return (Key)_mm512_set1_epi32(x); }
static inline Key larger(Key a, Key b) { return (Key)_mm512_max_epi32((__m512i)a, (__m512i)b); }
static inline Key smaller(Key a, Key b) { return (Key)_mm512_min_epi32((__m512i)a, (__m512i)b); }
static inline uint32_t at_least(Key a, Key b) { return _mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b); }

// In the lanes of `where` v[l ^ S], in the others `base`: one masked shuffle.
template <int S>
static inline Key merged(Key base, __mmask16 where, Key v) {
    const __m512i b = (__m512i)base, x = (__m512i)v;
    if constexpr (S == 1) return (Key)_mm512_mask_shuffle_epi32(b, where, x, (_MM_PERM_ENUM)0xB1);
    if constexpr (S == 2) return (Key)_mm512_mask_shuffle_epi32(b, where, x, (_MM_PERM_ENUM)0x4E);
    if constexpr (S == 4) return (Key)_mm512_mask_shuffle_i32x4(b, where, x, x, 0xB1);
    return (Key)_mm512_mask_shuffle_i32x4(b, where, x, x, 0x4E);
}
template <int S>
constexpr __mmask16 lanes_with = S == 1 ? 0xAAAA : S == 2 ? 0xCCCC : S == 4 ? 0xF0F0 : 0xFF00;
template <int S>
static inline Key swapped(Key v) {
    if constexpr (S == 1) return (Key)_mm512_shuffle_epi32((__m512i)v, (_MM_PERM_ENUM)0xB1);
    if constexpr (S == 2) return (Key)_mm512_shuffle_epi32((__m512i)v, (_MM_PERM_ENUM)0x4E);
    if constexpr (S == 4) return (Key)_mm512_shuffle_i32x4((__m512i)v, (__m512i)v, 0xB1);
    return (Key)_mm512_shuffle_i32x4((__m512i)v, (__m512i)v, 0x4E);
}
template <int S>
static inline Key upper(Key a, Key b) {
    return merged<S>(a, lanes_with<S>, b);
}
template <int S>
static inline Key lower(Key a, Key b) {
    return merged<S>(b, (__mmask16)~lanes_with<S>, a);
}
template <int M>
static inline Key spread(Key v, int r) {
    const Key lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (Key)_mm512_permutexvar_epi32((__m512i)(lane / M * M + r), (__m512i)v);
}

template <class T>
static inline Key magnitudes(__m512i bits) {
    return (Key)_mm512_and_si512(bits, _mm512_set1_epi32((int32_t)T::magnitude));
}
static inline Key keys(const f32 *p) { return magnitudes<f32>(_mm512_loadu_si512(p)); }
static inline Key keys(const f32 *p, int64_t length, int32_t pad) {
    const __mmask16 some = (__mmask16)((1u << length) - 1);
    return (Key)_mm512_mask_mov_epi32(_mm512_set1_epi32(pad), some,
                                      (__m512i)magnitudes<f32>(_mm512_maskz_loadu_epi32(some, p)));
}
template <class T>
static inline Key keys(const T *p) {
    return magnitudes<T>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)));
}
template <class T>
static inline Key keys(const T *p, int64_t length, int32_t pad) {
    const __mmask16 some = (__mmask16)((1u << length) - 1);
    const Key key = magnitudes<T>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)));
    return (Key)_mm512_mask_mov_epi32(_mm512_set1_epi32(pad), some, (__m512i)key);
}

// ---------------------------------------------------------------------------------------------------------- writing
typedef __m512 Floats;
typedef __m512i Bits;
typedef __m256i Halves;  // sixteen bits a lane of Floats

static inline Bits load(const void *p) { return _mm512_loadu_si512(p); }
static inline Floats every(float x) { return _mm512_set1_ps(x); }
static inline Halves low(Bits v) { return _mm512_castsi512_si256(v); }
static inline Halves high(Bits v) { return _mm512_extracti64x4_epi64(v, 1); }
static inline Bits joined(Halves low, Halves high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
static inline void store(void *to, Halves v) { _mm256_storeu_si256((Halves *)to, v); }
static inline void store(void *to, Bits v) { _mm512_storeu_si512(to, v); }
static inline void stream(void *to, Bits v) { _mm512_stream_si512((Bits *)to, v); }

static inline Bits chosen32(uint64_t word, Bits kept, Bits pruned) {
    return _mm512_mask_mov_epi32(pruned, (__mmask16)word, kept);
}
static inline Bits chosen16(uint64_t word, Bits kept, Bits pruned) {
    return _mm512_mask_mov_epi16(pruned, (__mmask32)word, kept);
}
static inline Bits ones8(uint64_t word) { return _mm512_maskz_set1_epi8(word, 1); }
static inline uint64_t not_zero8(Bits v) { return _mm512_test_epi8_mask(v, v); }

static inline Halves upper_halves(Bits v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)); }
static inline Floats widened(bf16, Halves v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
static inline Floats widened(f16, Halves v) { return _mm512_cvtph_ps(v); }
static inline Halves narrowed(f16, Floats v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace NMFLOW_ISA
}  // namespace nmflow

#include "project_x86.hpp"

#include "project_pieces.hpp"

namespace nmflow {
const ProjectKernels *const project_avx512 = &NMFLOW_ISA::kernels;
}
#else
namespace nmflow {
const ProjectKernels *const project_avx512 = nullptr;
}
#endif
