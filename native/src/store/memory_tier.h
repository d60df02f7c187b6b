// Which pieces of experts lie in main memory, where, and which of them give way when another one needs their place.
//
// A piece that has a place keeps it until it is evicted or dropped, whether it has been read by then or not. A level
// has a place only together with the coarser ones of its expert. What is kept for a pass, being read, or on the way to
// an expert of which something is being read stays; of the rest what is expected next leaves last, and before it all
// else in the order of EvictionRanking.
//
// The bookkeeping of ExpertStore, whose lock covers all calls but is_short(). It knows of no file, thread or pass: a
// second place for pieces, in a device's memory, would stand beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/store_options.h"
#include "store/cheapest_runs.h"
#include "store/eviction.h"
#include "store/layout.h"

namespace edgemoe {

enum class PieceState : uint8_t { absent, queued, reading, present, failed };

class MemoryTier {
  public:
    // Memory for `slots` of the largest experts. Counts evictions, and predictions that were evicted unused, in
    // `counters`. Both references must outlive this.
    MemoryTier(const StoreLayout& layout, int slots, Eviction policy, StoreCounters& counters);

    // Whether there is no room for all pieces.
    bool is_short() const { return owner_.size() < layout_.units(); }

    PieceState state(int piece) const { return held_[piece].state; }
    bool has_place(int piece) const { return held_[piece].unit >= 0; }
    bool is_speculative(int piece) const { return held_[piece].speculative; }
    // Where a level of an expert lies that has a place. What is there while a piece is being read is the reader's.
    std::byte* address(int expert, int level) const;

    void begin_turn(int layer, const Turn& turn);
    // The piece works in this turn, up to its row `last_row`, `uses` times. A coarser piece after the finer ones.
    void use(int piece, int last_row, int uses) { ranking_.use(piece, last_row, uses); }
    // The expert is expected next, or no longer.
    void expect(int expert, bool expected);

    // Keeps the first `count` pieces of an expert, giving a place (and the state absent) to those that have none; all
    // or nothing. False: there is no room, for others are kept. To be let go as often as it was kept.
    bool keep(int expert, int count);
    void let_go(int expert, int count);
    // Gives a piece a place that nothing kept or expected has; false if there is none. It is speculative and being
    // read.
    bool place_speculative(int piece);

    void set_state(int piece, PieceState state) { held_[piece].state = state; }
    void set_needed(int piece) { held_[piece].speculative = false; }
    // To be called when reads of an expert's pieces have ended: they may leave from now on.
    void reads_ended(int expert) { reconsider(expert); }
    // Takes a piece its place; evict() the finer ones of its expert, too, and counts them.
    void drop(int piece);
    void evict(int piece);

  private:
    struct Held {
        int32_t run, end;   // its length in units; the number after its expert's last piece: both from the layout
        int32_t unit = -1;  // its first one
        int32_t kept = 0;   // times
        PieceState state = PieceState::absent;
        bool speculative = false;  // read because of a prediction, and not needed so far
    };

    int make_room(int run, bool for_prediction);  // the first unit of an empty run, or -1
    bool can_leave(int piece) const;
    Cost cost_of(int unit) const;
    void place(int piece, int unit);
    // To be called whenever cost_of() changes for another reason than a turn.
    void reconsider(int expert);
    void reconsider(const Held& held);
    // Values anew, now that room is needed, what has changed since it was needed last. All else keeps its place in the
    // order of leaving: a turn costs what changes in it, not what the memory holds.
    void update_runs();

    const StoreLayout& layout_;
    StoreCounters& counters_;
    std::vector<Held> held_;         // [pieces]
    std::vector<uint8_t> expected_;  // [experts]
    std::vector<int32_t> owner_;     // [units] the piece that lies there, -1 for none
    CheapestRuns runs_;
    std::vector<int32_t> stale_;     // units that may cost something else by now than in runs_
    std::vector<uint8_t> is_stale_;  // [units]
    int layer_ = -1;                 // of the current turn
    int passed_ = 0;                 // so many layers, up to that one, have other ranks than in runs_
    EvictionRanking ranking_;
    Arena arena_;
};

}  // namespace edgemoe
