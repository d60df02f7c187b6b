// The choice of experts from the router's scores.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu_backend.h"

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

void CpuBackend::choose(const Choice& of, Floats all_scores, int count, Buffer<int32_t> picks, Floats weights) {
    const RouterSpec& spec = *of.router;
    const size_t experts = of.experts, top_k = of.top_k;
    each_row(count, [&](int t) {
        const std::span<float> scores{all_scores.address() + t * experts, experts};
        const std::span<float> choice{work_.choice + t * experts, experts};
        int32_t* order = work_.order + t * experts;
        float* out = weights ? weights.address() + t * top_k : nullptr;
        if (spec.scores == RouterScores::sparsemixer) {
            // SparseMixer (Liu et al. 2023) without noise: each choice's weight is its share among the experts whose
            // logits come near it, and the second is made among the others.
            std::ranges::copy(scores, choice.begin());
            largest(scores, of.top_k, order);
            for (size_t pick = 0; out && pick < top_k; ++pick) {
                const float best = scores[order[pick]];
                for (size_t expert = 0; expert < experts; ++expert) {
                    const float distance = (best - scores[expert]) / std::max(std::abs(scores[expert]), best);
                    choice[expert] = distance > spec.mask_threshold ? -kInfinity : scores[expert];
                }
                for (size_t earlier = 0; earlier < pick; ++earlier) choice[order[earlier]] = -kInfinity;
                kernels_.softmax(choice);
                out[pick] = choice[order[pick]];
            }
        } else {
            if (spec.scores == RouterScores::softmax) kernels_.softmax(scores);
            if (spec.scores == RouterScores::sigmoid) kernels_.sigmoid(scores);
            std::ranges::copy(scores, choice.begin());
            if (of.selection_bias) kernels_.add_scaled(1.0f, of.selection_bias.address(), choice);
            if (spec.groups > 1) keep_best_groups(spec, choice, order);
            largest(choice, of.top_k, order);
            for (size_t pick = 0; out && pick < top_k; ++pick) out[pick] = scores[order[pick]];
            if (out && spec.scores == RouterScores::softmax_topk) kernels_.softmax({out, top_k});
        }
        std::copy_n(order, top_k, picks.address() + t * top_k);
        if (!out) return;
        if (spec.renormalize) {
            float total = 0;
            for (size_t pick = 0; pick < top_k; ++pick) total += out[pick];
            if (total < spec.renormalize_least) total = spec.renormalize_least;
            total += spec.renormalize_epsilon;
            for (size_t pick = 0; pick < top_k; ++pick) out[pick] = canonical(out[pick] / total);
        }
        for (size_t pick = 0; pick < top_k; ++pick) {
            out[pick] = canonical(out[pick] * spec.weight_scale);
            if (of.expert_scale) out[pick] = canonical(out[pick] * of.expert_scale.address()[order[pick]]);
        }
    });
}

}  // namespace edgemoe
