// Experts that are expected next: what of them is read before it is asked for, and how much of that pays.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "edgemoe/store_options.h"
#include "store/layout.h"
#include "store/memory_tier.h"

namespace edgemoe {

// Whether reading ahead pays, from what was measured so far.
//
// Between the last read that a layer had to wait for and the first one of the next layer the disk is idle for some time
// `window`. A read of duration `read` begun in it saves what of it fits into the window if the prediction holds. If
// not, what does not fit delays a read that is needed, and something was pushed out for nothing. So predictions are
// read while that comes out positive: many small experts behind much arithmetic, none where one read outlasts the
// window.
class LookAhead {
  public:
    // Bytes of predictions worth reading in the next window, in reads of average length; now and then one more, to see
    // whether things have changed.
    double worth(int readers);
    void observe_window(double seconds) { blend(window_, seconds); }
    void observe_read(double seconds, uint64_t bytes) {
        blend(read_, seconds);
        if (bytes_ == 0) bytes_ = static_cast<double>(bytes);
        blend(bytes_, static_cast<double>(bytes));
    }
    void observe_prediction(bool held) { blend(precision_, held ? 1.0 : 0.0); }

  private:
    static void blend(double& average, double value) { average += 0.05 * (value - average); }

    double window_ = 0;
    double read_ = 0;
    double bytes_ = 0;
    double precision_ = 0.75;
    int turns_ = 0;
};

// The current prediction, and what comes of it. A part of ExpertStore, whose lock covers all calls.
class Predictions {
  public:
    struct Expected {
        int32_t expert;  // of all
        int32_t level;   // the finest that is expected to work
    };

    // Counts in `counters` what is read for predictions and what it was good for. All references must outlive this.
    Predictions(const StoreLayout& layout, MemoryTier& memory, int readers, StoreCounters& counters)
        : layout_(layout), memory_(memory), readers_(readers), counters_(counters) {}

    // These are expected next, the most likely first, in place of what was expected before. What is in memory of them
    // leaves last; what is not can be read, level 0 of all of them first.
    void replace(std::span<const Expected> experts);
    // No more is read for the current prediction.
    void stop_reading() { unread_.clear(); }
    bool waits() const { return !unread_.empty(); }
    // A piece to read now, which has a place and the state reading from then on. None: nothing is left, or no more
    // pays.
    std::optional<int32_t> next();

    // A piece is needed, wherever it is: a prediction may have come true.
    void needed(int piece);
    // A piece that was to be read could not be.
    void failed(int piece);
    // The layer that was predicted begins, and what is in memory for it is kept: how good was the prediction?
    void layer_begins();

    // The disk has read everything that was known to be needed; something is needed of it again; a pass begins, and the
    // time before it, a user's perhaps, says nothing.
    void disk_idles();
    void disk_is_needed();
    void pass_begins() { idle_since_.reset(); }
    // A needed read took so long.
    void observe_read(double seconds, uint64_t bytes) { look_ahead_.observe_read(seconds, bytes); }

  private:
    const StoreLayout& layout_;
    MemoryTier& memory_;
    int readers_;
    StoreCounters& counters_;
    LookAhead look_ahead_;
    std::vector<int32_t> expected_;  // experts
    std::deque<int32_t> unread_;     // pieces of them, in the order of reading
    std::vector<int32_t> ahead_;     // pieces that were read, or are being read
    double ahead_bytes_ = 0;         // of these
    double ahead_limit_ = 0;
    std::optional<std::chrono::steady_clock::time_point> idle_since_;  // of the disk, but for predictions
};

}  // namespace edgemoe
