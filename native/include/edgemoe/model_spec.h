// The facts of a model that the forward pass reads: the C++ side of edgemoe/spec.py, which documents the fields and
// refuses everything that is not implemented here.
#pragma once

#include <vector>

namespace edgemoe {

struct RopeSpec {
    std::vector<float> inverse_frequencies;  // [pairs], radians per position
    float attention_factor = 1.0f;

    bool operator==(const RopeSpec&) const = default;
};

struct AttentionSpec {
    int heads = 0;
    int kv_heads = 0;
    int head_dim = 0;
    float scale = 0;
    bool head_norm = false;  // RMSNorm on each query and key head
    int rope = -1;           // into ModelSpec::ropes, -1 for none
};

struct LayerSpec {
    AttentionSpec attention;
    int ffn_dim = 0;
    int experts = 0;  // 0: a dense layer
    int top_k = 0;
    bool renormalize = false;
};

struct ModelSpec {
    int vocab_size = 0;
    int hidden_size = 0;
    int context = 0;
    float norm_epsilon = 0;
    bool tied_embeddings = false;
    std::vector<RopeSpec> ropes;
    std::vector<LayerSpec> layers;
};

}  // namespace edgemoe
