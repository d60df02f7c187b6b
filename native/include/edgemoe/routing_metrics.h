// Measures of how a model routes its tokens, and caches that serve what it asks for.
//
// Everything here works on picks: the experts chosen for a token in one layer, by descending score, none twice. Sizes
// are checked by the callers (the Python binding); nothing here allocates by what a file says.
//
// A hit is counted as in the code of arXiv 2505.16056: all picks of a token are judged against the cache as it was
// before the token, and the first pick of an expert is a hit as long as fewer experts have been seen than there are
// slots (a free slot costs nothing), so that a cache of all experts hits always. Evictions happen pick by pick.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace edgemoe {

// The picks of one sequence in one layer, or in a whole model whose experts are numbered through.
struct Picks {
    const uint16_t* data = nullptr;  // [tokens, k]
    int tokens = 0;
    int k = 0;
    int experts = 0;

    std::span<const uint16_t> row(int token) const { return {data + size_t(token) * k, size_t(k)}; }
};

enum class CachePolicy { lru, lfu, future, belady };

// Hits by the least number of slots that makes them one: hits[c] += picks that hit in a cache of c + 1 slots and in
// none smaller. `window` is the length of `future` only: evict the expert that the next tokens (`window` of them,
// the current one included) use least, among equals the least recently used.
void count_hits(const Picks& picks, CachePolicy policy, int window, std::span<int64_t> hits);

// How often experts are picked within windows of m consecutive tokens, all overlapping windows of every sequence added.
// A sequence shorter than m has none.
class WindowCounts {
  public:
    // Without `by_expert` only best_fixed() and windows() are kept.
    WindowCounts(int experts, int m, bool by_expert);

    void add(const Picks& picks);

    int64_t windows() const { return windows_; }
    // [experts, m + 1]: windows in which the expert is picked so often.
    std::span<const int64_t> by_expert() const { return by_expert_; }
    // [m + 1]: the same over all experts.
    std::vector<int64_t> totals() const;
    // [experts]: picks caught by the c + 1 experts that a window picks most often, summed over the windows.
    std::vector<int64_t> best_fixed() const;

  private:
    int experts_, m_;
    int64_t windows_ = 0;
    std::vector<int64_t> by_expert_;
    std::vector<int64_t> reached_by_;  // [experts + 1]: pairs of a window and a count >= 1 that so many experts reach
    std::vector<int32_t> count_, since_, reached_, reached_since_;
};

// A pool of slots shared by everything that is asked for, least recently used first out, as the engine's store does it:
// what is asked for together is used in the order given, what of it is in the pool stays while the rest is read, and
// where even that does not fit, the first of it leave again. What is larger than the pool is read and not kept.
class PoolSimulator {
  public:
    struct Counters {
        int64_t requested = 0;
        int64_t hit = 0;
        int64_t evictions = 0;
        int64_t missed_size = 0;  // of all that was missing
    };

    // `sizes` [items] and the capacity in the same unit.
    PoolSimulator(std::span<const int64_t> sizes, int64_t capacity);

    // Asks for the items of one group; adds the misses to `missed` [groups] at `group`.
    void request(std::span<const int32_t> items, int64_t& missed);
    const Counters& counters() const { return counters_; }

  private:
    void unlink(int32_t item);
    void push_front(int32_t item);

    std::vector<int64_t> sizes_;
    int64_t free_;
    std::vector<int32_t> previous_, next_;  // the last entry is the list's end
    std::vector<uint8_t> present_;
    std::vector<int32_t> missing_;
    Counters counters_;
};

}  // namespace edgemoe
