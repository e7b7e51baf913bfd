// How a kernel wants its weight: sizes of the packed arrays, and the one-time packing.
#include <string.h>

#include "kernel.hpp"

namespace nmflow {
namespace {

// The most whole blocks within `reach` columns.
int64_t blocks_within(int64_t reach, int64_t m) { return reach / m * m; }

int complete_tb(nmflow_layout &l, const Kernels &k) {
    if (l.chunk < 1 || l.chunk % l.m) return NMFLOW_BAD_ARGUMENT;
    l.lanes = k.lanes;
    if (l.chunk > 65536) return NMFLOW_UNSUPPORTED;
    l.index_bits = l.chunk <= 256 ? 8 : 16;
    l.values_size = l.rows * l.kept * 4;
    l.index_size = l.rows * l.kept * l.index_bits / 8;
    return NMFLOW_OK;
}

int complete_rv(nmflow_layout &l, const Kernels &k) {
    l.lanes = k.lanes;
    const int64_t vectors = div_up(l.rows, l.lanes);
    if (l.value_bits && l.dtype != NMFLOW_F32) return NMFLOW_UNSUPPORTED;
    if (l.dtype == NMFLOW_BF16) {
        if (!k.rv_bf16 || !nmflow_has_bf16() || l.m > k.rv_bf16_reach) return NMFLOW_UNSUPPORTED;
        // One register reaches half; it is enough where it holds a pair of slots.
        const int64_t half = k.rv_bf16_reach / 2;
        const bool enough = l.m <= half && blocks_within(half, l.m) / l.m * l.n >= 2;
        const int64_t reach = enough ? half : k.rv_bf16_reach;
        l.chunk = static_cast<int32_t>(blocks_within(reach, l.m));
        l.index_bits = bits_below(reach);
        const int64_t whole = l.cols / l.chunk, rest = l.cols % l.chunk;
        const int64_t pairs = whole * div_up(kept_in(l.chunk, l.n, l.m), 2) + div_up(kept_in(rest, l.n, l.m), 2);
        l.values_size = vectors * pairs * l.lanes * 2 * 2;
        l.index_size = vectors * div_up(pairs, 16 / l.index_bits) * l.lanes * 2 * 2;
        return NMFLOW_OK;
    }
    if (!k.rv) return NMFLOW_UNSUPPORTED;
    // A vector of x, or the fewest that hold a block; fewer entries than a vector has where the caller asks for it.
    int64_t reach = l.chunk && l.m <= k.lanes ? 4 : k.lanes;
    while (reach < l.m && reach < k.rv_reach) reach *= 2;
    const bool picked = l.m <= reach;
    l.chunk = static_cast<int32_t>(picked ? blocks_within(reach, l.m) : l.m);
    l.index_bits = picked ? bits_below(reach) : l.chunk <= 256 ? 8 : 16;
    if (l.value_bits) {
        if (!k.rv_short || !has_vbmi() || !picked || reach >= k.lanes) return NMFLOW_UNSUPPORTED;
        l.index_bits += exponent_bits;
    }
    l.values_size = vectors * l.kept * l.lanes * (l.value_bits ? 3 : 4);
    if (l.value_bits) l.values_size += short_before + short_after;
    l.index_size = vectors * div_up(l.kept, 32 / l.index_bits) * l.lanes * 4;
    return NMFLOW_OK;
}

struct Packing {
    const nmflow_layout *layout;
    const void *values, *offsets;
    void *packed_values, *packed_index;
    uint8_t code_of[256];  // values of 24 bits: the place of an exponent in their table
};

uint32_t float_bits(const Packing &p, int64_t at) {
    uint32_t bits;
    if (p.layout->dtype == NMFLOW_F32)
        memcpy(&bits, static_cast<const float *>(p.values) + at, 4);
    else
        bits = static_cast<uint32_t>(static_cast<const uint16_t *>(p.values)[at]) << 16;
    return bits;
}

struct Slot {
    int64_t row;
    int64_t before, here;  // slots of the row in earlier chunks, and in this one
    int64_t s;             // of those
};

void put_tb(const Packing &p, Slot slot, uint32_t bits, int64_t index) {
    const int64_t to = slot.before * p.layout->rows + slot.row * slot.here + slot.s;
    memcpy(static_cast<float *>(p.packed_values) + to, &bits, 4);
    if (p.layout->index_bits == 8)
        static_cast<uint8_t *>(p.packed_index)[to] = static_cast<uint8_t>(index);
    else
        static_cast<uint16_t *>(p.packed_index)[to] = static_cast<uint16_t>(index);
}

// Index number `step` of a lane goes into its word, after those that are there.
template <class Word>
void put_index(const Packing &p, int64_t vector, int64_t step, int64_t lane, int64_t width, int64_t index) {
    const nmflow_layout &l = *p.layout;
    const int64_t per_word = 8 * static_cast<int64_t>(sizeof(Word)) / l.index_bits;
    const int64_t of_vector = l.index_size / static_cast<int64_t>(sizeof(Word)) / div_up(l.rows, l.lanes);
    Word &word = static_cast<Word *>(p.packed_index)[vector * of_vector + step / per_word * width + lane];
    const int64_t at = step % per_word;
    word = static_cast<Word>((at ? word : 0) | index << (at * l.index_bits));
}

void put_rv(const Packing &p, Slot slot, uint32_t bits, int64_t index) {
    const nmflow_layout &l = *p.layout;
    const int64_t vector = slot.row / l.lanes, lane = slot.row % l.lanes, step = slot.before + slot.s;
    memcpy(static_cast<float *>(p.packed_values) + (vector * l.kept + step) * l.lanes + lane, &bits, 4);
    put_index<uint32_t>(p, vector, step, lane, l.lanes, index);
}

// Sign and mantissa in three bytes, the exponent's code above the index.
void put_short(const Packing &p, Slot slot, uint32_t bits, int64_t index) {
    const nmflow_layout &l = *p.layout;
    const int64_t vector = slot.row / l.lanes, lane = slot.row % l.lanes, step = slot.before + slot.s;
    uint8_t *to = static_cast<uint8_t *>(p.packed_values) + short_before + 3 * ((vector * l.kept + step) * l.lanes + lane);
    to[0] = static_cast<uint8_t>(bits);
    to[1] = static_cast<uint8_t>(bits >> 8);
    to[2] = static_cast<uint8_t>((bits >> 16 & 0x7F) | bits >> 31 << 7);
    const int64_t code = p.code_of[bits >> 23 & 0xFF];
    put_index<uint32_t>(p, vector, step, lane, l.lanes, index | code << (l.index_bits - exponent_bits));
}

// The table of exponents, as the upper bits of floats, and where each lies in it; whether they are few enough.
bool find_exponents(Packing &p, uint32_t *table) {
    const int64_t count = p.layout->rows * p.layout->kept;
    bool there[256] = {};
    for (int64_t i = 0; i < count; ++i) there[float_bits(p, i) >> 23 & 0xFF] = true;
    int found = 0;
    for (uint32_t exponent = 0; exponent < 256; ++exponent) {
        if (!there[exponent]) continue;
        if (found == exponents) return false;
        p.code_of[exponent] = static_cast<uint8_t>(found);
        table[found++] = exponent << 23;
    }
    return true;
}

void put_pairs(const Packing &p, Slot slot, uint32_t bits, int64_t index) {
    const nmflow_layout &l = *p.layout;
    const int64_t vector = slot.row / l.lanes, lane = slot.row % l.lanes * 2 + slot.s % 2, width = 2 * l.lanes;
    const int64_t pair = (slot.before + slot.s) / 2, of_vector = l.values_size / 2 / div_up(l.rows, l.lanes);
    static_cast<uint16_t *>(p.packed_values)[vector * of_vector + pair * width + lane] =
        static_cast<uint16_t>(bits >> 16);
    put_index<uint16_t>(p, vector, pair, lane, width, index);
}

void pack_rows(int64_t begin, int64_t end, void *context) {
    const Packing &p = *static_cast<const Packing *>(context);
    const nmflow_layout &l = *p.layout;
    const bool pairs = l.algorithm == NMFLOW_RV && l.dtype == NMFLOW_BF16;
    const auto put = l.algorithm == NMFLOW_TB ? put_tb : pairs ? put_pairs : l.value_bits ? put_short : put_rv;
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
                    bits = float_bits(p, from + s);
                    index = s / l.n * l.m + offset;
                }
                put(p, {row, before, here, s}, bits, index);
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
    if (l.value_bits && (l.value_bits != 24 || l.algorithm != NMFLOW_RV)) return NMFLOW_BAD_ARGUMENT;
    if (l.isa == NMFLOW_ISA_AUTO) l.isa = nmflow_best_isa();
    const Kernels *kernels = kernels_of(l.isa);
    if (!kernels) return NMFLOW_UNSUPPORTED;
    l.kept = kept_in(l.cols, l.n, l.m);
    const int status = l.algorithm == NMFLOW_TB   ? complete_tb(l, *kernels)
                       : l.algorithm == NMFLOW_RV ? complete_rv(l, *kernels)
                                                  : NMFLOW_BAD_ARGUMENT;
    if (status == NMFLOW_OK) *layout = l;
    return status;
}

extern "C" int32_t nmflow_pack(const nmflow_layout *layout, const void *values, const void *offsets,
                               void *packed_values, void *packed_index, nmflow_parallel_for parallel) {
    Packing packing = {layout, values, offsets, packed_values, packed_index, {}};
    int64_t rows = layout->rows;
    if (layout->value_bits) {
        uint32_t table[exponents] = {};
        if (!find_exponents(packing, table)) return NMFLOW_UNSUPPORTED;
        memcpy(packed_values, table, sizeof table);
    }
    if (layout->algorithm != NMFLOW_TB) rows = div_up(rows, layout->lanes) * layout->lanes;  // the filling too
    if (rows == 0) return NMFLOW_OK;
    if (parallel) return parallel(0, rows, 64, pack_rows, &packing) ? NMFLOW_NO_MEMORY : NMFLOW_OK;
    pack_rows(0, rows, &packing);
    return NMFLOW_OK;
}
