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

class Pass {
  public:
    struct Setting {
        const ModelSpec& model;
        const PackIndex& index;
        KvType key_type, value_type;
        int rows;  // of a chunk, at most
    };

    // All that is given must outlive this. Takes buffer_bytes() of the backend's memory. `store` may be null where no
    // layer has experts. Throws std::invalid_argument where the index does not hold the model's tensors.
    Pass(const Setting& setting, Weights& weights, Backend& backend, ExpertStore* store);

    static size_t buffer_bytes(const ModelSpec& model, int rows);
    static BackendSizes backend_sizes(const ModelSpec& model, int rows);

    // Writes the logits of the wanted rows [wanted, vocab] after the last layer. `check` is called between layers and
    // may throw.
    void run(const Chunk& chunk, LayerRange layers, Observer* observer, EngineCounters& counters, float* logits,
             const std::function<void()>& check);

  private:
    struct Layer {
        Norm mixer_norm;
        std::unique_ptr<Mixer> mixer;
        Matrix output;  // [hidden, heads * value_dim] of what the mixer makes
        ConstFloats output_bias;
        Norm output_norm;
        Norm half_norm;
        std::unique_ptr<FeedForwardHalf> half;
        ConstFloats output_scale;  // [1]
    };
    struct Buffers {
        Floats x;          // [rows, hidden] the residual stream
        Floats normed;     // [rows, hidden]
        Floats projected;  // [rows, hidden] what a mixer adds to the stream
        std::byte* half;   // what the half at work needs
        std::byte* ahead;

        void place(Places& places, const ModelSpec& model, int rows);
    };

    void mix(const Layer& layer, int count);

    const ModelSpec& model_;
    Backend& backend_;
    Matrix embedding_;
    Head head_;
    Norm final_norm_;
    std::vector<Layer> layers_;
    Buffers buffers_{};
};

}  // namespace edgemoe
