// The second half of a layer: dense, or a mixture of experts (mixture.h).
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "edgemoe/backend.h"
#include "edgemoe/batch.h"
#include "edgemoe/engine.h"
#include "edgemoe/observer.h"
#include "model/weights.h"
#include "store/device_tier.h"
#include "store/expert_store.h"

namespace edgemoe {

class FeedForwardHalf;

// The rows that go through a half, with what it reads and changes.
struct HalfInput {
    Backend& backend;    // of the half, and of what is given
    Floats x;            // [count, hidden] the residual stream: what the half makes is added to it
    ConstFloats normed;  // [count, hidden] it, after the layer's norm
    int count;
    int steps;                                  // the most rows that one sequence has
    std::span<const Quality* const> qualities;  // [count]
    Observer* observer;                         // may be null
    EngineCounters& counters;
    // The next half with experts that the chunk goes through, null if there is none, and which of the rows do; all of
    // them without a list.
    FeedForwardHalf* next;
    std::optional<std::span<const int32_t>> next_rows;
};

class FeedForwardHalf {
  public:
    virtual ~FeedForwardHalf() = default;

    virtual void run(const HalfInput& input) = 0;
    // Tells the store which experts this half will probably want, while an earlier one, whose input is given, is at
    // work: for the stream as it is before. Nothing to do without experts.
    virtual void expect(const HalfInput& /*earlier*/) {}
};

struct HalfSetting {
    Backend& backend;
    Backend& host;  // where experts are computed that the backend does not have
    const ModelSpec& model;
    const LayerSpec& spec;
    int layer;
    const Norm& norm;  // of the stream, before the half
    const PackIndex& index;
    ExpertStore* store;  // null where no layer has experts
    DeviceTier* tier;    // experts that the backend has, if it is a device; may be null
};

// Where the buffers of all halves lie: one runs at a time, and what is expected of another one is worked out beside it.
struct HalfMemory {
    int rows;
    std::byte* half;
    std::byte* ahead;
    std::byte* host;  // of the host, for a half whose backend is another one
};

// Bytes of the first two, and of the last.
std::pair<size_t, size_t> half_buffer_bytes(const ModelSpec& model, const LayerSpec& spec, int rows);
size_t host_buffer_bytes(const ModelSpec& model, const LayerSpec& spec, int rows);
std::unique_ptr<FeedForwardHalf> load_half(const HalfSetting& setting, const PlacedWeights& weights,
                                           const HalfMemory& memory);

}  // namespace edgemoe
