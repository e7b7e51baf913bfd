// The projection for any machine: vectors of four as the compiler makes them (SSE2, NEON, or plain numbers).
#define NMFLOW_ISA portable_project

#include "project_scalar.hpp"

namespace nmflow {
namespace NMFLOW_ISA {

typedef int32_t Key __attribute__((vector_size(16)));
constexpr int lanes = 4;

static inline Key every(int32_t x) { return Key{x, x, x, x}; }
static inline Key larger(Key a, Key b) { return a > b ? a : b; }
static inline Key smaller(Key a, Key b) { return a < b ? a : b; }
static inline uint32_t at_least(Key a, Key b) {
    const Key set = (a >= b) & Key{1, 2, 4, 8};
    return (uint32_t)(set[0] | set[1] | set[2] | set[3]);
}

template <int S>
static inline Key swapped(Key v) {
    return Key{v[0 ^ S], v[1 ^ S], v[2 ^ S], v[3 ^ S]};
}
template <int S>
static inline Key upper(Key a, Key b) {
    return Key{a[0], S & 1 ? b[1 ^ S] : a[1], S & 2 ? b[2 ^ S] : a[2], b[3 ^ S]};
}
template <int S>
static inline Key lower(Key a, Key b) {
    return Key{a[0 ^ S], S & 1 ? b[1] : a[1 ^ S], S & 2 ? b[2] : a[2 ^ S], b[3]};
}
template <int M>
static inline Key spread(Key v, int r) {
    return every(v[r]);
}

template <class T>
static inline Key keys(const T *p) {
    constexpr uint32_t mask = T::magnitude;
    return Key{(int32_t)(p[0].bits & mask), (int32_t)(p[1].bits & mask), (int32_t)(p[2].bits & mask),
               (int32_t)(p[3].bits & mask)};
}
template <class T>
static inline Key keys(const T *p, int64_t length, int32_t pad) {
    Key key = every(pad);
    for (int64_t l = 0; l < length; ++l) key[l] = (int32_t)(p[l].bits & T::magnitude);
    return key;
}

template <class T>
static int64_t write_words(const Piece<T> &, const uint64_t *, int64_t, float, bool, int64_t &) {
    return 0;
}
static inline void finish_streaming(bool) {}

}  // namespace NMFLOW_ISA
}  // namespace nmflow

#include "project_pieces.hpp"

namespace nmflow {
const ProjectKernels *const project_portable = &NMFLOW_ISA::kernels;
}
