// The kernels that run everywhere: TB alone, in plain vector code.
#include "portable.hpp"

#include "../ceilings.hpp"
#include "../stream.hpp"
#include "../token_broadcast.hpp"

namespace nmflow {
const Kernels portable_kernels = {portable::lanes, 0, 0, portable::tb, nullptr, nullptr,
                                  nullptr, portable::stream, &portable::ceilings, nullptr};
}  // namespace nmflow
