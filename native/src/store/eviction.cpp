#include "store/eviction.h"

#include <algorithm>
#include <limits>
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
      last_step_(layer_of_.size()),
      layers_(layers) {
    for (int layer = 0; layer < layers; ++layer)
        layers_[layer].passed = static_cast<uint64_t>(layer);  // as if a pass had just ended
    double value = 1;
    for (double& factor : decay_) {
        factor = value;
        value *= kDecay;
    }
}

int EvictionRanking::begin_turn(int layer, const Turn& turn) {
    const auto all = static_cast<int>(layers_.size());
    const int count = (layer - layer_ - 1 + all) % all + 1;
    for (int i = 1; i <= count; ++i) layers_[(layer_ + i) % all].passed += static_cast<uint64_t>(all);
    const bool is_other = std::min(turn.rows, kMostRows) != std::min(turn_.rows, kMostRows);
    layer_ = layer;
    turn_ = turn;
    Layer& of = layers_[layer];
    const auto steps = static_cast<uint64_t>(turn.steps);
    of.steps += steps;
    of.rows = of.rows * decay(steps) + static_cast<double>(turn.rows) / turn.steps * decayed(steps);
    return is_other && policy_ == Eviction::next_use ? all : count;
}

void EvictionRanking::use(int section, int last_row, int uses) {
    last_use_[section] = ++clock_;
    uses_[section] += static_cast<uint32_t>(uses);
    // Where in the turn its uses lie is not known but for the last one. A single sequence's are taken to be spread
    // evenly up to that, those of several sequences over the whole turn.
    const uint64_t now = layers_[layer_].steps;
    const int steps = turn_.rows == turn_.steps ? last_row + 1 : turn_.steps;
    const double weight =
        decay(static_cast<uint64_t>(turn_.steps - steps)) * decayed(static_cast<uint64_t>(steps)) / steps;
    score_[section] = score_[section] * decay(now - last_step_[section]) + uses * weight;
    last_step_[section] = now;
}

double EvictionRanking::passes_to_next_use(int section) const {
    const Layer& of = layers_[layer_of_[section]];
    const double uses = score_[section] * decay(of.steps - last_step_[section]);
    if (uses <= 0) return std::numeric_limits<double>::infinity();
    double unused = 1 - std::min(uses / of.rows, 1.0), all_unused = 1;
    for (int rows = std::min(turn_.rows, kMostRows); rows > 0; rows /= 2) {  // unused^rows
        if (rows % 2) all_unused *= unused;
        unused *= unused;
    }
    return 1 / (1 - all_unused);
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
    const uint64_t passed = layers_[layer_of_[section]].passed;
    return {-(static_cast<double>(passed) + static_cast<double>(layers_.size()) * passes_to_next_use(section)),
            ~passed};
}

}  // namespace edgemoe
