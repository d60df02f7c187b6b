// The facts of a model that the forward pass reads: the C++ side of edgemoe/spec.py, which documents the fields and
// refuses everything that is not implemented here.
#pragma once

#include <vector>

namespace edgemoe {

struct RopeSpec {
    std::vector<float> inverse_frequencies;  // [pairs], radians per position
    float attention_factor = 1.0f;
    bool interleaved = false;  // pairs (2i, 2i + 1) instead of (i, i + pairs)

    bool operator==(const RopeSpec&) const = default;
};

enum class QkNorm { none, head, full };

enum class AttentionKind { full, mla, gated_delta, short_conv };

struct AttentionSpec {
    AttentionKind kind = AttentionKind::full;
    int heads = 0;
    int kv_heads = 0;
    int head_dim = 0;
    int value_dim = 0;
    float scale = 0;
    QkNorm qk_norm = QkNorm::none;
    int rope = -1;   // into ModelSpec::ropes, -1 for none
    int window = 0;  // positions a token sees, itself included; 0 for all
    bool sinks = false;
    bool bias = false;
    bool output_bias = false;
    bool value_norm = false;
    bool values_are_keys = false;
    float clip_qkv = 0;
    bool output_gate = false;
    int q_rank = 0;
    int kv_rank = 0;
    int rope_dim = 0;
    float latent_norm_epsilon = 0;
    int conv_size = 0;
    bool tiled_heads = false;
    bool fused_beta_alpha = false;

    // Of a layer's convolution.
    int channels() const {
        return kind == AttentionKind::short_conv ? heads * head_dim : 2 * kv_heads * head_dim + heads * value_dim;
    }
};

enum class RouterScores { softmax, softmax_topk, sigmoid, sparsemixer };
enum class GroupScore { largest, two_largest };

struct RouterSpec {
    RouterScores scores = RouterScores::softmax;
    bool renormalize = false;
    float renormalize_epsilon = 0;
    float renormalize_least = 0;
    bool selection_bias = false;
    bool bias = false;
    int groups = 1;
    int groups_kept = 1;
    GroupScore group_score = GroupScore::two_largest;
    float weight_scale = 1.0f;
    float mask_threshold = 0;
    bool input_norm = false;
    float input_scale = 1.0f;
    bool expert_scale = false;
};

enum class Activation { silu, gelu_tanh, clamped_swiglu };

struct LayerSpec {
    AttentionSpec attention;
    int ffn_dim = 0;
    int experts = 0;  // 0: a dense layer
    int top_k = 0;
    RouterSpec router;
    int shared_dim = 0;
    bool shared_gate = false;
    bool ffn_bias = false;
    bool expert_bias = false;
    Activation activation = Activation::silu;
    float swiglu_alpha = 1.0f;
    float swiglu_limit = 0;
    bool output_norms = false;
    bool branch_norms = false;
    bool output_scale = false;
};

struct ModelSpec {
    int vocab_size = 0;
    int hidden_size = 0;
    int context = 0;
    float norm_epsilon = 0;
    bool layer_norm = false;  // LayerNorm with a bias instead of RMSNorm
    float norm_offset = 0;
    bool tied_embeddings = false;
    bool head_bias = false;
    float embedding_multiplier = 1.0f;
    float residual_multiplier = 1.0f;
    float logits_divisor = 1.0f;
    float logits_softcap = 0;
    std::vector<RopeSpec> ropes;
    std::vector<LayerSpec> layers;
};

}  // namespace edgemoe
