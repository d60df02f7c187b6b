#include "model/feed_forward.h"

#include "model/dense_part.h"
#include "model/mixture.h"

namespace edgemoe {
namespace {

class DenseHalf final : public FeedForwardHalf {
  public:
    struct Buffers {
        DensePart::Buffers part;
        Floats out;  // [rows, hidden]

        void place(Places& places, const ModelSpec& model, const LayerSpec& spec, int rows) {
            part.place(places, spec.ffn_dim, rows);
            places.place(out, size_t(rows) * model.hidden_size);
        }
    };

    DenseHalf(const HalfSetting& setting, const PlacedWeights& weights, const HalfMemory& memory)
        : size_(setting.model.hidden_size),
          residual_multiplier_(setting.model.residual_multiplier),
          part_(setting.model, setting.spec, weights, "ffn.", setting.spec.ffn_dim) {
        if (setting.spec.output_norms) output_norm_ = weights.norm("ffn_output_norm", size_);
        Places places(memory.half);
        buffers_.place(places, setting.model, setting.spec, memory.rows);
    }

    void run(const HalfInput& input) override {
        Backend& backend = input.backend;
        part_.run(backend, buffers_.part, input.normed, input.count, buffers_.out);
        if (output_norm_) backend.normalize(output_norm_, buffers_.out, input.count, buffers_.out);
        backend.add(residual_multiplier_, buffers_.out, input.x, size_, input.count);
    }

  private:
    int size_;
    float residual_multiplier_;
    DensePart part_;
    Norm output_norm_;
    Buffers buffers_;
};

}  // namespace

std::pair<size_t, size_t> half_buffer_bytes(const ModelSpec& model, const LayerSpec& spec, int rows) {
    Places half, ahead;
    if (spec.experts) {
        Mixture::Buffers{}.place(half, model, spec, rows);
        Mixture::AheadBuffers{}.place(ahead, model, spec, rows);
    } else {
        DenseHalf::Buffers{}.place(half, model, spec, rows);
    }
    return {half.used(), ahead.used()};
}

size_t host_buffer_bytes(const ModelSpec& model, const LayerSpec& spec, int rows) {
    Places host;
    if (spec.experts) Mixture::HostBuffers{}.place(host, model, spec, rows);
    return host.used();
}

std::unique_ptr<FeedForwardHalf> load_half(const HalfSetting& setting, const PlacedWeights& weights,
                                           const HalfMemory& memory) {
    if (setting.spec.experts) return std::make_unique<Mixture>(setting, find_experts(setting), weights, memory);
    return std::make_unique<DenseHalf>(setting, weights, memory);
}

}  // namespace edgemoe
