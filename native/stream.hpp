// The dense product of few tokens: two rows of the weight at a time, dot products along them.
// Included after an isa header, once an instruction set.
#pragma once

#include "epilogue.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

static inline float total(V v) {
    float part[lanes];
    store(part, v);
    for (int width = lanes / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

// The sums of `Rows` rows, `apart` from one to the next, and of `Tokens` tokens from `token` on -> number `at` of y.
template <class X, int Rows, int Tokens>
static void stream_sums(const StreamJob &job, int64_t row, int64_t apart, int64_t token, V (&y)[Rows][Tokens],
                        int64_t at) {
    const nmflow_dense &d = *job.dense;
    const X *w[Rows], *x[Tokens];
    for (int r = 0; r < Rows; ++r) w[r] = static_cast<const X *>(d.w) + (row + r * apart) * d.w_stride;
    for (int t = 0; t < Tokens; ++t) x[t] = static_cast<const X *>(job.x) + (token + t) * job.x_stride;
    V sum[Rows][Tokens];
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) sum[r][t] = broadcast(0.0f);
    int64_t k = 0;
    for (; k + lanes <= d.cols; k += lanes) {
        V of_x[Tokens];
        for (int t = 0; t < Tokens; ++t) of_x[t] = load(x[t] + k);
        for (int r = 0; r < Rows; ++r) {
            const V of_w = load(w[r] + k);
            __builtin_prefetch(reinterpret_cast<const char *>(w[r] + k) + bytes_ahead);
            for (int t = 0; t < Tokens; ++t) sum[r][t] = fma(of_w, of_x[t], sum[r][t]);
        }
    }
    if (k < d.cols) {
        const int64_t rest = d.cols - k;
        for (int r = 0; r < Rows; ++r) {
            const V of_w = load_first(w[r] + k, rest);
            for (int t = 0; t < Tokens; ++t) sum[r][t] = fma(of_w, load_first(x[t] + k, rest), sum[r][t]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t) y[r][t][at] = total(sum[r][t]);
}

// `count` rows from `row` on, and as many from each further place: at most a vector of y, which is finished at once.
template <class X, int Rows, int Tokens>
static void stream_tile(const StreamJob &job, int64_t row, int64_t count, int64_t apart, int64_t token) {
    V y[Rows][Tokens] = {};
    for (int64_t i = 0; i < count; ++i) stream_sums<X>(job, row + i, apart, token, y, i);
    const X *bias = static_cast<const X *>(job.bias);
    for (int r = 0; bias && r < Rows; ++r) {
        const V add = load_first(bias + row + r * apart, count);
        for (int t = 0; t < Tokens; ++t) y[r][t] += add;
    }
    if (job.dense->activation) activate(&y[0][0], Rows * Tokens, job.dense->activation);
    for (int r = 0; r < Rows; ++r)
        for (int t = 0; t < Tokens; ++t)
            store_first(static_cast<X *>(job.y) + (token + t) * job.y_stride + row + r * apart, y[r][t], count);
}

// Rows [begin, end): one of the first half beside one of the second, as a core reads most in two places at once.
template <class X, int Tokens>
static void stream_halves(const StreamJob &job, int64_t begin, int64_t end, int64_t token) {
    const int64_t half = (end - begin) / 2, second = begin + half;
    for (int64_t row = begin; row < second; row += lanes)
        stream_tile<X, 2, Tokens>(job, row, least(lanes, second - row), half, token);
    if (second + half < end) stream_tile<X, 1, Tokens>(job, end - 1, 1, 0, token);
}

template <class X>
static void stream_units(const StreamJob &job, int64_t begin, int64_t end) {
    int64_t token = 0;
    for (; token + 4 <= job.tokens; token += 4) stream_halves<X, 4>(job, begin, end, token);
    for (; token + 2 <= job.tokens; token += 2) stream_halves<X, 2>(job, begin, end, token);
    for (; token < job.tokens; ++token) stream_halves<X, 1>(job, begin, end, token);
}

static void stream(const StreamJob &job, int64_t begin, int64_t end) {
    if (job.dense->dtype == NMFLOW_F32)
        stream_units<float>(job, begin, end);
    else
        stream_units<bf16>(job, begin, end);
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
