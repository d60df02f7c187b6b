// Token mixing by a recurrence: Gated DeltaNet (Yang et al. 2024), as in Qwen3-Next.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "engine_parts.h"

namespace edgemoe {
namespace {

// Added to the sum of squares of a query or key head before it is normalized.
constexpr float kLengthEpsilon = 1e-6f;

}  // namespace

void Engine::load_gated_delta(Layer& layer, const AttentionSpec& a, const std::string& prefix) {
    const int hidden = spec_.hidden_size, values = a.heads * a.value_dim;
    layer.mixed = matrix(prefix + "mixed", a.channels(), hidden);
    layer.output_gate = matrix(prefix + "output_gate", values, hidden);
    if (a.fused_beta_alpha) {
        layer.beta = matrix(prefix + "beta_alpha", 2 * a.heads, hidden);
    } else {
        layer.beta = matrix(prefix + "beta", a.heads, hidden);
        layer.alpha = matrix(prefix + "alpha", a.heads, hidden);
    }
    layer.conv = convolution(prefix + "conv", a.channels(), a.conv_size);
    layer.decay_rate = vector(prefix + "decay_rate", a.heads);
    layer.step_bias = vector(prefix + "step_bias", a.heads);
    layer.head_norm = vector(prefix + "head_norm", a.value_dim);
}

// The recurrence runs token by token in their order, all heads side by side: no result depends on how a prompt is cut.
void Engine::gated_delta(int number, int count, std::span<const int32_t> positions,
                         std::span<const int32_t> sequence_ids) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const AttentionSpec& a = spec_.layers[number].attention;
    const int heads = a.heads, shared = a.heads / a.kv_heads;
    const size_t key_dim = a.head_dim, value_dim = a.value_dim, keys = a.kv_heads * key_dim, values = heads * value_dim,
                 channels = a.channels();

    float* beta = s.values;  // [count, heads], and alpha behind it
    float* alpha = s.values + size_t(count) * heads;
    const std::array<Matrix, 4> projections{layer.mixed, layer.output_gate, layer.beta, layer.alpha};
    const std::span<const Matrix> used(projections.data(), a.fused_beta_alpha ? 3 : 4);
    const Activations input = prepare(s.normed, count, spec_.hidden_size, used);
    product(used, input, count, std::array{s.queries, s.gates, beta, alpha});

    convolve(number, count, positions, sequence_ids, s.queries, true, s.keys);

    // Queries and keys have length 1, queries then 1 / sqrt(key_dim). The mean of squares is their sum over key_dim.
    const auto dim = static_cast<float>(key_dim);
    const std::vector<float> query_scale(key_dim, 1.0f / dim), key_scale(key_dim, 1.0f / std::sqrt(dim));
    each_token(count, [&](int t) {
        float* row = s.keys + t * channels;
        for (int h = 0; h < 2 * a.kv_heads; ++h) {
            const std::span<float> head{row + h * key_dim, key_dim};
            kernels_.rms_norm(head, (h < a.kv_heads ? query_scale : key_scale).data(), kLengthEpsilon / dim,
                              head.data());
        }
    });

    pool_.run(heads, [&](int h) {
        const int key_head = a.tiled_heads ? h % a.kv_heads : h / shared;
        for (int t = 0; t < count; ++t) {
            float* state = sequences_[sequence_ids[t]]->recurrence(number) + h * key_dim * value_dim;
            if (positions[t] == 0) std::fill_n(state, key_dim * value_dim, 0.0f);
            float b, x;
            if (a.fused_beta_alpha) {  // for each key head: beta of its value heads, then alpha of them
                const float* both = beta + size_t(t) * 2 * heads + size_t(h) / shared * 2 * shared + h % shared;
                b = both[0];
                x = both[shared];
            } else {
                b = beta[size_t(t) * heads + h];
                x = alpha[size_t(t) * heads + h];
            }
            // In double precision with the C library, rounded once, as the angles of the rotary embedding.
            const double step = static_cast<double>(x) + layer.step_bias[h];
            const double softplus = step > 30.0 ? step : std::log1p(std::exp(step));
            const auto decay = static_cast<float>(std::exp(layer.decay_rate[h] * softplus));
            const auto rate = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(b))));

            const float* row = s.keys + t * channels;
            const std::span<float> out{s.attended + t * values + h * value_dim, value_dim};
            kernels_.gated_delta(state, a.head_dim, a.value_dim, row + key_head * key_dim,
                                 row + keys + key_head * key_dim, row + 2 * keys + h * value_dim, decay, rate,
                                 out.data());
            kernels_.rms_norm(out, layer.head_norm, spec_.norm_epsilon, out.data());
            kernels_.silu_multiply({s.gates + t * values + h * value_dim, value_dim}, out.data(), out.data());
        }
    });
}

}  // namespace edgemoe
