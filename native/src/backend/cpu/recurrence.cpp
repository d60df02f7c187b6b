// What a state is advanced by, position by position: convolutions and the gated delta rule. No result depends on how a
// prompt is cut.
#include <algorithm>
#include <vector>

#include "blocks.h"
#include "cpu_backend.h"

namespace edgemoe {

// The last taps inputs of a sequence stay in its state, that of position p in row p % taps.
void CpuBackend::convolve(const Matrix& weights, int layer, ConstFloats in, bool silu, Floats out) {
    const int taps = weights.cols, all = row_blocks(weights.rows), count = rows_.count();
    const size_t channels = weights.rows;
    constexpr int kStep = 32;  // row blocks per item, which sees the rows of the chunk in their order
    pool_.run((all + kStep - 1) / kStep, [&](int item) {
        const int first = item * kStep, last = std::min(first + kStep, all);
        const size_t begin = size_t(first) * kRowBlock, size = std::min(size_t(last) * kRowBlock, channels) - begin;
        std::vector<const float*> inputs(taps);
        for (int t = 0; t < count; ++t) {
            SequenceState& sequence = *rows_.states[t];
            float* kept = sequence.convolution(layer);
            const int position = rows_.positions[t];
            const float* before = sequence.convolution_before(layer);
            for (int tap = 0; tap < taps; ++tap) {
                float* row = kept + tap * channels + begin;
                if (position == 0)
                    std::fill_n(row, size, 0.0f);
                else if (before && position == sequence.length())
                    std::copy_n(before + tap * channels + begin, size, row);
            }
            std::copy_n(in.address() + t * channels + begin, size, kept + position % taps * channels + begin);
            for (int tap = 0; tap < taps; ++tap) {
                const int earlier = position - (taps - 1) + tap;
                inputs[tap] = earlier < 0 ? nullptr : kept + earlier % taps * channels;
            }
            kernels_.convolve(weights, inputs.data(), first, last, silu, out.address() + t * channels);
        }
    });
}

void CpuBackend::gated_delta(const DeltaHeads& a, int layer, const DeltaBuffers& b) {
    // Added to the sum of squares of a query or key head before it is normalized.
    constexpr float kLengthEpsilon = 1e-6f;
    const int count = rows_.count(), heads = a.heads, shared = a.heads / a.kv_heads;
    const size_t key_dim = a.key_dim, value_dim = a.value_dim, keys = a.kv_heads * key_dim, values = heads * value_dim,
                 channels = 2 * keys + values;
    each_row(count, [&](int t) {
        float* row = b.mixed.address() + t * channels;
        for (int h = 0; h < 2 * a.kv_heads; ++h) {
            const std::span<float> head{row + h * key_dim, key_dim};
            // The norm's mean of squares is their sum over key_dim.
            kernels_.rms_norm(head, (h < a.kv_heads ? a.query_norm : a.key_norm).address(),
                              kLengthEpsilon / static_cast<float>(key_dim), head.data());
        }
        // Beta becomes the rate at which the state takes in what is new, alpha the factor by which it decays.
        if (a.fused_beta_alpha) {
            for (int first = 0; first < heads; first += shared) {
                float* both = b.beta.address() + 2 * (size_t(t) * heads + first);
                kernels_.sigmoid({both, size_t(shared)});
                kernels_.softplus_decay({both + shared, size_t(shared)}, a.step_bias.address() + first,
                                        a.decay_rate.address() + first);
            }
        } else {
            kernels_.sigmoid({b.beta.address() + size_t(t) * heads, size_t(heads)});
            kernels_.softplus_decay({b.alpha.address() + size_t(t) * heads, size_t(heads)}, a.step_bias.address(),
                                    a.decay_rate.address());
        }
    });
    pool_.run(heads, [&](int h) {
        const int key_head = a.tiled_heads ? h % a.kv_heads : h / shared;
        for (int t = 0; t < count; ++t) {
            SequenceState& sequence = *rows_.states[t];
            const size_t place = h * key_dim * value_dim;
            float* state = sequence.recurrence(layer) + place;
            const float* before = sequence.recurrence_before(layer);
            if (rows_.positions[t] == 0)
                std::fill_n(state, key_dim * value_dim, 0.0f);
            else if (before && rows_.positions[t] == sequence.length())
                std::copy_n(before + place, key_dim * value_dim, state);
            const size_t fused = 2 * (size_t(t) * heads + h / shared * shared) + h % shared,
                         apart = size_t(t) * heads + h;
            const float rate = b.beta.address()[a.fused_beta_alpha ? fused : apart];
            const float decay = a.fused_beta_alpha ? b.beta.address()[fused + shared] : b.alpha.address()[apart];
            const float* row = b.mixed.address() + t * channels;
            const std::span<float> out{b.out.address() + t * values + h * value_dim, value_dim};
            kernels_.gated_delta(state, a.key_dim, a.value_dim, row + key_head * key_dim,
                                 row + keys + key_head * key_dim, row + 2 * keys + h * value_dim, decay, rate,
                                 out.data());
            kernels_.rms_norm(out, a.head_norm.address(), a.norm_epsilon, out.data());
            kernels_.silu_multiply({b.gates.address() + t * values + h * value_dim, value_dim}, out.data(), out.data());
        }
    });
}

}  // namespace edgemoe
