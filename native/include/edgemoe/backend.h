// How a model's steps are computed.
//
// The pass (src/model) says what is computed, on which buffers and in which order; a backend computes it. Operations
// are as large as the model's own steps and work on all rows of a chunk. They are asked for in order, and each sees
// what the ones before it wrote; a backend may be behind until it is asked to read() or wait().
//
// Every backend gives the bits that the CPU's gives with its scalar kernels: kernels.h says what a kernel computes, and
// src/backend/cpu in which order an operation calls them, and what it computes between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "edgemoe/buffer.h"
#include "edgemoe/kernels.h"
#include "edgemoe/memory.h"
#include "edgemoe/model_spec.h"
#include "edgemoe/sequence_state.h"

namespace edgemoe {

// The rows of the chunk at hand.
struct Rows {
    std::span<const int32_t> tokens;         // Batch::kEmbedding where `embeddings` has the row
    std::span<const int32_t> positions;      // [rows]
    std::span<SequenceState* const> states;  // [rows] of their sequences
    std::span<const float> embeddings;       // [rows, hidden], or none

    int count() const { return static_cast<int>(positions.size()); }
};

// A norm over rows of `size` elements: with a bias a LayerNorm, without one an RMSNorm. No weight: there is no norm.
struct Norm {
    ConstFloats weight;
    ConstFloats bias;
    int size = 0;
    float epsilon = 0;

    explicit operator bool() const { return static_cast<bool>(weight); }
};

// Attention with a key and a value for each key/value head. What a layer does not have is null, or 0.
struct AttentionHeads {
    int heads, kv_heads, dim;
    KvType key_type, value_type;
    ConstFloats q_bias{}, k_bias{}, v_bias{};
    QkNorm qk_norm;
    ConstFloats q_norm{}, k_norm{};  // [dim], or [heads * dim] and [kv_heads * dim]
    ConstFloats value_norm{};        // [dim]
    float norm_epsilon;
    float clip;            // queries, keys and values are limited to +- this
    int rope;              // into ModelSpec::ropes, -1 for none
    bool values_are_keys;  // there is no projection of values
    bool output_gate;      // each head's query has its gate behind it
    int window;            // positions that a token sees, itself included; 0 for all
    float scale;
    ConstFloats sinks{};  // [heads]
};

// Of one chunk; `projected` is of layers with an output gate, whose queries are taken from it.
struct AttentionBuffers {
    Floats projected;  // [rows, heads, query | gate]
    Floats queries;    // [rows, heads, dim]
    Floats keys;       // [rows, kv_heads, dim]
    Floats values;     // [rows, kv_heads, dim]
    Floats attended;   // [rows, heads, dim]
};

// Multi-head latent attention: all heads share one latent and one rotated key of a position.
struct LatentHeads {
    int heads, head_dim, kv_rank, rope_dim, value_dim;
    KvType type;
    ConstFloats kv_norm;  // [kv_rank]
    float norm_epsilon;
    int rope;
    float scale;
};

// Heads [first, first + heads) of a chunk, with their queries in the latents' space.
struct LatentBuffers {
    int first, heads;
    ConstFloats queries;  // [rows, all heads, head_dim]; the last rope_dim of a head are rotated
    Floats asked;         // [rows, heads, kv_rank + rope_dim], of which the first kv_rank are given
    Floats found;         // [rows, heads, kv_rank]
};

// Heads' own inputs times their own rows of a matrix [all heads * rows, cols]: head h of [first, first + heads) reads
// cols elements at values + (h - first) * value_step and writes `rows` at out + (h - first) * out_step; rows of the
// chunk are value_stride and out_stride apart.
struct HeadProducts {
    Matrix matrix;
    int rows;
    int first, heads;
    ConstFloats values;
    size_t value_step, value_stride;
    Floats out;
    size_t out_step, out_stride;
};

// The gated delta rule (Yang et al. 2024).
struct DeltaHeads {
    int heads, kv_heads, key_dim, value_dim;
    bool tiled_heads;        // head h reads key head h % kv_heads, not h / (heads / kv_heads)
    bool fused_beta_alpha;   // for each key head beta of its value heads, then alpha of them
    ConstFloats decay_rate;  // [heads], negative
    ConstFloats step_bias;   // [heads]
    ConstFloats query_norm;  // [key_dim] these give heads of queries the length 1 / sqrt(key_dim), of keys 1
    ConstFloats key_norm;
    ConstFloats head_norm;  // [value_dim]
    float norm_epsilon;
};

struct DeltaBuffers {
    // Overwritten, all but the gates.
    Floats mixed;  // [rows, queries | keys | values], after the convolution
    Floats gates;  // [rows, heads, value_dim]
    Floats beta;   // [rows, heads], or beta and alpha [rows, 2 * heads]
    Floats alpha;  // [rows, heads]
    Floats out;    // [rows, heads, value_dim]
};

struct GatedActivation {
    Activation kind;
    float alpha, limit;  // of clamped_swiglu
};

// down(activation(gate(x), up(x))). Biases may be null.
struct FeedForward {
    Matrix gate, up, down;
    ConstFloats gate_bias, up_bias, down_bias;
    GatedActivation activation;
};

// How the experts of a token follow from the router's scores.
struct Choice {
    const RouterSpec* router;
    int experts, top_k;
    ConstFloats selection_bias;  // [experts]
    ConstFloats expert_scale;    // [experts]
};

// What all routed experts of a layer share: the shapes of their matrices (without data), and biases [experts, rows].
struct ExpertShapes {
    Matrix gate, up, down;
    ConstFloats gate_bias, up_bias, down_bias;
    GatedActivation activation;
};

// An expert at work, on the pairs [first, first + count) of (row, pick).
struct ExpertWork {
    int expert;
    Matrix gate, up, down;
    int first, count;
};

// Pairs of (row, pick) in the order in which experts take them, each expert's side by side.
struct ExpertBuffers {
    Buffer<const int32_t> rows;  // [pairs] the row of a pair
    Floats hidden, up;           // [pairs, ffn]
    Floats outputs;              // [pairs, hidden]
};

// sum = fma(scale, shared, sum); then sum = fma(w, output, sum) and sum = fma(w, down_bias, sum), with w the rounded
// product scale * weight, for each of a row's picks in their order, whenever they were
// computed.
struct Combination {
    bool from_zero;  // sum begins with zero
    float scale;
    ConstFloats shared{};          // [rows, hidden] or null
    ConstFloats weights;           // [rows, top_k]
    Buffer<const int32_t> picks;   // [rows, top_k]
    Buffer<const int32_t> places;  // [rows * top_k] of a pair among the outputs
    ConstFloats outputs;           // [pairs, hidden]
    ConstFloats down_bias;         // [experts, hidden] or null
    int top_k;
    Floats sum;  // [rows, hidden]
};

struct Head {
    Matrix matrix;
    ConstFloats bias;
    float divisor, softcap;
};

// What a backend needs room for beside the buffers it is given: the largest of all layers.
struct BackendSizes {
    int rows = 0;  // of a chunk
    int hidden = 0;
    size_t input_groups = 0;  // groups of kGroup columns of a product's input, for one row
    size_t inner_groups =
        0;               // the same of what the last matrices of feed-forward parts multiply, for all rows or pairs
    size_t by_head = 0;  // elements that products_by_head() reads, or writes, for one row
    int heads = 0;
    int experts = 0;
    std::span<const RopeSpec> ropes;  // must stay where they are
};

inline constexpr size_t kMostMatrices = 4;  // of one product

class Backend {
  public:
    virtual ~Backend() = default;

    virtual std::string_view name() const = 0;
    // Where its buffers, weights and states lie.
    virtual Memory& memory() = 0;

    // Operations that read positions or states are for all of these rows, up to the next begin(); others take `count`
    // rows of what they are given. What `rows` refers to stays until
    // wait() has returned after them; spans that other operations are given are valid during the call only.
    virtual void begin(const Rows& rows) = 0;
    // Rows of the embedding, or the embeddings given, [rows, cols]; tokens' rows are multiplied.
    virtual void embed(const Matrix& embedding, float multiplier, Floats out) = 0;
    virtual void normalize(const Norm& norm, ConstFloats x, int count, Floats out) = 0;  // out may be x
    // outputs[i] [count, rows of matrix i]; x [count, cols]. At most kMostMatrices.
    virtual void product(std::span<const Matrix> matrices, ConstFloats x, int count,
                         std::span<const Floats> outputs) = 0;
    // Of x [count, size]: adds a vector to each row; adds factor * values; multiplies with factor[0].
    virtual void add_vector(ConstFloats vector, Floats x, int size, int count) = 0;
    virtual void add(float factor, ConstFloats values, Floats x, int size, int count) = 0;
    virtual void scale(ConstFloats factor, Floats x, int size, int count) = 0;
    // out[i] = x[rows[i]], rows ascending; out may be x.
    virtual void gather(ConstFloats x, std::span<const int32_t> rows, int size, Floats out) = 0;
    // out[t] = a[t] * b[t], `size` elements of rows that are so far apart; out may be one of them.
    virtual void multiply(ConstFloats a, size_t a_stride, ConstFloats b, size_t b_stride, int size, int count,
                          Floats out, size_t out_stride) = 0;

    // Biases, norms, limits and rotation of queries and keys; keys and values go into the state. Those of all rows,
    // before any row attends: a row sees the stored form, rounded to the state's type, of its own chunk, too.
    virtual void store(const AttentionHeads& heads, int layer, const AttentionBuffers& buffers) = 0;
    virtual void attend(const AttentionHeads& heads, int layer, const AttentionBuffers& buffers) = 0;

    // The same for latents [rows, kv_rank + rope_dim], which are stored, and queries [rows, heads, head_dim].
    virtual void store_latents(const LatentHeads& heads, int layer, Floats queries, Floats latents) = 0;
    virtual void attend_latents(const LatentHeads& heads, int layer, const LatentBuffers& buffers) = 0;
    virtual void products_by_head(const HeadProducts& products, int count) = 0;

    // A causal depthwise convolution [channels, taps] over the sequences' positions; in, out [rows, channels].
    virtual void convolve(const Matrix& weights, int layer, ConstFloats in, bool silu, Floats out) = 0;
    virtual void gated_delta(const DeltaHeads& heads, int layer, const DeltaBuffers& buffers) = 0;

    // x [count, hidden] -> out [count, hidden]; inner, up [count, ffn] are overwritten.
    virtual void feed_forward(const FeedForward& part, ConstFloats x, int count, Floats inner, Floats up,
                              Floats out) = 0;
    // Multiplies each row of out [count, size] with sigmoid(weights . x).
    virtual void gate_rows(ConstFloats weights, ConstFloats x, int size, int count, Floats out) = 0;

    // scores [count, experts], overwritten -> picks [count, top_k] in descending preference, and their weights, unless
    // `weights` is null.
    virtual void choose(const Choice& choice, Floats scores, int count, Buffer<int32_t> picks, Floats weights) = 0;
    // The rows' input of a layer's experts [count, hidden], for the calls of experts() that follow; no other
    // product comes before the last of them.
    virtual void begin_experts(const ExpertShapes& shapes, ConstFloats x, int count) = 0;
    virtual void experts(const ExpertShapes& shapes, std::span<const ExpertWork> work,
                         const ExpertBuffers& buffers) = 0;
    virtual void combine(const Combination& combination, int size, int count) = 0;

    // Logits [count, vocabulary] of x [count, hidden], into host memory.
    virtual void head(const Head& head, ConstFloats x, int count, float* logits) = 0;

    // What a buffer holds, in host memory, until the next operation that is not a read().
    virtual std::span<const float> read(ConstFloats buffer, size_t count) = 0;
    virtual std::span<const int32_t> read(Buffer<const int32_t> buffer, size_t count) = 0;
    // What the host has, into a buffer.
    template <class T>
    void write(std::span<const T> values, Buffer<T> buffer) {
        memory().write(reinterpret_cast<std::byte*>(buffer.address()), std::as_bytes(values));
    }
    // A buffer's contents into one of another backend's; one of the two is the host's.
    void take(ConstFloats from, size_t count, Backend& other, Floats to) {
        const auto* source = reinterpret_cast<const std::byte*>(from.address());
        auto* target = reinterpret_cast<std::byte*>(to.address());
        const size_t bytes = count * sizeof(float);
        if (other.memory().is_hosts())
            memory().read({target, bytes}, source);
        else
            other.memory().write(target, {source, bytes});
    }
    // Everything asked for so far has been computed: what it read may change.
    virtual void wait() = 0;
};

}  // namespace edgemoe
