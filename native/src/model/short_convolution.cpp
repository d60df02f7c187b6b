// Convolutions over the last positions, and token mixing by a gated short convolution (LFM2).
#include <algorithm>
#include <array>
#include <vector>

#include "engine_parts.h"

namespace edgemoe {

// inputs [count, channels] -> outputs [count, channels]. The last taps inputs of a sequence stay in its state, that of
// position p in row p % taps.
void Engine::convolve(int number, int count, std::span<const int32_t> positions, std::span<const int32_t> sequence_ids,
                      const float* inputs, bool silu, float* outputs) {
    const Matrix& weights = layers_[number].conv;
    const int taps = weights.cols, all = blocks(weights.rows);
    const size_t channels = weights.rows;
    constexpr int kStep = 32;  // row blocks per item, which sees the tokens in their order
    pool_.run((all + kStep - 1) / kStep, [&](int item) {
        const int first = item * kStep, last = std::min(first + kStep, all);
        const size_t begin = size_t(first) * kRowBlock, size = std::min(size_t(last) * kRowBlock, channels) - begin;
        std::vector<const float*> rows(taps);
        for (int t = 0; t < count; ++t) {
            float* kept = sequences_[sequence_ids[t]]->convolution(number);
            std::copy_n(inputs + t * channels + begin, size, kept + positions[t] % taps * channels + begin);
            for (int tap = 0; tap < taps; ++tap) {
                const int position = positions[t] - (taps - 1) + tap;
                rows[tap] = position < 0 ? nullptr : kept + position % taps * channels;
            }
            kernels_.convolve(weights, rows.data(), first, last, silu, outputs + t * channels);
        }
    });
}

void Engine::load_short_convolution(Layer& layer, const AttentionSpec& a, const std::string& prefix) {
    layer.mixed = matrix(prefix + "mixed", 3 * a.channels(), spec_.hidden_size);
    layer.conv = convolution(prefix + "conv", a.channels(), a.conv_size);
}

void Engine::short_convolution(int number, int count, std::span<const int32_t> positions,
                               std::span<const int32_t> sequence_ids) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const size_t channels = spec_.layers[number].attention.channels();

    const Activations input = prepare(s.normed, count, spec_.hidden_size, {&layer.mixed, 1});
    product({&layer.mixed, 1}, input, count, {&s.queries, 1});
    // A token has a gate on the input, a gate on the output, and the input itself.
    each_token(count, [&](int t) {
        const float* gate = s.queries + t * 3 * channels;
        const float* x = gate + 2 * channels;
        for (size_t c = 0; c < channels; ++c) s.keys[t * channels + c] = gate[c] * x[c];
    });
    convolve(number, count, positions, sequence_ids, s.keys, false, s.attended);
    each_token(count, [&](int t) {
        const float* gate = s.queries + (t * 3 + 1) * channels;
        for (size_t c = 0; c < channels; ++c) s.attended[t * channels + c] *= gate[c];
    });
}

}  // namespace edgemoe
