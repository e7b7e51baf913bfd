// The pass over the weight of a convolution as it lies, [rows][channels][taps], while blocks run along the channels of
// one tap and then along those of the next.
//
//   keys of a row, or of the sums of several that keep the same columns
//   transposed                        [taps][channels]                   scratch memory, in L1 or L2
//   select, as on any row             bits [taps][channels]
//   bits, transposed                  bits [channels][taps]
//   write                             the row as it lies in memory, in one line
//
// Included by project_pieces.hpp, once an instruction set.
#pragma once

#include "project_columns.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

// Bit c * taps + t of `to` becomes bit t * channels + c of `from`, by way of a byte for each: survivors are few, and a
// byte is written without a look at its neighbours.
static inline void transpose_marks(const uint64_t *from, int64_t taps, int64_t channels, uint8_t *bytes, uint64_t *to) {
    const int64_t entries = taps * channels, words = div_up(entries, 64);
    memset(bytes, 0, (size_t)words * 64);
    int64_t start = 0;  // of the bits of `tap`
    uint8_t *tap = bytes;
    for (int64_t word = 0; word < words; ++word)
        for (uint64_t left = from[word]; left; left &= left - 1) {
            const int64_t k = word * 64 + __builtin_ctzll(left);
            for (; k - start >= channels; ++tap) start += channels;
            tap[(k - start) * taps] = 1;
        }
    for (int64_t word = 0; word < words; ++word) {
        uint64_t eight[8], bits = 0;
        memcpy(eight, bytes + word * 64, 64);
        for (int i = 0; i < 8; ++i) bits |= eight[i] * 0x0102040810204080 >> 56 << 8 * i;
        to[word] = bits;
    }
    to[words] = 0;
}

template <class T>
static int64_t project_taps(const Projection &projection, int64_t begin, int64_t end) {
    const nmflow_projection &job = projection.job;
    const int64_t taps = job.taps, channels = job.cols / taps, words = job.cols / 64 + 2;
    const int64_t stride = div_up(channels, lanes) * lanes;  // whole vectors are stored, of as many taps as one has lanes
    const int64_t entries = div_up(taps, lanes) * lanes * stride;
    const int64_t summed = job.shared > 1 ? div_up(job.cols, lanes) * lanes : 0;
    f32 *panel = static_cast<f32 *>(scratch((size_t)(entries + summed) * sizeof(f32) + (size_t)words * (8 + 8 + 64)));
    if (!panel) return -1;
    f32 *sums = panel + entries;
    uint64_t *bits = reinterpret_cast<uint64_t *>(sums + summed), *marks = bits + words;
    uint8_t *bytes = reinterpret_cast<uint8_t *>(marks + words);
    int64_t flips = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit * job.shared, rows = least(job.shared, job.rows - first);
        const T *w = (const T *)job.w + first * job.w_stride;
        if (job.shared > 1) {
            add_rows<T>(w, job.w_stride, rows, job.cols, sums);
            transpose_keys(sums, taps, taps, channels, panel, stride);
        } else {
            transpose_keys(w, taps, taps, channels, panel, stride);
        }
        for (int64_t t = 1; stride != channels && t < taps; ++t)
            memmove(panel + t * channels, panel + t * stride, (size_t)channels * sizeof(f32));
        select(panel, job.n, job.m, job.cols, bits);
        for (int64_t row = first; job.bits && row < first + rows; ++row)
            put_bits(job.bits + row * job.bits_stride, 0, bits, job.cols);
        if (!has_lines(job)) continue;
        transpose_marks(bits, taps, channels, bytes, marks);
        for (int64_t row = first; row < first + rows; ++row)
            flips += write(job, piece_at<T>(job, row, 0), marks, job.cols, projection.stream);
    }
    finish_streaming(projection.stream);
    return flips;
}

}  // namespace NMFLOW_ISA
}  // namespace nmflow
