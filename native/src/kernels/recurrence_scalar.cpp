// Convolutions and recurrences.
#include "scalar.h"

namespace edgemoe::scalar {

void convolve(const Matrix& weights, const float* const* rows, int first_block, int last_block, bool silu, float* out) {
    const size_t taps = weights.cols;
    for (int channel = first_block * kRowBlock; channel < last_block * kRowBlock && channel < weights.rows; ++channel) {
        const std::byte* block = weights.data + channel / kRowBlock * block_bytes(Layout::f32, weights.cols);
        float sum = 0.0f;
        for (size_t tap = 0; tap < taps; ++tap)
            if (rows[tap])
                sum = std::fma(load_f32(block, tap * kRowBlock + channel % kRowBlock), rows[tap][channel], sum);
        out[channel] = canonical(silu ? sum / (1.0f + exp_of(0.0f - sum)) : sum);
    }
}

void gated_delta(float* state, int key_dim, int value_dim, const float* query, const float* key, const float* value,
                 float decay, float beta, float* out) {
    for (int v = 0; v < value_dim; ++v) {
        float memory = 0.0f;
        for (int k = 0; k < key_dim; ++k) memory = std::fma(state[k * value_dim + v] * decay, key[k], memory);
        const float delta = (value[v] - memory) * beta;
        float sum = 0.0f;
        for (int k = 0; k < key_dim; ++k) {
            float& element = state[k * value_dim + v];
            element = canonical(std::fma(key[k], delta, element * decay));
            sum = std::fma(element, query[k], sum);
        }
        out[v] = canonical(sum);
    }
}

}  // namespace edgemoe::scalar
