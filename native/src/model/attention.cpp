// Token mixing: projections, positions, and attention over what came before.
#include <algorithm>
#include <array>
#include <limits>

#include "engine_parts.h"

namespace edgemoe {

// Elements (0, 1, 2, 3, ...) of the rotated part as (0, 2, ..., 1, 3, ...): pairs of neighbours become the pairs that
// Kernels::rope turns. Queries and keys are dealt with alike, so that their products stay what they are.
void separate_pairs(float* head, int pairs, float* scratch) {
    for (int i = 0; i < pairs; ++i) {
        scratch[i] = head[2 * i];
        scratch[pairs + i] = head[2 * i + 1];
    }
    std::copy_n(scratch, 2 * pairs, head);
}

void Engine::load_attention(Layer& layer, const AttentionSpec& a, const std::string& p) {
    const int hidden = spec_.hidden_size, queries = a.heads * a.head_dim, keys = a.kv_heads * a.head_dim;
    layer.q = matrix(p + "q", a.output_gate ? 2 * queries : queries, hidden);
    layer.k = matrix(p + "k", keys, hidden);
    if (!a.values_are_keys) layer.v = matrix(p + "v", keys, hidden);
    if (a.bias) {
        layer.q_bias = vector(p + "q_bias", queries);
        layer.k_bias = vector(p + "k_bias", keys);
        if (!a.values_are_keys) layer.v_bias = vector(p + "v_bias", keys);
    }
    if (a.qk_norm != QkNorm::none) {
        const bool full = a.qk_norm == QkNorm::full;
        layer.q_norm = norm(p + "q_norm", full ? queries : a.head_dim).weight;
        layer.k_norm = norm(p + "k_norm", full ? keys : a.head_dim).weight;
    }
    if (a.value_norm) ones_.resize(std::max<size_t>(ones_.size(), a.head_dim), 1.0f);
    if (a.sinks) layer.sinks = vector(p + "sinks", a.heads);
}

void Engine::attention(int number, int count, std::span<const int32_t> positions,
                       std::span<const int32_t> sequence_ids) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const AttentionSpec& a = spec_.layers[number].attention;
    const int hidden = spec_.hidden_size, dim = a.head_dim, group = a.heads / a.kv_heads;
    const size_t query_size = size_t(a.heads) * dim, key_size = size_t(a.kv_heads) * dim;

    const std::array<Matrix, 3> projections{layer.q, layer.k, layer.v};
    const std::span<const Matrix> projected(projections.data(), a.values_are_keys ? 2 : 3);
    const Activations input = prepare(s.normed, count, hidden, projected);
    product(projected, input, count, std::array{a.output_gate ? s.gates : s.queries, s.keys, s.values});
    // With an output gate, the projection gives each head's query and behind it its gate.
    if (a.output_gate)
        each_token(count, [&](int t) {
            for (int h = 0; h < a.heads; ++h)
                std::copy_n(s.gates + (t * query_size + size_t(h) * dim) * 2, dim,
                            s.queries + t * query_size + size_t(h) * dim);
        });

    // Every token's key and value are stored before any token of the chunk attends, so a token sees the stored form
    // (rounded to the state's type) of its own chunk just as of earlier ones.
    each_token(count, [&](int t) {
        SequenceState& state = *sequences_[sequence_ids[t]];
        const std::span<float> queries{s.queries + t * query_size, query_size}, keys{s.keys + t * key_size, key_size},
            values{s.values + t * key_size, key_size};
        if (a.bias) {
            kernels_.add_scaled(1.0f, layer.q_bias, queries);
            kernels_.add_scaled(1.0f, layer.k_bias, keys);
            if (!a.values_are_keys) kernels_.add_scaled(1.0f, layer.v_bias, values);
        }
        if (a.values_are_keys) std::ranges::copy(keys, values.begin());
        if (a.qk_norm == QkNorm::full) {
            kernels_.rms_norm(queries, layer.q_norm, spec_.norm_epsilon, queries.data());
            kernels_.rms_norm(keys, layer.k_norm, spec_.norm_epsilon, keys.data());
        }
        if (a.clip_qkv > 0)
            for (const std::span<float> all : {queries, keys, values})
                for (float& x : all) x = x > a.clip_qkv ? a.clip_qkv : x < -a.clip_qkv ? -a.clip_qkv : x;

        const float* cosine = nullptr;
        const float* sine = nullptr;
        int pairs = 0;
        bool interleaved = false;
        if (a.rope >= 0) {
            const RopeSpec& rope = spec_.ropes[a.rope];
            const size_t place = (size_t(a.rope) * count + t) * s.widest_pairs;
            cosine = s.cosine + place;
            sine = s.sine + place;
            pairs = static_cast<int>(rope.inverse_frequencies.size());
            interleaved = rope.interleaved;
        }
        const auto turn = [&](float* head, const float* norm) {
            if (a.qk_norm == QkNorm::head) kernels_.rms_norm({head, size_t(dim)}, norm, spec_.norm_epsilon, head);
            // attended is free until the chunk attends.
            if (interleaved) separate_pairs(head, pairs, s.attended + t * query_size);
            if (pairs) kernels_.rope(head, cosine, sine, pairs);
        };
        for (int h = 0; h < a.heads; ++h) turn(queries.data() + size_t(h) * dim, layer.q_norm);
        for (int h = 0; h < a.kv_heads; ++h) {
            const std::span<float> key = keys.subspan(size_t(h) * dim, dim),
                                   value = values.subspan(size_t(h) * dim, dim);
            turn(key.data(), layer.k_norm);
            if (a.value_norm) kernels_.rms_norm(value, ones_.data(), spec_.norm_epsilon, value.data());
            const KvBlocks blocks = state.blocks(number, h);
            kernels_.store_key(options_.key_type, key, positions[t], blocks);
            kernels_.store_value(options_.value_type, value, positions[t], blocks);
        }
    });

    pool_.run(count * a.kv_heads, [&](int item) {
        const int t = item / a.kv_heads, kv_head = item % a.kv_heads;
        SequenceState& state = *sequences_[sequence_ids[t]];
        const size_t first_head = size_t(kv_head) * group;
        float* maximum = s.maximum + t * size_t(a.heads) + first_head;
        float* sum = s.sum + t * size_t(a.heads) + first_head;
        float* out = s.attended + t * query_size + first_head * dim;
        if (layer.sinks) {  // a score before all others, whose value is zero
            std::copy_n(layer.sinks + first_head, group, maximum);
            std::fill_n(sum, group, 1.0f);
        } else {
            std::fill_n(maximum, group, -std::numeric_limits<float>::infinity());
            std::fill_n(sum, group, 0.0f);
        }
        std::fill_n(out, size_t(group) * dim, 0.0f);
        const int end = positions[t] + 1, begin = a.window ? std::max(end - a.window, 0) : 0;
        kernels_.attend(options_.key_type, options_.value_type, s.queries + t * query_size + first_head * dim, group,
                        dim, a.scale, state.blocks(number, kv_head), begin, end, maximum, sum, out);
        for (int h = 0; h < group; ++h) {
            float* head = out + size_t(h) * dim;
            for (int d = 0; d < dim; ++d) head[d] /= sum[h];
            if (a.output_gate) {
                const float* gate = s.gates + (t * query_size + (first_head + h) * dim) * 2 + dim;
                kernels_.sigmoid_multiply({gate, size_t(dim)}, head, head);
            }
        }
    });
}

}  // namespace edgemoe
