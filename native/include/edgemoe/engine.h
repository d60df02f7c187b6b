// The forward pass: tokens in, logits out.
//
//   embedding -> [ norm -> mixer -> + -> norm -> dense part or (router -> experts) -> + ] x layers -> norm -> head
//
// with a shared expert beside the routed ones, and norms after the parts, where a model has them.
//
// A position's logits have the same bits for any number of threads, any chunking, any number of expert slots and any
// order in which experts arrive (docs/architecture.md says what that takes).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "edgemoe/backend.h"
#include "edgemoe/batch.h"
#include "edgemoe/direct_file.h"
#include "edgemoe/kernels.h"
#include "edgemoe/model_spec.h"
#include "edgemoe/observer.h"
#include "edgemoe/pack_index.h"
#include "edgemoe/sequence_state.h"
#include "edgemoe/store_options.h"

namespace edgemoe {

struct EngineOptions {
    int threads = 1;
    int sequences = 1;  // there may be at a time
    int context = 0;    // positions a sequence may have
    int positions = 0;  // positions of all sequences together, at least `context`; 0 for that
    int chunk = 512;    // rows computed together
    StoreOptions store;
    KvType key_type = KvType::f16;
    KvType value_type = KvType::f16;
    int device_layers = 0;  // the last so many are computed by a device; one more: the head, too
    int device_slots = 0;   // of the largest expert, in the device's memory
    std::string isa;        // empty: the best this processor has, or EDGEMOE_ISA
};

// What an engine with these options takes, in bytes.
struct MemoryPlan {
    size_t dense = 0;    // weights that are always in memory
    size_t state = 0;    // all `sequences`, of together `positions` positions
    size_t scratch = 0;  // activations of one chunk
    size_t slot = 0;     // memory of one expert, the largest with all its levels
    int experts = 0;     // slots that hold all experts of the model: more are never used
    int minimum_slots = 0;
    // What a device takes of the same: none of it is counted above.
    size_t device_dense = 0, device_state = 0, device_scratch = 0;
    size_t device_slot = 0;  // memory of one expert there
    int device_experts = 0;  // slots that hold all experts of its layers
};

struct EngineCounters {
    uint64_t tokens = 0;       // rows computed
    double seconds = 0;        // in forward passes, waiting included
    uint64_t expert_uses = 0;  // pairs of a token and an expert
    uint64_t expert_bits = 0;  // the stored widths of the levels they worked at, added up
    uint64_t device_hits = 0;  // of expert_uses, those of experts that lay in the device's memory
    uint64_t device_uploads = 0;
    uint64_t device_upload_bytes = 0;
    StoreCounters store;
};

// Which experts are in memory, and how often each was read: [layers, experts] of the layer that has most of them.
struct Residency {
    static constexpr uint8_t kNone = 255;  // the layer has no such expert

    int layers = 0, experts = 0;
    std::vector<uint8_t> levels;  // in memory, 0 for none of them
    std::vector<uint64_t> reads;  // so far, of one level or of several at once
};

class Device;
class DeviceTier;
class ExpertStore;
class Pass;
class Weights;

// Makes what computes the passes, with room for so much. `sizes` refers to facts of the model that stay.
using MakeBackend = std::function<std::unique_ptr<Backend>(const EngineOptions& options, const BackendSizes& sizes)>;

class Engine {
  public:
    // device: what computes EngineOptions::device_layers; it is used by nobody else meanwhile. Without `make_backend`
    // the CPU computes all else. Throws DeviceError.
    Engine(ModelSpec spec, PackIndex index, EngineOptions options, std::shared_ptr<Device> device = {},
           const MakeBackend& make_backend = {});
    ~Engine();

    static MemoryPlan plan(const ModelSpec& spec, const PackIndex& index, const EngineOptions& options);

    // Computes all rows, chunk by chunk, and writes the logits of the wanted ones to `logits` [wanted, vocab]. `check`
    // is called between layers and may throw to give up: finished chunks stay in the state, and each sequence goes on
    // where they end (but see SequenceState::give_up_writing). Throws std::invalid_argument and ContextError for a
    // batch that is refused, and StateError where the states have no room for it, before anything is computed or
    // changed.
    void forward(const Batch& batch, float* logits, const std::function<void()>& check, Observer* observer = nullptr) {
        forward(batch, {0, static_cast<int>(spec_.layers.size())}, logits, check, observer);
    }
    // The same through some layers only: embeddings are the residual stream before the first of them, and logits can
    // be wanted if the last layer of the model is among them. So a long text can go through a large model layer by
    // layer, each expert read once. The sequences' state of other layers is missing then: truncate them to 0.
    void forward(const Batch& batch, LayerRange layers, float* logits, const std::function<void()>& check,
                 Observer* observer = nullptr);

    // Sequence 0 exists from the start; more can be added, up to EngineOptions::sequences at a time: StateError beyond
    // that. An id that was removed is used again. The others refuse ids that are not in use (std::invalid_argument).
    int add_sequence();
    // A new sequence that begins with the first `length` positions of another one and shares their memory. Throws
    // StateError, too, where a layer does not keep the state at that length: a window has moved on, or there is neither
    // the end nor the mark of a recurrence.
    int fork_sequence(int id, int length);
    void remove_sequence(int id);
    SequenceState& sequence(int id);
    // Positions that can still be written, of all sequences together; a multiple of kKvBlock.
    int64_t free_positions() const { return states_->free_positions(); }

    const ModelSpec& spec() const { return spec_; }
    std::string_view isa() const { return backend_->name(); }
    bool direct_io() const;
    // Of what has been computed so far. From any thread at any time, unlike all else but residency().
    EngineCounters counters() const;
    // As it is now.
    Residency residency() const;

  private:
    void add_counts(const EngineCounters& more);  // what the store counts left out
    int place_sequence(std::unique_ptr<SequenceState> state);
    void check_batch(const Batch& batch, LayerRange layers);
    void wait();

    ModelSpec spec_;
    PackIndex index_;
    EngineOptions options_;
    std::vector<std::unique_ptr<DirectFile>> files_;
    std::unique_ptr<Backend> backend_;
    std::unique_ptr<Backend> device_;  // may be absent
    std::unique_ptr<Weights> weights_;
    std::unique_ptr<DeviceTier> tier_;    // absent without a device, or slots there
    std::unique_ptr<ExpertStore> store_;  // absent where every layer is dense
    std::unique_ptr<Pass> pass_;
    std::unique_ptr<StatePool> states_;
    std::vector<std::unique_ptr<SequenceState>> sequences_;  // [ids], null where one is not in use
    mutable std::mutex counters_mutex_;
    EngineCounters counters_;
};

}  // namespace edgemoe
