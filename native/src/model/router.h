// Which experts work on a token.
#pragma once

#include "edgemoe/backend.h"
#include "model/weights.h"

namespace edgemoe {

class Router {
  public:
    struct Buffers {
        Floats input;   // [rows, hidden] of a router with a norm of its own
        Floats scores;  // [rows, experts]

        void place(Places& places, const ModelSpec& model, const LayerSpec& spec, int rows);
    };

    // The two specifications must outlive this.
    Router(const ModelSpec& model, const LayerSpec& spec, const PlacedWeights& weights);

    // A router reads `normed`, the stream `x` after the layer's norm, or, with a norm of its own, the stream itself.
    bool reads_stream() const { return static_cast<bool>(norm_); }
    // picks [count, top_k] in descending preference and their weights; these only if they are not null.
    void route(Backend& backend, const Buffers& buffers, ConstFloats x, ConstFloats normed, int count,
               Buffer<int32_t> picks, Floats weights) const;

  private:
    Matrix matrix_;  // [experts, hidden]
    ConstFloats bias_;
    Norm norm_;
    Choice choice_;
};

}  // namespace edgemoe
