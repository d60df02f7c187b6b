#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "edgemoe/routing_metrics.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace edgemoe {
namespace {

int count_bits(uint64_t word) {
    // std::popcount is a library call where the instruction is not assumed.
    word -= (word >> 1) & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
    return static_cast<int>((((word + (word >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u) >> 56);
}

// Which experts were used more recently than a given one, without a list to reorder: every use sets a bit at its time
// and clears that of the expert's last use, so the distance is the number of bits after it.
class Recency {
  public:
    explicit Recency(int experts)
        : time_(experts, -1),
          capacity_(std::max(1024, (4 * experts + kGroup - 1) / kGroup * kGroup)),
          words_(capacity_ / 64),
          in_word_(capacity_ / 64),
          in_group_(capacity_ / kGroup),
          user_(capacity_) {}

    bool seen(int expert) const { return time_[expert] >= 0; }

    int distance(int expert) const {
        const int time = time_[expert], word = time / 64, group = time / kGroup;
        int result = count_bits(words_[word] >> (time % 64)) - 1;
        const int end = (group + 1) * (kGroup / 64);
        for (int i = word + 1; i < end; ++i) result += in_word_[i];
        const int last = (now_ - 1) / kGroup;
        for (int i = group + 1; i <= last; ++i) result += in_group_[i];
        return result;
    }

    void use(int expert) {
        if (now_ == capacity_) compact();
        if (time_[expert] >= 0) flip(time_[expert], -1);
        time_[expert] = now_;
        user_[now_] = static_cast<uint16_t>(expert);
        flip(now_++, 1);
    }

  private:
    static constexpr int kGroup = 1024;

    void flip(int time, int change) {
        words_[time / 64] ^= uint64_t(1) << (time % 64);
        in_word_[time / 64] = static_cast<uint8_t>(in_word_[time / 64] + change);
        in_group_[time / kGroup] = static_cast<uint16_t>(in_group_[time / kGroup] + change);
    }

    void compact() {
        int kept = 0;
        for (int time = 0; time < now_; ++time) {
            if (!(words_[time / 64] >> (time % 64) & 1)) continue;
            user_[kept] = user_[time];
            time_[user_[kept]] = kept;
            ++kept;
        }
        std::fill(words_.begin(), words_.end(), 0);
        std::fill(in_word_.begin(), in_word_.end(), 0);
        std::fill(in_group_.begin(), in_group_.end(), 0);
        for (now_ = 0; now_ < kept; ++now_) flip(now_, 1);
    }

    std::vector<int32_t> time_;
    int capacity_;
    std::vector<uint64_t> words_;
    std::vector<uint8_t> in_word_;
    std::vector<uint16_t> in_group_;
    std::vector<uint16_t> user_;
    int now_ = 0;
};

constexpr int kScan = 16;

// The first of the kScan values that is below `limit`, kScan if none is.
template <class Key>
int first_below(const Key* values, Key limit) {
    Key any = 0;
    for (int i = 0; i < kScan; ++i) any |= static_cast<Key>(values[i] < limit);
    if (!any) return kScan;
    int i = 0;
    while (values[i] >= limit) ++i;
    return i;
}

#if defined(__SSE2__)
template <>
int first_below(const int32_t* values, int32_t limit) {
    const auto* blocks = reinterpret_cast<const __m128i*>(values);
    const __m128i wanted = _mm_set1_epi32(limit);
    const auto below = [&](int i) { return _mm_cmplt_epi32(_mm_loadu_si128(blocks + i), wanted); };
    const __m128i mask = _mm_packs_epi16(_mm_packs_epi32(below(0), below(1)), _mm_packs_epi32(below(2), below(3)));
    return std::countr_zero(static_cast<uint32_t>(_mm_movemask_epi8(mask)) | 1u << kScan);
}
#endif

// All cache sizes of a policy at once (Mattson's priority stack): the first c entries are what a cache of c slots
// holds. A used expert goes to the top; the one that was there sinks, and wherever it meets an expert of lower
// priority it takes that place and the other sinks on, down to where the used expert was.
template <class Key>
class PriorityStack {
  public:
    explicit PriorityStack(int experts) : keys_(experts + kScan), ids_(experts), place_(experts, -1) {}

    int place(int expert) const { return place_[expert]; }  // -1: never used

    void change(int expert, Key key) {
        if (place_[expert] >= 0) keys_[place_[expert]] = key;
    }

    void use(int expert, Key key) {
        int end = place_[expert];
        if (end < 0) end = size_++;
        if (end > 0) {
            Key sinking = keys_[0];
            uint16_t id = ids_[0];
            for (int begin = 1; begin < end;) {
                const int step = first_below(&keys_[begin], sinking);
                begin += step;
                if (step == kScan) continue;
                if (begin >= end) break;
                std::swap(sinking, keys_[begin]);
                std::swap(id, ids_[begin]);
                place_[ids_[begin]] = begin;
                ++begin;
            }
            keys_[end] = sinking;
            ids_[end] = id;
            place_[id] = end;
        }
        keys_[0] = key;
        ids_[0] = static_cast<uint16_t>(expert);
        place_[expert] = 0;
    }

  private:
    std::vector<Key> keys_;
    std::vector<uint16_t> ids_;
    std::vector<int32_t> place_;
    int size_ = 0;
};

void count_lru(const Picks& picks, std::span<int64_t> hits) {
    Recency recency(picks.experts);
    int seen = 0;
    for (int token = 0; token < picks.tokens; ++token) {
        const auto row = picks.row(token);
        for (const int expert : row) ++hits[recency.seen(expert) ? recency.distance(expert) : seen++];
        for (const int expert : row) recency.use(expert);
    }
}

// Least often used, then least recently. A use only ever raises an expert, so a cache of c slots holds the c - 1 best
// by that order and one more: the next best, or one of lower rank that was used when it was not in the cache and has
// not been dropped since. Such an expert of rank `high` is in the caches of `low` to `high` - 1 slots; those are all
// the gaps there are (the way of moe-lrc).
void count_lfu(const Picks& picks, std::span<int64_t> hits) {
    struct Gap {
        int low, high;  // ranks and slots from 1 on
    };
    std::vector<Gap> gaps{{1, picks.experts + 1}};
    std::vector<int32_t> count(picks.experts), rank(picks.experts);  // rank 0: never used
    std::vector<uint16_t> order(picks.experts + 1);                  // by rank
    int seen = 0;
    const auto gap_of = [&](int place) {
        return std::find_if(gaps.begin(), gaps.end(), [&](const Gap& gap) { return gap.high >= place; });
    };
    for (int token = 0; token < picks.tokens; ++token) {
        const auto row = picks.row(token);
        int fresh = seen;
        for (const int expert : row) {
            const int place = rank[expert];
            if (place == 0) {
                ++hits[fresh++];
                continue;
            }
            const auto gap = gap_of(place);
            int slots = place;
            if (gap != gaps.end()) slots = place == gap->high ? gap->low : place + (place >= gap->low);
            ++hits[slots - 1];
        }
        for (const int expert : row) {
            const int place = rank[expert] ? rank[expert] : picks.experts + 1;
            int to = rank[expert] ? rank[expert] : ++seen;
            ++count[expert];
            for (; to > 1 && count[order[to - 1]] <= count[expert]; --to) {
                order[to] = order[to - 1];
                rank[order[to]] = to;
            }
            order[to] = static_cast<uint16_t>(expert);
            rank[expert] = to;

            auto rest = gap_of(place);
            const bool split = rest != gaps.end() && rest->low <= place;
            const Gap below = split ? Gap{place + 1, rest->high} : Gap{1, 1};
            if (split) ++rest;
            gaps.erase(gaps.begin(), rest);
            if (below.high > below.low) gaps.insert(gaps.begin(), below);
            if (to > 1) gaps.insert(gaps.begin(), {1, to});
        }
    }
}

// Keys must order the experts other than the used one; equal keys never decide about a hit.
template <class Key>
void count_priority(const Picks& picks, CachePolicy policy, int window, std::span<int64_t> hits) {
    const int tokens = picks.tokens, k = picks.k;
    const Key uses = static_cast<Key>(tokens) * k + 1;  // a time is less than this, so count * uses + time orders both
    PriorityStack<Key> stack(picks.experts);
    std::vector<Key> count(picks.experts, 0), last(picks.experts, 0), next;
    if (policy == CachePolicy::belady) {
        // next[i]: when the expert of use i is used again.
        next.resize(size_t(tokens) * k);
        std::vector<Key> upcoming(picks.experts, uses);
        for (Key i = static_cast<Key>(next.size()); i-- > 0;) {
            next[i] = upcoming[picks.data[i]];
            upcoming[picks.data[i]] = i;
        }
    }
    if (policy == CachePolicy::future)
        for (int token = 0; token < std::min(window, tokens); ++token)
            for (const int expert : picks.row(token)) ++count[expert];

    int seen = 0;
    Key now = 0;
    for (int token = 0; token < tokens; ++token) {
        const auto row = picks.row(token);
        for (const int expert : row) ++hits[stack.place(expert) >= 0 ? stack.place(expert) : seen++];
        for (const int expert : row) {
            ++now;
            last[expert] = now;
            if (policy == CachePolicy::belady)
                stack.use(expert, -next[now - 1]);
            else
                stack.use(expert, --count[expert] * uses + now);
        }
        if (policy == CachePolicy::future && token + window < tokens)
            for (const int expert : picks.row(token + window))
                stack.change(expert, ++count[expert] * uses + last[expert]);
    }
}

}  // namespace

void count_hits(const Picks& picks, CachePolicy policy, int window, std::span<int64_t> hits) {
    if (policy == CachePolicy::lru) return count_lru(picks, hits);
    if (policy == CachePolicy::lfu) return count_lfu(picks, hits);
    // The largest key is below (tokens + 1) * (tokens * k + 1).
    const double largest = (picks.tokens + 1.0) * (double(picks.tokens) * picks.k + 1);
    if (largest < std::numeric_limits<int32_t>::max())
        count_priority<int32_t>(picks, policy, window, hits);
    else
        count_priority<int64_t>(picks, policy, window, hits);
}

PoolSimulator::PoolSimulator(std::span<const int64_t> sizes, int64_t capacity)
    : sizes_(sizes.begin(), sizes.end()),
      free_(capacity),
      previous_(sizes.size() + 1),
      next_(sizes.size() + 1),
      present_(sizes.size()) {
    previous_.back() = next_.back() = static_cast<int32_t>(sizes.size());
}

void PoolSimulator::unlink(int32_t item) {
    next_[previous_[item]] = next_[item];
    previous_[next_[item]] = previous_[item];
}

void PoolSimulator::push_front(int32_t item) {
    const auto end = static_cast<int32_t>(sizes_.size());
    next_[item] = next_[end];
    previous_[item] = end;
    previous_[next_[end]] = item;
    next_[end] = item;
}

void PoolSimulator::request(std::span<const int32_t> items, int64_t& missed) {
    const auto end = static_cast<int32_t>(sizes_.size());
    missing_.clear();
    for (const int32_t item : items) {
        // What is asked for is no candidate for eviction while the others are read.
        if (present_[item])
            unlink(item);
        else
            missing_.push_back(item);
    }
    size_t done = 0;  // of the items asked for, those that have left again
    for (const int32_t item : missing_) {
        counters_.missed_size += sizes_[item];
        while (free_ < sizes_[item]) {
            int32_t victim = previous_[end];
            if (victim != end) {
                unlink(victim);
            } else {
                while (done < items.size() && !present_[items[done]]) ++done;
                if (done == items.size()) break;
                victim = items[done];
            }
            present_[victim] = 0;
            free_ += sizes_[victim];
            ++counters_.evictions;
        }
        if (free_ < sizes_[item]) continue;
        free_ -= sizes_[item];
        present_[item] = 1;
    }
    for (const int32_t item : items)
        if (present_[item]) push_front(item);
    const auto misses = static_cast<int64_t>(missing_.size());
    counters_.requested += static_cast<int64_t>(items.size());
    counters_.hit += static_cast<int64_t>(items.size()) - misses;
    missed += misses;
}

}  // namespace edgemoe
