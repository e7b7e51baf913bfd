// The entries of measure.h: which instruction set, and parts for the threads.
#include <atomic>

#include "kernel.hpp"
#include "measure.h"

namespace nmflow {
namespace {

struct Shared {
    const Ceilings *ceilings;
    const Spin *spin;
    int64_t rounds;
    const float *x;
    int64_t count, parts;
    std::atomic<double> sum;

    void add(double part) {  // no fetch_add on doubles before C++20
        double before = sum.load(std::memory_order_relaxed);
        while (!sum.compare_exchange_weak(before, before + part, std::memory_order_relaxed)) {
        }
    }
};

void spin_parts(int64_t begin, int64_t end, void *context) {
    Shared *shared = static_cast<Shared *>(context);
    // The seed is always 1, but the compiler cannot know: parts come from outside.
    for (int64_t part = begin; part < end; ++part) shared->add(shared->spin->run(shared->rounds, part < 0 ? 2.0f : 1.0f));
}

void read_parts(int64_t begin, int64_t end, void *context) {
    Shared *shared = static_cast<Shared *>(context);
    const int64_t from = shared->count * begin / shared->parts, to = shared->count * end / shared->parts;
    shared->add(shared->ceilings->read(shared->x + from, to - from));
}

int32_t run(Shared &shared, nmflow_parallel_for parallel, nmflow_range_fn fn) {
    if (!parallel) {
        fn(0, shared.parts, &shared);
        return NMFLOW_OK;
    }
    return parallel(0, shared.parts, 1, fn, &shared) == 0 ? NMFLOW_OK : NMFLOW_NO_MEMORY;
}

const Kernels *kernels_for(int32_t isa) { return kernels_of(isa == NMFLOW_ISA_AUTO ? nmflow_best_isa() : isa); }

}  // namespace
}  // namespace nmflow

int32_t nmflow_spin(int32_t isa, int32_t dtype, int64_t rounds, int64_t parts, nmflow_parallel_for parallel,
                    double *flops) {
    using namespace nmflow;
    *flops = 0;
    if (rounds < 0 || parts < 1 || (dtype != NMFLOW_F32 && dtype != NMFLOW_BF16)) return NMFLOW_BAD_ARGUMENT;
    const Kernels *kernels = kernels_for(isa);
    if (!kernels || (dtype == NMFLOW_BF16 && !(kernels->spin_bf16 && nmflow_has_bf16()))) return NMFLOW_UNSUPPORTED;
    const Spin &spin = dtype == NMFLOW_BF16 ? *kernels->spin_bf16 : kernels->ceilings->spin;
    Shared shared = {kernels->ceilings, &spin, rounds, nullptr, 0, parts, {0}};
    const int32_t status = run(shared, parallel, spin_parts);
    *flops = spin.flops_of_round * static_cast<double>(rounds * parts);
    return status;
}

int32_t nmflow_read(int32_t isa, const float *x, int64_t count, int64_t parts, nmflow_parallel_for parallel,
                    double *sum) {
    using namespace nmflow;
    *sum = 0;
    if (count < 0 || parts < 1) return NMFLOW_BAD_ARGUMENT;
    const Kernels *kernels = kernels_for(isa);
    if (!kernels) return NMFLOW_UNSUPPORTED;
    Shared shared = {kernels->ceilings, nullptr, 0, x, count, parts, {0}};
    const int32_t status = run(shared, parallel, read_parts);
    *sum = shared.sum.load(std::memory_order_relaxed);
    return status;
}
