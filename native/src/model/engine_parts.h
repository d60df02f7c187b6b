// What the files of the forward pass share: an engine's private parts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "edgemoe/engine.h"

namespace edgemoe {

constexpr size_t kAlignment = 64;

inline int blocks(int rows) { return (rows + kRowBlock - 1) / kRowBlock; }
inline int groups(int cols) { return (cols + kGroup - 1) / kGroup; }
inline size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Row blocks per loop item of a product.
int blocks_per_item(const Matrix& matrix, int tokens);

// Makes interleaved rotary pairs of a head such as Kernels::rope turns; scratch: 2 * pairs floats.
void separate_pairs(float* head, int pairs, float* scratch);

// Heads of latent attention that are computed at a time.
constexpr int kLatentHeads = 16;

// Floats per token that a layer's mixing of tokens takes in each buffer of Scratch; `input` counts columns of a
// product's input.
struct MixerWidths {
    size_t queries, keys, values, gates, attended, input;
};

inline MixerWidths mixer_widths(const AttentionSpec& a) {
    const size_t queries = size_t(a.heads) * a.head_dim, keys = size_t(a.kv_heads) * a.head_dim,
                 values = size_t(a.heads) * a.value_dim;
    switch (a.kind) {
        case AttentionKind::full:
            return {queries, keys, keys, a.output_gate ? 2 * queries : 0, queries, queries};
        case AttentionKind::mla: {
            const size_t heads = std::min(a.heads, kLatentHeads), rank = a.q_rank, latent = a.kv_rank + a.rope_dim;
            const size_t head_inputs = size_t(std::max(groups(a.head_dim - a.rope_dim), groups(a.kv_rank))) * kGroup;
            return {queries, std::max(rank, heads * latent),
                    latent,  heads * a.kv_rank,
                    values,  std::max({rank, heads * head_inputs, values})};
        }
        case AttentionKind::gated_delta: {
            const size_t channels = a.channels(), rates = 2 * size_t(a.heads);
            return {channels, channels, rates, values, values, values};
        }
        case AttentionKind::short_conv:
            return {3 * values, values, 0, 0, values, values};
    }
    return {};
}

// int8 inputs of a product.
struct Codes {
    int8_t* codes;
    float* scales;
    float* sums;
};

// Norm weights; with a bias it is a LayerNorm, without one an RMSNorm. No weight: there is no such norm.
struct Norm {
    const float* weight;
    const float* bias;

    explicit operator bool() const { return weight != nullptr; }
};

// A gated feed-forward part: down(activation(gate(x), up(x))). Biases may be null.
struct FeedForward {
    Matrix gate, up, down;
    const float* gate_bias;
    const float* up_bias;
    const float* down_bias;
};

// Weights of one layer; pointers into the dense arena. What a layer does not have is null.
struct Engine::Layer {
    Norm attention_norm;
    Matrix q, k, v, o;
    const float* q_bias;
    const float* k_bias;
    const float* v_bias;
    const float* o_bias;
    const float* q_norm;  // [head_dim] or [heads * head_dim]
    const float* k_norm;
    const float* sinks;  // [heads]
    Norm attention_output_norm;
    // Of latent attention, beside q, o and q_norm.
    Matrix q_down;   // [q_rank, hidden]
    Matrix kv_down;  // [kv_rank + rope_dim, hidden]
    Matrix k_up;     // [heads * kv_rank, head_dim - rope_dim]
    Matrix v_up;     // [heads * value_dim, kv_rank]
    const float* kv_norm;
    // Of convolutions and the gated delta rule, beside o.
    Matrix mixed;             // [channels or 3 * channels, hidden]
    Matrix conv;              // [channels, taps]
    Matrix output_gate;       // [heads * value_dim, hidden]
    Matrix beta, alpha;       // [heads, hidden], or beta [2 * heads, hidden] has both
    const float* decay_rate;  // [heads], negative
    const float* step_bias;   // [heads]
    const float* head_norm;   // [value_dim]

    Norm ffn_norm;
    FeedForward dense;         // what every token goes through: a dense layer's part, or the shared expert
    const float* shared_gate;  // [hidden]
    Matrix router;             // [experts, hidden], of a mixture of experts
    const float* router_bias;
    const float* router_norm;     // [hidden] of the router's own input
    const float* selection_bias;  // [experts]
    const float* expert_scale;    // [experts]
    Matrix gate, up, down;        // of routed experts: shapes and layouts, data comes from the store
    const float* gate_bias;       // [experts, ffn]
    const float* up_bias;         // [experts, ffn]
    const float* down_bias;       // [experts, hidden]
    Norm expert_norm;             // of the routed experts' own input
    Norm expert_output_norm;
    Norm shared_output_norm;
    Norm ffn_output_norm;
    const float* output_scale;    // [1]
    std::vector<uint8_t> finest;  // [experts] the finest level of each routed expert
    std::vector<int> bits;        // [levels] stored width
};

// Activations of one chunk of T tokens. P = T * top_k pairs of (token, slot), numbered token * top_k + slot.
struct Engine::Scratch {
    // Walks the buffers in one fixed order: first to measure, then to place them.
    struct Layout {
        std::byte* base;
        size_t used = 0;
        template <class T>
        void place(T*& pointer, size_t count) {
            pointer = base ? reinterpret_cast<T*>(base + used) : nullptr;
            used += aligned(count * sizeof(T));
        }
    };

    Scratch(const ModelSpec& spec, int chunk) {
        arena = Arena(layout({nullptr}, spec, chunk));
        layout({arena.data()}, spec, chunk);
    }

    static size_t bytes(const ModelSpec& spec, int chunk) {
        Scratch measured;
        return measured.layout({nullptr}, spec, chunk);
    }

    float* x;          // [T, hidden] the residual stream
    float* normed;     // [T, hidden]
    float* projected;  // [T, hidden] output of attention or of the feed-forward part
    float* shared;     // [T, hidden] output of the shared expert
    Codes input;       // [T, widest input of a product]
    float* queries;    // [T, heads * head_dim]; here and in the next four, other kinds of layers keep other things
    float* keys;       // [T, kv_heads * head_dim]
    float* values;     // [T, kv_heads * head_dim]
    float* gates;      // [T, heads * head_dim * 2] queries and gates
    float* attended;   // [T, heads * value_dim]
    float* maximum;    // [T, heads] online softmax
    float* sum;        // [T, heads]
    float* cosine;     // [ropes, T, pairs]
    float* sine;       // [ropes, T, pairs]
    float* scores;     // [T, experts] router
    float* choice;     // [T, experts] what experts are chosen by
    float* weights;    // [T, top_k]
    int32_t* picks;    // [T, top_k]
    int32_t* levels;   // [T, top_k] at which they work
    int32_t* order;    // [max experts of a layer] scratch of the selection, per token: [T, experts]
    int32_t* pairs;    // [P] pair numbers, sorted by expert
    int32_t* tokens;   // [P] their tokens
    float* gate;       // [P, ffn], or [T, ffn] of a dense part
    float* up;         // as gate
    Codes hidden;      // as gate
    float* outputs;    // [P, hidden] each expert's output for each of its tokens
    size_t widest_pairs = 0;  // cosine and sine: floats per token and rope
    Arena arena;

  private:
    Scratch() = default;

    size_t layout(Layout place, const ModelSpec& spec, int chunk) {
        const size_t t = chunk, hidden = spec.hidden_size;
        MixerWidths widest{};
        size_t heads = 0, experts = 0, top_k = 0, pair_count = 0, shared_rows = 0, ffn = 0, ffn_codes = 0,
               ffn_groups = 0;
        for (const LayerSpec& layer : spec.layers) {
            const AttentionSpec& a = layer.attention;
            heads = std::max<size_t>(heads, a.heads);
            const MixerWidths widths = mixer_widths(a);
            for (size_t MixerWidths::* width : {&MixerWidths::queries, &MixerWidths::keys, &MixerWidths::values,
                                                &MixerWidths::gates, &MixerWidths::attended, &MixerWidths::input})
                widest.*width = std::max(widest.*width, widths.*width);
            experts = std::max<size_t>(experts, layer.experts);
            top_k = std::max<size_t>(top_k, layer.top_k);
            const size_t rows = t * std::max(layer.top_k, 1);
            if (layer.experts) pair_count = std::max(pair_count, rows);
            if (layer.shared_dim) shared_rows = t;
            ffn = std::max({ffn, rows * layer.ffn_dim, t * layer.shared_dim});
            ffn_groups = std::max({ffn_groups, rows * groups(layer.ffn_dim), t * groups(layer.shared_dim)});
        }
        for (const RopeSpec& rope : spec.ropes) widest_pairs = std::max(widest_pairs, rope.inverse_frequencies.size());
        ffn_codes = ffn_groups * kGroup;
        const size_t input_groups = groups(static_cast<int>(std::max(hidden, widest.input)));
        place.place(x, t * hidden);
        place.place(normed, t * hidden);
        place.place(projected, t * hidden);
        place.place(shared, shared_rows * hidden);
        place.place(input.codes, t * input_groups * kGroup);
        place.place(input.scales, t * input_groups);
        place.place(input.sums, t * input_groups);
        place.place(queries, t * widest.queries);
        place.place(keys, t * widest.keys);
        place.place(values, t * widest.values);
        place.place(gates, t * widest.gates);
        place.place(attended, t * widest.attended);
        place.place(maximum, t * heads);
        place.place(sum, t * heads);
        place.place(cosine, spec.ropes.size() * t * widest_pairs);
        place.place(sine, spec.ropes.size() * t * widest_pairs);
        place.place(scores, t * experts);
        place.place(choice, t * experts);
        place.place(weights, t * top_k);
        place.place(picks, t * top_k);
        place.place(levels, t * top_k);
        place.place(order, t * experts);
        place.place(pairs, pair_count);
        place.place(tokens, pair_count);
        place.place(gate, ffn);
        place.place(up, ffn);
        place.place(hidden_codes(), ffn_codes);
        place.place(this->hidden.scales, ffn_groups);
        place.place(this->hidden.sums, ffn_groups);
        place.place(outputs, pair_count * hidden);
        return place.used;
    }

    int8_t*& hidden_codes() { return hidden.codes; }
};

template <class Body>
void Engine::each_token(int count, Body&& body) {
    constexpr int kBatch = 4;
    pool_.run((count + kBatch - 1) / kBatch, [&](int item) {
        for (int t = item * kBatch; t < std::min(count, (item + 1) * kBatch); ++t) body(t);
    });
}

}  // namespace edgemoe
