// RV in bfloat16: a step is two kept weights, one dot product (vdpbf16ps), sums in float32.
//
// Packed weight: values bfloat16 [row vectors][steps][lanes][2], index the column within the chunk of 32 or 64 columns; an
// odd number of weights in a chunk is filled up with value 0, index 0. Indices have 5 or 6 bits, a word of 16 holds those
// of 3 or 2 steps: words [row vectors][words][lanes][2].
#include "avx512.hpp"

#include "../row_vector.hpp"

namespace nmflow {
namespace avx512 {

template <int Regs>
struct Pairs {
    using X = bf16;
    using Values = Plain;
    static constexpr int reach = 32 * Regs, cost = Regs, most_tokens = rv_most_tokens;
    static constexpr int bits = bits_below(reach), per_word = 16 / bits;
    static constexpr int64_t steps(int64_t kept) { return div_up(kept, 2); }
    static inline I next(I index) { return (I)_mm512_srli_epi16((__m512i)index, bits); }
    static inline void put(bf16 *y, V v, int64_t count) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
        count == lanes ? _mm256_storeu_si256((__m256i *)y, rounded)
                       : _mm256_mask_storeu_epi16(y, avx512::first(count), rounded);
    }

    __m512i x[Regs];
    inline void read(const bf16 *p) {
        NMFLOW_UNROLLED
        for (int i = 0; i < Regs; ++i) x[i] = _mm512_loadu_si512(p + 32 * i);
    }
    inline void read_first(const bf16 *p, int64_t count) {
        NMFLOW_UNROLLED
        for (int i = 0; i < Regs; ++i) {
            const int64_t here = count - 32 * i;
            x[i] = _mm512_maskz_loadu_epi16(here >= 32 ? ~0u : here <= 0 ? 0u : (1u << here) - 1u, p + 32 * i);
        }
    }
    inline V plus(V sum, V value, I index) const {  // bits of the index above those that reach x do not matter
        const __m512i i = (__m512i)index;
        const __m512i picked =
            Regs == 1 ? _mm512_permutexvar_epi16(i, x[0]) : _mm512_permutex2var_epi16(x[0], i, x[Regs - 1]);
        return _mm512_dpbf16_ps(sum, (__m512bh)value, (__m512bh)picked);
    }
};

void rv_bf16(const Job &job, int64_t begin, int64_t end) {
    job.weight->layout.chunk <= 32 ? rv_run<Pairs<1>>(job, begin, end) : rv_run<Pairs<2>>(job, begin, end);
}

// `spin` of ceilings.hpp in dot products: they take six cycles, and each adds 2^-14, so the sums stay small.
constexpr int chains = 16;
static double spin(int64_t rounds, float seed) {
    V sum[chains];
    for (int i = 0; i < chains; ++i) sum[i] = broadcast(seed + static_cast<float>(i));
    const __m512bh tiny = (__m512bh)_mm512_set1_epi32(seed > 1.5f ? 1 : 0x3C00);
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < chains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], tiny, tiny);
    float all[lanes];
    double total = 0;
    for (int i = 0; i < chains; ++i) {
        store(all, sum[i]);
        total += all[0];
    }
    return total;
}
extern const Spin spin_bf16;
const Spin spin_bf16 = {2.0 * chains * 2 * lanes, spin};

}  // namespace avx512
}  // namespace nmflow
