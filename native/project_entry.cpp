// The entry of a projection: what is refused, how it is cut into pieces, and which instruction set does it.
#include <atomic>
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
#include <cpuid.h>
#endif

#include "project_kernel.hpp"

namespace nmflow {
namespace {

constexpr int64_t grain_entries = 32768;            // a thread is woken for no less
constexpr int64_t large_bytes = (int64_t)24 << 20;  // read and written; more leaves the caches before it is used

struct Shared {
    const Projection *projection;
    ProjectKernel kernel;
    int64_t pieces_together;  // one after the other, by one thread
    std::atomic<int64_t> flips;
    std::atomic<bool> out_of_memory;
};

void run(int64_t begin, int64_t end, void *context) {
    Shared *shared = static_cast<Shared *>(context);
    const int64_t together = shared->pieces_together;
    const int64_t flips = shared->kernel(*shared->projection, begin * together, end * together);
    if (flips < 0)
        shared->out_of_memory.store(true, std::memory_order_relaxed);
    else
        shared->flips.fetch_add(flips, std::memory_order_relaxed);
}

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
// Half precision, asked once: a virtual machine answers slowly. Clang 14's __builtin_cpu_supports does not know the name.
bool ask_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
const bool f16c = ask_f16c();
#endif

bool has_avx2() {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
    return project_avx2 && f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
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
    if (job.shared < 1 || (job.shared > 1 && job.columns && panel_rows % job.shared)) return false;
    if (job.taps < 0 || (job.taps > 1 && (job.columns || job.cols % job.taps))) return false;
    if (job.bits && job.rows > 1 && job.bits_stride < (job.cols + 7) / 8) return false;
    const int64_t lines = job.columns ? job.cols : job.rows, length = job.columns ? job.rows : job.cols;
    if (lines < 2) return true;
    return job.w_stride >= 0 && (!job.mask || job.mask_stride >= length) &&
           (!job.effective || job.effective_stride >= length) && (!job.cast || job.cast_stride >= length);
}

// Rows that follow each other without a gap, blocks whole, are one long row.
void join_rows(nmflow_projection &job) {
    const auto joined = [&](const void *p, int64_t stride) { return !p || stride == job.cols; };
    if (job.bits && (job.cols % 8 || job.bits_stride != job.cols / 8)) return;
    if (job.cols % job.m == 0 && joined(job.w, job.w_stride) && joined(job.mask, job.mask_stride) &&
        joined(job.effective, job.effective_stride) && joined(job.cast, job.cast_stride)) {
        job.cols *= job.rows;
        job.rows = 1;
    }
}

bool aligned(const void *p, int64_t stride, int64_t lines, int64_t entry_bytes) {
    return !p || ((uintptr_t)p % 64 == 0 && (lines < 2 || stride * entry_bytes % 64 == 0));
}

bool streams(const nmflow_projection &job, int64_t piece) {
    const int64_t entry_bytes = job.dtype == NMFLOW_F32 ? 4 : 2;
    const int64_t bytes = job.rows * job.cols * ((job.effective ? 2 : 1) * entry_bytes + (job.mask ? 1 : 0));
    if (job.stream == 0 || (job.stream < 0 && bytes < large_bytes)) return false;
    const int64_t lines = job.columns ? job.cols : job.rows, along = job.columns ? panel_rows : piece;
    return along % 64 == 0 && aligned(job.effective, job.effective_stride, lines, entry_bytes) &&
           aligned(job.mask, job.mask_stride, lines, 1);
}

int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

// Whole blocks, and whole words of bits where that is not too long for the bits' place on the stack.
int64_t piece_of(int64_t m, bool columns) {
    const int64_t words = m * (64 / common_divisor(m, 64));
    const int64_t unit = words <= NMFLOW_PROJECT_LARGEST_M ? words : m;
    const int64_t many = m * most_lanes <= NMFLOW_PROJECT_LARGEST_M ? m * most_lanes : m;
    const int64_t wanted = columns ? panel_entries : many > piece_entries ? many : piece_entries;
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
    const bool has_taps = job.taps > 1;
    if (!job.columns && !has_taps && job.shared == 1) join_rows(job);
    projection.piece = has_taps ? job.cols : piece_of(job.m, job.columns);
    projection.pieces_per_row = (job.cols + projection.piece - 1) / projection.piece;
    projection.stream = streams(job, projection.piece);

    const int64_t band = job.columns ? panel_rows : job.shared < job.rows ? job.shared : job.rows;
    const int64_t bands = (job.rows + band - 1) / band;
    // Pieces that share a byte of packed bits go to one thread, in their order.
    const int64_t together = job.bits && projection.piece % 8 ? projection.pieces_per_row : 1;
    const int64_t units = bands * projection.pieces_per_row / together;
    const int64_t entries = projection.piece * together * band;
    const int64_t grain = grain_entries / entries > 1 ? grain_entries / entries : 1;
    const ProjectKernel *kernel = has_taps         ? kernels->taps
                                  : job.columns    ? kernels->columns
                                  : job.shared > 1 ? kernels->groups
                                                   : kernels->rows;
    Shared shared = {&projection, kernel[job.dtype], together, {0}, {false}};
    if (!parallel)
        run(0, units, &shared);
    else if (parallel(0, units, grain, run, &shared) != 0)
        return NMFLOW_NO_MEMORY;
    if (shared.out_of_memory.load(std::memory_order_relaxed)) return NMFLOW_NO_MEMORY;
    *flips = shared.flips.load(std::memory_order_relaxed);
    return NMFLOW_OK;
}
