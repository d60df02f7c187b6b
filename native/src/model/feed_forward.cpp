// The feed-forward parts that every token goes through: those of dense layers, and shared experts.
#include <array>
#include <cmath>

#include "engine_parts.h"

namespace edgemoe {

void Engine::activate(const LayerSpec& spec, std::span<float> gate, const float* up) const {
    switch (spec.activation) {
        case Activation::silu:
            return kernels_.silu_multiply(gate, up, gate.data());
        case Activation::gelu_tanh:
            return kernels_.gelu_multiply(gate, up, gate.data());
        case Activation::clamped_swiglu:
            return kernels_.clamped_swiglu(gate, up, spec.swiglu_alpha, spec.swiglu_limit, gate.data());
    }
}

void Engine::gated_ffn(const FeedForward& part, const LayerSpec& spec, int count, float* out) {
    Scratch& s = *scratch_;
    const int hidden = spec_.hidden_size, ffn = part.gate.rows;
    const size_t per_token = groups(ffn);

    const std::array<Matrix, 2> matrices{part.gate, part.up};
    const Activations input = prepare(s.normed, count, hidden, matrices);
    product(matrices, input, count, std::array{s.gate, s.up});
    each_token(count, [&](int t) {
        const std::span<float> gate{s.gate + size_t(t) * ffn, size_t(ffn)}, up{s.up + size_t(t) * ffn, size_t(ffn)};
        if (part.gate_bias) {
            kernels_.add_scaled(1.0f, part.gate_bias, gate);
            kernels_.add_scaled(1.0f, part.up_bias, up);
        }
        activate(spec, gate, up.data());
        if (reads_codes(part.down.layout))
            kernels_.quantize(gate, s.hidden.codes + t * per_token * kGroup, s.hidden.scales + t * per_token,
                              s.hidden.sums + t * per_token);
    });
    const Activations hidden_input{s.gate, ffn, s.hidden.codes, s.hidden.scales, s.hidden.sums};
    product({&part.down, 1}, hidden_input, count, {&out, 1});
    if (part.down_bias)
        each_token(count, [&](int t) {
            kernels_.add_scaled(1.0f, part.down_bias, {out + size_t(t) * hidden, size_t(hidden)});
        });
}

void Engine::dense_ffn(int number, int count) {
    const Layer& layer = layers_[number];
    gated_ffn(layer.dense, spec_.layers[number], count, scratch_->projected);
    add_to_stream(scratch_->projected, layer.ffn_output_norm, count);
}

// Into scratch.shared [count, hidden].
void Engine::shared_expert(int number, int count) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const int hidden = spec_.hidden_size;
    gated_ffn(layer.dense, spec_.layers[number], count, s.shared);
    if (!layer.shared_gate) return;
    each_token(count, [&](int t) {
        // One accumulator for each of kLanes, folded by halves, as in the kernels.
        std::array<float, kLanes> sums{};
        const float* x = s.normed + size_t(t) * hidden;
        for (int i = 0; i < hidden; ++i) sums[i % kLanes] = std::fma(x[i], layer.shared_gate[i], sums[i % kLanes]);
        for (int width = kLanes / 2; width >= 1; width /= 2)
            for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
        float gate = sums[0];
        kernels_.sigmoid({&gate, 1});
        float* row = s.shared + size_t(t) * hidden;
        for (int i = 0; i < hidden; ++i) row[i] *= gate;
    });
}

}  // namespace edgemoe
