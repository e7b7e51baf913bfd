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
static inline void store(void *to, __m256i v, bool stream) {
    if (stream)
        _mm256_stream_si256((__m256i *)to, v);
    else
        _mm256_storeu_si256((__m256i *)to, v);
}

// All bits of lane l where bit l of `word` is set.
static inline __m256i lanes32(uint32_t word) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int32_t)word), bit), bit);
}
static inline __m256i lanes16(uint32_t word) {
    const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16((int16_t)word), bit), bit);
}
static inline __m256i lanes8(uint32_t word) {
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int32_t)word), byte);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
}

static inline __m128i to_bf16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

static inline __m256 widen16(bf16, __m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
static inline __m256 widen16(f16, __m128i v) { return _mm256_cvtph_ps(v); }
static inline __m128i narrow16(bf16, __m256 v) { return to_bf16(v); }
static inline __m128i narrow16(f16, __m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

template <bool Stream>
static inline void write_word(const Piece<f32> &piece, int64_t i, uint64_t word, float decay) {
    for (int v = 0; v < 64; v += 8) {
        const __m256 keep = _mm256_castsi256_ps(lanes32((uint32_t)(word >> v)));
        const __m256 w = _mm256_loadu_ps((const float *)(piece.w + i + v));
        const __m256 out = decay == 0 ? _mm256_and_ps(w, keep)
                                      : _mm256_blendv_ps(_mm256_mul_ps(w, _mm256_set1_ps(decay)), w, keep);
        if (piece.effective) store(piece.effective + i + v, _mm256_castps_si256(out), Stream);
        if (piece.cast) _mm_storeu_si128((__m128i *)(piece.cast + i + v), to_bf16(out));
    }
}

template <bool Stream, class T>
static inline void write_word(const Piece<T> &piece, int64_t i, uint64_t word, float decay) {
    if (!piece.effective) return;
    for (int v = 0; v < 64; v += 16) {
        const __m256i keep = lanes16((uint32_t)(word >> v));
        const __m256i w = _mm256_loadu_si256((const __m256i *)(piece.w + i + v));
        __m256i out = _mm256_and_si256(w, keep);
        if (decay != 0) {
            const __m256 d = _mm256_set1_ps(decay);
            const __m128i low = narrow16(T(), _mm256_mul_ps(widen16(T(), _mm256_castsi256_si128(w)), d));
            const __m128i high = narrow16(T(), _mm256_mul_ps(widen16(T(), _mm256_extracti128_si256(w, 1)), d));
            out = _mm256_blendv_epi8(_mm256_set_m128i(high, low), w, keep);
        }
        store(piece.effective + i + v, out, Stream);
    }
}

template <bool Stream, class T>
static int64_t write_words_as(const Piece<T> &piece, const uint64_t *bits, int64_t entries, float decay,
                              int64_t &flips) {
    int64_t i = 0;
    for (; i + 64 <= entries; i += 64) {
        const uint64_t word = bits[i / 64];
        if (piece.mask)
            for (int v = 0; v < 64; v += 32) {
                const __m256i before = _mm256_loadu_si256((const __m256i *)(piece.mask + i + v));
                const uint32_t part = (uint32_t)(word >> v);
                const int unset = _mm256_movemask_epi8(_mm256_cmpeq_epi8(before, _mm256_setzero_si256()));
                flips += __builtin_popcount(part ^ ~(uint32_t)unset);
                store(piece.mask + i + v, _mm256_and_si256(lanes8(part), _mm256_set1_epi8(1)), Stream);
            }
        write_word<Stream>(piece, i, word, decay);
    }
    return i;
}

// Entries in sixty-fours; returns how many those were.
template <class T>
static int64_t write_words(const Piece<T> &piece, const uint64_t *bits, int64_t entries, float decay, bool stream,
                           int64_t &flips) {
    return stream ? write_words_as<true>(piece, bits, entries, decay, flips)
                  : write_words_as<false>(piece, bits, entries, decay, flips);
}

static inline void finish_streaming(bool stream) {
    if (stream) _mm_sfence();
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow

#include "project_pieces.hpp"

namespace nmflow {
const ProjectKernels *const project_avx2 = &NMFLOW_ISA::kernels;
}
#else
namespace nmflow {
const ProjectKernels *const project_avx2 = nullptr;
}
#endif
