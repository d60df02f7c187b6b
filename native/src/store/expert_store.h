// Routed experts: on disk, in memory, and on the way between the two.
//
//   StoreLayout    the pieces there are, and the units that memory is divided into
//   MemoryTier     which of them lie where in memory, and which give way
//   ReadQueue      what is needed and not there, in the order of reading
//   Predictions    what is expected next, and whether reading it pays
//   Readers        the threads that read
//   ExpertStream   one layer's walk over the experts it needs
//
// The store is what ties these together: one lock, under which every decision is made, and the counters. The forward
// pass opens an ExpertStream over the experts a layer needs. It hands out those that are in memory at once, and the
// readers fetch what others lack meanwhile; the pass computes what it was given, releases it, and asks for more.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "edgemoe/direct_file.h"
#include "edgemoe/pack_index.h"
#include "edgemoe/store_options.h"
#include "store/layout.h"
#include "store/look_ahead.h"
#include "store/memory_tier.h"
#include "store/readers.h"

namespace edgemoe {

using ExpertParts = std::array<std::array<const std::byte*, kMaxLevels>, 3>;  // [gate, up, down][levels]

// Levels of an expert's matrices in memory; valid until it is let go.
struct ExpertWeights {
    ExpertParts parts;
};

class ExpertStore {
  public:
    // Throws std::invalid_argument where the index says something impossible about experts, and ThreadError. The index
    // and the files must outlive the store.
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

    // Of each expert of a layer: its levels that are in memory, and how many reads have brought some of them so far.
    // Both spans have an element for each of the layer's experts. From any thread, as counters().
    void residency(int layer, std::span<uint8_t> levels, std::span<uint64_t> reads) const;

    // What follows is for ExpertStream. Its calls are made with the lock held, which they take as a proof.
    using Lock = std::unique_lock<std::mutex>;
    Lock lock() const { return Lock(mutex_); }
    const StoreLayout& layout() const { return layout_; }

    // The turn of a layer begins. Demands that can be kept are: those in memory first, since they are computed while
    // the others are read, and must not make room for them; then those of which something is in memory, then the
    // others, up to the first for which there is no room, or most_awaited(). What is missing of them is queued.
    void begin_turn(const Lock& lock, int layer, const Turn& turn, std::span<Demand> demands);
    // Demands whose reading may be under way or queued at a time. With many rows a layer lacks most of its experts, and
    // if all of them took their place at once, they would push out what the next layers need, where what is released
    // of this layer is needed last.
    int most_awaited(const Turn& turn) const;
    // Tries the same with one demand: false if there is no room.
    bool keep(const Lock& lock, Demand& demand);
    void let_go(const Lock& lock, Demand& demand);
    // How many of a kept demand's pieces are there, from the first on. Throws what reading the one after them failed
    // with.
    int present(const Lock& lock, const Demand& demand) const;
    // Of levels 0 ... level, which are present.
    ExpertWeights weights(const Lock& lock, int expert, int level) const;
    // Whether something is being read, so that wait() has something to wait for.
    bool is_reading(const Lock& lock) const;
    // Until something that was being read has arrived, or failed.
    void wait(Lock& lock);
    // Evicts what an expert that is not kept has in memory.
    void evict(const Lock& lock, int expert);
    // The pass has failed: nothing that it asked for may still be under way, or its failure would meet the next pass.
    void abandon(Lock& lock);

  private:
    std::optional<ReadRequest> take();
    void done(const ReadRequest& request, const std::exception_ptr& error, double seconds);

    StoreOptions options_;
    StoreLayout layout_;
    mutable std::mutex mutex_;
    std::condition_variable arrived_;
    StoreCounters counters_;
    std::vector<uint64_t> reads_;  // [experts]
    MemoryTier memory_;
    ReadQueue queue_;
    Predictions predictions_;
    int layer_ = -1;            // of the last turn
    int needed_reading_ = 0;    // requests under way that something waits for
    std::exception_ptr error_;  // of the last read that failed
    Readers readers_;
};

}  // namespace edgemoe
