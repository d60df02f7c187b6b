// At which level a nested expert works for a token.
#pragma once

#include <cstdint>
#include <span>

#include "edgemoe/batch.h"

namespace edgemoe {

// levels [top_k] of a token's experts, whose finest levels are given. HOBBIT (arXiv 2411.01433) measures how little an
// expert matters by the share of the router's weight that those before it have; unlike there, nothing depends on what
// is in memory. Without thresholds `weights` is not read.
void choose_levels(const Quality& quality, std::span<const uint8_t> finest, std::span<const int32_t> experts,
                   std::span<const float> weights, std::span<int32_t> levels);

}  // namespace edgemoe
