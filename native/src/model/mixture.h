// A mixture of experts: each expert is computed when it is in memory.
#pragma once

#include <optional>
#include <vector>

#include "model/dense_part.h"
#include "model/feed_forward.h"
#include "model/router.h"
#include "store/stream.h"

namespace edgemoe {

// The layer's experts. Throws std::invalid_argument where the index has other ones than the model.
const ExpertLayer& find_experts(const HalfSetting& setting);

class Mixture final : public FeedForwardHalf {
  public:
    struct Buffers {
        Router::Buffers router;
        Buffer<int32_t> picks;  // [rows, top_k]
        Floats weights;         // [rows, top_k]
        DensePart::Buffers shared;
        Floats shared_out;          // [rows, hidden]
        Floats input;               // [rows, hidden] of experts with a norm of their own
        Buffer<int32_t> pair_rows;  // [pairs] rows of pairs, sorted by expert
        Buffer<int32_t> places;     // [pairs] where a pair stands among these
        Floats hidden, up;          // [pairs, ffn]
        Floats outputs;             // [pairs, hidden]
        Floats sum;                 // [rows, hidden] where norms come after it

        void place(Places& places, const ModelSpec& model, const LayerSpec& spec, int rows);
    };

    // Of expect(), which runs amid another layer's run().
    struct AheadBuffers {
        Router::Buffers router;
        Floats x, normed;       // [rows, hidden]
        Buffer<int32_t> picks;  // [rows, top_k]
        Floats weights;         // [rows, top_k]

        void place(Places& places, const ModelSpec& model, const LayerSpec& spec, int rows);
    };

    // Of the host, for experts that it computes for another backend.
    struct HostBuffers {
        Floats input;               // [rows, hidden]
        Buffer<int32_t> pair_rows;  // [pairs]
        Floats hidden, up;          // [pairs, ffn]
        Floats outputs;             // [pairs, hidden]

        void place(Places& places, const ModelSpec& model, const LayerSpec& spec, int rows);
    };

    Mixture(const HalfSetting& setting, const ExpertLayer& experts, const PlacedWeights& weights,
            const HalfMemory& memory);

    void run(const HalfInput& input) override;
    void expect(const HalfInput& input) override;

  private:
    // What a chunk wants of the experts: pairs of (row, pick) in groups by expert and level.
    struct Grouping;
    Grouping demand(std::span<const int32_t> picks, std::span<const float> weights, const HalfInput& input) const;
    ExpertWork work_of(const Grouping& demanded, const ExpertStream::Need& need, const ExpertParts& parts) const;
    Matrix at_level(const Matrix& shape, const std::array<const std::byte*, kMaxLevels>& data, int level) const;
    // Computes what `needs` says on the host, and gives it to the backend.
    void run_apart(const HalfInput& input, const Grouping& demanded, ExpertStream& stream,
                   std::span<const ExpertStream::Need> needs);
    void observe(const HalfInput& input, const Grouping& demand, ConstFloats experts_input) const;
    void add_up(const HalfInput& input) const;

    // Whether experts are computed on the host, for a backend elsewhere.
    bool is_apart() const { return &backend_ != &host_; }

    Backend& backend_;
    Backend& host_;
    const ModelSpec& model_;
    const LayerSpec& spec_;
    int layer_;
    ExpertStore& store_;
    DeviceTier* tier_;  // null where the backend has no experts of its own
    Norm layer_norm_;   // before the whole half: what the router sees when it is asked ahead
    Router router_;
    std::optional<DensePart> shared_;
    ConstFloats shared_gate_;  // [hidden]
    Norm expert_norm_, expert_output_norm_, shared_output_norm_, output_norm_;
    ExpertShapes shapes_;
    ExpertShapes host_shapes_;     // with the host's copies of the biases
    std::vector<uint8_t> finest_;  // [experts] the finest level of each
    std::vector<int> bits_;        // [levels] stored width
    std::vector<size_t> bytes_;    // [levels] of an expert, up to that one
    Buffers buffers_;
    AheadBuffers ahead_;
    HostBuffers host_buffers_;
};

}  // namespace edgemoe
