// A gated short convolution (LFM2).
#include "model/mixers/mixer.h"

namespace edgemoe {
namespace {

struct Buffers {
    Floats mixed;  // [rows, gate on the input | gate on the output | input]
    Floats gated;  // [rows, channels] the convolution's input
    Floats out;    // [rows, channels]

    void place(Places& places, const AttentionSpec& a, int rows) {
        const size_t size = size_t(rows) * a.channels();
        places.place(mixed, 3 * size);
        places.place(gated, size);
        places.place(out, size);
    }
};

class ShortConvolution final : public Mixer {
  public:
    ShortConvolution(const MixerSetting& setting, const PlacedWeights& weights, int rows, std::byte* memory)
        : layer_(setting.layer), channels_(setting.spec.channels()) {
        projection_ = weights.matrix("mixed", 3 * channels_, setting.model.hidden_size);
        convolution_ = weights.float_matrix("conv", channels_, setting.spec.conv_size);
        Places places(memory);
        buffers_.place(places, setting.spec, rows);
    }

    ConstFloats run(Backend& backend, ConstFloats x, int count) override {
        const size_t size = channels_;
        const Floats mixed = buffers_.mixed, gated = buffers_.gated, out = buffers_.out;
        backend.product({&projection_, 1}, x, count, {&mixed, 1});
        backend.multiply(mixed, 3 * size, mixed + 2 * size, 3 * size, channels_, count, gated, size);
        backend.convolve(convolution_, layer_, gated, false, out);
        backend.multiply(out, size, mixed + size, 3 * size, channels_, count, out, size);
        return out;
    }

  private:
    int layer_;
    int channels_;
    Matrix projection_{};   // [3 * channels, hidden]
    Matrix convolution_{};  // [channels, taps]
    Buffers buffers_;
};

}  // namespace

const MixerKind kShortConvolution{
    .state =
        [](const AttentionSpec& a, KvType key_type, KvType value_type) {
            return KvShape{.kv_heads = 0,
                           .head_dim = 0,
                           .key_type = key_type,
                           .value_type = value_type,
                           .window = 0,
                           .convolution = size_t(a.channels()) * a.conv_size};
        },
    .input_groups = no_wider_input,
    .buffer_bytes = mixer_buffer_bytes<Buffers>,
    .load = load_mixer<ShortConvolution>,
};

}  // namespace edgemoe
