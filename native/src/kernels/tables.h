// The tables of the instruction sets compiled into this build. The vector ones may only be used after the processor
// was asked (dispatch.cpp).
#pragma once

#include "edgemoe/kernels.h"

namespace edgemoe {

extern const Kernels kScalarKernels;
#if defined(EDGEMOE_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512VnniKernels;
#endif
#if defined(EDGEMOE_AVXVNNI)
extern const Kernels kAvxVnniKernels;
#endif
#if defined(EDGEMOE_NEON)
extern const Kernels kNeonKernels;
extern const Kernels kNeonDotprodKernels;
extern const Kernels kNeonI8mmKernels;
#endif

// Bytes of one group (kGroup columns) of a row block: codes, then kRowBlock scales, then kRowBlock offsets (float16).
inline constexpr size_t kQ8Codes = size_t{kRowBlock} * kGroup;
inline constexpr size_t kQ4Codes = kQ8Codes / 2;
inline constexpr size_t kGroupParameters = size_t{2} * kRowBlock * sizeof(uint16_t);

// Activations smaller than this count as zeros: their scale would be subnormal.
inline constexpr float kLeastMagnitude = 127 * 0x1p-126f;

}  // namespace edgemoe
