// The forward pass: tokens in, logits out.
//
//   embedding -> [ norm -> attention -> + -> norm -> dense FFN or (router -> experts) -> + ] x layers -> norm -> head
//
// with a shared expert beside the routed ones, and norms after the parts, where a model has them.
//
// A position's logits have the same bits for any number of threads, any chunking, any number of expert slots and any
// order in which experts arrive (docs/architecture.md says what that takes).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/direct_file.h"
#include "edgemoe/expert_store.h"
#include "edgemoe/kernels.h"
#include "edgemoe/model_spec.h"
#include "edgemoe/pack_index.h"
#include "edgemoe/sequence_state.h"
#include "edgemoe/thread_pool.h"

namespace edgemoe {

struct EngineOptions {
    int threads = 1;
    int sequences = 1;  // there may be at a time
    int context = 0;    // positions a sequence may have
    int chunk = 512;    // tokens computed together in a prompt
    StoreOptions store;
    // Lossy modes for nested experts: the expert in slot i of a token works as many levels below its finest as there
    // are thresholds (ascending) below the share of the router's weight that the slots with larger weights have. None:
    // exact. What is in memory or on its way makes no difference.
    std::vector<float> thresholds;
    int level_cap = kMaxLevels;  // no expert works above this level
    KvType key_type = KvType::f16;
    KvType value_type = KvType::f16;
    std::string isa;  // empty: the best this processor has, or EDGEMOE_ISA
};

// What an engine with these options takes, in bytes.
struct MemoryPlan {
    size_t dense = 0;    // weights that are always in memory
    size_t state = 0;    // all `sequences`, each of `context` positions
    size_t scratch = 0;  // activations of one chunk
    size_t slot = 0;     // memory of one expert, the largest with all its levels
    int experts = 0;     // slots that hold all experts of the model: more are never used
    int minimum_slots = 0;
};

struct EngineCounters {
    uint64_t tokens = 0;
    double seconds = 0;        // in forward passes, waiting included
    uint64_t expert_uses = 0;  // pairs of a token and an expert
    uint64_t expert_bits = 0;  // the stored widths of the levels they worked at, added up
    StoreCounters store;
};

// What the routers chose, token by token, all layers' picks side by side (`width` in all); see Engine::record_routing.
struct RoutingRecord {
    static constexpr uint16_t kNoPrediction = 0xFFFF;

    size_t width = 0;
    std::vector<uint16_t> picks;  // [tokens, width], each layer's in the order of the choice
    std::vector<float> weights;   // [tokens, width]
    std::vector<uint16_t>
        predicted;  // [tokens, width] what the look-ahead expected, kNoPrediction where it does not look
};

// One layer of a pass on its own (Engine::forward_layer): where its input comes from, and where what its experts saw
// and made goes (of a layer with experts).
struct LayerPass {
    int layer;
    bool embed;       // the residual stream before it is the tokens' embedding, not what `residual` holds
    float* residual;  // [tokens, hidden] before the layer, then after it
    float* inputs;    // [tokens, hidden] what the experts multiply
    int32_t* picks;   // [tokens, top_k] in descending weight
    float* weights;   // [tokens, top_k]
    float* hidden;    // [tokens, top_k, ffn] what the experts' last matrix multiplies
    float* peaks;     // [tokens, top_k] largest magnitude in an expert's output
    float* energies;  // [tokens, top_k] sum of the squares of an expert's output
};

// A position beyond the context, or not the next one of its sequence.
struct ContextError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Norm;
struct FeedForward;

class Engine {
  public:
    Engine(ModelSpec spec, PackIndex index, EngineOptions options);
    ~Engine();

    static MemoryPlan plan(const ModelSpec& spec, const PackIndex& index, const EngineOptions& options);

    // Computes all tokens and writes the logits of those at the indexes `wanted` (ascending, into `tokens`) to `logits`
    // [wanted, vocab]. Token i stands at positions[i] of sequence sequence_ids[i]; the positions of a sequence go on
    // where it ends. `check` is called between layers and may throw to give up: finished chunks stay in the state.
    void forward(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                 std::span<const int32_t> sequence_ids, std::span<const int32_t> wanted, float* logits,
                 const std::function<void()>& check);

    // Takes the tokens of one sequence, from its first on, through one layer only: the residual stream comes from and
    // goes back to `pass.residual`. After the last layer the logits of `wanted` are written as by `forward`. So a long
    // text can go through a large model layer by layer, each expert read once. Sequence 0 is empty afterwards.
    void forward_layer(const LayerPass& pass, std::span<const int32_t> tokens, std::span<const int32_t> wanted,
                       float* logits, const std::function<void()>& check);

    // Sequence 0 exists from the start; more can be added, up to EngineOptions::sequences at a time: StateError beyond
    // that. An id that was removed is used again. The others refuse ids that are not in use (std::invalid_argument).
    int add_sequence();
    void remove_sequence(int id);
    SequenceState& sequence(int id);

    // While switched on, every finished chunk's routing is kept until it is taken.
    void record_routing(bool on) { recording_ = on; }
    RoutingRecord take_routing();

    const ModelSpec& spec() const { return spec_; }
    const EngineOptions& options() const { return options_; }
    std::string_view isa() const { return kernels_.name; }
    bool direct_io() const;
    EngineCounters counters() const;

  private:
    struct Layer;
    struct Scratch;

    void load_dense();
    Matrix matrix(const std::string& name, int rows, int cols) const;
    float* vector(const std::string& name, int size) const;
    Norm norm(const std::string& name, int size) const;
    Matrix convolution(const std::string& name, int channels, int taps) const;
    void load_attention(Layer& layer, const AttentionSpec& spec, const std::string& prefix);
    void load_latent_attention(Layer& layer, const AttentionSpec& spec, const std::string& prefix);
    void load_gated_delta(Layer& layer, const AttentionSpec& spec, const std::string& prefix);
    void load_short_convolution(Layer& layer, const AttentionSpec& spec, const std::string& prefix);
    FeedForward feed_forward(const std::string& name, int dim, bool bias) const;

    void forward_chunk(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                       std::span<const int32_t> sequence_ids, std::span<const int32_t> wanted, float* logits,
                       const std::function<void()>& check);
    // What reads other positions, by the layer's kind: of scratch.normed, into scratch.attended [count, o.cols].
    void attention(int layer, int count, std::span<const int32_t> positions, std::span<const int32_t> sequence_ids);
    void latent_attention(int layer, int count, std::span<const int32_t> positions,
                          std::span<const int32_t> sequence_ids);
    void gated_delta(int layer, int count, std::span<const int32_t> positions, std::span<const int32_t> sequence_ids);
    void short_convolution(int layer, int count, std::span<const int32_t> positions,
                           std::span<const int32_t> sequence_ids);
    void mix(int layer, int count, std::span<const int32_t> positions, std::span<const int32_t> sequence_ids);
    void convolve(int layer, int count, std::span<const int32_t> positions, std::span<const int32_t> sequence_ids,
                  const float* inputs, bool silu, float* outputs);
    void head_products(const Matrix& matrix, int rows, int first, int heads, int count, const float* values,
                       size_t input_step, size_t input_stride, float* out, size_t output_step, size_t output_stride);
    void dense_ffn(int layer, int count);
    bool computes_wanted_only(int layer) const;
    void expert_ffn(int layer, int count, std::span<const int32_t> wanted);
    void shared_expert(int layer, int count);
    // Of scratch.normed, into out [count, hidden].
    void gated_ffn(const FeedForward& part, const LayerSpec& spec, int count, float* out);
    void activate(const LayerSpec& spec, std::span<float> gate, const float* up) const;
    void route(int layer, int count);
    void router_logits(int layer, int count, const float* x, const float* normed);
    void choose(int layer, int count, float* weights);
    void check_experts(int layer, const ExpertLayer& experts) const;
    void choose_levels(const Layer& layer, int top_k, const int32_t* experts, const float* weights,
                       int32_t* levels) const;
    void predict(int layer, int count, std::span<const int32_t> wanted);
    int routing_column(int layer) const;

    void normalize(const Norm& norm, const float* x, int count, float* out);
    // The residual stream takes in a part's output [count, hidden], after the norm if there is one.
    void add_to_stream(float* output, const Norm& norm, int count);

    template <class Body>
    void each_token(int count, Body&& body);
    // The input of products: `values` [count, cols] as it is for float layouts, as int8 codes for the others.
    Activations prepare(const float* values, int count, int cols, std::span<const Matrix> users);
    void product(std::span<const Matrix> matrices, const Activations& input, int count,
                 std::span<float* const> outputs);

    ModelSpec spec_;
    PackIndex index_;
    EngineOptions options_;
    const Kernels& kernels_;
    std::vector<std::unique_ptr<DirectFile>> files_;
    Arena dense_;
    std::vector<std::byte*> dense_sections_;  // [sections], null where it holds no dense tensor
    Matrix embedding_{};
    Matrix head_{};
    const float* head_bias_ = nullptr;
    std::vector<float> ones_;  // [largest head_dim] weights of norms that have none
    std::vector<Layer> layers_;
    std::unique_ptr<Norm> final_norm_;
    std::unique_ptr<Scratch> scratch_;
    std::unique_ptr<StatePool> states_;
    std::vector<std::unique_ptr<SequenceState>> sequences_;  // [ids], null where one is not in use
    std::unique_ptr<ExpertStore> store_;                     // absent where every layer is dense
    ThreadPool pool_;
    EngineCounters counters_;
    std::optional<LayerPass> pass_;  // while forward_layer lasts: of the chunk at hand
    bool recording_ = false;
    RoutingRecord chunk_routing_;
    RoutingRecord routing_;
};

}  // namespace edgemoe
