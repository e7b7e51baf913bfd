// RV in float32 with values of 24 bits: one token from memory, where the weight's bytes are the time.
//
// For weights of at most 16 exponents: a table of them lies in front of the values, and every word holds beside an index,
// above it, which exponent its value has. Sign and mantissa are three bytes (the sign the uppermost bit), so a kept weight
// takes 30.4 bits at chunks of 4 columns and 32 at 8, and not 34 and 35.2. Nothing is lost. Rows that fill up the last
// vector hold some number; nobody looks at their sums.
#include "avx512.hpp"

#include "../row_vector.hpp"

namespace nmflow {
namespace avx512 {

template <int IndexBits>
class Short {
    __m512i bytes, table;

   public:
    static constexpr int64_t before = short_before / 4, size = lanes * 3 / 4;
    explicit Short(const float *packed) : table(_mm512_loadu_si512(packed)) {
        uint8_t from[64];
        for (int i = 0; i < 64; ++i) from[i] = static_cast<uint8_t>(i / 4 * 3 + (i % 4 < 3 ? i % 4 : 2));
        bytes = _mm512_loadu_si512(from);
    }
    inline V operator()(const float *step, I word) const {
        const __m512i number = _mm512_permutexvar_epi8(bytes, _mm512_loadu_si512(step));  // the third byte twice
        const __m512i exponent = _mm512_permutexvar_epi32(_mm512_srli_epi32((__m512i)word, IndexBits), table);
        const __m512i sign_and_mantissa = _mm512_set1_epi32(static_cast<int>(0x807FFFFFu));
        return (V)_mm512_ternarylogic_epi32(number, sign_and_mantissa, exponent, 0xEA);  // (a & b) | c
    }
};

// As `Repeated` in row_vector_f32.hpp: bits of a word above the index do not matter to the permutation.
template <int Reach>
struct RepeatedShort {
    using X = float;
    using Values = Short<bits_below(Reach)>;
    static constexpr int reach = Reach, cost = 1, most_tokens = 0;
    static constexpr int bits = bits_below(Reach) + exponent_bits, per_word = 32 / bits;
    static constexpr int64_t steps(int64_t kept) { return kept; }
    static inline I next(I word) { return word >> bits; }
    static inline void put(float *y, V v, int64_t count) { store_first(y, v, count); }

    V x;
    inline void read(const float *p) { x = load_repeated<Reach>(p); }
    inline void read_first(const float *p, int64_t count) {
        float few[lanes];
        store(few, load_first(p, least(count, Reach)));
        read(few);
    }
    inline V plus(V sum, V value, I word) const { return fma(value, pick<1>(&x, word), sum); }
};

void rv_short(const Job &job, int64_t begin, int64_t end) {
    const bool four = job.weight->layout.index_bits == bits_below(4) + exponent_bits;
    four ? rv_run<RepeatedShort<4>>(job, begin, end) : rv_run<RepeatedShort<8>>(job, begin, end);
}

}  // namespace avx512
}  // namespace nmflow
