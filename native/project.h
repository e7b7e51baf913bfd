/* What the native library offers to training: the mask of a dense weight and the effective weight, in one pass.

   effective = mask ? w : decay * w        (decay 0 writes zeros, whatever w is: a pruned NaN or inf does not survive)

   mask keeps the n largest magnitudes of every m consecutive entries of a row; a last block of r < m keeps min(n, r).
   Rows may have to keep the same columns (`shared`).
   NaN is larger than everything and all NaN are alike; of equal magnitudes the lowest index survives. */

#ifndef NMFLOW_PROJECT_H
#define NMFLOW_PROJECT_H

#include "nmflow.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { NMFLOW_F16 = 2 };                   /* a dtype beside those of nmflow_dtype */
enum { NMFLOW_PROJECT_LARGEST_M = 32768 }; /* the bits of one block lie on a thread's stack */

typedef struct nmflow_projection {
    int64_t rows, cols, n, m;
    int64_t shared; /* above 1, that many rows keep the same columns, chosen by the sums of their magnitudes: in float32,
                       row added to row; of the last rows as many as are left. 1: each row for itself. Under columns = 1
                       it divides 64 */
    int32_t dtype; /* of w and effective: NMFLOW_F32, NMFLOW_BF16 or NMFLOW_F16 */
    int32_t isa;   /* of enum nmflow_isa */
    float decay;
    int32_t stream; /* outputs bypass the caches: 1 always where alignment allows, 0 never, -1 where they are large */
    int32_t columns; /* 0: the entries of a row are neighbours, and a stride leads from row to row. 1: the rows are
                        neighbours (w is stored [cols, rows], the other tensors too), a stride leads from one entry of
                        a row to the next; `bits` alone lies as under 0 */
    int32_t taps; /* above 1, under columns = 0: a row is that of a convolution, cols / taps channels of `taps` neighbours
                     each. Its entry k is channel k % (cols / taps) of tap k / (cols / taps) and lies at the place
                     channel * taps + tap of the row, in the other tensors too; `bits` alone lies as under 0 and 1 */
    const void *w;
    uint8_t *mask;   /* 0 or 1, or null; what it held before is read for `flips` */
    void *effective; /* or null; may be w itself */
    uint16_t *cast;  /* effective rounded to bfloat16 for a float32 w, or null */
    uint8_t *bits;   /* or null; the mask at one bit an entry, entry k of a row in bit k % 8 of byte k / 8. A row has
                        ceil(cols / 8) bytes, the bits behind its last entry are 0 */
    int64_t w_stride, mask_stride, effective_stride, cast_stride; /* in entries */
    int64_t bits_stride;                                          /* in bytes, from row to row */
} nmflow_projection;

/* flips: entries of the mask that differ from what it held before (0 without a mask). Serial where `parallel` is null.
   NMFLOW_BAD_ARGUMENT, and nothing written, unless 1 <= n <= m <= NMFLOW_PROJECT_LARGEST_M, 1 <= shared and rows do not
   overlap.
   NMFLOW_NO_MEMORY: no scratch memory, which all but rows for themselves need; the outputs are undefined. */
NMFLOW_API int32_t nmflow_project(const nmflow_projection *projection, nmflow_parallel_for parallel, int64_t *flips);

#ifdef __cplusplus
}
#endif
#endif
