// What can be chosen for the store of routed experts, and what it counts. The store itself is native/src/store/.
#pragma once

#include <chrono>
#include <cstdint>
#include <string_view>

namespace edgemoe {

// Which expert, or which level of one, leaves memory when another one needs its place.
enum class Eviction : uint8_t {
    lru,          // least recently used
    lfu,          // least often used, then least recently
    least_stale,  // those untouched in this forward pass first, then least recently used (SpecMD): the order of lru
    next_use,     // least likely to be used when its layer comes again; among equals the layer that comes last
};

Eviction eviction_from_name(std::string_view name);  // throws std::invalid_argument

struct StoreOptions {
    int slots = 0;    // memory for so many of the largest experts, touched when first used
    int readers = 2;  // reading threads
    Eviction eviction = Eviction::next_use;
    bool prefetch = true;
    bool all_levels = false;  // experts never work with less than all their levels
    // For tests: what was read arrives up to so much later, each section by another pseudo-random time.
    std::chrono::microseconds arrival_jitter{0};
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

}  // namespace edgemoe
