// Which experts work on a token, and which the next layer will probably want.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "engine_parts.h"

namespace edgemoe {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A score that is not a number sorts last, to keep the order a strict one; it still shows in the weights.
float sort_key(float score) { return std::isnan(score) ? -kInfinity : score; }

// The numbers of the `count` largest of `scores`, in descending order; equal ones in ascending order of their numbers.
void largest(std::span<const float> scores, int count, int32_t* order) {
    std::iota(order, order + scores.size(), 0);
    std::partial_sort(order, order + count, order + scores.size(), [&](int32_t left, int32_t right) {
        const float a = sort_key(scores[left]), b = sort_key(scores[right]);
        return a != b ? a > b : left < right;
    });
}

// Leaves only the best groups of experts in the choice (DeepSeek-V3, section 2.1.2; DeepSeek-V2: the group's largest).
void keep_best_groups(const RouterSpec& spec, std::span<float> choice, int32_t* order) {
    const size_t size = choice.size() / spec.groups;
    std::vector<float> scores(spec.groups);
    for (int group = 0; group < spec.groups; ++group) {
        float first = -kInfinity, second = -kInfinity;
        for (const float score : choice.subspan(group * size, size)) {
            const float key = sort_key(score);
            if (key > first)
                second = std::exchange(first, key);
            else
                second = std::max(second, key);
        }
        scores[group] = spec.group_score == GroupScore::largest ? first : first + second;
    }
    largest(scores, spec.groups_kept, order);
    std::vector<bool> kept(spec.groups, false);
    for (int i = 0; i < spec.groups_kept; ++i) kept[order[i]] = true;
    for (size_t expert = 0; expert < choice.size(); ++expert)
        if (!kept[expert / size]) choice[expert] = -kInfinity;
}

}  // namespace

// Fills scores [count, experts] with the router's logits for `normed`, the stream `x` after ffn_norm. A router with a
// norm of its own reads the stream itself; `projected`, which may be `x`, is overwritten then.
void Engine::router_logits(int number, int count, const float* x, const float* normed) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const size_t experts = spec_.layers[number].experts;
    const float* values = normed;
    if (layer.router_norm) {
        normalize({layer.router_norm, nullptr}, x, count, s.projected);
        values = s.projected;
    }
    const Activations input = prepare(values, count, spec_.hidden_size, {&layer.router, 1});
    product({&layer.router, 1}, input, count, {&s.scores, 1});
    if (layer.router_bias)
        each_token(count,
                   [&](int t) { kernels_.add_scaled(1.0f, layer.router_bias, {s.scores + t * experts, experts}); });
}

// From the logits in `scores`: sorts the first top_k of order [count, experts] by falling preference and, unless
// `weights` is null, fills it [count, top_k]. Overwrites scores and choice.
void Engine::choose(int number, int count, float* weights) {
    Scratch& s = *scratch_;
    const LayerSpec& layer_spec = spec_.layers[number];
    const RouterSpec& spec = layer_spec.router;
    const Layer& layer = layers_[number];
    const size_t experts = layer_spec.experts, top_k = layer_spec.top_k;
    each_token(count, [&](int t) {
        const std::span<float> scores{s.scores + t * experts, experts}, choice{s.choice + t * experts, experts};
        int32_t* order = s.order + t * experts;
        float* out = weights ? weights + t * top_k : nullptr;
        if (spec.scores == RouterScores::sparsemixer) {
            // SparseMixer (Liu et al. 2023) without noise: each choice's weight is its share among the experts whose
            // logits come near it, and the second is made among the others.
            std::ranges::copy(scores, choice.begin());
            largest(scores, static_cast<int>(top_k), order);
            for (size_t slot = 0; out && slot < top_k; ++slot) {
                const float best = scores[order[slot]];
                for (size_t expert = 0; expert < experts; ++expert) {
                    const float distance = (best - scores[expert]) / std::max(std::abs(scores[expert]), best);
                    choice[expert] = distance > spec.mask_threshold ? -kInfinity : scores[expert];
                }
                for (size_t earlier = 0; earlier < slot; ++earlier) choice[order[earlier]] = -kInfinity;
                kernels_.softmax(choice);
                out[slot] = choice[order[slot]];
            }
        } else {
            if (spec.scores == RouterScores::softmax) kernels_.softmax(scores);
            if (spec.scores == RouterScores::sigmoid) kernels_.sigmoid(scores);
            std::ranges::copy(scores, choice.begin());
            if (layer.selection_bias) kernels_.add_scaled(1.0f, layer.selection_bias, choice);
            if (spec.groups > 1) keep_best_groups(spec, choice, order);
            largest(choice, static_cast<int>(top_k), order);
            for (size_t slot = 0; out && slot < top_k; ++slot) out[slot] = scores[order[slot]];
            if (out && spec.scores == RouterScores::softmax_topk) kernels_.softmax({out, top_k});
        }
        if (!out) return;
        if (spec.renormalize) {
            float total = 0;
            for (size_t slot = 0; slot < top_k; ++slot) total += out[slot];
            if (total < spec.renormalize_least) total = spec.renormalize_least;
            total += spec.renormalize_epsilon;
            for (size_t slot = 0; slot < top_k; ++slot) out[slot] /= total;
        }
        for (size_t slot = 0; slot < top_k; ++slot) {
            out[slot] *= spec.weight_scale;
            if (layer.expert_scale) out[slot] *= layer.expert_scale[order[slot]];
        }
    });
}

// Fills picks and weights [count, top_k].
void Engine::route(int number, int count) {
    Scratch& s = *scratch_;
    const size_t experts = spec_.layers[number].experts, top_k = spec_.layers[number].top_k;
    router_logits(number, count, s.x, s.normed);
    choose(number, count, s.weights);
    for (int t = 0; t < count; ++t) std::copy_n(s.order + t * experts, top_k, s.picks + t * top_k);
}

// Tells the store what the next layer with experts will probably want: its router's choice on today's residual stream,
// which the experts of this layer have not been added to yet. The choice of most tokens first; of those tokens that go
// through that layer's experts, which in the last layer are the `wanted` ones.
// Overwrites `projected`.
void Engine::predict(int number, int count, std::span<const int32_t> wanted) {
    Scratch& s = *scratch_;
    int next = (number + 1) % static_cast<int>(layers_.size());
    while (!spec_.layers[next].experts) next = (next + 1) % static_cast<int>(layers_.size());
    if (next <= number) return;  // the next pass begins with another token
    const LayerSpec& spec = spec_.layers[next];
    const float* x = s.x;
    if (computes_wanted_only(next)) {
        if (wanted.empty()) return store_->hint(next, {});
        const size_t hidden = spec_.hidden_size;
        count = static_cast<int>(wanted.size());
        for (int i = 0; i < count; ++i) std::copy_n(s.x + wanted[i] * hidden, hidden, s.projected + i * hidden);
        x = s.projected;
    }
    if (!layers_[next].router_norm) normalize(layers_[next].ffn_norm, x, count, s.projected);
    router_logits(next, count, x, s.projected);
    // Without thresholds levels do not depend on the weights.
    std::vector<float> weights(options_.thresholds.empty() ? 0 : size_t(count) * spec.top_k);
    choose(next, count, weights.empty() ? nullptr : weights.data());
    std::vector<int32_t> uses(spec.experts, 0), finest(spec.experts, 0), levels(spec.top_k);
    std::vector<ExpertStore::Hint> expected;
    for (int t = 0; t < count; ++t) {
        const int32_t* picks = s.order + size_t(t) * spec.experts;
        choose_levels(layers_[next], spec.top_k, picks, weights.empty() ? nullptr : &weights[size_t(t) * spec.top_k],
                      levels.data());
        for (int slot = 0; slot < spec.top_k; ++slot) {
            if (uses[picks[slot]]++ == 0) expected.push_back({picks[slot], 0});
            finest[picks[slot]] = std::max(finest[picks[slot]], levels[slot]);
        }
    }
    for (ExpertStore::Hint& hint : expected) hint.level = finest[hint.expert];
    std::stable_sort(expected.begin(), expected.end(),
                     [&](const ExpertStore::Hint& left, const ExpertStore::Hint& right) {
                         return uses[left.expert] > uses[right.expert];
                     });
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
