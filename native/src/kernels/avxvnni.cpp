// AVX2 with AVX-VNNI, the byte products of VNNI in registers of 256 bits. The intrinsic is that of AVX-512 VNNI at this
// width too: compiled for that, the same source can be tested on processors without AVX-VNNI (native/tests).
#include "avx2.h"

namespace edgemoe {
namespace {

struct Quads {
    static constexpr bool kQuads = true;
    static EDGEMOE_INLINE __m256i add(__m256i sum, __m256i weights, __m256i x) {
        return _mm256_dpbusd_epi32(sum, weights, x);
    }
    static EDGEMOE_INLINE __m256i add_pairs(__m256i sum, __m256i weights, __m256i x) {
        return _mm256_dpwssd_epi32(sum, weights, x);
    }
};

}  // namespace

constinit const Kernels kAvxVnniKernels = VectorKernels<Avx2<Quads>>::table("avxvnni");

}  // namespace edgemoe
