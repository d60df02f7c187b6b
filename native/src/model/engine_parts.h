// What the files of the forward pass share: an engine's private parts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "edgemoe/engine.h"

namespace edgemoe {

constexpr size_t kAlignment = 64;

inline int blocks(int rows) { return (rows + kRowBlock - 1) / kRowBlock; }
inline int groups(int cols) { return (cols + kGroup - 1) / kGroup; }
inline size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Row blocks per loop item of a product.
int blocks_per_item(const Matrix& matrix, int tokens);

// int8 inputs of a product.
struct Codes {
    int8_t* codes;
    float* scales;
    float* sums;
};

// Weights of one layer; pointers into the dense arena.
struct Engine::Layer {
    const float* attention_norm;
    Matrix q, k, v, o;
    const float* q_norm;
    const float* k_norm;
    const float* ffn_norm;
    Matrix router;          // [experts, hidden], of a mixture of experts
    Matrix gate, up, down;  // of a dense layer; of a mixture their shapes and layouts, data comes from the store
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

    float* x;                 // [T, hidden] the residual stream
    float* normed;            // [T, hidden]
    float* projected;         // [T, hidden] output of attention or of a dense FFN
    Codes input;              // [T, widest input of a product]
    float* queries;           // [T, heads * head_dim]
    float* keys;              // [T, kv_heads * head_dim]
    float* values;            // [T, kv_heads * head_dim]
    float* attended;          // [T, heads * head_dim]
    float* maximum;           // [T, heads] online softmax
    float* sum;               // [T, heads]
    float* cosine;            // [ropes, T, pairs]
    float* sine;              // [ropes, T, pairs]
    float* scores;            // [T, experts] router
    float* weights;           // [T, top_k]
    int32_t* picks;           // [T, top_k]
    int32_t* order;           // [max experts of a layer] scratch of the selection, per token: [T, experts]
    int32_t* pairs;           // [P] pair numbers, sorted by expert
    int32_t* tokens;          // [P] their tokens
    float* gate;              // [P, ffn] or [T, ffn]
    float* up;                // [P, ffn] or [T, ffn]
    Codes hidden;             // [P, ffn] or [T, ffn]
    float* outputs;           // [P, hidden] each expert's output for each of its tokens
    size_t widest_pairs = 0;  // cosine and sine: floats per token and rope
    Arena arena;

  private:
    Scratch() = default;

    size_t layout(Layout place, const ModelSpec& spec, int chunk) {
        const size_t t = chunk, hidden = spec.hidden_size;
        size_t heads = 0, query = 0, key = 0, experts = 0, top_k = 0, pair_count = 0, ffn = 0, ffn_codes = 0,
               ffn_groups = 0;
        for (const LayerSpec& layer : spec.layers) {
            const AttentionSpec& a = layer.attention;
            heads = std::max<size_t>(heads, a.heads);
            query = std::max<size_t>(query, size_t(a.heads) * a.head_dim);
            key = std::max<size_t>(key, size_t(a.kv_heads) * a.head_dim);
            experts = std::max<size_t>(experts, layer.experts);
            top_k = std::max<size_t>(top_k, layer.top_k);
            const size_t rows = t * std::max(layer.top_k, 1);
            if (layer.experts) pair_count = std::max(pair_count, rows);
            ffn = std::max(ffn, rows * layer.ffn_dim);
            ffn_groups = std::max(ffn_groups, rows * groups(layer.ffn_dim));
        }
        for (const RopeSpec& rope : spec.ropes) widest_pairs = std::max(widest_pairs, rope.inverse_frequencies.size());
        ffn_codes = ffn_groups * kGroup;
        const size_t input_groups = groups(static_cast<int>(std::max(hidden, query)));
        place.place(x, t * hidden);
        place.place(normed, t * hidden);
        place.place(projected, t * hidden);
        place.place(input.codes, t * input_groups * kGroup);
        place.place(input.scales, t * input_groups);
        place.place(input.sums, t * input_groups);
        place.place(queries, t * query);
        place.place(keys, t * key);
        place.place(values, t * key);
        place.place(attended, t * query);
        place.place(maximum, t * heads);
        place.place(sum, t * heads);
        place.place(cosine, spec.ropes.size() * t * widest_pairs);
        place.place(sine, spec.ropes.size() * t * widest_pairs);
        place.place(scores, t * experts);
        place.place(weights, t * top_k);
        place.place(picks, t * top_k);
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
