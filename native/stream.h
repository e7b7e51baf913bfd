/* The product with a dense weight for a few tokens: what of a network stays dense (a language model's head) waits for
   its weight to arrive from memory, and is done when it has.

   y[t, r] = act(sum_k w[r, k] * x[t, k] + bias[r]) */

#ifndef NMFLOW_STREAM_H
#define NMFLOW_STREAM_H

#include "nmflow.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct nmflow_dense {
    const void *w; /* [rows, cols], rows w_stride entries apart */
    int64_t rows, cols, w_stride;
    int32_t dtype;      /* of w, x, bias and y; sums are float32 */
    int32_t isa;        /* of enum nmflow_isa */
    int32_t activation; /* of enum nmflow_activation */
} nmflow_dense;

/* x, bias, y, tokens and parallel as in nmflow_linear. w is read once for every four tokens, and nothing is packed. */
NMFLOW_API int32_t nmflow_stream(const nmflow_dense *dense, const void *x, int64_t x_stride, const void *bias, void *y,
                                 int64_t y_stride, int64_t tokens, nmflow_parallel_for parallel);

#ifdef __cplusplus
}
#endif
#endif
