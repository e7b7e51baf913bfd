// The dense product of few tokens: a few rows of the weight at a time, dot products along them.
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

// Four rows from `row` (fewer at the end: the last is read again and not written), `Tokens` tokens from `token`.
template <class X, int Tokens>
static void stream_tile(const StreamJob &job, int64_t row, int64_t token) {
    const nmflow_dense &d = *job.dense;
    const int64_t here = least(stream_rows, d.rows - row);
    const X *w[stream_rows], *x[Tokens];
    for (int r = 0; r < stream_rows; ++r) w[r] = static_cast<const X *>(d.w) + (row + least(r, here - 1)) * d.w_stride;
    for (int t = 0; t < Tokens; ++t) x[t] = static_cast<const X *>(job.x) + (token + t) * job.x_stride;
    V sum[stream_rows][Tokens];
    for (int r = 0; r < stream_rows; ++r)
        for (int t = 0; t < Tokens; ++t) sum[r][t] = broadcast(0.0f);
    int64_t k = 0;
    for (; k + lanes <= d.cols; k += lanes) {
        V of_x[Tokens];
        for (int t = 0; t < Tokens; ++t) of_x[t] = load(x[t] + k);
        for (int r = 0; r < stream_rows; ++r) {
            const V of_w = load(w[r] + k);
            for (int t = 0; t < Tokens; ++t) sum[r][t] = fma(of_w, of_x[t], sum[r][t]);
        }
    }
    if (k < d.cols) {
        const int64_t rest = d.cols - k;
        for (int r = 0; r < stream_rows; ++r) {
            const V of_w = load_first(w[r] + k, rest);
            for (int t = 0; t < Tokens; ++t) sum[r][t] = fma(of_w, load_first(x[t] + k, rest), sum[r][t]);
        }
    }
    const X *bias = static_cast<const X *>(job.bias);
    const V add = bias ? load_first(bias + row, here) : broadcast(0.0f);
    for (int t = 0; t < Tokens; ++t) {
        V y = broadcast(0.0f);
        for (int r = 0; r < stream_rows; ++r) y[r] = total(sum[r][t]);
        y += add;
        if (d.activation) activate(&y, 1, d.activation);
        store_first(static_cast<X *>(job.y) + (token + t) * job.y_stride + row, y, here);
    }
}

template <class X>
static void stream_units(const StreamJob &job, int64_t begin, int64_t end) {
    int64_t token = 0;
    for (; token + 4 <= job.tokens; token += 4)
        for (int64_t unit = begin; unit < end; ++unit) stream_tile<X, 4>(job, unit * stream_rows, token);
    for (; token + 2 <= job.tokens; token += 2)
        for (int64_t unit = begin; unit < end; ++unit) stream_tile<X, 2>(job, unit * stream_rows, token);
    for (; token < job.tokens; ++token)
        for (int64_t unit = begin; unit < end; ++unit) stream_tile<X, 1>(job, unit * stream_rows, token);
}

static void stream(const StreamJob &job, int64_t begin, int64_t end) {
    if (job.dense->dtype == NMFLOW_F32)
        stream_units<float>(job, begin, end);
    else
        stream_units<bf16>(job, begin, end);
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
