// NEON with the dot product instructions and those that multiply int8 matrices (FEAT_DotProd, FEAT_I8MM).
#include "neon.h"

namespace edgemoe {
namespace {

struct Tiles {
    static constexpr bool kQuads = true;
    static constexpr bool kTiles = true;
    static constexpr int kTokens = 4;

    template <int N>
    static EDGEMOE_INLINE int32x4_t signed_lane(int32x4_t sum, int8x16_t weights, int8x16_t x) {
        return vdotq_laneq_s32(sum, weights, x, N);
    }
    template <int N>
    static EDGEMOE_INLINE int32x4_t unsigned_lane(int32x4_t sum, uint8x16_t weights, int8x16_t x) {
        return vusdotq_s32(sum, weights, vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), N)));
    }
    static EDGEMOE_INLINE int32x4_t signed_tile(int32x4_t sum, int8x16_t weights, int8x16_t x) {
        return vmmlaq_s32(sum, weights, x);
    }
    static EDGEMOE_INLINE int32x4_t unsigned_tile(int32x4_t sum, uint8x16_t weights, int8x16_t x) {
        return vusmmlaq_s32(sum, weights, x);
    }
};

}  // namespace

constinit const Kernels kNeonI8mmKernels = VectorKernels<Neon<Tiles>>::table("neon_i8mm");

}  // namespace edgemoe
