// The product itself: which kernel, how many parts, on whose threads.
#include "kernel.hpp"

namespace nmflow {
namespace {

struct Call {
    Job job;
    Kernel kernel;
};

void run_part(int64_t begin, int64_t end, void *context) {
    const Call &call = *static_cast<const Call *>(context);
    call.kernel(call.job, begin, end);
}

// RV knows of rows only: tokens [begin, end) are a job of their own, with all rows.
void run_tokens(int64_t begin, int64_t end, void *context) {
    const Call &call = *static_cast<const Call *>(context);
    const nmflow_layout &l = call.job.weight->layout;
    const int64_t bytes = l.dtype == NMFLOW_F32 ? 4 : 2;
    Job job = call.job;
    job.x = static_cast<const char *>(job.x) + begin * job.x_stride * bytes;
    job.y = static_cast<char *>(job.y) + begin * job.y_stride * bytes;
    job.tokens = end - begin;
    call.kernel(job, 0, div_up(l.rows, l.lanes));
}

}  // namespace
}  // namespace nmflow

using namespace nmflow;

extern "C" int32_t nmflow_linear(const nmflow_weight *weight, const void *x, int64_t x_stride, const void *bias,
                                 void *y, int64_t y_stride, int64_t tokens, nmflow_parallel_for parallel) {
    const nmflow_layout &l = weight->layout;
    if (tokens == 0 || l.rows == 0) return NMFLOW_OK;
    if (tokens < 0 || weight->tile_tokens < 1 || weight->tile_rows < 1) return NMFLOW_BAD_ARGUMENT;
    const Kernels *kernels = kernels_of(l.isa);
    if (!kernels) return NMFLOW_UNSUPPORTED;
    const bool rv = l.algorithm != NMFLOW_TB;
    const Kernel kernel = !rv                     ? kernels->tb
                          : l.dtype == NMFLOW_BF16 ? kernels->rv_bf16
                          : l.value_bits           ? kernels->rv_short
                                                   : kernels->rv;
    if (!kernel) return NMFLOW_UNSUPPORTED;

    bool out_of_memory = false;
    Call call = {{weight, x, bias, y, x_stride, y_stride, tokens, &out_of_memory}, kernel};
    const bool by_rows = weight->split == NMFLOW_SPLIT_ROWS;
    const int64_t units = rv && !by_rows ? tokens : div_up(by_rows ? l.rows : tokens, l.lanes);
    const nmflow_range_fn part = rv && !by_rows ? run_tokens : run_part;
    if (parallel && units > 1 && l.rows * l.kept * tokens >= worth_sharing) {
        if (parallel(0, units, 1, part, &call)) return NMFLOW_NO_MEMORY;
    } else {
        part(0, units, &call);
    }
    return out_of_memory ? NMFLOW_NO_MEMORY : NMFLOW_OK;
}
