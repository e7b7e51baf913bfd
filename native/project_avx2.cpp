// The projection in AVX2 (with FMA and F16C, as every such machine has them): eight keys a vector.
#include "project_kernel.hpp"

#if defined(__AVX2__) && defined(__F16C__)
#define NMFLOW_ISA avx2_project

#include <immintrin.h>

#include "project_scalar.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

typedef int32_t Key __attribute__((vector_size(32)));
constexpr int lanes = 8;

static inline Key every(int32_t x) { return (Key)_mm256_set1_epi32(x); }
static inline Key larger(Key a, Key b) { return (Key)_mm256_max_epi32((__m256i)a, (__m256i)b); }
static inline Key smaller(Key a, Key b) { return (Key)_mm256_min_epi32((__m256i)a, (__m256i)b); }
static inline uint32_t at_least(Key a, Key b) {
    const __m256i below = _mm256_cmpgt_epi32((__m256i)b, (__m256i)a);
    return ~(uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(below)) & 0xFF;
}

template <int S>
static inline Key swapped(Key v) {
    if constexpr (S == 1) return (Key)_mm256_shuffle_epi32((__m256i)v, 0xB1);
    if constexpr (S == 2) return (Key)_mm256_shuffle_epi32((__m256i)v, 0x4E);
    return (Key)_mm256_permute4x64_epi64((__m256i)v, 0x4E);
}
template <int S>
constexpr int lanes_with = S == 1 ? 0xAA : S == 2 ? 0xCC : 0xF0;
template <int S>
static inline Key upper(Key a, Key b) {
    return (Key)_mm256_blend_epi32((__m256i)a, (__m256i)swapped<S>(b), lanes_with<S>);
}
template <int S>
static inline Key lower(Key a, Key b) {
    return (Key)_mm256_blend_epi32((__m256i)swapped<S>(a), (__m256i)b, lanes_with<S>);
}
template <int M>
static inline Key spread(Key v, int r) {
    const Key lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (Key)_mm256_permutevar8x32_epi32((__m256i)v, (__m256i)(lane / M * M + r));
}

static inline Key keys(const f32 *p) {
    return (Key)_mm256_and_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi32(f32::magnitude));
}
template <class T>
static inline Key keys(const T *p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (Key)_mm256_and_si256(bits, _mm256_set1_epi32(T::magnitude));
}
template <class T>
static inline Key keys(const T *p, int64_t length, int32_t pad) {
    Key key = every(pad);
    for (int64_t l = 0; l < length; ++l) key[l] = (int32_t)(p[l].bits & T::magnitude);
    return key;
}

// ---------------------------------------------------------------------------------------------------------- writing
typedef __m256 Floats;
typedef __m256i Bits;
typedef __m128i Halves;  // sixteen bits a lane of Floats

static inline Bits load(const void *p) { return _mm256_loadu_si256((const Bits *)p); }
static inline Floats every(float x) { return _mm256_set1_ps(x); }
static inline Halves low(Bits v) { return _mm256_castsi256_si128(v); }
static inline Halves high(Bits v) { return _mm256_extracti128_si256(v, 1); }
static inline Bits joined(Halves low, Halves high) { return _mm256_set_m128i(high, low); }
static inline void store(void *to, Halves v) { _mm_storeu_si128((Halves *)to, v); }
static inline void store(void *to, Bits v) { _mm256_storeu_si256((Bits *)to, v); }
static inline void stream(void *to, Bits v) { _mm256_stream_si256((Bits *)to, v); }

// All bits of lane l where bit l of `word` is set.
static inline Bits lanes32(uint32_t word) {
    const Bits bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int32_t)word), bit), bit);
}
static inline Bits lanes16(uint32_t word) {
    const Bits bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16((int16_t)word), bit), bit);
}
static inline Bits lanes8(uint32_t word) {
    const Bits byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const Bits bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const Bits spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int32_t)word), byte);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
}

static inline Bits chosen32(uint64_t word, Bits kept, Bits pruned) {
    return _mm256_blendv_epi8(pruned, kept, lanes32((uint32_t)word));
}
static inline Bits chosen16(uint64_t word, Bits kept, Bits pruned) {
    return _mm256_blendv_epi8(pruned, kept, lanes16((uint32_t)word));
}
static inline Bits ones8(uint64_t word) { return _mm256_and_si256(lanes8((uint32_t)word), _mm256_set1_epi8(1)); }
static inline uint64_t not_zero8(Bits v) {
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256()));
}

static inline Halves upper_halves(Bits v) {
    const Bits shifted = _mm256_srli_epi32(v, 16);
    return _mm_packus_epi32(low(shifted), high(shifted));
}
static inline Floats widened(bf16, Halves v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
static inline Floats widened(f16, Halves v) { return _mm256_cvtph_ps(v); }
static inline Halves narrowed(f16, Floats v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace NMFLOW_ISA
}  // namespace nmflow

#include "project_x86.hpp"

#include "project_pieces.hpp"

namespace nmflow {
const ProjectKernels *const project_avx2 = &NMFLOW_ISA::kernels;
}
#else
namespace nmflow {
const ProjectKernels *const project_avx2 = nullptr;
}
#endif
