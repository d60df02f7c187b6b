// The table of the scalar kernels.
#include "scalar.h"

#include "ggml_formats.h"
#include "nested_format.h"
#include "tables.h"

namespace edgemoe {
namespace {

void matmul(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count, int first_block,
            int last_block, float* out, ptrdiff_t out_stride) {
    if (matrix.layout == Layout::nested)
        return nested_matmul_scalar(matrix, x, tokens, count, first_block, last_block, out, out_stride);
    if (is_ggml(matrix.layout))
        return ggml_matmul_scalar(matrix, x, tokens, count, first_block, last_block, out, out_stride);
    return scalar::matmul_packs(matrix, x, tokens, count, first_block, last_block, out, out_stride);
}

}  // namespace

constinit const Kernels kScalarKernels = {
    .name = "scalar",
    .matmul = matmul,
    .quantize = scalar::quantize,
    .rms_norm = scalar::rms_norm,
    .layer_norm = scalar::layer_norm,
    .silu_multiply = scalar::silu_multiply,
    .gelu_multiply = scalar::gelu_multiply,
    .clamped_swiglu = scalar::clamped_swiglu,
    .sigmoid = scalar::sigmoid,
    .sigmoid_multiply = scalar::sigmoid_multiply,
    .softcap = scalar::softcap,
    .softplus_decay = scalar::softplus_decay,
    .softmax = scalar::softmax,
    .add_scaled = scalar::add_scaled,
    .rope = scalar::rope,
    .store_key = scalar::store_key,
    .store_value = scalar::store_value,
    .attend = scalar::attend,
    .attend_latent = scalar::attend_latent,
    .convolve = scalar::convolve,
    .gated_delta = scalar::gated_delta,
};

}  // namespace edgemoe
