// Which experts work on a token, and which the next layer will probably want.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "engine_parts.h"

namespace edgemoe {

// Sorts the first top_k of order [count, experts] by descending score; equal scores by ascending expert number.
void Engine::choose(const LayerSpec& spec, int count) {
    Scratch& s = *scratch_;
    each_token(count, [&](int t) {
        const float* scores = s.scores + size_t(t) * spec.experts;
        int32_t* order = s.order + size_t(t) * spec.experts;
        std::iota(order, order + spec.experts, 0);
        // A score that is not a number sorts last, to keep the order a strict one; it still shows in the weights.
        const auto key = [&](int32_t e) {
            return std::isnan(scores[e]) ? -std::numeric_limits<float>::infinity() : scores[e];
        };
        std::partial_sort(order, order + spec.top_k, order + spec.experts, [&](int32_t left, int32_t right) {
            return key(left) != key(right) ? key(left) > key(right) : left < right;
        });
    });
}

// Fills picks and weights [count, top_k], in descending weight.
void Engine::route(const LayerSpec& spec, const Layer& layer, int count) {
    Scratch& s = *scratch_;
    const Activations input{s.normed, spec_.hidden_size, nullptr, nullptr, nullptr};
    product({&layer.router, 1}, input, count, {&s.scores, 1});
    each_token(count, [&](int t) { kernels_.softmax({s.scores + size_t(t) * spec.experts, size_t(spec.experts)}); });
    choose(spec, count);
    each_token(count, [&](int t) {
        float* weights = s.weights + size_t(t) * spec.top_k;
        int32_t* picks = s.picks + size_t(t) * spec.top_k;
        float total = 0;
        for (int slot = 0; slot < spec.top_k; ++slot) {
            picks[slot] = s.order[size_t(t) * spec.experts + slot];
            weights[slot] = s.scores[size_t(t) * spec.experts + picks[slot]];
            total += weights[slot];
        }
        if (spec.renormalize)
            for (int slot = 0; slot < spec.top_k; ++slot) weights[slot] /= total;
    });
}

// Tells the store what the next layer with experts will probably want: its router's choice on today's residual stream,
// which the experts of this layer have not been added to yet. The choice of most tokens first.
void Engine::predict(int number, int count) {
    Scratch& s = *scratch_;
    int next = (number + 1) % static_cast<int>(layers_.size());
    while (!spec_.layers[next].experts) next = (next + 1) % static_cast<int>(layers_.size());
    if (next <= number) return;  // the next pass begins with another token
    const LayerSpec& spec = spec_.layers[next];
    const int hidden = spec_.hidden_size;
    each_token(count, [&](int t) {
        const size_t row = size_t(t) * hidden;
        kernels_.rms_norm({s.x + row, size_t(hidden)}, layers_[next].ffn_norm, spec_.norm_epsilon, s.projected + row);
    });
    const Activations input{s.projected, hidden, nullptr, nullptr, nullptr};
    product({&layers_[next].router, 1}, input, count, {&s.scores, 1});
    choose(spec, count);
    std::vector<int32_t> uses(spec.experts, 0), expected;
    for (int t = 0; t < count; ++t)
        for (int slot = 0; slot < spec.top_k; ++slot) {
            const int32_t expert = s.order[size_t(t) * spec.experts + slot];
            if (uses[expert]++ == 0) expected.push_back(expert);
        }
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int32_t left, int32_t right) { return uses[left] > uses[right]; });
    if (store_->wants_hints()) store_->hint(next, expected);
    if (recording_) {
        const size_t width = routing_column(static_cast<int>(layers_.size())), column = routing_column(next);
        for (int t = 0; t < count; ++t)
            for (int slot = 0; slot < spec.top_k; ++slot)
                chunk_routing_.predicted[t * width + column + slot] =
                    static_cast<uint16_t>(s.order[size_t(t) * spec.experts + slot]);
    }
}

}  // namespace edgemoe
