// Observers that keep what they are shown: the routing of a trace, and one layer's work for calibration.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "edgemoe/model_spec.h"
#include "edgemoe/observer.h"

namespace edgemoe {

// What the routers chose, row by row, all layers' picks side by side.
struct RoutingRecord {
    static constexpr uint16_t kNoPrediction = 0xFFFF;

    size_t width = 0;             // picks of a row, of all layers
    std::vector<uint16_t> picks;  // [rows, width], each layer's in the order of the choice
    std::vector<float> weights;   // [rows, width]
    std::vector<uint16_t>
        predicted;  // [rows, width] what the look-ahead expected, kNoPrediction where it does not look
};

// Keeps the routing of finished chunks until it is taken.
class RoutingRecorder final : public Observer {
  public:
    explicit RoutingRecorder(const ModelSpec& spec);

    void begin(int rows) override;
    void finish() override;
    void routed(int layer, std::span<const int32_t> picks, std::span<const float> weights) override;
    bool wants_predictions() const override { return true; }
    void predicted(int layer, std::span<const int32_t> picks) override;

    RoutingRecord take();

  private:
    RoutingRecord empty() const;
    template <class From, class To>
    void put(int layer, std::span<const From> values, std::vector<To>& rows) const;

    std::vector<size_t> columns_;  // [layers + 1] where a layer's picks begin in a row
    RoutingRecord chunk_;
    RoutingRecord record_;
};

// One layer's residual stream after it and what its experts saw and made, written to arrays for all rows of a batch,
// one chunk after the other. A layer without experts writes the residual only.
class LayerRecorder final : public Observer {
  public:
    struct Arrays {
        float* residual;  // [rows, hidden]
        float* inputs;    // [rows, hidden] what the experts multiply
        int32_t* picks;   // [rows, top_k] in the order of the choice
        float* weights;   // [rows, top_k]
        float* hidden;    // [rows, top_k, ffn] what the experts' last matrix multiplies
        float* peaks;     // [rows, top_k] largest magnitude in an expert's output
        float* energies;  // [rows, top_k] sum of the squares of an expert's output
    };

    explicit LayerRecorder(const Arrays& arrays) : next_(arrays) {}

    void begin(int /*rows*/) override {}
    void finish() override {}
    bool wants_experts() const override { return true; }
    void experts(int layer, const ExpertsSeen& seen) override;
    bool wants_residuals() const override { return true; }
    void residual(int layer, std::span<const float> stream) override;

  private:
    Arrays next_;  // where the next chunk's rows go
};

}  // namespace edgemoe
