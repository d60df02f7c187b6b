// One chunk's way through the layers: what is computed, in which order, on which buffers. How is the backend's matter.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "edgemoe/backend.h"
#include "edgemoe/batch.h"
#include "edgemoe/engine.h"
#include "edgemoe/observer.h"
#include "model/feed_forward.h"
#include "model/mixers/mixer.h"
#include "model/weights.h"
#include "store/expert_store.h"

namespace edgemoe {

struct Chunk {
    Rows rows;
    std::span<const int32_t> wanted;            // rows whose logits are wanted, ascending
    std::span<const Quality* const> qualities;  // [rows]
    int steps;                                  // the most rows that one sequence has
};

// Which halves of the layers a device computes, and whether the head; all else is the host's.
struct DeviceShare {
    std::vector<bool> mixers, halves;  // [layers]
    bool head = false;

    explicit DeviceShare(size_t layers) : mixers(layers, false), halves(layers, false) {}
};

class Pass {
  public:
    struct Setting {
        const ModelSpec& model;
        const PackIndex& index;
        KvType key_type, value_type;
        int rows;  // of a chunk, at most
    };

    // All that is given must outlive this, but `share`. Takes buffer_bytes() of the backends' memory. `device` may be
    // null where it has no share, `store` where no layer has experts, `tier` where the device has none of its own.
    // Throws std::invalid_argument where the index does not hold the model's tensors.
    Pass(const Setting& setting, Weights& weights, Backend& host, Backend* device, const DeviceShare& share,
         ExpertStore* store, DeviceTier* tier);

    // Of the device, or of the host.
    static size_t buffer_bytes(const ModelSpec& model, int rows, const DeviceShare& share, bool of_device);
    static BackendSizes backend_sizes(const ModelSpec& model, int rows);
    // Whether a layer's weight of this name is its mixer's; if not, the other half's.
    static bool is_of_mixer(const std::string& name);

    // Writes the logits of the wanted rows [wanted, vocab] after the last layer. `check` is called between layers and
    // may throw.
    void run(const Chunk& chunk, LayerRange layers, Observer* observer, EngineCounters& counters, float* logits,
             const std::function<void()>& check);

  private:
    struct Buffers {
        Floats x;          // [rows, hidden] the residual stream
        Floats normed;     // [rows, hidden]
        Floats projected;  // [rows, hidden] what a mixer adds to the stream
        std::byte* half;   // what the half at work needs
        std::byte* ahead;

        void place(Places& places, const ModelSpec& model, int rows, const DeviceShare& share, bool of_device);
    };
    struct Side {
        Backend* backend = nullptr;
        Buffers buffers{};
    };
    struct Layer {
        Side* mixer_side;
        Norm mixer_norm;
        std::unique_ptr<Mixer> mixer;
        Matrix output;  // [hidden, heads * value_dim] of what the mixer makes
        ConstFloats output_bias;
        Norm output_norm;
        Side* half_side;
        Norm half_norm;
        std::unique_ptr<FeedForwardHalf> half;
        ConstFloats output_scale;  // [1]
    };

    void mix(const Layer& layer, int count);
    // Takes the residual stream of so many rows from where it is to where it is needed.
    void go_on(Side*& from, Side& to, int count) const;

    const ModelSpec& model_;
    Side host_, device_;
    Matrix embedding_;
    Side* head_side_;
    Head head_;
    Norm final_norm_;
    std::vector<Layer> layers_;
};

}  // namespace edgemoe
