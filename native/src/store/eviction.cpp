#include "store/eviction.h"

#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace edgemoe {

Eviction eviction_from_name(std::string_view name) {
    if (name == "lru") return Eviction::lru;
    if (name == "lfu") return Eviction::lfu;
    if (name == "least_stale") return Eviction::least_stale;
    if (name == "next_use") return Eviction::next_use;
    throw std::invalid_argument("eviction policy " + std::string(name) +
                                " is not one of lru, lfu, least_stale, next_use");
}

EvictionRanking::EvictionRanking(Eviction policy, std::vector<int32_t> layer_of_section, int layers)
    : policy_(policy),
      layer_of_(std::move(layer_of_section)),
      last_use_(layer_of_.size()),
      uses_(layer_of_.size()),
      score_(layer_of_.size()),
      last_token_(layer_of_.size()),
      layer_tokens_(layers),
      passed_(layers),
      layers_(layers) {
    std::iota(passed_.begin(), passed_.end(), 0);  // as if a pass had just ended
    double value = 1;
    for (double& factor : decay_) {
        factor = value;
        value *= kDecay;
    }
}

int EvictionRanking::begin_turn(int layer, int tokens) {
    const int count = (layer - layer_ - 1 + layers_) % layers_ + 1;
    for (int i = 1; i <= count; ++i) passed_[(layer_ + i) % layers_] += static_cast<uint64_t>(layers_);
    layer_ = layer;
    turn_begin_ = layer_tokens_[layer];
    layer_tokens_[layer] += static_cast<uint64_t>(tokens);
    return count;
}

double EvictionRanking::likelihood(int section) const {
    const uint64_t age = layer_tokens_[layer_of_[section]] - last_token_[section];
    return age < kHorizon ? score_[section] * decay_[age] : 0;
}

void EvictionRanking::use(int section, int last_token, int uses) {
    last_use_[section] = ++clock_;
    uses_[section] += static_cast<uint32_t>(uses);
    // Uses before the last one of a turn lie anywhere in it; only the last is counted, at its own time.
    const uint64_t now = turn_begin_ + static_cast<uint64_t>(last_token) + 1;
    const uint64_t age = now - last_token_[section];
    score_[section] = 1 + (age < kHorizon ? score_[section] * decay_[age] : 0);
    last_token_[section] = now;
}

EvictionRanking::Rank EvictionRanking::rank(int section) const {
    switch (policy_) {
        case Eviction::lru:
        case Eviction::least_stale:  // what was touched in this pass was used after all that was not
            return {0, last_use_[section]};
        case Eviction::lfu:
            return {static_cast<double>(uses_[section]), last_use_[section]};
        case Eviction::next_use:
            break;
    }
    // The layer that was passed last comes again last.
    return {likelihood(section), ~passed_[layer_of_[section]]};
}

}  // namespace edgemoe
