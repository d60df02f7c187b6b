// NEON as every AArch64 processor has it.
#include "neon.h"

namespace edgemoe {
namespace {

struct Products {
    static constexpr bool kQuads = false;
    static constexpr bool kTiles = false;
    static constexpr int kTokens = 2;
};

}  // namespace

constinit const Kernels kNeonKernels = VectorKernels<Neon<Products>>::table("neon");

}  // namespace edgemoe
