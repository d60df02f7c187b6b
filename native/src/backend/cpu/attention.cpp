// Keys and values into the state, and attention over what came before.
#include <array>
#include <limits>

#include "cpu_backend.h"

namespace edgemoe {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

void CpuBackend::store(const AttentionHeads& a, int layer, const AttentionBuffers& b) {
    const size_t dim = a.dim, query_size = a.heads * dim, key_size = a.kv_heads * dim;
    each_row(rows_.count(), [&](int t) {
        SequenceState& state = *rows_.states[t];
        const int position = rows_.positions[t];
        const std::span<float> queries{b.queries.address() + t * query_size, query_size},
            keys{b.keys.address() + t * key_size, key_size}, values{b.values.address() + t * key_size, key_size};
        if (a.output_gate)
            for (int h = 0; h < a.heads; ++h)
                std::copy_n(b.projected.address() + (t * query_size + h * dim) * 2, dim, queries.data() + h * dim);
        if (a.q_bias) {
            kernels_.add_scaled(1.0f, a.q_bias.address(), queries);
            kernels_.add_scaled(1.0f, a.k_bias.address(), keys);
            if (a.v_bias) kernels_.add_scaled(1.0f, a.v_bias.address(), values);
        }
        if (a.values_are_keys) std::ranges::copy(keys, values.begin());
        if (a.qk_norm == QkNorm::full) {
            kernels_.rms_norm(queries, a.q_norm.address(), a.norm_epsilon, queries.data());
            kernels_.rms_norm(keys, a.k_norm.address(), a.norm_epsilon, keys.data());
        }
        if (a.clip > 0)
            for (const std::span<float> all : {queries, keys, values})
                for (float& x : all) x = x > a.clip ? a.clip : x < -a.clip ? -a.clip : x;

        const Rotation turned = rotation(a.rope, t);
        const auto turn = [&](std::span<float> head, ConstFloats norm) {
            if (a.qk_norm == QkNorm::head) kernels_.rms_norm(head, norm.address(), a.norm_epsilon, head.data());
            rotate(turned, t, head.data());
        };
        for (int h = 0; h < a.heads; ++h) turn(queries.subspan(h * dim, dim), a.q_norm);
        for (int h = 0; h < a.kv_heads; ++h) {
            const std::span<float> key = keys.subspan(h * dim, dim), value = values.subspan(h * dim, dim);
            turn(key, a.k_norm);
            if (a.value_norm) kernels_.rms_norm(value, a.value_norm.address(), a.norm_epsilon, value.data());
            const KvBlocks blocks = state.blocks(layer, h);
            kernels_.store_key(a.key_type, key, position, blocks);
            kernels_.store_value(a.value_type, value, position, blocks);
        }
    });
}

void CpuBackend::attend(const AttentionHeads& a, int layer, const AttentionBuffers& b) {
    const size_t dim = a.dim, query_size = a.heads * dim, group = a.heads / a.kv_heads;
    pool_.run(rows_.count() * a.kv_heads, [&](int item) {
        const int t = item / a.kv_heads, kv_head = item % a.kv_heads;
        SequenceState& state = *rows_.states[t];
        const size_t first_head = kv_head * group;
        const float* queries = b.queries.address() + t * query_size + first_head * dim;
        float* maximum = work_.maximum + t * size_t(a.heads) + first_head;
        float* sum = work_.sum + t * size_t(a.heads) + first_head;
        float* out = b.attended.address() + t * query_size + first_head * dim;
        if (a.sinks) {  // a score before all others, whose value is zero
            std::copy_n(a.sinks.address() + first_head, group, maximum);
            std::fill_n(sum, group, 1.0f);
        } else {
            std::fill_n(maximum, group, -kInfinity);
            std::fill_n(sum, group, 0.0f);
        }
        std::fill_n(out, group * dim, 0.0f);
        const int end = rows_.positions[t] + 1, begin = a.window ? std::max(end - a.window, 0) : 0;
        kernels_.attend(a.key_type, a.value_type, queries, static_cast<int>(group), a.dim, a.scale,
                        state.blocks(layer, kv_head), begin, end, maximum, sum, out);
        for (size_t h = 0; h < group; ++h) {
            float* head = out + h * dim;
            for (size_t d = 0; d < dim; ++d) head[d] = canonical(head[d] / sum[h]);
            if (a.output_gate) {
                const float* gate = b.projected.address() + (t * query_size + (first_head + h) * dim) * 2 + dim;
                kernels_.sigmoid_multiply({gate, dim}, head, head);
            }
        }
    });
}

void CpuBackend::store_latents(const LatentHeads& a, int layer, Floats queries, Floats latents) {
    const size_t rank = a.kv_rank, latent = rank + a.rope_dim, query_size = size_t(a.heads) * a.head_dim;
    each_row(rows_.count(), [&](int t) {
        SequenceState& state = *rows_.states[t];
        const int position = rows_.positions[t];
        const std::span<float> row{latents.address() + t * latent, latent};
        kernels_.rms_norm(row.first(rank), a.kv_norm.address(), a.norm_epsilon, row.data());
        const Rotation turned = rotation(a.rope, t);
        rotate(turned, t, row.data() + rank);
        for (int h = 0; h < a.heads; ++h)
            rotate(turned, t, queries.address() + t * query_size + size_t(h) * a.head_dim + (a.head_dim - a.rope_dim));
        kernels_.store_key(a.type, row, position, state.blocks(layer, 0));
    });
}

void CpuBackend::attend_latents(const LatentHeads& a, int layer, const LatentBuffers& b) {
    const size_t rank = a.kv_rank, rope = a.rope_dim, latent = rank + rope, query_size = size_t(a.heads) * a.head_dim;
    const int count = rows_.count();
    // A single row's heads are divided among the threads.
    const int step = count > 1 ? b.heads : (b.heads + pool_.threads() - 1) / pool_.threads();
    const int items = (b.heads + step - 1) / step;
    pool_.run(count * items, [&](int item) {
        const int t = item / items, begin_head = item % items * step, end_head = std::min(begin_head + step, b.heads);
        const size_t many = end_head - begin_head, place = size_t(t) * b.heads + begin_head;
        SequenceState& state = *rows_.states[t];
        float* asked = b.asked.address() + place * latent;
        for (size_t h = 0; h < many; ++h) {
            const size_t end = (b.first + begin_head + h + 1) * a.head_dim;
            std::copy_n(b.queries.address() + t * query_size + end - rope, rope, asked + h * latent + rank);
        }
        float* maximum = work_.maximum + size_t(t) * a.heads + b.first + begin_head;
        float* sum = work_.sum + size_t(t) * a.heads + b.first + begin_head;
        float* out = b.found.address() + place * rank;
        std::fill_n(maximum, many, -kInfinity);
        std::fill_n(sum, many, 0.0f);
        std::fill_n(out, many * rank, 0.0f);
        kernels_.attend_latent(a.type, asked, static_cast<int>(many), static_cast<int>(latent), a.kv_rank, a.scale,
                               state.blocks(layer, 0), 0, rows_.positions[t] + 1, maximum, sum, out);
        for (size_t h = 0; h < many; ++h)
            for (size_t d = 0; d < rank; ++d) out[h * rank + d] = canonical(out[h * rank + d] / sum[h]);
    });
}

}  // namespace edgemoe
