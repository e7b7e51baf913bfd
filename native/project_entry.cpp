// The entry of a projection: what is refused, how it is cut into pieces, and which instruction set does it.
#include <atomic>

#include "project_kernel.hpp"

namespace nmflow {
namespace {

constexpr int64_t grain_entries = 32768;            // a thread is woken for no less
constexpr int64_t large_bytes = (int64_t)24 << 20;  // read and written; more leaves the caches before it is used

struct Shared {
    const Projection *projection;
    ProjectKernel kernel;
    std::atomic<int64_t> flips;
};

void run(int64_t begin, int64_t end, void *context) {
    Shared *shared = static_cast<Shared *>(context);
    shared->flips.fetch_add(shared->kernel(*shared->projection, begin, end), std::memory_order_relaxed);
}

bool has_avx2() {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
    return project_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("popcnt");
#else
    return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
    return project_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("popcnt");
#else
    return false;
#endif
}

const ProjectKernels *kernels_for(int isa) {
    switch (isa) {
        case NMFLOW_ISA_AUTO:
            return has_avx512() ? project_avx512 : has_avx2() ? project_avx2 : project_portable;
        case NMFLOW_ISA_AVX512:
            return has_avx512() ? project_avx512 : nullptr;
        case NMFLOW_ISA_AVX2:
            return has_avx2() ? project_avx2 : nullptr;
        case NMFLOW_ISA_PORTABLE:
            return project_portable;
        default:
            return nullptr;
    }
}

bool valid(const nmflow_projection &job) {
    if (job.rows < 0 || job.cols < 0 || job.n < 1 || job.n > job.m || job.m > NMFLOW_PROJECT_LARGEST_M) return false;
    if (job.dtype < NMFLOW_F32 || job.dtype > NMFLOW_F16 || (job.cast && job.dtype != NMFLOW_F32)) return false;
    if (job.rows < 2) return true;
    return job.w_stride >= 0 && (!job.mask || job.mask_stride >= job.cols) &&
           (!job.effective || job.effective_stride >= job.cols) && (!job.cast || job.cast_stride >= job.cols);
}

// Rows that follow each other without a gap, blocks whole, are one long row.
void join_rows(nmflow_projection &job) {
    const auto joined = [&](const void *p, int64_t stride) { return !p || stride == job.cols; };
    if (job.cols % job.m == 0 && joined(job.w, job.w_stride) && joined(job.mask, job.mask_stride) &&
        joined(job.effective, job.effective_stride) && joined(job.cast, job.cast_stride)) {
        job.cols *= job.rows;
        job.rows = 1;
    }
}

bool aligned(const void *p, int64_t stride, int64_t rows, int64_t entry_bytes) {
    return !p || ((uintptr_t)p % 64 == 0 && (rows < 2 || stride * entry_bytes % 64 == 0));
}

bool streams(const nmflow_projection &job, int64_t piece) {
    const int64_t entry_bytes = job.dtype == NMFLOW_F32 ? 4 : 2;
    const int64_t bytes = job.rows * job.cols * ((job.effective ? 2 : 1) * entry_bytes + (job.mask ? 1 : 0));
    if (job.stream == 0 || (job.stream < 0 && bytes < large_bytes)) return false;
    return piece % 64 == 0 && aligned(job.effective, job.effective_stride, job.rows, entry_bytes) &&
           aligned(job.mask, job.mask_stride, job.rows, 1);
}

int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

// Whole blocks, and whole words of bits where that is not too long for the bits' place on the stack.
int64_t piece_of(int64_t m) {
    const int64_t words = m * (64 / common_divisor(m, 64));
    const int64_t unit = words <= NMFLOW_PROJECT_LARGEST_M ? words : m;
    const int64_t many = m * most_lanes <= NMFLOW_PROJECT_LARGEST_M ? m * most_lanes : m;
    const int64_t wanted = many > piece_entries ? many : piece_entries;
    return wanted > unit ? wanted / unit * unit : unit;
}

}  // namespace
}  // namespace nmflow

int32_t nmflow_project(const nmflow_projection *given, nmflow_parallel_for parallel, int64_t *flips) {
    using namespace nmflow;
    *flips = 0;
    if (!valid(*given)) return NMFLOW_BAD_ARGUMENT;
    const ProjectKernels *kernels = kernels_for(given->isa);
    if (!kernels) return NMFLOW_UNSUPPORTED;
    if (given->rows == 0 || given->cols == 0) return NMFLOW_OK;

    Projection projection = {};
    projection.job = *given;
    nmflow_projection &job = projection.job;
    join_rows(job);
    projection.piece = piece_of(job.m);
    projection.pieces_per_row = (job.cols + projection.piece - 1) / projection.piece;
    projection.stream = streams(job, projection.piece);

    Shared shared = {&projection, kernels->of_dtype[job.dtype], {0}};
    const int64_t pieces = job.rows * projection.pieces_per_row;
    const int64_t grain = grain_entries / projection.piece > 1 ? grain_entries / projection.piece : 1;
    if (!parallel)
        run(0, pieces, &shared);
    else if (parallel(0, pieces, grain, run, &shared) != 0)
        return NMFLOW_NO_MEMORY;
    *flips = shared.flips.load(std::memory_order_relaxed);
    return NMFLOW_OK;
}
