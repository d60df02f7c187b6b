// Gated DeltaNet (Yang et al. 2024), as in Qwen3-Next: a recurrence, behind a short convolution.
#include <array>
#include <cmath>

#include "model/mixers/mixer.h"

namespace edgemoe {
namespace {

struct Buffers {
    Floats mixed;      // [rows, channels] queries, keys and values
    Floats convolved;  // [rows, channels]
    Floats gates;      // [rows, heads, value_dim]
    Floats beta;       // [rows, heads], or with alpha [rows, 2 * heads]
    Floats alpha;      // [rows, heads]
    Floats out;        // [rows, heads, value_dim]

    void place(Places& places, const AttentionSpec& a, int rows) {
        const size_t count = rows, channels = a.channels(), values = size_t(a.heads) * a.value_dim;
        places.place(mixed, count * channels);
        places.place(convolved, count * channels);
        places.place(gates, count * values);
        places.place(beta, count * a.heads * (a.fused_beta_alpha ? 2 : 1));
        places.place(alpha, a.fused_beta_alpha ? 0 : count * a.heads);
        places.place(out, count * values);
    }
};

class GatedDelta final : public Mixer {
  public:
    GatedDelta(const MixerSetting& setting, const PlacedWeights& weights, int rows, std::byte* memory)
        : layer_(setting.layer) {
        const AttentionSpec& a = setting.spec;
        const int hidden = setting.model.hidden_size;
        projections_ = {weights.matrix("mixed", a.channels(), hidden),
                        weights.matrix("output_gate", a.heads * a.value_dim, hidden)};
        if (a.fused_beta_alpha) {
            projections_.push_back(weights.matrix("beta_alpha", 2 * a.heads, hidden));
        } else {
            projections_.push_back(weights.matrix("beta", a.heads, hidden));
            projections_.push_back(weights.matrix("alpha", a.heads, hidden));
        }
        convolution_ = weights.float_matrix("conv", a.channels(), a.conv_size);
        const auto dim = static_cast<float>(a.head_dim);
        heads_ = {.heads = a.heads,
                  .kv_heads = a.kv_heads,
                  .key_dim = a.head_dim,
                  .value_dim = a.value_dim,
                  .tiled_heads = a.tiled_heads,
                  .fused_beta_alpha = a.fused_beta_alpha,
                  .decay_rate = weights.vector("decay_rate", a.heads),
                  .step_bias = weights.vector("step_bias", a.heads),
                  .query_norm = weights.constant(a.head_dim, 1.0f / dim),
                  .key_norm = weights.constant(a.head_dim, 1.0f / std::sqrt(dim)),
                  .head_norm = weights.vector("head_norm", a.value_dim),
                  .norm_epsilon = setting.model.norm_epsilon};
        Places places(memory);
        buffers_.place(places, a, rows);
    }

    ConstFloats run(Backend& backend, ConstFloats x, int count) override {
        const Buffers& b = buffers_;
        const std::array outputs{b.mixed, b.gates, b.beta, b.alpha};
        backend.product(projections_, x, count, std::span(outputs).first(projections_.size()));
        backend.convolve(convolution_, layer_, b.mixed, true, b.convolved);
        backend.gated_delta(heads_, layer_, {b.convolved, b.gates, b.beta, b.alpha, b.out});
        return b.out;
    }

  private:
    int layer_;
    std::vector<Matrix> projections_;  // mixed, output gate, beta and alpha
    Matrix convolution_{};             // [channels, taps]
    DeltaHeads heads_{};
    Buffers buffers_;
};

}  // namespace

const MixerKind kGatedDelta{
    .state =
        [](const AttentionSpec& a, KvType key_type, KvType value_type) {
            return KvShape{.kv_heads = 0,
                           .head_dim = 0,
                           .key_type = key_type,
                           .value_type = value_type,
                           .window = 0,
                           .recurrence = size_t(a.heads) * a.head_dim * a.value_dim,
                           .convolution = size_t(a.channels()) * a.conv_size};
        },
    .input_groups = no_wider_input,
    .buffer_bytes = mixer_buffer_bytes<Buffers>,
    .load = load_mixer<GatedDelta>,
};

}  // namespace edgemoe
