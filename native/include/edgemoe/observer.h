// Who watches a pass: calibration, traces, tests. What is shown is in host memory and valid during the call.
#pragma once

#include <cstdint>
#include <span>

namespace edgemoe {

// The experts of a layer at work on a chunk. Pair p = row * top_k + pick lies in row places[p] of `hidden` and
// `outputs`, which are given to observers that ask for them only.
struct ExpertsSeen {
    int top_k;
    std::span<const int32_t> picks;   // [rows, top_k] in the order of the choice
    std::span<const float> weights;   // [rows, top_k]
    std::span<const int32_t> places;  // [rows * top_k]
    std::span<const float> inputs;    // [rows, hidden] what the experts multiply
    std::span<const float> hidden;    // [rows * top_k, ffn] what the experts' last matrix multiplies
    std::span<const float> outputs;   // [rows * top_k, hidden]
};

// A pass with an observer takes every row through every part of the layers, also where only logits depend on it.
class Observer {
  public:
    virtual ~Observer() = default;

    // A chunk begins; if it ends without finish(), it failed and what was shown of it does not count.
    virtual void begin(int rows) = 0;
    virtual void finish() = 0;

    // A layer's routing: picks and weights [rows, top_k].
    virtual void routed(int /*layer*/, std::span<const int32_t> /*picks*/, std::span<const float> /*weights*/) {}
    // What the router of a later layer chooses for the residual stream as it is before this layer's experts have been
    // added: [rows, top_k]. Computed for observers that want it.
    virtual bool wants_predictions() const { return false; }
    virtual void predicted(int /*layer*/, std::span<const int32_t> /*picks*/) {}
    // What experts read and made; copied from a device for observers that want it.
    virtual bool wants_experts() const { return false; }
    virtual void experts(int /*layer*/, const ExpertsSeen& /*seen*/) {}
    // The residual stream after a layer, [rows, hidden].
    virtual bool wants_residuals() const { return false; }
    virtual void residual(int /*layer*/, std::span<const float> /*stream*/) {}
};

}  // namespace edgemoe
