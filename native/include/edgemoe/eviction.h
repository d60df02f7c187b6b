// Which expert, or which level of one, leaves memory when another one needs its place.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <string_view>
#include <vector>

namespace edgemoe {

enum class Eviction : uint8_t {
    lru,          // least recently used
    lfu,          // least often used, then least recently
    least_stale,  // those untouched in this forward pass first, then least recently used (SpecMD): the order of lru
    next_use,     // least likely to be used when its layer comes again; among equals the layer that comes last
};

Eviction eviction_from_name(std::string_view name);  // throws std::invalid_argument

// What is remembered about every section (an expert, or one level of it), in memory or not, and the order of leaving
// that follows from it. A level is used whenever a finer one of its expert is, and is told so after it: then no level
// ranks below a finer one of its expert.
//
// next_use is local routing consistency put to work: consecutive tokens use similar experts, so how likely an expert is
// at its layer's next turn follows from how recently and how often the layer's last tokens used it: a use counts
// kDecay^n after n more tokens. Every layer has one turn in a pass; of two equally likely experts the one whose layer
// was just computed is needed later and leaves.
//
// A rank is a number that stays what it is until something happens to its section or its layer, so that an order of
// many sections can be kept up to date (CheapestRuns) instead of being made anew.
class EvictionRanking {
  public:
    EvictionRanking(Eviction policy, std::vector<int32_t> layer_of_section, int layers);

    // Layer `layer` is about to compute `tokens` tokens. The number of layers that were passed on the way to it from
    // the last one (the first follows the last), itself included: only their sections have another rank now.
    int begin_turn(int layer, int tokens);
    // The section works in the current turn; `last_token` is the last of the turn's tokens that uses it, `uses` how
    // many. No other section's rank changes.
    void use(int section, int last_token, int uses);

    // Smaller leaves first.
    struct Rank {
        double first = 0;
        uint64_t second = 0;
        auto operator<=>(const Rank&) const = default;
    };
    Rank rank(int section) const;

  private:
    static constexpr double kDecay = 0.99;
    static constexpr int kHorizon = 1024;  // tokens after which a use counts nothing

    double likelihood(int section) const;

    Eviction policy_;
    std::vector<int32_t> layer_of_;
    std::vector<uint64_t> last_use_;  // clock of the last use, 0 for never
    std::vector<uint32_t> uses_;
    std::vector<double> score_;           // decayed uses as of last_token_
    std::vector<uint64_t> last_token_;    // of the section's layer
    std::vector<uint64_t> layer_tokens_;  // tokens each layer has computed, those of its current turn included
    std::vector<uint64_t> passed_;        // when each layer was passed last, in layers passed since the beginning
    std::array<double, kHorizon> decay_;
    int layer_ = -1;
    int layers_;
    uint64_t turn_begin_ = 0;
    uint64_t clock_ = 0;
};

}  // namespace edgemoe
