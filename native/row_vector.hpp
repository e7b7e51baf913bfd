// RV: y of few tokens. Output rows lie in the lanes; x and y stay as they are.
//
//   for a tile of tokens, for a few vectors of rows, for a chunk of columns (at most what a permutation reaches):
//       x chunk in registers, one set a token
//       for a slot of the chunk:  sum[rows][token] += value[rows] * x[index[rows]]
//   sums + bias, activation -> y
//
// One token at a time has a loop of its own (`OneToken`): one vector of rows after another, in the order of memory.
//
// Packed weight: values float [row vectors][slots][lanes], index the column within the chunk; a chunk is the most
// whole blocks of m that a permutation reaches, its slots the kept weights of that many columns. Rows that fill up the
// last vector have value 0 and index 0. Blocks too wide for a permutation are gathered from memory. Where the weight's
// bytes are the time, chunks of 4 or 8 columns take indices of 2 or 3 bits, for more loads of x.
// An index has the bits that reach a chunk (4 for 16 columns), and a word of 32 holds those of the next 32 / bits slots,
// whatever their chunk, the first one lowest: words [row vectors][words][lanes]. A shift brings up the next one;
// converting from bytes would cost as much as two weights, and a lane for every index eight times the memory.
// Included after an isa header, once an instruction set.
#pragma once

#include "epilogue.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

constexpr int rv_most_rows = 4, rv_most_tokens = 8;

// Where x is found. Chunk: the entries of one chunk, for one token.
template <int Regs>
struct InRegisters {
    static constexpr int cost = Regs, most_tokens = rv_most_tokens;  // cost: registers a token
    static constexpr int reach = Regs * lanes, bits = bits_below(reach);
    V x[Regs];
    inline void read(const float *p) {
        for (int i = 0; i < Regs; ++i) x[i] = load(p + i * lanes);
    }
    inline void read_first(const float *p, int64_t count) {
        for (int i = 0; i < Regs; ++i) {
            const int64_t here = count - i * lanes;
            x[i] = here <= 0 ? broadcast(0.0f) : load_first(p + i * lanes, least(here, lanes));
        }
    }
    inline V operator[](I index) const { return pick<Regs>(x, index); }
};

// A chunk of fewer entries than lanes, again and again: an index has fewer bits, and those above them do not matter.
// Bytes are the time where tokens are few: one at a time is all it takes.
template <int Reach>
struct Repeated {
    static constexpr int cost = 1, most_tokens = 1;
    static constexpr int reach = Reach, bits = bits_below(reach);
    V x;
    inline void read(const float *p) { x = load_repeated<Reach>(p); }
    inline void read_first(const float *p, int64_t count) {
        float few[Reach] = {};
        for (int64_t i = 0; i < least(count, Reach); ++i) few[i] = p[i];
        read(few);
    }
    inline V operator[](I index) const { return pick<1>(&x, index); }
};

template <int Bits>
struct InMemory {
    static constexpr int cost = 0, most_tokens = rv_most_tokens;
    static constexpr int reach = 0, bits = Bits;  // as many as a chunk has
    const float *x;
    inline void read(const float *p) { x = p; }
    inline void read_first(const float *p, int64_t) { x = p; }
    inline V operator[](I index) const { return gather(x, index & ((1 << Bits) - 1)); }
};

// Packed entries of one vector of rows.
struct OfVector {
    int64_t values, words;
    explicit OfVector(const nmflow_layout &l)
        : values(l.kept * lanes), words(div_up(l.kept, 32 / l.index_bits) * lanes) {}
};

// Columns from `k` on, where a word begins.
template <class From, int Rows, int Tokens>
static void rv_tile(const nmflow_layout &l, OfVector each, const float *values, const uint32_t *words, const float *x,
                    int64_t x_stride, V *sums, int64_t k = 0) {
    const int64_t slots = kept_in(l.chunk, l.n, l.m);
    const int64_t reach = From::reach ? From::reach : l.chunk;
    V sum[Rows][Tokens];
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) sum[r][t] = broadcast(0.0f);

    I index[Rows];
    int left = 0;  // indices in it
    const auto step = [&](const From *chunk, int64_t count) __attribute__((always_inline)) {
        for (int64_t s = 0; s < count; ++s) {
            if (left == 0) {
                for (int r = 0; r < Rows; ++r) index[r] = load(words + r * each.words);
                words += lanes;
                left = 32 / From::bits;
            }
            --left;
            for (int r = 0; r < Rows; ++r) {
                const V value = load(values + r * each.values);
                for (int t = 0; t < Tokens; ++t) sum[r][t] = fma(value, chunk[t][index[r]], sum[r][t]);
                index[r] >>= From::bits;
            }
            values += lanes;
        }
    };
    From chunk[Tokens];
    for (; k + reach <= l.cols && k + l.chunk <= l.cols; k += l.chunk) {
        for (int t = 0; t < Tokens; ++t) chunk[t].read(x + t * x_stride + k);
        step(chunk, slots);
    }
    for (; k < l.cols; k += l.chunk) {  // what a whole load would overrun
        const int64_t here = least(l.chunk, l.cols - k);
        for (int t = 0; t < Tokens; ++t) chunk[t].read_first(x + t * x_stride + k, here);
        step(chunk, kept_in(here, l.n, l.m));
    }
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) sums[r * Tokens + t] = sum[r][t];
}

// One token. The weight's bytes are the time, and memory is fastest where it is read from one end to the other. The chunk
// a slot lies in comes from a table, so that a word's slots are one straight piece of code whatever the pattern is: words
// and chunks begin together again after `words` of them and `width` columns, a cycle.
template <class From>
class OneToken {
    static constexpr int per_word = 32 / From::bits, reach = From::reach;
    static constexpr int64_t ahead = 64;  // slots; a page of 4 KiB where no hardware prefetcher crosses into the next
    const nmflow_layout &l;
    const OfVector each;
    int64_t words, width;
    int32_t column[reach * per_word];  // of the chunk of every slot of a cycle

   public:
    explicit OneToken(const nmflow_layout &layout) : l(layout), each(layout) {
        const int64_t slots = kept_in(l.chunk, l.n, l.m);
        for (words = 1; words * per_word % slots;) ++words;
        width = words * per_word / slots * l.chunk;
        for (int64_t i = 0; i < words * per_word; ++i) column[i] = static_cast<int32_t>(i / slots * l.chunk);
    }

    inline V sum(const float *values, const uint32_t *word, const float *x) const {
        V even = broadcast(0.0f), odd = even;
        int64_t k = 0;
        for (; k + width - l.chunk + reach <= l.cols; k += width)  // what a whole load would overrun is left
            for (const int32_t *at = column; at < column + words * per_word; at += per_word) {
                I index = load(word);
                __builtin_prefetch(word + ahead / per_word * lanes);
                for (int s = 0; s < per_word; ++s) {
                    From chunk;
                    chunk.read(x + k + at[s]);
                    V &sum = s % 2 ? odd : even;  // two chains: a multiply-add takes longer than its weight's arrival
                    sum = fma(load(values + s * lanes), chunk[index], sum);
                    index >>= From::bits;
                    __builtin_prefetch(values + (ahead + s) * lanes);
                }
                values += per_word * lanes;
                word += lanes;
            }
        if (k >= l.cols) return even + odd;
        V rest;
        rv_tile<From, 1, 1>(l, each, values, word, x, 0, &rest, k);
        return even + odd + rest;
    }
};

using RvTile = void (*)(const nmflow_layout &, OfVector, const float *, const uint32_t *, const float *, int64_t, V *,
                        int64_t);

// As many sums as the registers hold beside the tokens' x, the indices, a value and what was picked; fewer tokens where
// they do not fit.
template <class From, int Rows, int Tokens>
static constexpr RvTile rv_tile_if_it_fits() {
    constexpr bool fits = Rows * Tokens + Tokens * From::cost + Rows + 2 <= NMFLOW_REGISTERS;
    if constexpr (Tokens == 1 || (fits && Tokens <= From::most_tokens))
        return rv_tile<From, Rows, Tokens>;
    return nullptr;
}

template <class From, int Rows, int... Tokens>
static RvTile rv_tile_of(int tokens, Numbers<Tokens...>) {
    static constexpr RvTile table[] = {rv_tile_if_it_fits<From, Rows, Tokens + 1>()...};
    return table[tokens - 1];
}

template <class From>
static RvTile rv_tile_of(int rows, int tokens) {
    using Upto = typename Count<rv_most_tokens>::Below;
    if (rows == 4) return rv_tile_of<From, 4>(tokens, Upto());
    if (rows == 2) return rv_tile_of<From, 2>(tokens, Upto());
    return rv_tile_of<From, 1>(tokens, Upto());
}

// Sums of `rows` row vectors and `tokens` tokens -> y.
static void rv_put(const Job &job, int64_t vector, int rows, int64_t token, int tokens, V *sums) {
    const nmflow_layout &l = job.weight->layout;
    for (int r = 0; job.bias && r < rows; ++r) {
        const int64_t row = (vector + r) * lanes;
        const V add = load_first(static_cast<const float *>(job.bias) + row, least(lanes, l.rows - row));
        for (int t = 0; t < tokens; ++t) sums[r * tokens + t] += add;
    }
    if (job.weight->activation) activate(sums, rows * tokens, job.weight->activation);
    for (int r = 0; r < rows; ++r) {
        const int64_t row = (vector + r) * lanes, width = least(lanes, l.rows - row);
        for (int t = 0; t < tokens; ++t) {
            float *to = static_cast<float *>(job.y) + (token + t) * job.y_stride + row;
            if (width == lanes)
                store(to, sums[r * tokens + t]);
            else
                store_first(to, sums[r * tokens + t], width);
        }
    }
}

// Row vectors [begin, end), all tokens.
template <class From>
static void rv_run(const Job &job, int64_t begin, int64_t end) {
    const nmflow_weight &w = *job.weight;
    const OfVector each(w.layout);
    const float *x = static_cast<const float *>(job.x), *values = static_cast<const float *>(w.values);
    const uint32_t *words = static_cast<const uint32_t *>(w.index);
    V sums[rv_most_rows * rv_most_tokens];
    if constexpr (From::cost > 0)
        if (job.tokens == 1 && w.tile_rows == 1) {
            const OneToken<From> one(w.layout);
            for (int64_t vector = begin; vector < end; ++vector) {
                sums[0] = one.sum(values + vector * each.values, words + vector * each.words, x);
                rv_put(job, vector, 1, 0, 1, sums);
            }
            return;
        }
    for (int64_t vector = begin; vector < end;) {
        int rows = w.tile_rows >= 4 ? 4 : w.tile_rows >= 2 ? 2 : 1;
        while (rows > end - vector) rows /= 2;
        int64_t most = least(rv_most_tokens, least(w.tile_tokens, job.tokens));
        while (!rv_tile_of<From>(rows, static_cast<int>(most))) --most;
        const int64_t tiles = div_up(job.tokens, most);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t token = job.tokens * tile / tiles;
            const int tokens = static_cast<int>(job.tokens * (tile + 1) / tiles - token);
            rv_tile_of<From>(rows, tokens)(w.layout, each, values + vector * each.values, words + vector * each.words,
                                           x + token * job.x_stride, job.x_stride, sums, 0);
            rv_put(job, vector, rows, token, tokens, sums);
        }
        vector += rows;
    }
}

static void rv(const Job &job, int64_t begin, int64_t end) {
    const nmflow_layout &l = job.weight->layout;
    if (l.index_bits == 2) return rv_run<Repeated<4>>(job, begin, end);
#if NMFLOW_RV_REGISTERS >= 8
    if (l.index_bits == 3) return rv_run<Repeated<8>>(job, begin, end);
#endif
    if (l.chunk <= lanes) return rv_run<InRegisters<1>>(job, begin, end);
#if NMFLOW_RV_REGISTERS >= 8
    if (l.chunk <= 2 * lanes) return rv_run<InRegisters<2>>(job, begin, end);
    if (l.chunk <= 4 * lanes) return rv_run<InRegisters<4>>(job, begin, end);
    if (l.chunk <= 8 * lanes) return rv_run<InRegisters<8>>(job, begin, end);
#endif
    l.chunk <= 256 ? rv_run<InMemory<8>>(job, begin, end) : rv_run<InMemory<16>>(job, begin, end);
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
