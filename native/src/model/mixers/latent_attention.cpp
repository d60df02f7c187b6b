// Multi-head latent attention (DeepSeek-V2, section 2.1): what is stored of a position is one latent and one rotated
// key, which all heads share. A head's queries are taken to the latent's space and its attended latents back to values
// ("absorbed" projections), at every chunk size: a token's result does not depend on its company.
#include <algorithm>
#include <array>

#include "model/mixers/mixer.h"

namespace edgemoe {
namespace {

struct Buffers {
    Floats low_rank;  // [rows, q_rank] queries before their second projection
    Floats queries;   // [rows, heads, head_dim]
    Floats latents;   // [rows, kv_rank + rope_dim]
    Floats asked;     // [rows, heads at a time, kv_rank + rope_dim]
    Floats found;     // [rows, heads at a time, kv_rank]
    Floats attended;  // [rows, heads, value_dim]

    void place(Places& places, const AttentionSpec& a, int rows) {
        const size_t count = rows, heads = std::min(a.heads, kHeadsAtATime), latent = a.kv_rank + a.rope_dim;
        places.place(low_rank, count * a.q_rank);
        places.place(queries, count * a.heads * a.head_dim);
        places.place(latents, count * latent);
        places.place(asked, count * heads * latent);
        places.place(found, count * heads * a.kv_rank);
        places.place(attended, count * a.heads * a.value_dim);
    }
};

class LatentAttention final : public Mixer {
  public:
    LatentAttention(const MixerSetting& setting, const PlacedWeights& weights, int rows, std::byte* memory)
        : layer_(setting.layer) {
        const AttentionSpec& a = setting.spec;
        const int hidden = setting.model.hidden_size, queries = a.heads * a.head_dim;
        if (a.q_rank) {
            q_down_ = weights.matrix("q_down", a.q_rank, hidden);
            q_norm_ = weights.rms_norm("q_norm", a.q_rank, a.latent_norm_epsilon);
        }
        q_ = weights.matrix("q", queries, a.q_rank ? a.q_rank : hidden);
        kv_down_ = weights.matrix("kv_down", a.kv_rank + a.rope_dim, hidden);
        k_up_ = weights.matrix("k_up", a.heads * a.kv_rank, a.head_dim - a.rope_dim);
        v_up_ = weights.matrix("v_up", a.heads * a.value_dim, a.kv_rank);
        heads_ = {.heads = a.heads,
                  .head_dim = a.head_dim,
                  .kv_rank = a.kv_rank,
                  .rope_dim = a.rope_dim,
                  .value_dim = a.value_dim,
                  .type = setting.key_type,
                  .kv_norm = weights.rms_norm("kv_norm", a.kv_rank, a.latent_norm_epsilon).weight,
                  .norm_epsilon = a.latent_norm_epsilon,
                  .rope = a.rope,
                  .scale = a.scale};
        Places places(memory);
        buffers_.place(places, a, rows);
    }

    ConstFloats run(Backend& backend, ConstFloats x, int count) override {
        const Buffers& b = buffers_;
        const std::array inputs{q_norm_ ? q_down_ : q_, kv_down_};
        backend.product(inputs, x, count, std::array{q_norm_ ? b.low_rank : b.queries, b.latents});
        if (q_norm_) {
            backend.normalize(q_norm_, b.low_rank, count, b.low_rank);
            backend.product({&q_, 1}, b.low_rank, count, {&b.queries, 1});
        }
        backend.store_latents(heads_, layer_, b.queries, b.latents);
        const size_t head_dim = heads_.head_dim, rank = heads_.kv_rank, latent = rank + heads_.rope_dim,
                     value_dim = heads_.value_dim;
        for (int first = 0; first < heads_.heads; first += kHeadsAtATime) {
            const int heads = std::min(kHeadsAtATime, heads_.heads - first);
            backend.products_by_head({.matrix = k_up_,
                                      .rows = heads_.kv_rank,
                                      .first = first,
                                      .heads = heads,
                                      .values = b.queries + first * head_dim,
                                      .value_step = head_dim,
                                      .value_stride = heads_.heads * head_dim,
                                      .out = b.asked,
                                      .out_step = latent,
                                      .out_stride = heads * latent},
                                     count);
            backend.attend_latents(heads_, layer_, {first, heads, b.queries, b.asked, b.found});
            backend.products_by_head({.matrix = v_up_,
                                      .rows = heads_.value_dim,
                                      .first = first,
                                      .heads = heads,
                                      .values = b.found,
                                      .value_step = rank,
                                      .value_stride = heads * rank,
                                      .out = b.attended + first * value_dim,
                                      .out_step = value_dim,
                                      .out_stride = heads_.heads * value_dim},
                                     count);
        }
        return b.attended;
    }

  private:
    int layer_;
    Matrix q_down_{};  // [q_rank, hidden], where queries have a low rank
    Norm q_norm_;
    Matrix q_{};        // [heads * head_dim, q_rank or hidden]
    Matrix kv_down_{};  // [kv_rank + rope_dim, hidden]
    Matrix k_up_{};     // [heads * kv_rank, head_dim - rope_dim]
    Matrix v_up_{};     // [heads * value_dim, kv_rank]
    LatentHeads heads_{};
    Buffers buffers_;
};

}  // namespace

const MixerKind kLatentAttention{
    .state =
        [](const AttentionSpec& a, KvType key_type, KvType value_type) {
            return KvShape{.kv_heads = 1,
                           .head_dim = a.kv_rank + a.rope_dim,
                           .key_type = key_type,
                           .value_type = value_type,
                           .window = 0,
                           .latent = true};
        },
    .input_groups =
        [](const AttentionSpec& a) {
            const size_t heads = std::min(a.heads, kHeadsAtATime);
            const size_t own = std::max(column_groups(a.head_dim - a.rope_dim), column_groups(a.kv_rank));
            return std::max(column_groups(a.q_rank), heads * own);
        },
    .buffer_bytes = mixer_buffer_bytes<Buffers>,
    .load = load_mixer<LatentAttention>,
};

}  // namespace edgemoe
