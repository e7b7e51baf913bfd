// Does the library compute what it says, on a machine without Python? Every instruction set that this one has: products
// against double loops, projections against a count of what is larger. Prints what it compared; exits 1 at a mismatch.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "nmflow.h"
#include "project.h"
#include "stream.h"

namespace {

uint32_t state = 1;
uint32_t random_bits() {  // a linear congruence; its upper bits are random enough
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}
float random_float() { return static_cast<float>(random_bits()) / (1 << 23) - 1.0f; }

float from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
uint16_t to_bf16(float value) {  // cut off: any bfloat16 will do
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(bits >> 16);
}

// Numbers of either dtype, and what they are worth.
struct Numbers {
    bool half;
    std::vector<float> floats;
    std::vector<uint16_t> halves;

    Numbers(size_t size, int dtype) : half(dtype == NMFLOW_BF16), floats(size), halves(half ? size : 0) {
        for (size_t i = 0; i < size; ++i) {
            floats[i] = random_float();
            if (half) floats[i] = from_bf16(halves[i] = to_bf16(floats[i]));
        }
    }
    void *data() { return half ? static_cast<void *>(halves.data()) : floats.data(); }
    double at(size_t i) const { return half ? from_bf16(halves[i]) : floats[i]; }
    void poison() {
        for (float &f : floats) f = NAN;
        for (uint16_t &h : halves) h = 0x7FC0;
    }
};

struct Case {
    int64_t rows, cols, n, m, tokens;
    int32_t dtype, isa, algorithm, chunk, tile, value_bits = 0;
};

int fails = 0, products = 0, projections = 0;

void fail(const char *what, const Case &c) {
    printf("MISMATCH in the %s of [%d, %d] at %d:%d, %d tokens, ", what, static_cast<int>(c.rows),
           static_cast<int>(c.cols), static_cast<int>(c.n), static_cast<int>(c.m), static_cast<int>(c.tokens));
    printf("dtype %d, isa %d, algorithm %d, chunk %d, tile %d, %d bits\n", c.dtype, c.isa, c.algorithm, c.chunk, c.tile,
           c.value_bits);
    ++fails;
}

// `size`: the sum of the magnitudes of what was added up. False for NaN.
bool near(double found, double expected, double size, int32_t dtype) {
    return fabs(found - expected) <= size * 1e-6 + (dtype == NMFLOW_BF16 ? expected / 256 : 0);
}

void *aligned(int64_t bytes) { return aligned_alloc(64, static_cast<size_t>(bytes + 64) / 64 * 64); }

void check_product(const Case &c) {
    nmflow_layout layout = {};
    layout.rows = c.rows, layout.cols = c.cols, layout.n = c.n, layout.m = c.m;
    layout.dtype = c.dtype, layout.isa = c.isa, layout.algorithm = c.algorithm, layout.chunk = c.chunk;
    layout.value_bits = c.value_bits;
    const int status = nmflow_layout_init(&layout);
    if (status == NMFLOW_UNSUPPORTED) return;
    if (status != NMFLOW_OK) return fail("layout", c);
    Numbers values(c.rows * layout.kept, c.dtype), x(c.tokens * c.cols, c.dtype), bias(c.rows, c.dtype);
    Numbers y(c.tokens * c.rows, c.dtype);
    y.poison();
    std::vector<uint8_t> narrow(c.rows * layout.kept);
    std::vector<uint16_t> wide(c.rows * layout.kept);
    for (int64_t i = 0; i < c.rows * layout.kept; ++i) {  // any offsets do, the same one twice as well
        const int64_t block = i % layout.kept / c.n * c.m, length = c.cols - block < c.m ? c.cols - block : c.m;
        wide[i] = static_cast<uint16_t>(random_bits() % length);
        narrow[i] = static_cast<uint8_t>(wide[i]);
    }
    void *packed = aligned(layout.values_size), *index = aligned(layout.index_size);
    const void *offsets = c.m <= 256 ? static_cast<const void *>(narrow.data()) : wide.data();
    const int32_t tokens = c.algorithm == NMFLOW_RV ? 8 : c.tile;
    const nmflow_weight weight = {layout, packed, index, NMFLOW_RELU, NMFLOW_SPLIT_ROWS, tokens, c.tile};
    if (nmflow_pack(&layout, values.data(), offsets, packed, index, nullptr) != NMFLOW_OK ||
        nmflow_linear(&weight, x.data(), c.cols, bias.data(), y.data(), c.rows, c.tokens, nullptr) != NMFLOW_OK)
        fail("call", c);
    bool right = true;
    for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t r = 0; r < c.rows; ++r) {
            double sum = bias.at(r), size = fabs(sum);
            for (int64_t s = 0; s < layout.kept; ++s) {
                const double term = values.at(r * layout.kept + s) *
                                    x.at(t * c.cols + s / c.n * c.m + wide[r * layout.kept + s]);
                sum += term;
                size += fabs(term);
            }
            right = right && near(y.at(t * c.rows + r), sum > 0 ? sum : 0, size, c.dtype);
        }
    if (!right) fail("product", c);
    ++products;
    free(packed);
    free(index);
}

// The dense product of few tokens: the numbers of the case that speak of patterns are not used.
void check_stream(const Case &c) {
    Numbers w(c.rows * c.cols, c.dtype), x(c.tokens * c.cols, c.dtype), bias(c.rows, c.dtype);
    Numbers y(c.tokens * c.rows, c.dtype);
    y.poison();
    const nmflow_dense dense = {w.data(), c.rows, c.cols, c.cols, c.dtype, c.isa, NMFLOW_RELU};
    if (nmflow_stream(&dense, x.data(), c.cols, bias.data(), y.data(), c.rows, c.tokens, nullptr) != NMFLOW_OK)
        return fail("call of a dense product", c);
    bool right = true;
    for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t r = 0; r < c.rows; ++r) {
            double sum = bias.at(r), size = fabs(sum);
            for (int64_t k = 0; k < c.cols; ++k) {
                const double term = w.at(r * c.cols + k) * x.at(t * c.cols + k);
                sum += term;
                size += fabs(term);
            }
            right = right && near(y.at(t * c.rows + r), sum > 0 ? sum : 0, size, c.dtype);
        }
    if (!right) fail("dense product", c);
    ++products;
}

// Float32 rows, columns or rows of a convolution, each for itself or several with the same columns; with ties, zeros of
// both signs and a NaN among the weights.
void check_projection(const Case &c, bool columns, int64_t taps = 1, int64_t shared = 1) {
    std::vector<float> w(c.rows * c.cols), effective(w.size(), NAN);
    for (float &f : w) {
        f = static_cast<float>(random_bits() % 9) - 4.0f;
        if (random_bits() % 3 == 0) f *= random_float();
    }
    w[w.size() / 2] = NAN;
    const int64_t bytes = (c.cols + 7) / 8;
    std::vector<uint8_t> mask(w.size(), 1), bits(c.rows * bytes, 0xFF);
    nmflow_projection job = {};
    job.rows = c.rows, job.cols = c.cols, job.n = c.n, job.m = c.m, job.shared = shared;
    job.dtype = NMFLOW_F32, job.isa = c.isa, job.decay = 0.5f, job.columns = columns, job.taps = static_cast<int32_t>(taps);
    job.w = w.data(), job.mask = mask.data(), job.effective = effective.data(), job.bits = bits.data();
    job.w_stride = job.mask_stride = job.effective_stride = columns ? c.rows : c.cols;
    job.bits_stride = bytes;
    int64_t flips = 0, pruned = 0;
    if (nmflow_project(&job, nullptr, &flips) != NMFLOW_OK) return fail("projection's call", c);
    const int64_t channels = c.cols / taps;
    const auto at = [&](int64_t r, int64_t k) {
        return columns ? k * c.rows + r : r * c.cols + k % channels * taps + k / channels;
    };
    bool right = true;
    std::vector<float> sizes(c.cols);  // of the rows that choose together
    for (int64_t r = 0; r < c.rows; ++r) {
        for (int64_t k = 0; r % shared == 0 && k < c.cols; ++k) {
            sizes[k] = 0;
            for (int64_t row = r; row < r + shared && row < c.rows; ++row) sizes[k] += fabsf(w[at(row, k)]);
            if (isnan(sizes[k])) sizes[k] = INFINITY;
        }
        for (int64_t k = 0; k < c.cols; ++k) {
            const int64_t i = at(r, k), first = k / c.m * c.m, last = first + c.m < c.cols ? first + c.m : c.cols;
            int64_t before = 0;  // entries of the block that are kept rather than this one
            for (int64_t other = first; other < last; ++other) {
                before += sizes[other] > sizes[k] || (sizes[other] == sizes[k] && other < k);
            }
            const bool keep = before < c.n;
            const float expected = keep ? w[i] : 0.5f * w[i];
            pruned += !keep;
            right = right && mask[i] == keep && (bits[r * bytes + k / 8] >> (k % 8) & 1) == keep;
            right = right && (effective[i] == expected || (isnan(expected) && isnan(effective[i])));
        }
    }
    if (!right || flips != pruned) fail(columns ? "projection of columns" : taps > 1 ? "projection of taps" : "projection", c);
    ++projections;
}

}  // namespace

int main() {
    const char *names[] = {"portable", "avx2", "avx512"};
    const int64_t patterns[][2] = {{2, 4}, {1, 4}, {1, 8}, {3, 5}, {4, 16}, {1, 32}, {16, 128}, {15, 16}, {2, 300}};
    for (int32_t isa = 0; isa <= nmflow_best_isa(); ++isa) {
        products = projections = 0;
        for (const auto &pattern : patterns) {
            const int64_t n = pattern[0], m = pattern[1];
            for (const int64_t cols : {m < 64 ? 4 * m : 2 * m, 2 * m + m / 2 + 1}) {
                for (const int64_t tokens : {1, 5, 35})
                    for (const int32_t dtype : {NMFLOW_F32, NMFLOW_BF16}) {
                        const int32_t m32 = static_cast<int32_t>(m), all = static_cast<int32_t>((cols + m - 1) / m * m);
                        check_product({37, cols, n, m, tokens, dtype, isa, NMFLOW_TB, m32, 32});
                        check_product({37, cols, n, m, tokens, dtype, isa, NMFLOW_TB, all, 32});
                        check_product({37, cols, n, m, tokens, dtype, isa, NMFLOW_TB, all, 1});  // sums in registers
                        for (const int32_t chunk : {0, m32})  // indices of a vector of x, and shorter ones
                            for (const int32_t tile : {1, 4})
                                check_product({37, cols, n, m, tokens, dtype, isa, NMFLOW_RV, chunk, tile});
                        check_product({37, cols, n, m, tokens, dtype, isa, NMFLOW_RV, m32, 1, 24});
                    }
                for (const int32_t dtype : {NMFLOW_F32, NMFLOW_BF16})
                    check_stream({37, cols, n, m, 7, dtype, isa, 0, 0, 0});
                check_projection({70, cols, n, m, 0, 0, isa, 0, 0, 0}, false);
                check_projection({70, cols, n, m, 0, 0, isa, 0, 0, 0}, true);
                check_projection({7, 9 * cols, n, m, 0, 0, isa, 0, 0, 0}, false, 9);
                check_projection({7, 49 * cols, n, m, 0, 0, isa, 0, 0, 0}, false, 49);
                check_projection({70, cols, n, m, 0, 0, isa, 0, 0, 0}, false, 1, 12);
                check_projection({70, cols, n, m, 0, 0, isa, 0, 0, 0}, true, 1, 16);
                check_projection({7, 9 * cols, n, m, 0, 0, isa, 0, 0, 0}, false, 9, 3);
            }
        }
        printf("%s: %d products, %d projections\n", names[isa], products, projections);
    }
    printf(fails ? "%d mismatches\n" : "all right\n", fails);
    return fails ? 1 : 0;
}
