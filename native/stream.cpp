// The entry of stream.h: which instruction set, and rows for the threads.
#include "stream.h"

#include "kernel.hpp"

namespace nmflow {
namespace {

struct Call {
    StreamJob job;
    Stream stream;
};

void run_part(int64_t begin, int64_t end, void *context) {
    const Call &call = *static_cast<const Call *>(context);
    call.stream(call.job, begin, end);
}

}  // namespace
}  // namespace nmflow

using namespace nmflow;

extern "C" int32_t nmflow_stream(const nmflow_dense *dense, const void *x, int64_t x_stride, const void *bias, void *y,
                                 int64_t y_stride, int64_t tokens, nmflow_parallel_for parallel) {
    if (tokens < 0 || dense->rows < 0 || dense->cols < 0) return NMFLOW_BAD_ARGUMENT;
    if (dense->dtype != NMFLOW_F32 && dense->dtype != NMFLOW_BF16) return NMFLOW_BAD_ARGUMENT;
    if (tokens == 0 || dense->rows == 0) return NMFLOW_OK;
    const Kernels *kernels = kernels_of(dense->isa == NMFLOW_ISA_AUTO ? nmflow_best_isa() : dense->isa);
    if (!kernels) return NMFLOW_UNSUPPORTED;
    Call call = {{dense, x, bias, y, x_stride, y_stride, tokens}, kernels->stream};
    if (parallel && dense->rows > 1 && dense->rows * dense->cols * tokens >= worth_sharing)
        return parallel(0, dense->rows, 1, run_part, &call) ? NMFLOW_NO_MEMORY : NMFLOW_OK;
    run_part(0, dense->rows, &call);
    return NMFLOW_OK;
}
