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
static inline void store(void *to, __m512i v, bool stream) {
    if (stream)
        _mm512_stream_si512((__m512i *)to, v);
    else
        _mm512_storeu_si512(to, v);
}

static inline __m256i to_bf16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

static inline __m512 widen16(bf16, __m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
static inline __m512 widen16(f16, __m256i v) { return _mm512_cvtph_ps(v); }
static inline __m256i narrow16(bf16, __m512 v) { return to_bf16(v); }
static inline __m256i narrow16(f16, __m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

template <bool Stream>
static inline void write_word(const Piece<f32> &piece, int64_t i, uint64_t word, float decay) {
    for (int v = 0; v < 64; v += 16) {
        const __mmask16 keep = (__mmask16)(word >> v);
        const __m512 w = _mm512_loadu_ps(piece.w + i + v);
        const __m512 out = decay == 0 ? _mm512_maskz_mov_ps(keep, w)
                                      : _mm512_mask_mul_ps(w, (__mmask16)~keep, w, _mm512_set1_ps(decay));
        if (piece.effective) store(piece.effective + i + v, _mm512_castps_si512(out), Stream);
        if (piece.cast) _mm256_storeu_si256((__m256i *)(piece.cast + i + v), to_bf16(out));
    }
}

template <bool Stream, class T>
static inline void write_word(const Piece<T> &piece, int64_t i, uint64_t word, float decay) {
    if (!piece.effective) return;
    for (int v = 0; v < 64; v += 32) {
        const __mmask32 keep = (__mmask32)(word >> v);
        const __m512i w = _mm512_loadu_si512(piece.w + i + v);
        __m512i pruned = _mm512_setzero_si512();
        if (decay != 0) {
            const __m512 d = _mm512_set1_ps(decay);
            const __m256i low = narrow16(T(), _mm512_mul_ps(widen16(T(), _mm512_castsi512_si256(w)), d));
            const __m256i high = narrow16(T(), _mm512_mul_ps(widen16(T(), _mm512_extracti64x4_epi64(w, 1)), d));
            pruned = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        }
        store(piece.effective + i + v, _mm512_mask_mov_epi16(pruned, keep, w), Stream);
    }
}

template <bool Stream, class T>
static int64_t write_words_as(const Piece<T> &piece, const uint64_t *bits, int64_t entries, float decay,
                              int64_t &flips) {
    int64_t i = 0;
    for (; i + 64 <= entries; i += 64) {
        const uint64_t word = bits[i / 64];
        if (piece.mask) {
            const __m512i before = _mm512_loadu_si512(piece.mask + i);
            flips += __builtin_popcountll(word ^ _mm512_test_epi8_mask(before, before));
            store(piece.mask + i, _mm512_maskz_set1_epi8(word, 1), Stream);
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
const ProjectKernels *const project_avx512 = &NMFLOW_ISA::kernels;
}
#else
namespace nmflow {
const ProjectKernels *const project_avx512 = nullptr;
}
#endif
