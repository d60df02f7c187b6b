// Token mixing: projections, positions, and attention over what came before.
#include <algorithm>
#include <array>
#include <limits>

#include "engine_parts.h"

namespace edgemoe {

void Engine::attention(int number, int count, std::span<const int32_t> positions,
                       std::span<const int32_t> sequence_ids) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const AttentionSpec& a = spec_.layers[number].attention;
    const int hidden = spec_.hidden_size, dim = a.head_dim, group = a.heads / a.kv_heads;
    const size_t query_size = size_t(a.heads) * dim, key_size = size_t(a.kv_heads) * dim;

    each_token(count, [&](int t) {
        const size_t row = size_t(t) * hidden;
        kernels_.rms_norm({s.x + row, size_t(hidden)}, layer.attention_norm, spec_.norm_epsilon, s.normed + row);
    });
    const std::array<Matrix, 3> projections{layer.q, layer.k, layer.v};
    const Activations input = prepare(s.normed, count, hidden, projections);
    product(projections, input, count, std::array{s.queries, s.keys, s.values});

    // Every token's key and value are stored before any token of the chunk attends, so a token sees the stored form
    // (rounded to the state's type) of its own chunk just as of earlier ones.
    each_token(count, [&](int t) {
        SequenceState& state = *sequences_[sequence_ids[t]];
        const int block = positions[t] / kKvBlock, slot = positions[t] % kKvBlock;
        const float* cosine = nullptr;
        const float* sine = nullptr;
        int pairs = 0;
        if (a.rope >= 0) {
            const size_t place = (size_t(a.rope) * count + t) * s.widest_pairs;
            cosine = s.cosine + place;
            sine = s.sine + place;
            pairs = static_cast<int>(spec_.ropes[a.rope].inverse_frequencies.size());
        }
        const auto turn = [&](float* head, const float* norm) {
            if (a.head_norm) kernels_.rms_norm({head, size_t(dim)}, norm, spec_.norm_epsilon, head);
            if (pairs) kernels_.rope(head, cosine, sine, pairs);
        };
        for (int h = 0; h < a.heads; ++h) turn(s.queries + t * query_size + size_t(h) * dim, layer.q_norm);
        for (int h = 0; h < a.kv_heads; ++h) {
            float* key = s.keys + t * key_size + size_t(h) * dim;
            const float* value = s.values + t * key_size + size_t(h) * dim;
            turn(key, layer.k_norm);
            kernels_.store_key(options_.key_type, {key, size_t(dim)}, slot, state.keys(number, block, h));
            kernels_.store_value(options_.value_type, {value, size_t(dim)}, slot, state.values(number, block, h));
        }
    });

    pool_.run(count * a.kv_heads, [&](int item) {
        const int t = item / a.kv_heads, kv_head = item % a.kv_heads;
        SequenceState& state = *sequences_[sequence_ids[t]];
        const size_t first_head = size_t(kv_head) * group;
        float* maximum = s.maximum + t * size_t(a.heads) + first_head;
        float* sum = s.sum + t * size_t(a.heads) + first_head;
        float* out = s.attended + t * query_size + first_head * dim;
        std::fill_n(maximum, group, -std::numeric_limits<float>::infinity());
        std::fill_n(sum, group, 0.0f);
        std::fill_n(out, size_t(group) * dim, 0.0f);
        const int length = positions[t] + 1;
        for (int begin = 0; begin < length; begin += kKvBlock) {
            const int block = begin / kKvBlock;
            kernels_.attend(options_.key_type, options_.value_type, s.queries + t * query_size + first_head * dim,
                            group, dim, a.scale, state.keys(number, block, kv_head),
                            state.values(number, block, kv_head), 0, std::min(kKvBlock, length - begin), maximum, sum,
                            out);
        }
        for (int h = 0; h < group; ++h)
            for (int d = 0; d < dim; ++d) out[size_t(h) * dim + d] /= sum[h];
    });

    const Activations attended = prepare(s.attended, count, static_cast<int>(query_size), {&layer.o, 1});
    product({&layer.o, 1}, attended, count, {&s.projected, 1});
    each_token(count, [&](int t) {
        const size_t row = size_t(t) * hidden;
        kernels_.add_scaled(1.0f, s.projected + row, {s.x + row, size_t(hidden)});
    });
}

}  // namespace edgemoe
