// Routed experts: on disk, in memory slots, and on the way between the two.
//
// The forward pass opens an ExpertStream over the experts a layer needs. The store hands back those that are in memory
// at once and reads the others meanwhile; the pass computes what it was given, releases it, and asks for more.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/direct_file.h"
#include "edgemoe/eviction.h"
#include "edgemoe/pack_index.h"

namespace edgemoe {

// An expert's matrices in memory; valid until it is released.
struct ExpertWeights {
    const std::byte* gate;
    const std::byte* up;
    const std::byte* down;
};

struct StoreCounters {
    uint64_t experts_requested = 0;
    uint64_t experts_hit = 0;
    uint64_t sections_read = 0;
    uint64_t bytes_read = 0;
    uint64_t evictions = 0;
    uint64_t prefetch_issued = 0;  // sections read because they were predicted
    uint64_t prefetch_used = 0;    // ... that were there when they were needed
    uint64_t prefetch_late = 0;    // ... that were still being read when they were needed
    uint64_t prefetch_wasted = 0;  // ... that left unused
    double stall_seconds = 0;      // the pass waited and had nothing to compute
    double read_seconds = 0;       // at least one read was under way
};

// Whether reading ahead pays, from what was measured so far.
//
// Between the last read that a layer had to wait for and the first one of the next layer the disk is idle for some time
// `window`. A read of duration `read` begun in it saves what of it fits into the window if the prediction holds. If
// not, what does not fit delays a read that is needed, and something was pushed out for nothing. So predictions are
// read while that comes out positive: many small experts behind much arithmetic, none where one read outlasts the
// window.
class LookAhead {
  public:
    // Predictions worth reading in the next window; now and then one more, to see whether things have changed.
    int worth(int readers);
    void observe_window(double seconds) { blend(window_, seconds); }
    void observe_read(double seconds) { blend(read_, seconds); }
    void observe_prediction(bool held) { blend(precision_, held ? 1.0 : 0.0); }

  private:
    static void blend(double& average, double value) { average += 0.05 * (value - average); }

    double window_ = 0;
    double read_ = 0;
    double precision_ = 0.75;
    int turns_ = 0;
};

struct StoreOptions {
    int slots = 0;    // experts in memory; each takes slot_bytes(), touched when first used
    int readers = 2;  // reading threads
    Eviction eviction = Eviction::next_use;
    bool prefetch = true;
};

class ExpertStore {
  public:
    ExpertStore(const PackIndex& index, const std::vector<std::unique_ptr<DirectFile>>& files, StoreOptions options);
    ~ExpertStore();
    ExpertStore(const ExpertStore&) = delete;
    ExpertStore& operator=(const ExpertStore&) = delete;

    // Memory one expert takes: its extents, each with the block-aligned span around it, and room for rows that a
    // row-major matrix lacks to whole row blocks.
    static size_t slot_bytes(const PackIndex& index);

    // Whether predictions can be of use: some expert is not in memory, and there is room to be wrong.
    bool wants_hints() const;

    // `experts` of `layer` are expected next, the most likely first. What is in memory of them is kept; what is not is
    // read as long as no expert that is known to be needed waits for the disk. Replaces the previous hint.
    void hint(int layer, std::span<const int32_t> experts);

    StoreCounters counters() const;

  private:
    friend class ExpertStream;

    enum class State : uint8_t { empty, queued, reading, present, failed };

    struct Slot {
        int32_t expert = -1;  // global expert number, -1 for none
        int pins = 0;
        State state = State::empty;
        bool speculative = false;  // read because of a hint, and not needed so far
    };

    int global_number(int layer, int expert) const { return first_expert_[layer] + expert; }
    // The following are called with the mutex held.
    int pin(int global);                 // the expert's slot, queueing a read if necessary; -1: every slot is taken
    int make_room(bool for_prediction);  // an empty slot, or -1
    int next_request();                  // a slot to fill, or -1
    void count_use(Slot& slot);
    void abandon(std::unique_lock<std::mutex>& lock);

    void read_loop();
    void read_into(int global, std::byte* slot, std::vector<std::byte>& scratch) const;
    ExpertWeights weights(int global, const std::byte* slot) const;

    const PackIndex& index_;
    const std::vector<std::unique_ptr<DirectFile>>& files_;
    StoreOptions options_;
    std::vector<int32_t> first_expert_;         // [layers]
    std::vector<std::pair<int, int>> experts_;  // global number -> (layer, expert)
    std::vector<int32_t> slot_of_;              // global number -> slot, -1 where not in memory
    std::vector<uint8_t> hinted_;               // global number -> expected by the current hint
    size_t slot_bytes_;
    Arena arena_;
    std::vector<Slot> slots_;
    EvictionRanking ranking_;

    mutable std::mutex mutex_;
    std::condition_variable work_;   // readers wait for requests
    std::condition_variable ready_;  // the pass waits for experts
    std::deque<int32_t> demands_;    // slots to fill, in the order asked for
    std::deque<int32_t> hints_;      // experts (global) to read when the disk has nothing better to do
    std::vector<int32_t> hint_;      // all experts of the current hint
    std::vector<int32_t> ahead_;     // those of them that were read because of it
    int ahead_limit_ = 0;
    LookAhead look_ahead_;
    std::chrono::steady_clock::time_point idle_since_;  // of the disk, but for predictions
    bool idle_ = false;
    StoreCounters counters_;
    int demands_reading_ = 0;
    int reading_ = 0;
    std::chrono::steady_clock::time_point reading_since_;
    bool stop_ = false;
    std::exception_ptr error_;
    std::vector<std::thread> readers_;
};

// One layer's walk over the experts it needs. Not copyable; releases what it holds when it goes.
class ExpertStream {
  public:
    struct Need {
        int32_t expert;      // of the layer
        int32_t last_token;  // the last of the turn's tokens that uses it
        int32_t uses;        // tokens that use it
    };
    struct Item {
        int position;  // in the `needs` given
        ExpertWeights weights;
    };

    // `needs`: distinct experts of the layer, in the order in which they should be read, for a turn of `tokens` tokens.
    ExpertStream(ExpertStore& store, int layer, int tokens, std::span<const Need> needs);
    ~ExpertStream();
    ExpertStream(const ExpertStream&) = delete;
    ExpertStream& operator=(const ExpertStream&) = delete;

    // Releases what the last call returned, then gives all experts that are in memory now, waiting for at least one;
    // empty once every expert has been given. Throws IoError where one could not be read.
    std::span<const Item> next();

  private:
    ExpertStore& store_;
    std::vector<int32_t> experts_;  // global numbers
    std::vector<int32_t> pinned_;   // slot of each, -1 before it has one, -2 after it was given and released
    std::vector<Item> items_;
    size_t asked_ = 0;
    size_t given_ = 0;
};

}  // namespace edgemoe
