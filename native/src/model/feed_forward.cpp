// The feed-forward part of a dense layer.
#include <array>

#include "engine_parts.h"

namespace edgemoe {

void Engine::dense_ffn(int number, int count) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const int hidden = spec_.hidden_size, ffn = spec_.layers[number].ffn_dim;
    const size_t per_token = groups(ffn);

    const std::array<Matrix, 2> matrices{layer.gate, layer.up};
    const Activations input = prepare(s.normed, count, hidden, matrices);
    product(matrices, input, count, std::array{s.gate, s.up});
    each_token(count, [&](int t) {
        float* row = s.gate + size_t(t) * ffn;
        kernels_.silu_multiply({row, size_t(ffn)}, s.up + size_t(t) * ffn, row);
        if (reads_codes(layer.down.layout))
            kernels_.quantize({row, size_t(ffn)}, s.hidden.codes + t * per_token * kGroup,
                              s.hidden.scales + t * per_token, s.hidden.sums + t * per_token);
    });
    const Activations hidden_input{s.gate, ffn, s.hidden.codes, s.hidden.scales, s.hidden.sums};
    product({&layer.down, 1}, hidden_input, count, {&s.projected, 1});
    each_token(count, [&](int t) {
        const size_t row = size_t(t) * hidden;
        kernels_.add_scaled(1.0f, s.projected + row, {s.x + row, size_t(hidden)});
    });
}

}  // namespace edgemoe
