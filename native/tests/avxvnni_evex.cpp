// AVX-VNNI's source a second time, in the encoding of AVX-512: many processors have these instructions as part of that
// only, and can test the source.
#define EDGEMOE_X86
#define EDGEMOE_AVXVNNI
#define kAvxVnniKernels kAvxVnniEvexKernels
#include "kernels/avxvnni.cpp"
