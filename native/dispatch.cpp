// Which instruction sets this machine has, and the scratch memory of its threads.
#include <stdlib.h>

#include "kernel.hpp"

namespace nmflow {

#if defined(NMFLOW_X86)
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static bool has_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_vbmi() { return has_avx512() && __builtin_cpu_supports("avx512vbmi"); }
#else
static bool has_avx2() { return false; }
static bool has_avx512() { return false; }
static bool has_bf16() { return false; }
bool has_vbmi() { return false; }
#endif

const Kernels *kernels_of(int isa) {
    switch (isa) {
        case NMFLOW_ISA_PORTABLE:
            return &portable_kernels;
#if defined(NMFLOW_X86)
        case NMFLOW_ISA_AVX2:
            return has_avx2() ? &avx2_kernels : nullptr;
        case NMFLOW_ISA_AVX512:
            return has_avx512() ? &avx512_kernels : nullptr;
#endif
        default:
            return nullptr;
    }
}

namespace {
struct Memory {
    void *start = nullptr;
    size_t size = 0;
    ~Memory() { free(start); }
};
thread_local Memory memory;
}  // namespace

// Kept between calls: fresh pages from the system would cost more than many a kernel.
void *scratch(size_t bytes) {
    if (bytes > memory.size) {
        free(memory.start);
        bytes = (bytes + 4095) / 4096 * 4096;
        memory.start = aligned_alloc(64, bytes);
        memory.size = memory.start ? bytes : 0;
    }
    return memory.start;
}

}  // namespace nmflow

extern "C" int32_t nmflow_abi_version(void) { return NMFLOW_ABI_VERSION; }
extern "C" int32_t nmflow_best_isa(void) {
    return nmflow::has_avx512() ? NMFLOW_ISA_AVX512 : nmflow::has_avx2() ? NMFLOW_ISA_AVX2 : NMFLOW_ISA_PORTABLE;
}
extern "C" int32_t nmflow_has_bf16(void) { return nmflow::has_bf16(); }
