#include "store/cheapest_runs.h"

#include <algorithm>
#include <bit>

namespace edgemoe {

CheapestRuns::CheapestRuns(size_t units, int longest_run) {
    const auto longest = static_cast<size_t>(longest_run);
    // At least two of the longest runs, so that every run has a neighbour.
    const size_t all = std::bit_ceil(std::max(units, 2 * longest));
    for (size_t length = 1; length <= longest; length *= 2) {
        Tournament& tournament = tournaments_.emplace_back();
        const size_t runs = all / length;
        tournament.longest = length == longest;
        tournament.costs.assign(runs, Cost{Cost::Kind::stays, {}, 0});
        std::fill_n(tournament.costs.begin(), units / length, Cost{});
        tournament.winners.resize(2 * runs);
        for (size_t run = 0; run < runs; ++run) tournament.winners[runs + run] = static_cast<int32_t>(run);
        for (size_t node = runs - 1; node > 0; --node) tournament.play(node);
    }
}

// Whether the run `right` is no better than the one before it.
bool CheapestRuns::Tournament::beats(int32_t left, int32_t right) const {
    const auto order = costs[left] <=> costs[right];
    if (order != 0 || costs[left].kind != Cost::Kind::free || longest) return order <= 0;
    const auto beside = [this](int32_t run) { return costs[run ^ 1].kind != Cost::Kind::free; };
    return beside(left) || !beside(right);
}

void CheapestRuns::Tournament::play(size_t node) {
    const int32_t left = winners[2 * node], right = winners[2 * node + 1];
    winners[node] = beats(left, right) ? left : right;
}

// The match with its neighbour is the first that a run plays: whether that one lies beside something has changed, too.
void CheapestRuns::Tournament::replay(size_t changed) {
    for (size_t node = (costs.size() + changed) / 2; node > 0; node /= 2) {
        const int32_t before = winners[node];
        play(node);
        if (winners[node] == before && static_cast<size_t>(before) / 2 != changed / 2) return;
    }
}

void CheapestRuns::set(size_t unit, const Cost& cost) {
    Cost dearest = cost;
    size_t run = unit;
    for (Tournament& tournament : tournaments_) {
        if (tournament.costs[run] == dearest) return;
        tournament.costs[run] = dearest;
        tournament.replay(run);
        dearest = std::max(dearest, tournament.costs[run ^ 1]);
        run /= 2;
    }
}

CheapestRuns::Run CheapestRuns::cheapest(int run) const {
    const Tournament& tournament = tournaments_[std::countr_zero(static_cast<unsigned>(run))];
    const int32_t winner = tournament.winners[1];
    return {winner * run, tournament.costs[winner]};
}

}  // namespace edgemoe
