"""Cases, as in family_table, of the families whose layers mix tokens by something else than plain attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from family_table import Array, Arrays, Case


def split_latent(tensors: Arrays, config: Any) -> Arrays:
    """Keys and values of latent attention apart, the keys turned around."""
    result: Arrays = {}
    for name, values in tensors.items():
        if not name.endswith(".kv_b_proj.weight"):
            result[name] = values
            continue
        heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, rest = np.split(heads, [config.qk_nope_head_dim], axis=1)
        result[name.replace("kv_b_proj", "k_b_proj")] = np.ascontiguousarray(keys.swapaxes(1, 2))
        result[name.replace("kv_b_proj", "v_b_proj")] = np.ascontiguousarray(rest)
    return result


def convolution_names(tensors: Arrays, config: Any) -> Arrays:
    """LFM2: convolutions without their middle axis, experts by the names that others have."""
    result: Arrays = {}
    for name, values in tensors.items():
        if name.endswith(".conv.conv.weight"):
            values = values[:, 0]
        name = name.replace(".expert_bias", ".expert_bias.bias")
        result[name.removeprefix("model.") if ".feed_forward.experts." in name else name] = values
    return result


def tiled(values: Array, config: Any, size: int, axis: int = 0) -> Array:
    """Value heads along an axis so that neighbours belong to different key heads (llama.cpp's order)."""
    heads = np.moveaxis(values, axis, 0)
    heads = heads.reshape(config.linear_num_key_heads, -1, size, *heads.shape[1:]).swapaxes(0, 1)
    return np.ascontiguousarray(np.moveaxis(heads.reshape(-1, *heads.shape[3:]), 0, axis))


def split_delta(tensors: Arrays, config: Any) -> Arrays:
    """Gated DeltaNet: one added to zero-centred norms, decay rates taken out of the logarithm, the projection of
    Qwen3-Next cut up and gathered by parts, value heads of Qwen3.5 reordered."""
    result: Arrays = {}
    key_heads, key_dim = config.linear_num_key_heads, config.linear_key_head_dim
    value_dim, keys = config.linear_value_head_dim, 2 * key_heads * key_dim
    reorder = config.model_type == "qwen3_5_moe_text"
    for name, values in tensors.items():
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            values = values + 1
        elif name.endswith(".conv1d.weight"):
            values = values[:, 0]
            if reorder:
                values = np.concatenate([values[:keys], tiled(values[keys:], config, value_dim)])
        elif name.endswith(".A_log"):
            values = -np.exp(tiled(values, config, 1) if reorder else values)
        elif name.endswith(".dt_bias"):
            name = name.replace(".dt_bias", ".dt_proj.bias")
            values = tiled(values, config, 1) if reorder else values
        elif name.endswith(".in_proj_qkv.weight"):
            values = np.concatenate([values[:keys], tiled(values[keys:], config, value_dim)])
        elif name.endswith((".in_proj_z.weight", ".in_proj_a.weight", ".in_proj_b.weight")):
            values = tiled(values, config, value_dim if "in_proj_z" in name else 1)
        elif name.endswith("linear_attn.out_proj.weight") and reorder:
            values = tiled(values, config, value_dim, 1)
        elif name.endswith(".in_proj_qkvz.weight"):
            groups = values.reshape(key_heads, -1, values.shape[1])
            size = config.linear_num_value_heads // key_heads * value_dim
            q, k, v, z = np.split(groups, [key_dim, 2 * key_dim, 2 * key_dim + size], axis=1)
            here = name.replace("model.layers.", "blk.").split(".linear_attn")[0]
            result[here + ".attn_qkv.weight"] = np.concatenate(
                [part.reshape(-1, values.shape[1]) for part in (q, k, v)]
            )
            result[here + ".attn_gate.weight"] = z.reshape(-1, values.shape[1])
            continue
        result[name] = values
    return result


_LATENT = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "n_shared_experts": 2,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 3,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LATENT_KEYS = {
    "attention.head_count_kv": 1,
    "attention.key_length": 40,
    "attention.value_length": 32,
    "attention.key_length_mla": 32,
    "attention.value_length_mla": 16,
    "attention.kv_lora_rank": 32,
    "rope.dimension_count": 8,
    "rope.freq_base": 10000.0,
    "expert_used_count": 3,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 48,
    "leading_dense_block_count": 1,
    "vocab_size": 300,
}
_YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}

_CONVOLUTIONS = {
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "num_dense_layers": 1,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
}
_CONVOLUTION_KEYS = {
    "attention.head_count_kv": [0, 2, 0],
    "shortconv.l_cache": 3,
    "leading_dense_block_count": 1,
    "expert_count": 6,
    "expert_used_count": 3,
    "expert_feed_forward_length": 48,
    "expert_gating_func": 2,
    "rope.freq_base": 1e6,
}

_DELTA = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
    "num_hidden_layers": 4,
}
_DELTA_KEYS = {
    "attention.key_length": 32,
    "attention.value_length": 32,
    "rope.dimension_count": 8,
    "rope.freq_base": 10000.0,
    "full_attention_interval": 4,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 24,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 6,
    "ssm.inner_size": 96,
    "expert_count": 6,
    "expert_used_count": 2,
    "expert_feed_forward_length": 48,
    "expert_shared_feed_forward_length": 40,
}

CASES: dict[str, Case] = {
    "deepseek_v2, scaled, queries without a latent": Case(
        "DeepseekV2Config",
        {
            **_LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1},
            "max_position_embeddings": 256,
        },
        "deepseek2",
        {**_LATENT_KEYS, **_YARN_KEYS, "expert_count": 8, "rope.scaling.yarn_log_multiplier": 0.0707},
        split_latent,
        context=256,
    ),
    "deepseek_v2, experts in groups": Case(
        "DeepseekV2Config",
        {
            **_LATENT,
            "q_lora_rank": 40,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 3.0,
        },
        "deepseek2",
        {
            **_LATENT_KEYS,
            "attention.q_lora_rank": 40,
            "expert_count": 8,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_weights_scale": 3.0,
            "expert_gating_func": 1,
        },
        split_latent,
    ),
    "deepseek_v3": Case(
        "DeepseekV3Config",
        {
            **_LATENT,
            "q_lora_rank": 40,
            "n_routed_experts": 16,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "max_position_embeddings": 256,
        },
        "deepseek2",
        {
            **_LATENT_KEYS,
            **_YARN_KEYS,
            "attention.q_lora_rank": 40,
            "expert_count": 16,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        split_latent,
        context=256,
    ),
    "deepseek_v3, halves that turn, many heads": Case(
        "DeepseekV3Config",
        {
            **_LATENT,
            "num_attention_heads": 19,
            "num_key_value_heads": 19,
            "q_lora_rank": None,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
        },
        "",
        {},
    ),
    "glm4_moe_lite": Case(
        "Glm4MoeLiteConfig",
        {**_LATENT, "q_lora_rank": 40, "n_routed_experts": 8, "n_shared_experts": 1, "rms_norm_eps": 1e-5},
        "deepseek2",
        {
            **_LATENT_KEYS,
            "attention.q_lora_rank": 40,
            "expert_count": 8,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.8,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
        },
        split_latent,
    ),
    "glm4_moe_lite, a dense layer between": Case(
        "Glm4MoeLiteConfig",
        {
            **_LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 6,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "",
        {},
    ),
    "lfm2_moe": Case(
        "Lfm2MoeConfig",
        {**_CONVOLUTIONS, "layer_types": ["conv", "full_attention", "conv"]},
        "lfm2moe",
        _CONVOLUTION_KEYS,
        convolution_names,
    ),
    "lfm2_moe, four taps, no bias for the choice": Case(
        "Lfm2MoeConfig",
        {
            **_CONVOLUTIONS,
            "layer_types": ["full_attention", "conv", "conv"],
            "conv_L_cache": 4,
            "num_dense_layers": 0,
            "use_expert_bias": False,
            "routed_scaling_factor": 1.5,
        },
        "lfm2moe",
        {
            **_CONVOLUTION_KEYS,
            "attention.head_count_kv": [2, 0, 0],
            "shortconv.l_cache": 4,
            "leading_dense_block_count": 0,
            "expert_weights_scale": 1.5,
        },
        convolution_names,
    ),
    "qwen3_next": Case("Qwen3NextConfig", _DELTA, "qwen3next", _DELTA_KEYS, split_delta),
    "qwen3_next, other proportions, a dense layer": Case(
        "Qwen3NextConfig",
        {
            **_DELTA,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "mlp_only_layers": [1],
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 40,
            "linear_value_head_dim": 80,
            "linear_conv_kernel_dim": 3,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
            "rope_parameters": {**_YARN, "partial_rotary_factor": 0.5},
        },
        "",
        {},
        context=256,
    ),
    "qwen3_5_moe": Case(
        "Qwen3_5MoeTextConfig",
        _DELTA,
        "qwen35moe",
        {**_DELTA_KEYS, "rope.dimension_sections": [2, 1, 1, 0]},
        split_delta,
    ),
    "qwen3_5_moe, tied, more heads": Case(
        "Qwen3_5MoeTextConfig",
        {
            **_DELTA,
            "num_hidden_layers": 2,
            "full_attention_interval": 2,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
        },
        "qwen35moe",
        {
            **_DELTA_KEYS,
            "full_attention_interval": 2,
            "rope.dimension_count": 16,
            "rope.dimension_sections": [3, 3, 2, 0],
            "rope.freq_base": 1e7,
            "ssm.state_size": 16,
            "ssm.group_count": 4,
            "ssm.time_step_rank": 8,
            "ssm.inner_size": 256,
        },
        split_delta,
    ),
}
