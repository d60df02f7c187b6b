// Multi-head latent attention (DeepSeek-V2, section 2.1): what is stored of a position is one latent and one rotated
// key, which all heads share. A head's queries are taken to the latent's space and its attended latents back to values
// ("absorbed" projections), at every chunk size: a token's result does not depend on its company.
#include <algorithm>
#include <array>
#include <limits>

#include "engine_parts.h"

namespace edgemoe {

void Engine::load_latent_attention(Layer& layer, const AttentionSpec& a, const std::string& prefix) {
    const int hidden = spec_.hidden_size, queries = a.heads * a.head_dim;
    if (a.q_rank) {
        layer.q_down = matrix(prefix + "q_down", a.q_rank, hidden);
        layer.q_norm = norm(prefix + "q_norm", a.q_rank).weight;
        layer.q = matrix(prefix + "q", queries, a.q_rank);
    } else {
        layer.q = matrix(prefix + "q", queries, hidden);
    }
    layer.kv_down = matrix(prefix + "kv_down", a.kv_rank + a.rope_dim, hidden);
    layer.kv_norm = norm(prefix + "kv_norm", a.kv_rank).weight;
    layer.k_up = matrix(prefix + "k_up", a.heads * a.kv_rank, a.head_dim - a.rope_dim);
    layer.v_up = matrix(prefix + "v_up", a.heads * a.value_dim, a.kv_rank);
}

// Products of heads' own inputs with their own rows of a matrix [heads * rows, cols], for `heads` heads from `first`
// on: head h reads cols floats at values + h * input_step of every token and writes rows floats at out + h *
// output_step. Token strides: input_stride, output_stride.
void Engine::head_products(const Matrix& matrix, int rows, int first, int heads, int count, const float* values,
                           size_t input_step, size_t input_stride, float* out, size_t output_step,
                           size_t output_stride) {
    const Codes& codes = scratch_->input;
    const size_t per_token = groups(matrix.cols), size = block_bytes(matrix.layout, matrix.cols);
    if (reads_codes(matrix.layout))
        each_token(count, [&](int t) {
            for (int h = 0; h < heads; ++h) {
                const size_t place = (size_t(h) * count + t) * per_token;
                kernels_.quantize({values + h * input_step + t * input_stride, size_t(matrix.cols)},
                                  codes.codes + place * kGroup, codes.scales + place, codes.sums + place);
            }
        });
    Matrix part{matrix.layout, rows, matrix.cols, nullptr};
    const int step = blocks_per_item(part, count), items = (blocks(rows) + step - 1) / step;
    pool_.run(heads * items, [&](int item) {
        const int h = item / items, begin = item % items * step, end = std::min(begin + step, blocks(rows));
        Matrix own = part;
        own.data = matrix.data + size_t(first + h) * blocks(rows) * size;
        const size_t place = size_t(h) * count * per_token;
        const Activations input{values + h * input_step, static_cast<ptrdiff_t>(input_stride),
                                codes.codes + place * kGroup, codes.scales + place, codes.sums + place};
        kernels_.matmul(own, input, {}, count, begin, end, out + h * output_step,
                        static_cast<ptrdiff_t>(output_stride));
    });
}

void Engine::latent_attention(int number, int count, std::span<const int32_t> positions,
                              std::span<const int32_t> sequence_ids) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const AttentionSpec& a = spec_.layers[number].attention;
    const size_t rank = a.kv_rank, rope = a.rope_dim, latent = rank + rope, head_dim = a.head_dim,
                 plain = head_dim - rope, value_dim = a.value_dim, queries = a.heads * head_dim;

    const std::array<Matrix, 2> projections{a.q_rank ? layer.q_down : layer.q, layer.kv_down};
    const Activations input = prepare(s.normed, count, spec_.hidden_size, projections);
    product(projections, input, count, std::array{a.q_rank ? s.keys : s.queries, s.values});
    if (a.q_rank) {
        each_token(count, [&](int t) {
            const std::span<float> row{s.keys + size_t(t) * a.q_rank, size_t(a.q_rank)};
            kernels_.rms_norm(row, layer.q_norm, a.latent_norm_epsilon, row.data());
        });
        product({&layer.q, 1}, prepare(s.keys, count, a.q_rank, {&layer.q, 1}), count, {&s.queries, 1});
    }

    each_token(count, [&](int t) {
        SequenceState& state = *sequences_[sequence_ids[t]];
        const std::span<float> row{s.values + t * latent, latent};
        kernels_.rms_norm(row.first(rank), layer.kv_norm, a.latent_norm_epsilon, row.data());
        if (a.rope >= 0) {
            const RopeSpec& spec = spec_.ropes[a.rope];
            const auto pairs = static_cast<int>(spec.inverse_frequencies.size());
            const size_t place = (size_t(a.rope) * count + t) * s.widest_pairs;
            const auto turn = [&](float* part) {
                // attended is free until the chunk attends.
                if (spec.interleaved) separate_pairs(part, pairs, s.attended + t * a.heads * value_dim);
                kernels_.rope(part, s.cosine + place, s.sine + place, pairs);
            };
            turn(row.data() + rank);
            for (int h = 0; h < a.heads; ++h) turn(s.queries + t * queries + h * head_dim + plain);
        }
        kernels_.store_key(options_.key_type, row, positions[t], state.blocks(number, 0));
    });

    // Some heads at a time, because their latents are larger than what they are made of.
    for (int first = 0; first < a.heads; first += kLatentHeads) {
        const int heads = std::min(kLatentHeads, a.heads - first);
        float* asked = s.keys;   // [count, heads, latent]
        float* found = s.gates;  // [count, heads, rank]
        head_products(layer.k_up, a.kv_rank, first, heads, count, s.queries + first * head_dim, head_dim, queries,
                      asked, latent, heads * latent);
        each_token(count, [&](int t) {
            for (int h = 0; h < heads; ++h)
                std::copy_n(s.queries + t * queries + (first + h) * head_dim + plain, rope,
                            asked + (size_t(t) * heads + h) * latent + rank);
        });
        const int step = count > 1 ? heads : (heads + pool_.threads() - 1) / pool_.threads();
        const int items = (heads + step - 1) / step;
        pool_.run(count * items, [&](int item) {
            const int t = item / items, begin_head = item % items * step, end_head = std::min(begin_head + step, heads);
            const size_t place = size_t(t) * heads + begin_head, many = end_head - begin_head;
            SequenceState& state = *sequences_[sequence_ids[t]];
            float* maximum = s.maximum + size_t(t) * a.heads + first + begin_head;
            float* sum = s.sum + size_t(t) * a.heads + first + begin_head;
            float* out = found + place * rank;
            std::fill_n(maximum, many, -std::numeric_limits<float>::infinity());
            std::fill_n(sum, many, 0.0f);
            std::fill_n(out, many * rank, 0.0f);
            kernels_.attend_latent(options_.key_type, asked + place * latent, static_cast<int>(many),
                                   static_cast<int>(latent), a.kv_rank, a.scale, state.blocks(number, 0), 0,
                                   positions[t] + 1, maximum, sum, out);
            for (size_t h = 0; h < many; ++h)
                for (size_t d = 0; d < rank; ++d) out[h * rank + d] /= sum[h];
        });
        head_products(layer.v_up, a.value_dim, first, heads, count, found, rank, heads * rank,
                      s.attended + first * value_dim, value_dim, a.heads * value_dim);
    }
}

}  // namespace edgemoe
