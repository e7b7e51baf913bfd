/* What this machine reaches at most, so that a kernel's speed can be told as a part of it: multiply-adds and reading. */

#ifndef NMFLOW_MEASURE_H
#define NMFLOW_MEASURE_H

#include "nmflow.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Independent multiply-adds in registers: `rounds` of them in each of `parts` parts, which the threads share. NMFLOW_F32
   multiplies and adds, NMFLOW_BF16 takes dot products of pairs (NMFLOW_UNSUPPORTED where the machine has none).
   flops: the floating-point operations that were done, a multiply-add counting two. Serial where `parallel` is null. */
NMFLOW_API int32_t nmflow_spin(int32_t isa, int32_t dtype, int64_t rounds, int64_t parts, nmflow_parallel_for parallel,
                               double *flops);

/* Loads every one of `count` floats once, in `parts` parts; sum: theirs, in no order to rely on. */
NMFLOW_API int32_t nmflow_read(int32_t isa, const float *x, int64_t count, int64_t parts, nmflow_parallel_for parallel,
                               double *sum);

#ifdef __cplusplus
}
#endif
#endif
