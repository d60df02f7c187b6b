#include "model/quality.h"

#include <algorithm>

namespace edgemoe {

void choose_levels(const Quality& quality, std::span<const uint8_t> finest, std::span<const int32_t> experts,
                   std::span<const float> weights, std::span<int32_t> levels) {
    const bool exact = quality.thresholds.empty();
    const size_t top_k = experts.size();
    float total = 0;
    for (size_t pick = 0; !exact && pick < top_k; ++pick) total += weights[pick];
    for (size_t pick = 0; pick < top_k; ++pick) {
        int level = finest[experts[pick]];
        if (!exact) {
            // Picks stand in descending order of what the router chose them by, which need not be the weight.
            float before = 0;
            for (size_t other = 0; other < top_k; ++other)
                if (weights[other] > weights[pick] || (weights[other] == weights[pick] && other < pick))
                    before += weights[other];
            for (const float threshold : quality.thresholds) level -= before / total > threshold;
        }
        levels[pick] = std::clamp(level, 0, quality.level_cap);
    }
}

}  // namespace edgemoe
