// The pass over the pieces: select the survivors of one, then write it. Included last, once an instruction set.
#pragma once

#include "project_kernel.hpp"
#include "project_select.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

// Where the piece `unit` begins in a tensor with this stride.
static inline int64_t start_of(const Projection &projection, int64_t unit, int64_t stride) {
    return unit / projection.pieces_per_row * stride + unit % projection.pieces_per_row * projection.piece;
}

template <class T>
static int64_t project_pieces(const Projection &projection, int64_t begin, int64_t end) {
    const nmflow_projection &job = projection.job;
    alignas(64) uint64_t bits[piece_words];
    int64_t flips = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
        const auto start = [&](int64_t stride) { return start_of(projection, unit, stride); };
        const int64_t col = unit % projection.pieces_per_row * projection.piece;
        const int64_t entries = projection.piece < job.cols - col ? projection.piece : job.cols - col;
        const Piece<T> piece = {
            (const T *)job.w + start(job.w_stride),
            job.effective ? (T *)job.effective + start(job.effective_stride) : nullptr,
            job.mask ? job.mask + start(job.mask_stride) : nullptr,
            job.cast ? (bf16 *)job.cast + start(job.cast_stride) : nullptr,
        };
        select(piece.w, job.n, job.m, entries, bits);
        const int64_t written = write_words(piece, bits, entries, job.decay, projection.stream, flips);
        flips += write_each(piece, bits, written, entries, job.decay);
    }
    finish_streaming(projection.stream);
    return flips;
}

constexpr ProjectKernels kernels = {{project_pieces<f32>, project_pieces<bf16>, project_pieces<f16>}};

}  // namespace NMFLOW_ISA
}  // namespace nmflow
