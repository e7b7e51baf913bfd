// The pass over rows of which `shared` neighbours keep the same columns.
//
//   magnitudes, row added to row         sums [entries], in float32         scratch memory, in L1
//   select, as on any row                bits [entries]
//   write                                each row of the group, which L2 still holds
//
// Included by project_pieces.hpp, once an instruction set.
#pragma once

#include "kernel.hpp"
#include "project_pieces.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

typedef float Sums __attribute__((vector_size(sizeof(Key))));

// Magnitudes of their keys.
static inline Sums as_floats(f32, Key key) { return (Sums)key; }
static inline Sums as_floats(bf16, Key key) { return (Sums)(key << 16); }
static inline Sums as_floats(f16, Key key) {
    const Key denormal = (Key)(__builtin_convertvector(key, Sums) * 0x1p-24f);
    const Key finite = key < 0x400 ? denormal : (key << 13) + (112 << 23);  // half's exponents are 112 lower
    return (Sums)(key < (int32_t)f16::infinity ? finite : key << 13 | 0x7F800000);
}

// Of keys, or of weights, of T. Order and width are those of nmflow/groups.py: all devices find the same sums.
template <class T, class From>
static void add_rows(const From *rows_of_keys, int64_t from_stride, int64_t rows, int64_t entries, f32 *sums) {
    for (int64_t r = 0; r < rows; ++r, rows_of_keys += from_stride)
        for (int64_t k = 0; k < entries; k += lanes) {
            __builtin_prefetch(rows_of_keys + from_stride + k);  // no hardware prefetcher follows to the next row
            Sums sum = as_floats(T(), keys_from(rows_of_keys, k, entries, 0));
            if (r) {
                Sums before;
                memcpy(&before, sums + k, sizeof before);
                sum = before + sum;
            }
            memcpy(sums + k, &sum, sizeof sum);
        }
}

template <class T>
static int64_t project_groups(const Projection &projection, int64_t begin, int64_t end) {
    const nmflow_projection &job = projection.job;
    f32 *sums = static_cast<f32 *>(scratch((size_t)(least(projection.piece, job.cols) + lanes) * sizeof(f32)));
    if (!sums) return -1;
    alignas(64) uint64_t bits[piece_words];
    int64_t flips = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit / projection.pieces_per_row * job.shared;
        const int64_t col = unit % projection.pieces_per_row * projection.piece;
        const int64_t rows = least(job.shared, job.rows - first), entries = least(projection.piece, job.cols - col);
        add_rows<T>((const T *)job.w + first * job.w_stride + col, job.w_stride, rows, entries, sums);
        select(sums, job.n, job.m, entries, bits);
        for (int64_t row = first; row < first + rows; ++row) {
            for (int64_t k = 0; job.mask && k < entries; k += 64)  // what it held, of the row after this one
                __builtin_prefetch(job.mask + (row + 1) * job.mask_stride + col + k);
            if (job.bits) put_bits(job.bits + row * job.bits_stride, col, bits, entries);
            if (has_lines(job)) flips += write(job, piece_at<T>(job, row, col), bits, entries, projection.stream);
        }
    }
    finish_streaming(projection.stream);
    return flips;
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
