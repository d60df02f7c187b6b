// Which run of memory units a section should take: one that is free, or that whose content is missed least.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "edgemoe/eviction.h"

namespace edgemoe {

// What it costs to take a unit of memory; smaller is better.
struct Cost {
    enum class Kind : uint8_t {
        free,      // nothing lies there
        leaves,    // what lies there can leave
        expected,  // ... but is expected next, and leaves only when nothing else can
        stays,     // it is in use
    };
    Kind kind = Kind::free;
    EvictionRanking::Rank rank;
    int32_t level = 0;  // negative: of equal ones the finest goes first
    auto operator<=>(const Cost&) const = default;
};

// All runs of 1, 2, 4, ... units that begin at a multiple of their length, and for each length the cheapest of them. A
// run costs what the dearest of its units does.
//
// For each length there is a tournament (Knuth, The Art of Computer Programming, volume 3, 5.4.1 and 5.2.3): a binary
// tree over the runs in which every node knows the cheapest below it. Where a cost changes, the matches above it are
// played anew up to the first that another run wins as it did before. There are few, since few runs are the cheapest of
// many.
class CheapestRuns {
  public:
    CheapestRuns() = default;
    CheapestRuns(size_t units, int longest_run);  // all free

    void set(size_t unit, const Cost& cost);

    struct Run {
        int begin;
        Cost cost;
    };
    // The cheapest run of this length; of equal ones the first, and of free ones the first beside what is taken, if
    // there is one, so that longer runs stay free. Its cost is `stays` where no run can be taken.
    Run cheapest(int run) const;

  private:
    // Runs of one length. They are made up to a power of two with runs that stay.
    struct Tournament {
        std::vector<Cost> costs;
        std::vector<int32_t> winners;  // [2 * runs]: of node n's children 2 n and 2 n + 1; from [runs] on the runs
        bool longest;

        void play(size_t node);
        void replay(size_t changed);
        bool beats(int32_t left, int32_t right) const;
    };

    std::vector<Tournament> tournaments_;  // [binary logarithm of the length]
};

}  // namespace edgemoe
