// How a kernel wants its weight: sizes of the packed arrays, and the one-time packing.
#include <string.h>

#include "kernel.hpp"

namespace nmflow {
namespace {

bool takes_bf16_pairs(const nmflow_layout &l) { return l.algorithm != NMFLOW_TB && l.dtype == NMFLOW_BF16; }

// The most whole blocks within `reach` columns.
int64_t blocks_within(int64_t reach, int64_t m) { return reach / m * m; }

int complete_tb(nmflow_layout &l, const Kernels &k) {
    if (l.chunk < 1 || l.chunk % l.m) return NMFLOW_BAD_ARGUMENT;
    l.lanes = k.lanes;
    if (l.chunk > 65536) return NMFLOW_UNSUPPORTED;
    l.index_bytes = l.chunk <= 256 ? 1 : 2;
    l.values_size = l.rows * l.kept * 4;
    l.index_size = l.rows * l.kept * l.index_bytes;
    return NMFLOW_OK;
}

int complete_rv(nmflow_layout &l, const Kernels &k) {
    const bool wide = l.algorithm == NMFLOW_RV_WIDE;
    l.lanes = k.lanes;
    if (l.dtype == NMFLOW_BF16) {
        if (!k.rv_bf16 || !nmflow_has_bf16() || l.m > k.rv_bf16_reach) return NMFLOW_UNSUPPORTED;
        // One register reaches half; it is enough where it holds a pair of slots.
        const int64_t half = k.rv_bf16_reach / 2;
        const bool enough = l.m <= half && blocks_within(half, l.m) / l.m * l.n >= 2;
        l.chunk = static_cast<int32_t>(blocks_within(enough ? half : k.rv_bf16_reach, l.m));
        const int64_t whole = l.cols / l.chunk, rest = l.cols % l.chunk;
        const int64_t pairs = whole * div_up(kept_in(l.chunk, l.n, l.m), 2) + div_up(kept_in(rest, l.n, l.m), 2);
        const int64_t entries = div_up(l.rows, l.lanes) * pairs * 2 * l.lanes;
        l.index_bytes = wide ? 2 : 1;
        l.values_size = entries * 2;
        l.index_size = entries * l.index_bytes;
        return NMFLOW_OK;
    }
    if (!k.rv || l.m > (wide ? k.rv_wide_reach : 65536)) return NMFLOW_UNSUPPORTED;
    int64_t reach = k.lanes;  // the fewest registers that hold a block
    while (reach < l.m && reach < k.rv_reach) reach *= 2;
    l.chunk = static_cast<int32_t>(l.m <= reach ? blocks_within(reach, l.m) : l.m);
    l.index_bytes = wide ? 4 : l.chunk <= 256 ? 1 : 2;
    const int64_t entries = div_up(l.rows, l.lanes) * l.lanes * l.kept;
    l.values_size = entries * 4;
    l.index_size = entries * l.index_bytes;
    return NMFLOW_OK;
}

struct Packing {
    const nmflow_layout *layout;
    const void *values, *offsets;
    void *packed_values, *packed_index;
};

uint32_t value_bits(const Packing &p, int64_t at) {  // of a float
    uint32_t bits;
    if (p.layout->dtype == NMFLOW_F32)
        memcpy(&bits, static_cast<const float *>(p.values) + at, 4);
    else
        bits = static_cast<uint32_t>(static_cast<const uint16_t *>(p.values)[at]) << 16;
    return bits;
}

void put(const Packing &p, int64_t to, uint32_t bits, int64_t index) {
    if (takes_bf16_pairs(*p.layout))
        static_cast<uint16_t *>(p.packed_values)[to] = static_cast<uint16_t>(bits >> 16);
    else
        memcpy(static_cast<float *>(p.packed_values) + to, &bits, 4);
    if (p.layout->index_bytes == 1)
        static_cast<uint8_t *>(p.packed_index)[to] = static_cast<uint8_t>(index);
    else if (p.layout->index_bytes == 2)
        static_cast<uint16_t *>(p.packed_index)[to] = static_cast<uint16_t>(index);
    else
        static_cast<uint32_t *>(p.packed_index)[to] = static_cast<uint32_t>(index);
}

// Where slot s of a chunk lies for a row; `before`: slots of the row in earlier chunks, `here`: slots of this one.
int64_t place(const nmflow_layout &l, int64_t row, int64_t before, int64_t here, int64_t s) {
    if (l.algorithm == NMFLOW_TB) return before * l.rows + row * here + s;
    const int64_t lane = row % l.lanes, vector = row / l.lanes;
    if (!takes_bf16_pairs(l)) return (vector * l.kept + before + s) * l.lanes + lane;
    const int64_t per_vector = l.index_size / l.index_bytes / div_up(l.rows, l.lanes);
    return vector * per_vector + (before + s / 2 * 2) * l.lanes + 2 * lane + s % 2;
}

void pack_rows(int64_t begin, int64_t end, void *context) {
    const Packing &p = *static_cast<const Packing *>(context);
    const nmflow_layout &l = *p.layout;
    const bool pairs = takes_bf16_pairs(l);
    for (int64_t row = begin; row < end; ++row) {
        int64_t from = row * l.kept, before = 0;
        for (int64_t k = 0; k < l.cols; k += l.chunk) {
            const int64_t stored = kept_in(least(l.chunk, l.cols - k), l.n, l.m);
            const int64_t here = pairs ? div_up(stored, 2) * 2 : stored;
            for (int64_t s = 0; s < here; ++s) {
                uint32_t bits = 0;
                int64_t index = 0;
                if (s < stored && row < l.rows) {
                    const int64_t offset = l.m <= 256 ? static_cast<const uint8_t *>(p.offsets)[from + s]
                                                      : static_cast<const uint16_t *>(p.offsets)[from + s];
                    bits = value_bits(p, from + s);
                    index = s / l.n * l.m + offset;
                }
                put(p, place(l, row, before, here, s), bits, index);
            }
            from += stored;
            before += here;
        }
    }
}

}  // namespace
}  // namespace nmflow

using namespace nmflow;

extern "C" int32_t nmflow_layout_init(nmflow_layout *layout) {
    nmflow_layout l = *layout;
    const int64_t most = int64_t{1} << 31;
    if (l.rows < 0 || l.cols < 0 || l.rows >= most || l.cols >= most) return NMFLOW_BAD_ARGUMENT;
    if (l.n < 1 || l.n > l.m || l.m > 65536) return NMFLOW_BAD_ARGUMENT;
    if (l.dtype != NMFLOW_F32 && l.dtype != NMFLOW_BF16) return NMFLOW_BAD_ARGUMENT;
    if (l.isa == NMFLOW_ISA_AUTO) l.isa = nmflow_best_isa();
    const Kernels *kernels = kernels_of(l.isa);
    if (!kernels) return NMFLOW_UNSUPPORTED;
    l.kept = kept_in(l.cols, l.n, l.m);
    const int status = l.algorithm == NMFLOW_TB   ? complete_tb(l, *kernels)
                       : l.algorithm == NMFLOW_RV || l.algorithm == NMFLOW_RV_WIDE ? complete_rv(l, *kernels)
                                                                                   : NMFLOW_BAD_ARGUMENT;
    if (status == NMFLOW_OK) *layout = l;
    return status;
}

extern "C" int32_t nmflow_pack(const nmflow_layout *layout, const void *values, const void *offsets,
                               void *packed_values, void *packed_index, nmflow_parallel_for parallel) {
    Packing packing = {layout, values, offsets, packed_values, packed_index};
    int64_t rows = layout->rows;
    if (layout->algorithm != NMFLOW_TB) rows = div_up(rows, layout->lanes) * layout->lanes;  // the filling too
    if (rows == 0) return NMFLOW_OK;
    if (parallel) return parallel(0, rows, 64, pack_rows, &packing) ? NMFLOW_NO_MEMORY : NMFLOW_OK;
    pack_rows(0, rows, &packing);
    return NMFLOW_OK;
}
