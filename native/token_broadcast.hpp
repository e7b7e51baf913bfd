// TB: tokens lie in the lanes, so a weight is one broadcast number and its index one row of x.
//
//   x tile, transposed once      xt[column][tokens of the tile]             (L2, one K-block of it at a time in L1)
//   for a block of rows, for a K-block, for a row:
//       sums[row][tokens] += value * xt[index]                              (sums in registers during a K-block)
//   sums, transposed back, + bias, activation -> y
//
// Where a row keeps few weights, carrying sums to memory and back would cost as much as making them: a tile of one
// vector of tokens whose K-block is the whole of K keeps the sums of `lanes` rows in registers until they are y.
//
// Packed weight: values float [K-blocks][rows][kept in the block], index the column within the K-block.
// Included after an isa header, once an instruction set.
#pragma once

#include "epilogue.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

constexpr int tb_most_vectors = NMFLOW_TB_VECTORS;  // sums that fit in the registers beside the broadcast value
constexpr int64_t tb_few = 16;  // kept weights of a row: with fewer, a sum costs less than its way through memory

template <class X>
static void tb_transpose_in(const X *x, int64_t stride, int64_t tokens, int64_t cols, int vectors, float *xt) {
    for (int v = 0; v < vectors; ++v) {
        const X *from = x + v * lanes * stride;
        const int64_t here = least(lanes, tokens - v * lanes);
        for (int64_t k = 0; k < cols; k += lanes) {
            const int64_t width = least(lanes, cols - k);
            V r[lanes];
            if (here == lanes && width == lanes) {
                for (int t = 0; t < lanes; ++t) r[t] = load(from + t * stride + k);
            } else {
                for (int t = 0; t < lanes; ++t)
                    r[t] = t < here ? load_first(from + t * stride + k, width) : broadcast(0.0f);
            }
            transpose(r);
            float *to = xt + (k * vectors + v) * lanes;
            for (int64_t j = 0; j < width; ++j) store(to + j * vectors * lanes, r[j]);
        }
    }
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of four indices lies in the lowest bits");
template <class Index>
struct Four {
    using Type = uint32_t;
};
template <>
struct Four<uint16_t> {
    using Type = uint64_t;
};
template <class Index>
using FourOf = typename Four<Index>::Type;

template <int Vectors, class Index>
static void tb_block(const float *values, const Index *index, int64_t kept, int64_t rows, const float *xt, float *sums,
                     bool first) {
    constexpr int width = Vectors * lanes;
    for (int64_t r = 0; r < rows; ++r) {
        V sum[Vectors];
        if (first)
            for (int v = 0; v < Vectors; ++v) sum[v] = broadcast(0.0f);
        else
            for (int v = 0; v < Vectors; ++v) sum[v] = load(sums + v * lanes);
        const auto add = [&](V value, Index at) __attribute__((always_inline)) {
            const float *row = xt + static_cast<size_t>(at) * width;
            NMFLOW_UNROLLED
            for (int v = 0; v < Vectors; ++v) sum[v] = fma(value, load(row + v * lanes), sum[v]);
        };
        int64_t i = 0;
        // The load ports are what limits this loop: four values come with one load and shuffles part them, four
        // indices with another (of 4 or 8 bytes) and shifts part them.
        constexpr int bits = 8 * sizeof(Index);
        for (; i + 4 <= kept; i += 4) {
            const V four = load_four(values + i);
            FourOf<Index> at;
            memcpy(&at, index + i, sizeof(at));
            add(splat<0>(four), static_cast<Index>(at));
            add(splat<1>(four), static_cast<Index>(at >> bits));
            add(splat<2>(four), static_cast<Index>(at >> 2 * bits));
            add(splat<3>(four), static_cast<Index>(at >> 3 * bits));
        }
        for (; i < kept; ++i) add(broadcast(values[i]), index[i]);
        for (int v = 0; v < Vectors; ++v) store(sums + v * lanes, sum[v]);
        values += kept;
        index += kept;
        sums += width;
    }
}

// Where sums end: what `lanes` rows have summed up for one vector of tokens becomes part of y.
template <class X>
struct Output {
    X *y;
    int64_t stride;
    const X *bias;
    int activation;

    // Rows from `row`, `rows` of them; tokens from `token`, `tokens` of them; at most `lanes` of each.
    inline __attribute__((always_inline)) void put(const V *sums, int64_t row, int64_t rows, int64_t token,
                                                   int64_t tokens) const {
        V out[lanes];
        NMFLOW_UNROLLED
        for (int j = 0; j < lanes; ++j) out[j] = sums[j];
        transpose(out);
        const V add = bias ? load_first(bias + row, rows) : broadcast(0.0f);
        NMFLOW_UNROLLED
        for (int t = 0; t < lanes; ++t) out[t] += add;
        if (activation) {
            V inputs[lanes];
            NMFLOW_UNROLLED
            for (int t = 0; t < lanes; ++t) inputs[t] = out[t];
            activate(inputs, lanes, activation);
            NMFLOW_UNROLLED
            for (int t = 0; t < lanes; ++t) out[t] = inputs[t];
        }
        X *to = y + token * stride + row;
        if (rows < lanes || tokens < lanes) {
            NMFLOW_UNROLLED
            for (int t = 0; t < lanes; ++t)
                if (t < tokens) store_first(to + t * stride, out[t], rows);
        } else {
            NMFLOW_UNROLLED
            for (int t = 0; t < lanes; ++t) store(to + t * stride, out[t]);
        }
    }
};

template <class X>
static void tb_transpose_out(const float *sums, int vectors, int64_t row, int64_t rows, int64_t tokens,
                             const Output<X> &output) {
    for (int64_t r = 0; r < rows; r += lanes) {
        for (int v = 0; v < vectors; ++v) {
            V out[lanes];
            NMFLOW_UNROLLED
            for (int j = 0; j < lanes; ++j) out[j] = load(sums + ((r + j) * vectors + v) * lanes);
            output.put(out, row + r, least(lanes, rows - r), v * lanes, least(lanes, tokens - v * lanes));
        }
    }
}

// The sums of `Rows` rows and one vector of tokens. Several rows at once: one alone would wait for its own sum.
template <int Rows, class Index>
static inline __attribute__((always_inline)) void tb_sums(const float *values, const Index *index, int64_t kept,
                                                          const float *xt, V *sums) {
    V sum[Rows];
    NMFLOW_UNROLLED
    for (int r = 0; r < Rows; ++r) sum[r] = broadcast(0.0f);
    const auto x = [&](Index at) __attribute__((always_inline)) { return load(xt + static_cast<size_t>(at) * lanes); };
    constexpr int bits = 8 * sizeof(Index);
    int64_t i = 0;
    for (; i + 4 <= kept; i += 4) {
        NMFLOW_UNROLLED
        for (int r = 0; r < Rows; ++r) {
            const V four = load_four(values + r * kept + i);
            FourOf<Index> at;
            memcpy(&at, index + r * kept + i, sizeof(at));
            sum[r] = fma(splat<0>(four), x(static_cast<Index>(at)), sum[r]);
            sum[r] = fma(splat<1>(four), x(static_cast<Index>(at >> bits)), sum[r]);
            sum[r] = fma(splat<2>(four), x(static_cast<Index>(at >> 2 * bits)), sum[r]);
            sum[r] = fma(splat<3>(four), x(static_cast<Index>(at >> 3 * bits)), sum[r]);
        }
    }
    for (; i < kept; ++i) {
        NMFLOW_UNROLLED
        for (int r = 0; r < Rows; ++r)
            sum[r] = fma(broadcast(values[r * kept + i]), x(index[r * kept + i]), sum[r]);
    }
    NMFLOW_UNROLLED
    for (int r = 0; r < Rows; ++r) sums[r] = sum[r];
}

template <class X, class Index>
static void tb_direct(const float *values, const Index *index, int64_t kept, int64_t row, int64_t rows, int64_t tokens,
                      const float *xt, const Output<X> &output) {
    int64_t r = 0;
    if (kept < tb_few) {
        for (; r + lanes <= rows; r += lanes) {
            V sums[lanes];
            tb_sums<lanes>(values + r * kept, index + r * kept, kept, xt, sums);
            output.put(sums, row + r, lanes, 0, tokens);
        }
    }
    for (; r < rows; r += lanes) {
        const int64_t here = least(lanes, rows - r);
        V sums[lanes];
        int64_t j = 0;
        for (; j + 4 <= here; j += 4) tb_sums<4>(values + (r + j) * kept, index + (r + j) * kept, kept, xt, sums + j);
        for (; j < here; ++j) tb_sums<1>(values + (r + j) * kept, index + (r + j) * kept, kept, xt, sums + j);
        for (; j < lanes; ++j) sums[j] = broadcast(0.0f);
        output.put(sums, row + r, here, 0, tokens);
    }
}

template <class Index>
using TbBlock = void (*)(const float *, const Index *, int64_t, int64_t, const float *, float *, bool);

template <class Index, int... Counts>
static TbBlock<Index> tb_block_of(int vectors, Numbers<Counts...>) {
    static constexpr TbBlock<Index> table[] = {tb_block<Counts + 1, Index>...};
    return table[vectors - 1];
}

// Rows [row_begin, row_end) of the tokens [token_begin, token_end).
template <class X, class Index>
static void tb_run(const Job &job, int64_t row_begin, int64_t row_end, int64_t token_begin, int64_t token_end) {
    const nmflow_weight &w = *job.weight;
    const nmflow_layout &l = w.layout;
    const int64_t units = div_up(token_end - token_begin, lanes);
    const int64_t most = least(tb_most_vectors, div_up(w.tile_tokens, lanes));
    const int64_t tiles = div_up(units, most);
    const int64_t widest = div_up(units, tiles);
    const int64_t cols = l.cols, rows = row_end - row_begin;
    const int64_t row_tiles = div_up(rows, w.tile_rows);
    const int64_t tile_rows = div_up(div_up(rows, row_tiles), lanes) * lanes;
    const int64_t x_floats = cols * widest * lanes;
    float *xt = static_cast<float *>(scratch(sizeof(float) * (x_floats + tile_rows * widest * lanes)));
    if (!xt) {
        *job.out_of_memory = true;
        return;
    }
    float *sums = xt + x_floats;
    const int64_t kept = kept_in(l.chunk, l.n, l.m);
    const float *values = static_cast<const float *>(w.values);
    const Index *index = static_cast<const Index *>(w.index);
    const bool direct = widest == 1 && w.tile_rows <= lanes && l.chunk >= cols;
    Output<X> output = {nullptr, job.y_stride, static_cast<const X *>(job.bias), w.activation};
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first_unit = units * tile / tiles, last_unit = units * (tile + 1) / tiles;
        const int vectors = static_cast<int>(last_unit - first_unit);
        const int64_t token = token_begin + first_unit * lanes;
        const int64_t tokens = least(vectors * lanes, token_end - token);
        const TbBlock<Index> block = tb_block_of<Index>(vectors, typename Count<tb_most_vectors>::Below());
        tb_transpose_in(static_cast<const X *>(job.x) + token * job.x_stride, job.x_stride, tokens, cols, vectors, xt);
        output.y = static_cast<X *>(job.y) + token * job.y_stride;
        if (direct) {
            const int64_t start = row_begin * l.kept;
            tb_direct(values + start, index + start, l.kept, row_begin, rows, tokens, xt, output);
            continue;
        }
        for (int64_t row = row_begin; row < row_end; row += tile_rows) {
            const int64_t rows_here = least(tile_rows, row_end - row);
            int64_t k = 0;
            do {  // once where there are no columns: y is the bias then
                const int64_t kept_here = k + l.chunk <= cols ? kept : kept_in(cols - k, l.n, l.m);
                const int64_t start = k / l.chunk * kept * l.rows + row * kept_here;
                block(values + start, index + start, kept_here, rows_here, xt + k * vectors * lanes, sums, k == 0);
                k += l.chunk;
            } while (k < cols);
            tb_transpose_out(sums, vectors, row, rows_here, tokens, output);
        }
    }
}

template <class X>
static void tb_run(const Job &job, int64_t begin, int64_t end) {
    const nmflow_layout &l = job.weight->layout;
    const bool by_rows = job.weight->split == NMFLOW_SPLIT_ROWS;
    const int64_t last = least(end * lanes, by_rows ? l.rows : job.tokens);
    const int64_t rows[] = {by_rows ? begin * lanes : 0, by_rows ? last : l.rows};
    const int64_t tokens[] = {by_rows ? 0 : begin * lanes, by_rows ? job.tokens : last};
    if (l.index_bits == 8)
        tb_run<X, uint8_t>(job, rows[0], rows[1], tokens[0], tokens[1]);
    else
        tb_run<X, uint16_t>(job, rows[0], rows[1], tokens[0], tokens[1]);
}

static void tb(const Job &job, int64_t begin, int64_t end) {
    if (job.weight->layout.dtype == NMFLOW_F32)
        tb_run<float>(job, begin, end);
    else
        tb_run<bf16>(job, begin, end);
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
