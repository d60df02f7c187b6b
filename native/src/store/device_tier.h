// Experts in a device's memory, beside those in the host's: which lie there, where, and which give way.
//
// What is here the device computes; what is missing the host computes from its own memory, or it is brought here first,
// whichever is done sooner (MissRule). What the host has computed in passes of few rows is uploaded afterwards, as far
// as the link is idle: an expert into an empty slot, or in place of the one that has not been used for longest, if that
// was used longer ago than the newcomer was before this time.
//
// No result depends on any of it.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/device.h"
#include "edgemoe/memory.h"
#include "edgemoe/pack_index.h"
#include "store/expert_store.h"

namespace edgemoe {

// Bytes of an expert's matrices [levels][gate, up, down] in memory.
std::vector<std::array<size_t, 3>> expert_bytes(const ExpertLayer& layer);

// Of the misses of a step, how many the device takes: those whose way over the link, one after the other, ends no later
// than the host's work on all others. By the averages of what was measured last; without a figure, none.
class MissRule {
  public:
    void host_took(size_t bytes, double seconds) { host_.add(bytes, seconds); }
    void link_took(size_t bytes, double seconds) { link_.add(bytes, seconds); }
    // It had arrived when somebody looked: the link may be faster.
    void link_took_at_most(size_t bytes, double seconds) {
        if (seconds > 0 && static_cast<double>(bytes) / seconds > link_.rate) link_.add(bytes, seconds);
    }
    int moved(int misses);

    double host_rate() const { return host_.rate; }  // bytes a second, 0 if unknown
    double link_rate() const { return link_.rate; }

  private:
    struct Average {
        double rate = 0;

        void add(size_t bytes, double seconds);
    };
    static constexpr int kAgain = 32;

    Average host_, link_;
    int without_host_ = 0;  // times that the host would have had nothing to do
};

class DeviceTier {
  public:
    // layers: of the experts of those that the device has halves of, others are null. Takes `slots` slots of
    // slot_bytes() of the memory. Throws DeviceMemoryError.
    DeviceTier(Device& device, Memory& memory, std::vector<const ExpertLayer*> layers, int slots);
    ~DeviceTier();
    DeviceTier(const DeviceTier&) = delete;
    DeviceTier& operator=(const DeviceTier&) = delete;

    static size_t slot_bytes(std::span<const ExpertLayer* const> layers);
    // Of the host's memory.
    static size_t staging_bytes(std::span<const ExpertLayer* const> layers) { return kUploads * slot_bytes(layers); }

    // A layer's turn: experts that are found from now on until the next one stay where they are.
    void begin_turn();
    // Where the device has the levels 0 ... level of an expert, if it has.
    std::optional<ExpertParts> find(int layer, int expert, int level);
    bool has(int layer, int expert, int level);  // without using it

    MissRule& rule() { return rule_; }
    // Brings an expert here within its turn; wait() before the device uses it. None: nothing there gives way to it.
    std::optional<ExpertParts> bring(int layer, int expert, int level, const ExpertParts& from);
    void wait();
    // An expert that this turn has used elsewhere, with these levels in the host's memory. Uploaded if the link is
    // idle.
    void offer(int layer, int expert, int level, const ExpertParts& from);

    struct Counters {
        uint64_t uploads = 0, bytes = 0;
    };
    const Counters& counters() const { return counters_; }

  private:
    struct Slot {
        int expert = -1;  // of all layers'
        int here = 0;     // levels of it
        int coming = 0;   // the same, with those that are under way
    };
    struct Upload {
        uint64_t number;
        int slot, staging;
        size_t bytes;
        std::chrono::steady_clock::time_point begin;  // with the copy from the host's memory
    };
    static constexpr int kUploads = 4;  // under way at a time

    int number_of(int layer, int expert) const { return begins_[layer] + expert; }
    ExpertParts parts(int layer, int slot) const;
    int victim(uint64_t used_before) const;  // -1 for none
    void collect();                          // what has arrived
    bool upload(int layer, int expert, int level, const ExpertParts& from, uint64_t used_before);

    Device& device_;
    std::vector<std::vector<std::array<size_t, 3>>> sizes_;  // [layers][levels][parts]
    std::vector<int> begins_;                                // [layers] of experts
    size_t slot_bytes_;
    std::byte* memory_;
    std::vector<Slot> slots_;
    std::vector<int> slot_of_;        // [experts] -1 for none
    std::vector<uint64_t> last_use_;  // [experts] turn, 0 for never
    std::vector<uint64_t> before_;    // [experts] turn of the use before it
    uint64_t turn_ = 0;
    Arena staging_;
    std::vector<int> free_staging_;
    std::deque<Upload> uploads_;
    std::chrono::steady_clock::time_point last_arrival_{};
    MissRule rule_;
    Counters counters_;
};

}  // namespace edgemoe
