// The AVX2 kernels; bfloat16 goes through TB, which computes in float32.
#include "avx2.hpp"

#include "../ceilings.hpp"
#include "../row_vector_f32.hpp"
#include "../stream.hpp"
#include "../token_broadcast.hpp"

namespace nmflow {
const Kernels avx2_kernels = {avx2::lanes, 8,       0,            avx2::tb,        avx2::rv,
                              nullptr,     nullptr, avx2::stream, &avx2::ceilings, nullptr};
}  // namespace nmflow
