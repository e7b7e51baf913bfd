// The pass over a weight whose rows are neighbours in memory, stored [cols, rows], in panels of sixty-four rows.
//
//   keys of the panel, transposed     [64 rows][entries]                 scratch memory, in L2
//   select, as on any rows            bits [64 rows][entries]
//   bits, transposed                  for every entry a word of 64 rows
//   write                             64 rows of one entry lie in memory as 64 entries of one row do
//
// So nothing but keys and bits is transposed; outputs are written where they lie, by the writing that rows have.
// Included by project_pieces.hpp, once an instruction set.
#pragma once

#include "project_groups.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

// The keys of `rows` rows and `entries` entries, cut to the smallest NaN: thus the methods for f32 take every dtype's.
template <class T>
static void transpose_keys(const T *w, int64_t w_stride, int64_t rows, int64_t entries, f32 *to, int64_t to_stride) {
    const Key nan = every(smallest_nan<T>);
    for (int64_t k = 0; k < entries; k += lanes)
        for (int64_t r = 0; r < rows; r += lanes) {
            Key v[lanes];
            for (int j = 0; j < lanes; ++j) {
                v[j] = every(0);
                if (k + j >= entries) continue;
                const T *from = w + (k + j) * w_stride + r;
                __builtin_prefetch(from + lanes * w_stride);  // a stride apart: no hardware prefetcher follows
                v[j] = smaller(r + lanes <= rows ? keys(from) : keys(from, rows - r, 0), nan);
            }
            transpose<lanes>(v);
            for (int j = 0; j < lanes; ++j)
                if (r + j < rows) memcpy(to + (r + j) * to_stride + k, &v[j], sizeof(Key));
        }
}

// Bit j of word i and bit i of word j change places: squares of 32 bits beside the diagonal, then of 16, ...
static inline void transpose_bits(uint64_t *words) {
    uint64_t left = 0x00000000FFFFFFFF;  // the bits whose place has no `step` in it
    for (int step = 32; step; step /= 2, left ^= left << step)
        for (int pair = 0; pair < 64; pair += 2 * step)
            for (int i = pair; i < pair + step; ++i) {
                const uint64_t differ = (words[i] >> step ^ words[i + step]) & left;
                words[i] ^= differ << step;
                words[i + step] ^= differ;
            }
}

// The bits of a panel's rows where `shared` of them, which divides the panel's, keep the same columns.
template <class T>
static void select_groups(const nmflow_projection &job, f32 *panel, int64_t stride, int64_t rows, int64_t entries,
                          uint64_t *bits) {
    const int64_t words = stride / 64;
    for (int64_t first = 0; first < rows; first += job.shared) {
        const int64_t together = least(job.shared, rows - first);
        f32 *sums = panel + first * stride;  // in the place of the first row's keys
        add_rows<T>(sums, stride, together, entries, sums);
        select(sums, job.n, job.m, entries, bits + first * words);
        for (int64_t r = first + 1; r < first + together; ++r)
            memcpy(bits + r * words, bits + first * words, (size_t)words * 8);
    }
}

template <class T>
static int64_t project_columns(const Projection &projection, int64_t begin, int64_t end) {
    const nmflow_projection &job = projection.job;
    const int64_t most = panel_rows * div_up(least(projection.piece, job.cols), 64) * 64;
    f32 *panel = static_cast<f32 *>(scratch((size_t)most * sizeof(f32) + (size_t)(most / 64 + 2) * 8));
    if (!panel) return -1;
    uint64_t *bits = reinterpret_cast<uint64_t *>(panel + most);
    int64_t flips = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit / projection.pieces_per_row * panel_rows;
        const int64_t col = unit % projection.pieces_per_row * projection.piece;
        const int64_t rows = least(panel_rows, job.rows - row), entries = least(projection.piece, job.cols - col);
        const int64_t words = div_up(entries, 64), stride = words * 64;
        transpose_keys((const T *)job.w + col * job.w_stride + row, job.w_stride, rows, entries, panel, stride);
        if (job.shared > 1)
            select_groups<T>(job, panel, stride, rows, entries, bits);
        else if (entries == stride && entries % job.m == 0)
            select(panel, job.n, job.m, rows * entries, bits);  // as one long row
        else
            for (int64_t r = 0; r < rows; ++r) select(panel + r * stride, job.n, job.m, entries, bits + r * words);
        if (job.bits)
            for (int64_t r = 0; r < rows; ++r)
                put_bits(job.bits + (row + r) * job.bits_stride, col, bits + r * words, entries);
        for (int64_t k = 0; has_lines(job) && k < entries; k += 64) {
            uint64_t of_entry[64] = {};
            for (int64_t r = 0; r < rows; ++r) of_entry[r] = bits[r * words + k / 64];
            transpose_bits(of_entry);
            for (int64_t j = 0; j < least(64, entries - k); ++j)
                flips += write(job, piece_at<T>(job, col + k + j, row), of_entry + j, rows, projection.stream);
        }
    }
    finish_streaming(projection.stream);
    return flips;
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
