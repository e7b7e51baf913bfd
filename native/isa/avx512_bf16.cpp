// RV in bfloat16: two weights a lane in one dot product (vdpbf16ps), sums in float32.
//
// Packed weight: values bfloat16 [row vectors][slot pairs][lanes][2], index the column within the chunk of 32 or 64
// columns; an odd number of slots in a chunk is filled up with value 0, index 0. Indices have 5 or 6 bits, a word of 16
// holds those of 3 or 2 pairs, as in row_vector.hpp: words [row vectors][words][lanes][2].
#include "avx512.hpp"

#include "../epilogue.hpp"

namespace nmflow {
namespace avx512 {

template <int Regs>
struct Chunk {  // of one token, 32 * Regs entries
    static constexpr int bits = Regs == 1 ? 5 : 6;
    __m512i x[Regs];
    static __m512i first(const bf16 *p, int64_t count) {
        const __mmask32 mask = count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1u;
        return _mm512_maskz_loadu_epi16(mask, p);
    }
    inline void read(const bf16 *p) {
        for (int i = 0; i < Regs; ++i) x[i] = _mm512_loadu_si512(p + 32 * i);
    }
    inline void read_first(const bf16 *p, int64_t count) {
        for (int i = 0; i < Regs; ++i) x[i] = first(p + 32 * i, count - 32 * i);
    }
    inline __m512bh operator[](__m512i index) const {  // the bits above those that reach it do not matter
        if constexpr (Regs == 1) return (__m512bh)_mm512_permutexvar_epi16(index, x[0]);
        if constexpr (Regs == 2) return (__m512bh)_mm512_permutex2var_epi16(x[0], index, x[1]);
    }
};

// Packed entries of one vector of rows.
struct OfPairs {
    int64_t values, words;
    explicit OfPairs(const nmflow_layout &l) {
        const int64_t vectors = div_up(l.rows, lanes);
        values = l.values_size / 2 / vectors;
        words = l.index_size / 2 / vectors;
    }
};

template <int Regs, int Rows, int Tokens>
static void bf16_tile(const nmflow_layout &l, OfPairs each, const uint16_t *values, const uint16_t *words,
                      const bf16 *x, int64_t x_stride, V *sums) {
    const int64_t pairs = div_up(kept_in(l.chunk, l.n, l.m), 2);
    __m512 sum[Rows][Tokens];
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) sum[r][t] = _mm512_setzero_ps();

    Chunk<Regs> chunk[Tokens];
    __m512i index[Rows];
    int left = 0;  // indices in it
    const auto step = [&](int64_t count) __attribute__((always_inline)) {
        for (int64_t s = 0; s < count; ++s) {
            if (left == 0) {
                for (int r = 0; r < Rows; ++r) index[r] = _mm512_loadu_si512(words + r * each.words);
                words += 32;
                left = 16 / Chunk<Regs>::bits;
            }
            --left;
            for (int r = 0; r < Rows; ++r) {
                const __m512bh value = (__m512bh)_mm512_loadu_si512(values + r * each.values);
                for (int t = 0; t < Tokens; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], value, chunk[t][index[r]]);
                index[r] = _mm512_srli_epi16(index[r], Chunk<Regs>::bits);
            }
            values += 32;
        }
    };
    int64_t k = 0;
    for (; k + 32 * Regs <= l.cols; k += l.chunk) {
        for (int t = 0; t < Tokens; ++t) chunk[t].read(x + t * x_stride + k);
        step(pairs);
    }
    for (; k < l.cols; k += l.chunk) {
        const int64_t here = least(l.chunk, l.cols - k);
        for (int t = 0; t < Tokens; ++t) chunk[t].read_first(x + t * x_stride + k, here);
        step(div_up(kept_in(here, l.n, l.m), 2));
    }
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) sums[r * Tokens + t] = sum[r][t];
}

using Bf16Tile = void (*)(const nmflow_layout &, OfPairs, const uint16_t *, const uint16_t *, const bf16 *, int64_t,
                          V *);

constexpr int most_rows = 4, most_tokens = 8;

template <int Regs, int Rows, int Tokens>
static constexpr Bf16Tile tile_if_it_fits() {
    if constexpr (Rows * Tokens + Tokens * Regs + Rows + 2 <= NMFLOW_REGISTERS) return bf16_tile<Regs, Rows, Tokens>;
    return nullptr;
}

template <int Regs, int Rows, int... Tokens>
static Bf16Tile tile_of(int tokens, Numbers<Tokens...>) {
    static constexpr Bf16Tile table[] = {tile_if_it_fits<Regs, Rows, Tokens + 1>()...};
    return table[tokens - 1];
}

template <int Regs>
static Bf16Tile tile_of(int rows, int tokens) {
    using Upto = typename Count<most_tokens>::Below;
    if (rows == 4) return tile_of<Regs, 4>(tokens, Upto());
    if (rows == 2) return tile_of<Regs, 2>(tokens, Upto());
    return tile_of<Regs, 1>(tokens, Upto());
}

template <int Regs>
static void run(const Job &job, int64_t begin, int64_t end) {
    const nmflow_weight &w = *job.weight;
    const nmflow_layout &l = w.layout;
    const OfPairs each(l);
    const bf16 *x = static_cast<const bf16 *>(job.x);
    const bf16 *bias = static_cast<const bf16 *>(job.bias);
    bf16 *y = static_cast<bf16 *>(job.y);
    V sums[most_rows * most_tokens];
    for (int64_t vector = begin; vector < end;) {
        int rows = w.tile_rows >= 4 ? 4 : w.tile_rows >= 2 ? 2 : 1;
        while (rows > end - vector) rows /= 2;
        int64_t most = least(most_tokens, least(w.tile_tokens, job.tokens));
        while (!tile_of<Regs>(rows, static_cast<int>(most))) --most;
        const int64_t tiles = div_up(job.tokens, most);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t token = job.tokens * tile / tiles;
            const int tokens = static_cast<int>(job.tokens * (tile + 1) / tiles - token);
            tile_of<Regs>(rows, tokens)(l, each, static_cast<const uint16_t *>(w.values) + vector * each.values,
                                        static_cast<const uint16_t *>(w.index) + vector * each.words,
                                        x + token * job.x_stride, job.x_stride, sums);
            for (int r = 0; bias && r < rows; ++r) {
                const int64_t row = (vector + r) * lanes;
                const V add = load_first(bias + row, least(lanes, l.rows - row));
                for (int t = 0; t < tokens; ++t) sums[r * tokens + t] += add;
            }
            if (w.activation) activate(sums, rows * tokens, w.activation);
            for (int r = 0; r < rows; ++r) {
                const int64_t row = (vector + r) * lanes, width = least(lanes, l.rows - row);
                for (int t = 0; t < tokens; ++t)
                    store_first(y + (token + t) * job.y_stride + row, sums[r * tokens + t], width);
            }
        }
        vector += rows;
    }
}

void rv_bf16(const Job &job, int64_t begin, int64_t end) {
    job.weight->layout.chunk <= 32 ? run<1>(job, begin, end) : run<2>(job, begin, end);
}

// `spin` of ceilings.hpp in dot products; each adds 2^-14, so the sums stay small.
double spin_bf16(int64_t rounds, float seed) {
    constexpr int chains = 10;
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

}  // namespace avx512
}  // namespace nmflow
