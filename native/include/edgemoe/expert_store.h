// Routed experts: on disk, in memory, and on the way between the two.
//
// An expert is one section, or several where its weights are nested: level 0 by itself is a coarse expert, and every
// later level refines it. Sections are read, kept and dropped one by one, but a level is in memory only together with
// the coarser ones of its expert; where experts never work with less than all levels, all of them together.
//
// The forward pass opens an ExpertStream over the experts a layer needs. The store hands back those that are in memory
// at once and reads what others lack meanwhile; the pass computes what it was given, releases it, and asks for more.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/cheapest_runs.h"
#include "edgemoe/direct_file.h"
#include "edgemoe/eviction.h"
#include "edgemoe/pack_index.h"
#include "edgemoe/thread_group.h"

namespace edgemoe {

// Levels of an expert's matrices in memory; valid until it is released.
struct ExpertWeights {
    std::array<std::array<const std::byte*, kMaxLevels>, 3> parts;  // [gate, up, down][levels]
};

struct StoreCounters {
    uint64_t experts_requested = 0;
    uint64_t experts_hit = 0;      // all levels that were needed were in memory
    uint64_t sections_read = 0;    // whole and undamaged
    uint64_t bytes_read = 0;       // for these
    uint64_t evictions = 0;        // of sections
    uint64_t prefetch_issued = 0;  // sections read because they were predicted
    uint64_t prefetch_used = 0;    // ... that were there when they were needed
    uint64_t prefetch_late = 0;    // ... that were still being read when they were needed
    uint64_t prefetch_wasted = 0;  // ... that left unused, or could not be read
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

// How memory for experts is divided: into equal units. A piece of an expert, which is a level or all of them, takes a
// run of 1, 2, 4, ... of them that begins at a multiple of its length, so that no order of coming and leaving can
// scatter what is free: dropping what lies in such a run always makes room for a piece of its length.
//
// The unit is chosen to waste little on this rounding. Levels need runs of two lengths, and that of a refinement is not
// a half or a quarter of the base's: levels of 2, 3 and 4 bits (2.5, 1 and 1 with their parameters) take 11 % more than
// their bytes. Experts that never work with less than all their levels are better one piece, of one unit if they are
// all alike, which wastes nothing: so they lie, come and leave as if they had one level.
struct StoreLayout {
    // may_join: experts never work with less than all levels.
    StoreLayout(const PackIndex& index, bool may_join);

    int run(uint64_t bytes) const;  // units of a piece that takes so many bytes

    bool joined = false;     // all levels of an expert are one piece
    uint64_t unit = 0;       // bytes
    int units_per_slot = 0;  // of the largest expert
    uint64_t units = 0;      // of all experts

    // Memory that the largest expert takes; so many of them hold all experts.
    size_t slot_bytes() const { return unit * static_cast<uint64_t>(units_per_slot); }
    int slots() const;
};

struct StoreOptions {
    int slots = 0;    // memory for so many of the largest experts, touched when first used
    int readers = 2;  // reading threads
    Eviction eviction = Eviction::next_use;
    bool prefetch = true;
    bool all_levels = false;  // experts never work with less than all their levels
    // For tests: what was read arrives up to so much later, each section by another pseudo-random time.
    std::chrono::microseconds arrival_jitter{0};
};

class ExpertStore {
  public:
    // Throws ThreadError.
    ExpertStore(const PackIndex& index, const std::vector<std::unique_ptr<DirectFile>>& files, StoreOptions options);
    ExpertStore(const ExpertStore&) = delete;
    ExpertStore& operator=(const ExpertStore&) = delete;

    // Whether predictions can be of use: some section is not in memory, and there is room to be wrong.
    bool wants_hints() const;

    struct Hint {
        int32_t expert;  // of the layer
        int32_t level;   // the finest that is expected to work
    };
    // These experts of `layer` are expected next, the most likely first. What is in memory of them is kept; what is not
    // is read, level 0 of all of them first, as long as nothing that is known to be needed waits for the disk. Replaces
    // the previous hint; none: nothing is expected.
    void hint(int layer, std::span<const Hint> experts);

    StoreCounters counters() const;

  private:
    friend class ExpertStream;

    enum class State : uint8_t { absent, queued, reading, present, failed };

    // What lies in memory, comes and leaves as one: a level of an expert, or all of them (StoreLayout::joined).
    struct Piece {
        int32_t expert;      // global expert number
        int32_t level, end;  // its sections are those of levels level ... end - 1
        int32_t run;         // units it takes
        uint64_t bytes;      // that are read for it
        int32_t unit = -1;
        int32_t pins = 0;
        State state = State::absent;
        bool speculative = false;  // read because of a hint, and not needed so far

        uint64_t sections() const { return static_cast<uint64_t>(end - level); }
    };

    // What of an expert has to be read, and how many tokens wait for it, with what weight, by piece.
    struct Demand {
        int32_t expert;
        int32_t next, end;  // pieces
        std::array<int32_t, kMaxLevels> tokens;
        std::array<float, kMaxLevels> weights;
    };

    // Pieces first ... end - 1 of an expert, for one reader.
    struct Request {
        int32_t expert;
        int32_t first, end;
        bool speculative;
    };

    int global_number(int layer, int expert) const { return first_expert_[layer] + expert; }
    std::span<Piece> pieces(int expert) {
        return {pieces_.data() + first_piece_[expert],
                static_cast<size_t>(first_piece_[expert + 1] - first_piece_[expert])};
    }
    int piece_of(int level) const { return layout_.joined ? 0 : level; }  // of an expert
    const Section& stored(int expert, int level) const;

    // The following are called with the mutex held.
    // Keeps the demanded pieces 0 ... end - 1 in memory, queueing reads of those that are not there; all or nothing.
    // False: there is no room, for others are kept.
    bool pin(const Demand& demand);
    int make_room(int run, bool for_prediction);  // the first unit of an empty run, or -1
    bool can_leave(int piece) const;
    Cost cost_of(int unit) const;
    void begin_turn(int layer, int tokens);
    // To be called whenever cost_of() changes for another reason than a turn: for the units of an expert's pieces, or
    // of one of them.
    void reconsider(int expert);
    void reconsider(const Piece& piece);
    // Values anew, now that room is needed, what has changed since it was needed last. All else keeps its place in the
    // order of leaving: a turn costs what changes in it, not what the memory holds.
    void update_runs();
    void evict(int piece);  // and the finer ones of its expert
    void place(Piece& piece, int unit);
    void drop(Piece& piece);
    Request next_request();  // expert -1: none
    bool before(const Demand& left, const Demand& right) const;
    bool continues(int expert, int level) const;  // level begins in the file where the one before it ends
    void abandon(std::unique_lock<std::mutex>& lock);

    void read_loop();
    void read(const Request& request, std::vector<std::byte>& scratch) const;
    void check(int expert, int level, std::vector<std::byte>& scratch) const;
    std::byte* memory(int expert, int level) const;
    ExpertWeights weights(int expert, int end) const;

    const PackIndex& index_;
    const std::vector<std::unique_ptr<DirectFile>>& files_;
    StoreOptions options_;
    StoreLayout layout_;
    std::vector<int32_t> first_expert_;         // [layers]
    std::vector<std::pair<int, int>> experts_;  // global number -> (layer, expert)
    std::vector<int32_t> first_piece_;          // [experts + 1] into pieces_
    std::vector<Piece> pieces_;
    std::vector<uint8_t> hinted_;  // global number -> expected by the current hint
    std::vector<int32_t> owner_;   // unit -> piece, -1 for none
    CheapestRuns runs_;
    std::vector<int32_t> stale_;     // units that may cost something else by now than in runs_
    std::vector<uint8_t> is_stale_;  // [units]
    int passed_ = 0;                 // so many layers, up to the last stream's, have other ranks than in runs_
    Arena arena_;
    EvictionRanking ranking_;

    mutable std::mutex mutex_;
    std::condition_variable work_;   // readers wait for requests
    std::condition_variable ready_;  // the pass waits for experts
    std::vector<Demand> demands_;    // in the order asked for
    std::deque<int32_t> hints_;      // pieces to read when the disk has nothing better to do
    std::vector<int32_t> hint_;      // experts (global) of the current hint
    std::vector<int32_t> ahead_;     // pieces that were read because of it
    double ahead_bytes_ = 0;
    double ahead_limit_ = 0;
    LookAhead look_ahead_;
    std::chrono::steady_clock::time_point idle_since_;  // of the disk, but for predictions
    bool idle_ = false;
    int layer_ = -1;  // of the last stream
    StoreCounters counters_;
    int demands_reading_ = 0;
    int reading_ = 0;
    std::chrono::steady_clock::time_point reading_since_;
    bool stop_ = false;
    std::exception_ptr error_;
    ThreadGroup readers_;
};

// One layer's walk over the experts it needs. Not copyable; releases what it holds when it goes.
class ExpertStream {
  public:
    // What tokens need of an expert at one level.
    struct Need {
        int32_t expert;      // of the layer
        int32_t level;       // it and all coarser ones
        int32_t last_token;  // the last of the turn's tokens that uses it at this level
        int32_t uses;        // tokens that use it at this level
        float weight;        // the sum of their router weights
    };
    struct Item {
        int position;  // in the `needs` given
        ExpertWeights weights;
    };

    // `needs`, for a turn of `tokens` tokens: an expert's needs stand together, in ascending order of level.
    //
    // Sections are read in the order of D2MoE's HEBF (arXiv 2504.15299): of the next missing level of each
    // expert, that which the most tokens wait for; of equal ones that with the larger weights, then the smaller one.
    ExpertStream(ExpertStore& store, int layer, int tokens, std::span<const Need> needs);
    ~ExpertStream();
    ExpertStream(const ExpertStream&) = delete;
    ExpertStream& operator=(const ExpertStream&) = delete;

    // Releases what the last call returned, then gives all needs whose levels are in memory now, waiting for at least
    // one; empty once every need has been given. Throws IoError where a section could not be read.
    std::span<const Item> next();

  private:
    struct Expert {
        ExpertStore::Demand demand;
        int first, end;       // needs
        int given = 0;        // needs that next() has returned
        bool pinned = false;  // its pieces, until all needs have been given and released
    };

    void unpin(Expert& expert);

    ExpertStore& store_;
    std::vector<Need> needs_;
    std::vector<Expert> experts_;
    std::vector<uint8_t> is_given_;  // [needs]
    std::vector<Item> items_;
    int unfinished_;  // experts that have not been released
};

}  // namespace edgemoe
