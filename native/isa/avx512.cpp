// The AVX-512 kernels in float32, and TB in bfloat16.
#include "avx512.hpp"

#include "../ceilings.hpp"
#include "../row_vector_f32.hpp"
#include "../stream.hpp"
#include "../token_broadcast.hpp"

namespace nmflow {
namespace avx512 {
void rv_bf16(const Job &job, int64_t begin, int64_t end);
void rv_short(const Job &job, int64_t begin, int64_t end);
extern const Spin spin_bf16;
}
const Kernels avx512_kernels = {avx512::lanes, 128, 64, avx512::tb, avx512::rv, avx512::rv_bf16,
                                avx512::rv_short, avx512::stream, &avx512::ceilings, &avx512::spin_bf16};
}  // namespace nmflow
