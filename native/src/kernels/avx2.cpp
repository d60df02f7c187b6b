// AVX2 with FMA and F16C.
#include "avx2.h"

namespace edgemoe {
namespace {

struct Pairs {
    static constexpr bool kQuads = false;
};

}  // namespace

constinit const Kernels kAvx2Kernels = VectorKernels<Avx2<Pairs>>::table("avx2");

}  // namespace edgemoe
