// The feed-forward parts that every token goes through: those of dense layers, and shared experts.
#pragma once

#include "edgemoe/backend.h"
#include "model/weights.h"

namespace edgemoe {

class DensePart {
  public:
    struct Buffers {
        Floats inner, up;  // [rows, dim]

        void place(Places& places, int dim, int rows) {
            places.place(inner, size_t(rows) * dim);
            places.place(up, size_t(rows) * dim);
        }
    };

    // name: what the tensors' names begin with, "ffn." or "shared.".
    DensePart(const ModelSpec& model, const LayerSpec& spec, const PlacedWeights& weights, const std::string& name,
              int dim);

    // x [count, hidden] -> out [count, hidden].
    void run(Backend& backend, const Buffers& buffers, ConstFloats x, int count, Floats out) const {
        backend.feed_forward(part_, x, count, buffers.inner, buffers.up, out);
    }

  private:
    FeedForward part_;
};

GatedActivation activation_of(const LayerSpec& spec);

}  // namespace edgemoe
