// RV: output rows lie in the lanes; x and y stay as they are.
//
//   for some tiles of tokens, for as many vectors of rows as L1 holds beside the x of a tile, for a block of columns:
//       for a tile of tokens, for a few of those vectors, for a chunk of columns (at most what a permutation reaches):
//           x chunk in registers, one set a token
//           for a step of the chunk:  sum[rows][token] += value[rows] * x[index[rows]]
//       after the last block, sums + bias, activation -> y
//
// A few tokens have a loop of their own (`FewTokens`): two vectors of rows at once, from two halves of the weight.
//
// Packed weight: values [row vectors][steps][lanes], index the column within the chunk. A step is what one multiplication
// takes of a row: a kept weight (float32) or two (bfloat16). Rows that fill up the last vector have value 0 and index 0.
// An index has the bits that reach a chunk (4 for 16 columns), and a word holds those of the next steps, whatever their
// chunk, the first one lowest: words [row vectors][words][lanes]. A shift brings up the next one; converting from bytes
// would cost as much as two weights, and a lane for every index eight times the memory.
//
// `From` says where x is found and what a step is (row_vector_f32.hpp, isa/avx512_bf16.cpp, isa/avx512_vbmi.cpp):
//   X                          an entry of x, bias and y
//   Values                     how a step's values are stored
//   steps(kept)                of so many kept weights of a row
//   per_word, next(index)      indices of a word; brings up the next one
//   reach, cost, most_tokens   columns of a whole load (0: any number), registers a token, tokens of a tile (0: it has none,
//                              whatever the number of tokens is)
//   read(x), read_first(x, n)  takes in a chunk, for one token
//   plus(sum, value, index)    sum + value * x[index]
//   put(y, v, n)               the first n numbers of v become y
// Included after an isa header, once an instruction set.
#pragma once

#include "epilogue.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

constexpr int rv_most_tokens = 8;

// What is gone through again and again should stay close: a few vectors of rows and a tile's x in L1. All rows, where L2
// (of 1 MiB) holds them, come from there for every few tokens, whose x stays in L1 or is next to it; larger weights come from
// further away, for as many tokens as L2 holds the x of.
constexpr int64_t rv_l1_bytes = 32 << 10, rv_l2_rows = 768 << 10, rv_l2_x = 256 << 10, rv_few_x = 64 << 10;

// A block is all columns, but where a tile's x and weight are more than L1 holds and a chunk is one step, so that x is
// loaded for a single multiplication. Then some tiles go through a block before the next, their sums in memory in between,
// and the weight's part stays in L1: 4 to 14 % faster in bfloat16. In float32, or with more steps, it was up to 6 % slower.
constexpr int64_t rv_block_bytes = 43 << 10, rv_block_tiles = 8;

struct Columns {
    int64_t begin, end;
    int64_t values, words;  // packed entries of one vector of rows before them
};

// A step's values as they are, `size` floats of memory.
struct Plain {
    static constexpr int64_t before = 0, size = lanes;
    explicit Plain(const float *) {}
    inline V operator()(const float *step, I) const { return load(step); }
};

// The steps of a packed weight.
template <class From>
struct Steps {
    const nmflow_layout &l;
    const typename From::Values value;  // of a step, by its place and its word
    const float *first_value;
    const uint32_t *first_word;
    int64_t of_chunk;       // a whole one
    int64_t values, words;  // packed entries of one vector of rows
    explicit Steps(const nmflow_weight &w)
        : l(w.layout),
          value(static_cast<const float *>(w.values)),
          first_value(static_cast<const float *>(w.values) + From::Values::before),
          first_word(static_cast<const uint32_t *>(w.index)),
          of_chunk(From::steps(kept_in(l.chunk, l.n, l.m))) {
        const int64_t all = l.cols / l.chunk * of_chunk + From::steps(kept_in(l.cols % l.chunk, l.n, l.m));
        values = all * From::Values::size;
        words = div_up(all, From::per_word) * lanes;
    }
};

// Columns [k, end); at `k` a word begins, and `values` and `words` point there.
template <class From, int Rows, int Tokens>
static inline __attribute__((always_inline)) void rv_add(const Steps<From> &steps, const float *values,
                                                         const uint32_t *words, const typename From::X *x,
                                                         int64_t x_stride, int64_t k, int64_t end,
                                                         V (&sum)[Rows][Tokens]) {
    const nmflow_layout &l = steps.l;
    const int64_t chunk = l.chunk, reach = From::reach ? From::reach : chunk;
    const int64_t of_chunk = steps.of_chunk, values_stride = steps.values, words_stride = steps.words;
    I index[Rows];
    int left = 0;  // indices in it
    const auto add = [&](const From *from, int64_t count) __attribute__((always_inline)) {
        for (int64_t s = 0; s < count; ++s) {
            if (left == 0) {
                NMFLOW_UNROLLED
                for (int r = 0; r < Rows; ++r) index[r] = load(words + r * words_stride);
                words += lanes;
                left = From::per_word;
            }
            --left;
            NMFLOW_UNROLLED
            for (int r = 0; r < Rows; ++r) {
                const V value = steps.value(values + r * values_stride, index[r]);
                NMFLOW_UNROLLED
                for (int t = 0; t < Tokens; ++t) sum[r][t] = from[t].plus(sum[r][t], value, index[r]);
                index[r] = From::next(index[r]);
            }
            values += From::Values::size;
        }
    };
    From from[Tokens];
    for (const int64_t whole = least(end, l.cols - reach + 1); k < whole; k += chunk) {
        NMFLOW_UNROLLED
        for (int t = 0; t < Tokens; ++t) from[t].read(x + t * x_stride + k);
        add(from, of_chunk);
    }
    for (; k < end; k += chunk) {  // what a whole load would overrun
        const int64_t here = least(chunk, l.cols - k);
        NMFLOW_UNROLLED
        for (int t = 0; t < Tokens; ++t) from[t].read_first(x + t * x_stride + k, here);
        add(from, From::steps(kept_in(here, l.n, l.m)));
    }
}

// Sums of `rows` row vectors and `tokens` tokens -> y, whatever their number.
template <class From>
static void rv_put(const Job &job, int64_t vector, int rows, int64_t token, int tokens, V *sums) {
    using X = typename From::X;
    const nmflow_weight &w = *job.weight;
    for (int r = 0; job.bias && r < rows; ++r) {
        const int64_t row = (vector + r) * lanes;
        const V bias = load_first(static_cast<const X *>(job.bias) + row, least(lanes, w.layout.rows - row));
        for (int t = 0; t < tokens; ++t) sums[r * tokens + t] += bias;
    }
    if (w.activation) activate(sums, rows * tokens, w.activation);
    for (int r = 0; r < rows; ++r) {
        const int64_t row = (vector + r) * lanes, width = least(lanes, w.layout.rows - row);
        X *y = static_cast<X *>(job.y) + token * job.y_stride + row;
        for (int t = 0; t < tokens; ++t) From::put(y + t * job.y_stride, sums[r * tokens + t], width);
    }
}

// Row vectors from `vector` on, tokens from `token` on, columns of a block. `sums`: of the columns before it, and of all up to
// its end where more follow.
template <class From, int Rows, int Tokens>
static void rv_tile(const Job &job, const Steps<From> &steps, int64_t vector, int64_t token, const Columns &block,
                    V *sums) {
    using X = typename From::X;
    const nmflow_weight &w = *job.weight;
    V sum[Rows][Tokens];
    NMFLOW_UNROLLED
    for (int r = 0; r < Rows; ++r)
        NMFLOW_UNROLLED
        for (int t = 0; t < Tokens; ++t) sum[r][t] = block.begin ? sums[r * Tokens + t] : broadcast(0.0f);
    rv_add(steps, steps.first_value + vector * steps.values + block.values,
           steps.first_word + vector * steps.words + block.words,
           static_cast<const X *>(job.x) + token * job.x_stride, job.x_stride, block.begin, block.end, sum);

    const bool last = block.end == w.layout.cols;
    const int64_t row = vector * lanes;
    if (!last || w.activation || row + Rows * lanes > w.layout.rows) {
        NMFLOW_UNROLLED
        for (int r = 0; r < Rows; ++r)
            NMFLOW_UNROLLED
            for (int t = 0; t < Tokens; ++t) sums[r * Tokens + t] = sum[r][t];
        if (last) rv_put<From>(job, vector, Rows, token, Tokens, sums);
        return;
    }
    // The same again in registers: at 1:16 it is a tenth of the time.
    if (job.bias) {
        NMFLOW_UNROLLED
        for (int r = 0; r < Rows; ++r) {
            const V bias = load(static_cast<const X *>(job.bias) + row + r * lanes);
            NMFLOW_UNROLLED
            for (int t = 0; t < Tokens; ++t) sum[r][t] += bias;
        }
    }
    X *y = static_cast<X *>(job.y) + token * job.y_stride + row;
    NMFLOW_UNROLLED
    for (int t = 0; t < Tokens; ++t) {
        NMFLOW_UNROLLED
        for (int r = 0; r < Rows; ++r) From::put(y + r * lanes, sum[r][t], lanes);
        y += job.y_stride;
    }
}

// A few tokens, all at once. The weight's bytes are the time, and a core reads most where it reads two places at once, each
// from one end to the other. The chunk a step lies in comes from a table, so that a word's steps are one straight piece of
// code whatever the pattern is: words and chunks begin together again after `words` of them and `width` columns, a cycle.
template <class From>
class FewTokens {
    static constexpr int per_word = From::per_word, reach = From::reach;
    static constexpr int64_t size = From::Values::size, ahead = bytes_ahead / (4 * size);  // steps
    int64_t words, width;
    int32_t column[reach * per_word];  // of the chunk of every step of a cycle

   public:
    const Steps<From> steps;

    explicit FewTokens(const nmflow_weight &w) : steps(w) {
        for (words = 1; words * per_word % steps.of_chunk;) ++words;
        width = words * per_word / steps.of_chunk * steps.l.chunk;
        for (int64_t i = 0; i < words * per_word; ++i)
            column[i] = static_cast<int32_t>(i / steps.of_chunk * steps.l.chunk);
    }

    // Vectors `vector`, `vector + apart`, ... and tokens from `token` on -> their sums.
    template <int Places, int Tokens>
    inline __attribute__((always_inline)) void sums(int64_t vector, int64_t apart, const typename From::X *x,
                                                    int64_t x_stride, V (&out)[Places][Tokens]) const {
        constexpr int chains = Tokens <= 2 ? 2 : 1;  // a sum takes longer than its weight's arrival
        const nmflow_layout &l = steps.l;
        const float *values = steps.first_value + vector * steps.values;
        const uint32_t *word = steps.first_word + vector * steps.words;
        const int64_t values_apart = apart * steps.values, words_apart = apart * steps.words;
        V sum[chains][Places][Tokens];
        NMFLOW_UNROLLED
        for (int i = 0; i < chains; ++i)
            NMFLOW_UNROLLED
            for (int p = 0; p < Places; ++p)
                NMFLOW_UNROLLED
                for (int t = 0; t < Tokens; ++t) sum[i][p][t] = broadcast(0.0f);
        int64_t k = 0;
        for (; k + width - l.chunk + reach <= l.cols; k += width)  // what a whole load would overrun is left
            for (const int32_t *at = column; at < column + words * per_word; at += per_word) {
                I index[Places];
                NMFLOW_UNROLLED
                for (int p = 0; p < Places; ++p) {
                    index[p] = load(word + p * words_apart);
                    __builtin_prefetch(word + p * words_apart + div_up(ahead, per_word) * lanes);
                }
                NMFLOW_UNROLLED
                for (int s = 0; s < per_word; ++s) {
                    V value[Places];
                    NMFLOW_UNROLLED
                    for (int p = 0; p < Places; ++p) {
                        const float *here = values + p * values_apart + s * size;
                        value[p] = steps.value(here, index[p]);
                        __builtin_prefetch(here + ahead * size);
                    }
                    NMFLOW_UNROLLED
                    for (int t = 0; t < Tokens; ++t) {
                        From from;
                        from.read(x + t * x_stride + k + at[s]);
                        NMFLOW_UNROLLED
                        for (int p = 0; p < Places; ++p)
                            sum[s % chains][p][t] = from.plus(sum[s % chains][p][t], value[p], index[p]);
                    }
                    NMFLOW_UNROLLED
                    for (int p = 0; p < Places; ++p) index[p] = From::next(index[p]);
                }
                values += per_word * size;
                word += lanes;
            }
        NMFLOW_UNROLLED
        for (int p = 0; p < Places; ++p) {
            V all[1][Tokens];
            NMFLOW_UNROLLED
            for (int t = 0; t < Tokens; ++t) {
                all[0][t] = sum[0][p][t];
                if constexpr (chains > 1) all[0][t] += sum[1][p][t];
            }
            rv_add(steps, values + p * values_apart, word + p * words_apart, x, x_stride, k, l.cols, all);
            NMFLOW_UNROLLED
            for (int t = 0; t < Tokens; ++t) out[p][t] = all[0][t];
        }
    }

    // The same, put into y.
    template <int Places, int Tokens>
    static void put(const Job &job, const FewTokens &few, int64_t vector, int64_t apart, int64_t token) {
        V sum[Places][Tokens];
        const auto *x = static_cast<const typename From::X *>(job.x) + token * job.x_stride;
        few.sums(vector, apart, x, job.x_stride, sum);
        for (int p = 0; p < Places; ++p) rv_put<From>(job, vector + p * apart, 1, token, Tokens, sum[p]);
    }
};

template <class From>
using RvTile = void (*)(const Job &, const Steps<From> &, int64_t, int64_t, const Columns &, V *);

// As many sums as the registers hold beside the tokens' x, the indices, a value and what was picked; fewer tokens where
// they do not fit.
template <class From, int Rows, int Tokens>
static constexpr RvTile<From> rv_tile_if_it_fits() {
    constexpr bool fits = Rows * Tokens + Tokens * From::cost + Rows + 2 <= NMFLOW_REGISTERS;
    if constexpr (Tokens == 1 || (fits && Tokens <= From::most_tokens)) return rv_tile<From, Rows, Tokens>;
    return nullptr;
}

template <class From, int Rows, int... Tokens>
static RvTile<From> rv_tile_of(int tokens, Numbers<Tokens...>) {
    static constexpr RvTile<From> table[] = {rv_tile_if_it_fits<From, Rows, Tokens + 1>()...};
    return table[tokens - 1];
}

template <class From>
static RvTile<From> rv_tile_of(int rows, int tokens) {
    using Upto = typename Count<rv_most_tokens>::Below;
    if (rows == 4) return rv_tile_of<From, 4>(tokens, Upto());
    if (rows == 2) return rv_tile_of<From, 2>(tokens, Upto());
    return rv_tile_of<From, 1>(tokens, Upto());
}

// Tokens that `FewTokens` takes at once: as many as the registers have sums for, beside an x, values, indices, what is picked.
template <class From>
static constexpr int rv_few_at_once() {
    const int tokens = (NMFLOW_REGISTERS - From::cost - 6) / 2;
    return tokens < rv_most_tokens ? tokens : rv_most_tokens;
}

template <class From, int Places, int... Tokens>
static void rv_put_few(const Job &job, const FewTokens<From> &few, int64_t vector, int64_t apart, int64_t token, int tokens,
                       Numbers<Tokens...>) {
    static constexpr decltype(&FewTokens<From>::template put<Places, 1>) table[] = {
        FewTokens<From>::template put<Places, Tokens + 1>...};
    table[tokens - 1](job, few, vector, apart, token);
}

// Row vectors [begin, end), all tokens: a vector of the first half beside one of the second, and the last where they are odd.
template <class From>
static void rv_run_few(const Job &job, int64_t begin, int64_t end) {
    constexpr int at_once = rv_few_at_once<From>();
    static_assert(at_once >= 1, "registers for the sums of a token");
    constexpr typename Count<at_once>::Below upto;
    const FewTokens<From> few(*job.weight);
    const int64_t half = (end - begin) / 2, tiles = div_up(job.tokens, least(at_once, job.weight->tile_tokens));
    for (int64_t i = 0; i < half + (end - begin) % 2; ++i) {
        for (int64_t tile = 0, token = 0; tile < tiles; ++tile) {
            const int here = static_cast<int>(job.tokens / tiles + (tile < job.tokens % tiles));
            if (i < half)
                rv_put_few<From, 2>(job, few, begin + i, half, token, here, upto);
            else
                rv_put_few<From, 1>(job, few, end - 1, 0, token, here, upto);
            token += here;
        }
    }
}

// What is gone through before the next tiles, vectors of rows and columns.
struct Together {
    int64_t tiles, vectors, cols;
};

// Of `vectors` vectors of rows in `tiles` tiles, one tile being `rows` vectors and at most `tokens` tokens.
template <class From>
static Together rv_together(const Steps<From> &steps, int rows, int64_t tokens, int64_t tiles, int64_t vectors) {
    const nmflow_layout &l = steps.l;
    const int64_t x = tokens * l.cols * static_cast<int64_t>(sizeof(typename From::X)) + 1;  // bytes of a tile
    const int64_t w = rows * (steps.values + steps.words) * 4 + 1;
    const bool x_once = sizeof(typename From::X) == 2 && steps.of_chunk == 1;
    if (x_once && tiles >= rv_block_tiles && x + w > rv_block_bytes) {
        const int64_t of_word = From::per_word * l.chunk, blocks = div_up(x + w, rv_block_bytes);
        return {rv_block_tiles, rows, div_up(l.cols, blocks * of_word) * of_word};
    }
    const int64_t of_x = vectors / rows * w <= rv_l2_rows ? rv_few_x : rv_l2_x;
    const int64_t beside_x = x < rv_l1_bytes ? (rv_l1_bytes - x) / w : 0;
    return {1 + of_x / x, rows * (1 + beside_x), l.cols};
}

// Row vectors [begin, end), all tokens, in tiles.
template <class From>
static void rv_run_tiles(const Job &job, int64_t begin, int64_t end) {
    const nmflow_weight &w = *job.weight;
    const Steps<From> steps(w);
    const int rows = w.tile_rows >= 4 ? 4 : w.tile_rows >= 2 ? 2 : 1;
    int64_t most = least(rv_most_tokens, least(w.tile_tokens, job.tokens));
    while (!rv_tile_of<From>(rows, static_cast<int>(most))) --most;
    const int64_t tiles = div_up(job.tokens, most), tokens = job.tokens / tiles, longer = job.tokens % tiles;

    const int64_t cols = w.layout.cols;
    const Together together = rv_together(steps, rows, most, tiles, end - begin);
    V carried[rv_block_tiles * NMFLOW_REGISTERS];
    for (int64_t first_tile = 0; first_tile < tiles; first_tile += together.tiles)
        for (int64_t first = begin; first < end; first += together.vectors) {
            const int64_t last = least(end, first + together.vectors);
            int64_t k = 0;
            do {  // once even where there are no columns
                const int64_t before = k / w.layout.chunk * steps.of_chunk;
                const Columns block = {k, least(cols, k + together.cols), before * From::Values::size,
                                       before / From::per_word * lanes};
                V *sums = carried;
                for (int64_t tile = first_tile; tile < least(tiles, first_tile + together.tiles); ++tile) {
                    const int64_t token = tile * tokens + least(tile, longer);
                    const int here = static_cast<int>(tokens + (tile < longer));
                    for (int64_t vector = first; vector < last;) {
                        int vectors = rows;
                        while (vectors > last - vector) vectors /= 2;
                        rv_tile_of<From>(vectors, here)(job, steps, vector, token, block, sums);
                        vector += vectors;
                        if (together.cols < cols) sums += vectors * here;
                    }
                }
                k += together.cols;
            } while (k < cols);
        }
}

// Row vectors [begin, end), all tokens.
template <class From>
static void rv_run(const Job &job, int64_t begin, int64_t end) {
    constexpr bool in_tiles = From::most_tokens > 0, by_few = From::cost > 0;
    if constexpr (by_few)
        if (!in_tiles || job.weight->tile_rows == 1) return rv_run_few<From>(job, begin, end);
    if constexpr (in_tiles) rv_run_tiles<From>(job, begin, end);
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
