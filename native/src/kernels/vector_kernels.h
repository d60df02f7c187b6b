// The table of a vector instruction set, whose trait V vector.h describes.
#pragma once

#include "attention_vector.h"
#include "elementwise_vector.h"
#include "ggml_vector.h"
#include "nested_vector.h"
#include "pack_vector.h"
#include "recurrence_vector.h"
#include "tables.h"

namespace edgemoe {

template <class V>
struct VectorKernels {
    using Elementwise = ElementwiseKernels<V>;
    using Attention = AttentionKernels<V>;
    using Recurrence = RecurrenceKernels<V>;

    static void matmul(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                       int first_block, int last_block, float* out, ptrdiff_t out_stride) {
        if (matrix.layout == Layout::nested)
            return NestedKernels<V>::matmul(matrix, x, tokens, count, first_block, last_block, out, out_stride);
        if (matrix.layout >= Layout::ggml_q4_0)
            return GgmlKernels<V>::matmul(matrix, x, tokens, count, first_block, last_block, out, out_stride);
        return PackKernels<V>::matmul(matrix, x, tokens, count, first_block, last_block, out, out_stride);
    }

    static constexpr Kernels table(std::string_view name) {
        return {
            .name = name,
            .matmul = matmul,
            .quantize = Elementwise::quantize,
            .rms_norm = Elementwise::rms_norm,
            .layer_norm = Elementwise::layer_norm,
            .silu_multiply = Elementwise::silu_multiply,
            .gelu_multiply = Elementwise::gelu_multiply,
            .clamped_swiglu = Elementwise::clamped_swiglu,
            .sigmoid = Elementwise::sigmoid,
            .sigmoid_multiply = Elementwise::sigmoid_multiply,
            .softcap = Elementwise::softcap,
            .softplus_decay = Elementwise::softplus_decay,
            .softmax = Elementwise::softmax,
            .add_scaled = Elementwise::add_scaled,
            .rope = Elementwise::rope,
            .store_key = Attention::store_key,
            .store_value = Attention::store_value,
            .attend = Attention::attend,
            .attend_latent = Attention::attend_latent,
            .convolve = Recurrence::convolve,
            .gated_delta = Recurrence::gated_delta,
        };
    }
};

}  // namespace edgemoe
