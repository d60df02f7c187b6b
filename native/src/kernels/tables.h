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

}  // namespace edgemoe
