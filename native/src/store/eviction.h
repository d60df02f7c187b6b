// The order in which sections leave memory.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <vector>

#include "edgemoe/store_options.h"

namespace edgemoe {

// What is remembered about every section (an expert, or one level of it), in memory or not, and the order of leaving
// that follows from it. A level is used whenever a finer one of its expert is, and is told so after it: then no level
// ranks below a finer one of its expert.
//
// next_use is local routing consistency put to work: consecutive tokens use similar experts, so how likely an expert is
// at its layer's next turn follows from how recently and how often rows of the last turns used it: what happened counts
// kDecay^n after the sequences have gone on by n more tokens. With q the share of rows that use it, and as many rows in
// its next turn as in the current one, it is used then with p = 1 - (1 - q)^rows, and one that is not then, in the turn
// after it with p, and so on. So its next use is 1 / p - 1 passes behind its layer's next turn, and what is used last
// leaves first, as Belady's rule has it. With one row the differences of p decide; with many rows, when most experts of
// each layer are used in every pass, those of the layer that was just computed leave, and what stays of each layer is
// there when its turn comes, where an order by time alone would evict everything just before its use.
//
// A rank is a number that stays what it is until something happens to its section or its layer, so that an order of
// many sections can be kept up to date (CheapestRuns) instead of being made anew.
// What a layer computes in a pass.
struct Turn {
    int rows;
    int steps;  // the most rows that one sequence has of them
};

class EvictionRanking {
  public:
    EvictionRanking(Eviction policy, std::vector<int32_t> layer_of_section, int layers);

    // A layer is about to compute `turn`. The number of layers, up to that one, whose sections may have another rank
    // now: those that were passed on the way to it from the last one (the first follows the last), itself included; all
    // layers where the turn has another number of rows than the last one.
    int begin_turn(int layer, const Turn& turn);
    // The section works in the current turn; `last_row` is the last of the turn's rows that uses it, `uses` how many.
    // No other section's rank changes.
    void use(int section, int last_row, int uses);

    // Smaller leaves first.
    struct Rank {
        double first = 0;
        uint64_t second = 0;
        auto operator<=>(const Rank&) const = default;
    };
    Rank rank(int section) const;

  private:
    static constexpr double kDecay = 0.99;
    static constexpr int kHorizon = 1024;  // steps after which a use counts nothing
    // More rows tell nothing: what most of them use is used, however many there are.
    static constexpr int kMostRows = 64;

    struct Layer {
        uint64_t steps = 0;   // that its sequences have gone on by, the current turn's included
        double rows = 0;      // that it computed, decayed
        uint64_t passed = 0;  // when it was passed last, in layers passed since the beginning
    };

    double decay(uint64_t steps) const { return steps < kHorizon ? decay_[steps] : 0; }
    // The sum of decay(0) ... decay(steps - 1).
    double decayed(uint64_t steps) const { return (1 - kDecay * decay(steps - 1)) / (1 - kDecay); }
    double passes_to_next_use(int section) const;

    Eviction policy_;
    std::vector<int32_t> layer_of_;
    std::vector<uint64_t> last_use_;  // clock of the last use, 0 for never
    std::vector<uint32_t> uses_;
    std::vector<double> score_;        // decayed uses as of last_step_
    std::vector<uint64_t> last_step_;  // of the section's layer
    std::vector<Layer> layers_;
    std::array<double, kHorizon> decay_;
    int layer_ = -1;
    Turn turn_{1, 1};
    uint64_t clock_ = 0;
};

}  // namespace edgemoe
