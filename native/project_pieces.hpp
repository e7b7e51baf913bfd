// The pass over the pieces: select the survivors of one, then write it. Included last, once an instruction set.
#pragma once

#include "project_kernel.hpp"
#include "project_select.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

template <class T>
static int64_t project_pieces(const Projection &projection, int64_t begin, int64_t end) {
    const nmflow_projection &job = projection.job;
    alignas(64) uint64_t bits[piece_words];
    int64_t flips = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit / projection.pieces_per_row;
        const int64_t col = unit % projection.pieces_per_row * projection.piece;
        const int64_t entries = projection.piece < job.cols - col ? projection.piece : job.cols - col;
        const Piece<T> piece = {
            (const T *)job.w + row * job.w_stride + col,
            job.effective ? (T *)job.effective + row * job.effective_stride + col : nullptr,
            job.mask ? job.mask + row * job.mask_stride + col : nullptr,
            job.cast ? (bf16 *)job.cast + row * job.cast_stride + col : nullptr,
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
