// Attention with keys and values for each head, or for groups of heads.
#include <array>

#include "model/mixers/mixer.h"

namespace edgemoe {
namespace {

struct Buffers : AttentionBuffers {
    void place(Places& places, const AttentionSpec& a, int rows) {
        const size_t query_size = size_t(rows) * a.heads * a.head_dim,
                     key_size = size_t(rows) * a.kv_heads * a.head_dim;
        places.place(projected, a.output_gate ? 2 * query_size : 0);
        places.place(queries, query_size);
        places.place(keys, key_size);
        places.place(values, key_size);
        places.place(attended, query_size);
    }
};

class Attention final : public Mixer {
  public:
    Attention(const MixerSetting& setting, const PlacedWeights& weights, int rows, std::byte* memory)
        : layer_(setting.layer) {
        const AttentionSpec& a = setting.spec;
        const int hidden = setting.model.hidden_size, queries = a.heads * a.head_dim, keys = a.kv_heads * a.head_dim;
        projections_ = {weights.matrix("q", a.output_gate ? 2 * queries : queries, hidden),
                        weights.matrix("k", keys, hidden)};
        if (!a.values_are_keys) projections_.push_back(weights.matrix("v", keys, hidden));
        heads_ = {.heads = a.heads,
                  .kv_heads = a.kv_heads,
                  .dim = a.head_dim,
                  .key_type = setting.key_type,
                  .value_type = setting.value_type,
                  .qk_norm = a.qk_norm,
                  .norm_epsilon = setting.model.norm_epsilon,
                  .clip = a.clip_qkv,
                  .rope = a.rope,
                  .values_are_keys = a.values_are_keys,
                  .output_gate = a.output_gate,
                  .window = a.window,
                  .scale = a.scale};
        if (a.bias) {
            heads_.q_bias = weights.vector("q_bias", queries);
            heads_.k_bias = weights.vector("k_bias", keys);
            if (!a.values_are_keys) heads_.v_bias = weights.vector("v_bias", keys);
        }
        if (a.qk_norm != QkNorm::none) {
            const bool full = a.qk_norm == QkNorm::full;
            heads_.q_norm = weights.rms_norm("q_norm", full ? queries : a.head_dim, heads_.norm_epsilon).weight;
            heads_.k_norm = weights.rms_norm("k_norm", full ? keys : a.head_dim, heads_.norm_epsilon).weight;
        }
        if (a.value_norm) heads_.value_norm = weights.constant(a.head_dim, 1.0f);
        if (a.sinks) heads_.sinks = weights.vector("sinks", a.heads);
        Places places(memory);
        buffers_.place(places, a, rows);
    }

    ConstFloats run(Backend& backend, ConstFloats x, int count) override {
        const std::array outputs{heads_.output_gate ? buffers_.projected : buffers_.queries, buffers_.keys,
                                 buffers_.values};
        backend.product(projections_, x, count, std::span(outputs).first(projections_.size()));
        backend.store(heads_, layer_, buffers_);
        backend.attend(heads_, layer_, buffers_);
        return buffers_.attended;
    }

  private:
    int layer_;
    std::vector<Matrix> projections_;  // queries, keys and, if they are others, values
    AttentionHeads heads_{};
    Buffers buffers_;
};

}  // namespace

const MixerKind kAttention{
    .state =
        [](const AttentionSpec& a, KvType key_type, KvType value_type) {
            return KvShape{.kv_heads = a.kv_heads,
                           .head_dim = a.head_dim,
                           .key_type = key_type,
                           .value_type = value_type,
                           .window = a.window};
        },
    .input_groups = no_wider_input,
    .buffer_bytes = mixer_buffer_bytes<Buffers>,
    .load = load_mixer<Attention>,
};

}  // namespace edgemoe
