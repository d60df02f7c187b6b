// NEON with the dot product instructions (FEAT_DotProd).
#include "neon.h"

namespace edgemoe {
namespace {

struct Quads {
    static constexpr bool kQuads = true;
    static constexpr bool kTiles = false;
    static constexpr int kTokens = 4;

    template <int N>
    static EDGEMOE_INLINE int32x4_t signed_lane(int32x4_t sum, int8x16_t weights, int8x16_t x) {
        return vdotq_laneq_s32(sum, weights, x, N);
    }
};

}  // namespace

constinit const Kernels kNeonDotprodKernels = VectorKernels<Neon<Quads>>::table("neon_dotprod");

}  // namespace edgemoe
