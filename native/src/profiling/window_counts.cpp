#include <algorithm>

#include "edgemoe/routing_metrics.h"

namespace edgemoe {

WindowCounts::WindowCounts(int experts, int m, bool by_expert)
    : experts_(experts),
      m_(m),
      by_expert_(by_expert ? size_t(experts) * (m + 1) : 0),
      reached_by_(experts + 1),
      count_(experts),
      since_(experts),
      reached_(m + 1),
      reached_since_(m + 1) {}

// A count stays for a run of windows and changes when a pick enters or leaves: the run is booked when it ends. The same
// for the number of experts that reach a count, from which the picks of the best c experts follow: the sum of the c
// largest counts is the sum over v >= 1 of min(c, experts with at least v picks).
void WindowCounts::add(const Picks& picks) {
    if (picks.tokens < m_) return;
    const int windows = picks.tokens - m_ + 1;
    std::fill(count_.begin(), count_.end(), 0);
    std::fill(since_.begin(), since_.end(), 0);
    std::fill(reached_.begin(), reached_.end(), 0);
    std::fill(reached_since_.begin(), reached_since_.end(), 0);
    for (int token = 0; token < m_; ++token)
        for (const int expert : picks.row(token)) ++reached_[++count_[expert]];

    // Books what held until `window`: the expert's count, and how many experts reach `reached`.
    const bool by_expert = !by_expert_.empty();
    const auto book = [&](int expert, int reached, int window) {
        if (by_expert) {
            by_expert_[size_t(expert) * (m_ + 1) + count_[expert]] += window - since_[expert];
            since_[expert] = window;
        }
        reached_by_[reached_[reached]] += window - reached_since_[reached];
        reached_since_[reached] = window;
    };
    for (int window = 1; window < windows; ++window) {
        for (const int expert : picks.row(window - 1)) {
            book(expert, count_[expert], window);
            --reached_[count_[expert]--];
        }
        for (const int expert : picks.row(window + m_ - 1)) {
            book(expert, count_[expert] + 1, window);
            ++reached_[++count_[expert]];
        }
    }
    if (by_expert)
        for (int expert = 0; expert < experts_; ++expert)
            by_expert_[size_t(expert) * (m_ + 1) + count_[expert]] += windows - since_[expert];
    for (int count = 1; count <= m_; ++count) reached_by_[reached_[count]] += windows - reached_since_[count];
    windows_ += windows;
}

std::vector<int64_t> WindowCounts::totals() const {
    std::vector<int64_t> result(m_ + 1);
    for (size_t i = 0; i < by_expert_.size(); ++i) result[i % (m_ + 1)] += by_expert_[i];
    return result;
}

std::vector<int64_t> WindowCounts::best_fixed() const {
    std::vector<int64_t> result(experts_);
    int64_t gain = 0, sum = 0;  // of the next slot: every pair that at least so many experts reach
    for (int n = 1; n <= experts_; ++n) gain += reached_by_[n];
    for (int c = 1; c <= experts_; ++c) {
        result[c - 1] = sum += gain;
        gain -= reached_by_[c];
    }
    return result;
}

}  // namespace edgemoe
