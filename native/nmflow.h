/* What the native library offers: the product with an N:M-compressed weight, behind a plain C ABI.

   y[t, r] = act(sum_s values[r, s] * x[t, column(r, s)] + bias[r]),     column(r, s) = m * (s / n) + offsets[r, s]

   The canonical form is values [R, S] and offsets [R, S] (one byte, two where m > 256), S kept weights a row. A layout
   says how a kernel wants them; `nmflow_layout_init` completes one, `nmflow_pack` writes it, `nmflow_linear` uses it.

   No function here checks offsets: the caller has (an offset outside its block reads outside x).
   Nothing is allocated for the caller, nothing is kept but scratch memory of each thread. No global state. */

#ifndef NMFLOW_H
#define NMFLOW_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define NMFLOW_API __attribute__((visibility("default")))
#else
#define NMFLOW_API
#endif

#define NMFLOW_ABI_VERSION 9

enum nmflow_dtype { NMFLOW_F32 = 0, NMFLOW_BF16 = 1 };

/* Instruction sets, the better the higher. AUTO: the best of this machine. */
enum nmflow_isa { NMFLOW_ISA_AUTO = -1, NMFLOW_ISA_PORTABLE = 0, NMFLOW_ISA_AVX2 = 1, NMFLOW_ISA_AVX512 = 2 };

/* TB, token-broadcast: tokens in the lanes, a weight is broadcast, x transposed first. For blocks of any width.
   RV, row-vector: output rows in the lanes, a permutation picks x. For blocks that one reaches; nothing is transposed. */
enum nmflow_algorithm { NMFLOW_TB = 0, NMFLOW_RV = 1 };

enum nmflow_activation { NMFLOW_NONE = 0, NMFLOW_RELU = 1, NMFLOW_GELU = 2, NMFLOW_GELU_TANH = 3, NMFLOW_SILU = 4 };

/* What the threads share out: output rows, or tokens. Whatever wrote x most likely shared out tokens, and rows then read
   what another core has in its cache. */
enum nmflow_split { NMFLOW_SPLIT_ROWS = 0, NMFLOW_SPLIT_TOKENS = 1 };

enum nmflow_status {
    NMFLOW_OK = 0,
    NMFLOW_BAD_ARGUMENT = 1, /* a number is out of range */
    NMFLOW_UNSUPPORTED = 2,  /* no such kernel for this instruction set, dtype and pattern */
    NMFLOW_NO_MEMORY = 3     /* scratch memory could not be had; y is undefined */
};

/* The signature of libtorch's `torch_parallel_for`: run fn on parts of [begin, end), every part once. */
typedef void (*nmflow_range_fn)(int64_t begin, int64_t end, void *context);
typedef int32_t (*nmflow_parallel_for)(int64_t begin, int64_t end, int64_t grain, nmflow_range_fn fn, void *context);

typedef struct nmflow_layout {
    /* set by the caller */
    int64_t rows, cols, n, m; /* W is [rows, cols], n of every m kept; a last block of r < m keeps min(n, r) */
    int32_t dtype;            /* of x, y and the canonical values */
    int32_t isa;              /* AUTO becomes the one that is used */
    int32_t algorithm;
    int32_t chunk; /* columns that are worked on together. TB: any multiple of m. RV: 0 for as many as a vector of x
                      holds, anything else (float32) for few, whose indices have fewer bits */
    int32_t value_bits; /* 0: values as they are. 24 (RV in float32, a chunk of few): sign and mantissa, and beside the
                           index one of 16 exponents. Nothing is lost, but values of more exponents are not taken */
    /* set by nmflow_layout_init */
    int32_t lanes;         /* rows (RV) or tokens (TB) of one vector */
    int32_t index_bits;    /* of one packed index; TB: 8 or 16, RV: as few as reach a chunk, see row_vector.hpp */
    int64_t kept;          /* S */
    int64_t values_size;   /* bytes of the packed values */
    int64_t index_size;    /* bytes of the packed indices */
} nmflow_layout;

typedef struct nmflow_weight {
    nmflow_layout layout;
    const void *values; /* packed, 64-byte aligned */
    const void *index;  /* packed, 64-byte aligned */
    int32_t activation;
    int32_t split;
    int32_t tile_tokens; /* TB: tokens of a tile at most; RV: tokens that share one load of a weight */
    int32_t tile_rows;   /* TB: rows that share one K-block of x in L1 (one vector of them, of tokens too, and all
                            columns in one K-block: sums stay in registers); RV: row vectors that share a load of x; 1
                            takes a few tokens at a time and reads the weight from two halves, each in the
                            order of memory */
} nmflow_weight;

NMFLOW_API int32_t nmflow_abi_version(void);
/* The best instruction set of this machine, of enum nmflow_isa. */
NMFLOW_API int32_t nmflow_best_isa(void);
/* 1 where the machine multiplies bfloat16 itself (avx512_bf16). */
NMFLOW_API int32_t nmflow_has_bf16(void);

NMFLOW_API int32_t nmflow_layout_init(nmflow_layout *layout);
/* values [rows, kept] of the layout's dtype, offsets [rows, kept] of one byte (m <= 256) or two. NMFLOW_UNSUPPORTED, with
   nothing written, where the layout has values of 24 bits and these have more than 16 exponents. */
NMFLOW_API int32_t nmflow_pack(const nmflow_layout *layout, const void *values, const void *offsets,
                               void *packed_values, void *packed_index, nmflow_parallel_for parallel);

/* x: `tokens` rows of `cols` entries, x_stride entries apart; y: rows of `rows` entries, y_stride apart; bias: `rows`
   entries or null; all of the layout's dtype. Serial where `parallel` is null. */
NMFLOW_API int32_t nmflow_linear(const nmflow_weight *weight, const void *x, int64_t x_stride, const void *bias,
                                 void *y, int64_t y_stride, int64_t tokens, nmflow_parallel_for parallel);

#ifdef __cplusplus
}
#endif
#endif
