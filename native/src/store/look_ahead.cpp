#include "store/look_ahead.h"

#include <algorithm>
#include <utility>

namespace edgemoe {

using Clock = std::chrono::steady_clock;

double LookAhead::worth(int readers) {
    constexpr double kPushedOut = 0.15;  // chance that what made room is missed before long
    int count = 0;
    for (double left = window_; left > 0 && read_ > 0; left -= read_ / readers, ++count) {
        const double saved = precision_ * std::min(left, read_);
        const double lost = (1 - precision_) * (std::max(read_ - left, 0.0) + kPushedOut * read_);
        if (saved <= lost) break;
    }
    return (++turns_ % 16 == 0 ? std::max(count, 1) : count) * std::max(bytes_, 1.0);
}

void Predictions::replace(std::span<const Expected> experts) {
    for (const int32_t expert : expected_) memory_.expect(expert, false);
    expected_.clear();
    unread_.clear();
    ahead_.clear();
    if (experts.empty()) return;
    ahead_bytes_ = 0;
    ahead_limit_ = look_ahead_.worth(readers_);
    int finest = 0;
    for (const Expected& expected : experts) {
        expected_.push_back(expected.expert);
        memory_.expect(expected.expert, true);
        finest = std::max(finest, layout_.piece_of(expected.level));
    }
    for (int number = 0; number <= finest; ++number)
        for (const Expected& expected : experts) {
            const int piece = layout_.first_piece(expected.expert) + number;
            if (number <= layout_.piece_of(expected.level) && !memory_.has_place(piece)) unread_.push_back(piece);
        }
}

std::optional<int32_t> Predictions::next() {
    while (!unread_.empty() && ahead_bytes_ < ahead_limit_) {
        const int32_t piece = unread_.front();
        unread_.pop_front();
        const Piece& facts = layout_.piece(piece);
        if (memory_.has_place(piece) || (facts.level > 0 && !memory_.has_place(piece - 1))) continue;
        if (!memory_.place_speculative(piece)) {
            unread_.clear();
            break;
        }
        counters_.prefetch_issued += facts.sections();
        ahead_.push_back(piece);
        ahead_bytes_ += static_cast<double>(facts.bytes);
        return piece;
    }
    return {};
}

void Predictions::needed(int piece) {
    if (!memory_.is_speculative(piece)) return;
    const bool in_time = memory_.state(piece) == PieceState::present;
    (in_time ? counters_.prefetch_used : counters_.prefetch_late) += layout_.piece(piece).sections();
    memory_.set_needed(piece);
}

void Predictions::failed(int piece) {
    if (!memory_.is_speculative(piece)) return;
    counters_.prefetch_wasted += layout_.piece(piece).sections();
    memory_.set_needed(piece);
}

void Predictions::layer_begins() {
    for (const int32_t piece : ahead_)
        look_ahead_.observe_prediction(memory_.has_place(piece) && !memory_.is_speculative(piece));
    ahead_.clear();
    unread_.clear();
}

void Predictions::disk_idles() { idle_since_ = Clock::now(); }

void Predictions::disk_is_needed() {
    if (const auto since = std::exchange(idle_since_, std::nullopt))
        look_ahead_.observe_window(std::chrono::duration<double>(Clock::now() - *since).count());
}

}  // namespace edgemoe
