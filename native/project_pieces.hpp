// The pass over the pieces: select the survivors of one, then write it. Included last, once an instruction set.
#pragma once

#include "project_kernel.hpp"
#include "project_select.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

// From entry `at` of a line on. A line is what lies in memory without a gap: a row, or of columns an entry of all rows.
template <class T>
static inline Piece<T> piece_at(const nmflow_projection &job, int64_t line, int64_t at) {
    return {
        (const T *)job.w + line * job.w_stride + at,
        job.effective ? (T *)job.effective + line * job.effective_stride + at : nullptr,
        job.mask ? job.mask + line * job.mask_stride + at : nullptr,
        job.cast ? (bf16 *)job.cast + line * job.cast_stride + at : nullptr,
    };
}

static inline bool has_lines(const nmflow_projection &job) { return job.mask || job.effective || job.cast; }

template <class T>
static int64_t write(const nmflow_projection &job, const Piece<T> &piece, const uint64_t *bits, int64_t entries,
                     bool stream) {
    int64_t flips = 0;
    const int64_t written = write_words(piece, bits, entries, job.decay, stream, flips);
    return flips + write_each(piece, bits, written, entries, job.decay);
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "byte i of a word holds its bits from 8 * i on");

// The entries from `col` on of a row's packed mask. The bits of the first byte below `col` stay as they are.
static inline void put_bits(uint8_t *row, int64_t col, const uint64_t *bits, int64_t entries) {
    uint8_t *to = row + col / 8;
    const int shift = col % 8;
    const int64_t bytes = (shift + entries + 7) / 8;
    if (shift == 0) {
        memcpy(to, bits, (size_t)bytes);
        return;
    }
    *to = (uint8_t)((*to & ((1 << shift) - 1)) | bits[0] << shift);
    for (int64_t b = 1; b < bytes; ++b) {
        const int64_t from = 8 * b - shift;
        const uint64_t here = bits[from / 64] >> (from % 64);
        to[b] = (uint8_t)(from % 64 > 56 ? here | bits[from / 64 + 1] << (64 - from % 64) : here);
    }
}

template <class T>
static int64_t project_rows(const Projection &projection, int64_t begin, int64_t end) {
    const nmflow_projection &job = projection.job;
    alignas(64) uint64_t bits[piece_words];
    int64_t flips = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit / projection.pieces_per_row, col = unit % projection.pieces_per_row * projection.piece;
        const int64_t entries = projection.piece < job.cols - col ? projection.piece : job.cols - col;
        const Piece<T> piece = piece_at<T>(job, row, col);
        select(piece.w, job.n, job.m, entries, bits);
        if (job.bits) put_bits(job.bits + row * job.bits_stride, col, bits, entries);
        if (has_lines(job)) flips += write(job, piece, bits, entries, projection.stream);
    }
    finish_streaming(projection.stream);
    return flips;
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow

#include "project_groups.hpp"
#include "project_columns.hpp"
#include "project_taps.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

constexpr ProjectKernels kernels = {{project_rows<f32>, project_rows<bf16>, project_rows<f16>},
                                    {project_groups<f32>, project_groups<bf16>, project_groups<f16>},
                                    {project_columns<f32>, project_columns<bf16>, project_columns<f16>},
                                    {project_taps<f32>, project_taps<bf16>, project_taps<f16>}};

}  // namespace NMFLOW_ISA
}  // namespace nmflow
