"""GLM-4.5 (GLM-4.5, GLM-4.5-Air, GLM-4.6): half of each head turns, optional query and key norms, sigmoid router with a
bias for the choice and groups, shared experts, dense first layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._common import grouped_attention, head_size, model, sigmoid_router
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, LAYER, GgufNames
from edgemoe.families._names import ATTENTION, Names, gated
from edgemoe.families._tools import KEYS_AND_VALUES
from edgemoe.spec import LayerSpec, ModelSpec

MODEL_TYPE = "glm4_moe"

_NAMES = Names(
    {
        **ATTENTION,
        "router": "mlp.gate.weight",
        "selection_bias": "mlp.gate.e_score_correction_bias",
        **gated("ffn", "mlp"),
        **gated("shared", "mlp.shared_experts"),
    }
)
_GGUF = GgufNames(
    architecture="glm4moe",
    config={
        **CONFIG,
        "n_routed_experts": "expert_count",
        "n_shared_experts": "expert_shared_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "first_k_dense_replace": "leading_dense_block_count",
        "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count",
        "routed_scaling_factor": "expert_weights_scale",
        "norm_topk_prob": "expert_weights_norm",
        "rotary_dim": "rope.dimension_count",
        "num_nextn_predict_layers": "nextn_predict_layers",
    },
    allowed={"expert_gating_func": (2,)},
    layer={**LAYER, "ffn_norm": "post_attention_norm.weight"},
)
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (KEYS_AND_VALUES,)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu", quantization_config=None)
    head_dim = head_size(c)
    attention = replace(
        grouped_attention(c, head_dim, c.rope(head_dim, partial=0.5)),
        qk_norm="head" if c.flag("use_qk_norm", default=False) else "none",
        bias=c.flag("attention_bias", default=False),
    )
    expert_dim = c.integer("moe_intermediate_size")
    dense = LayerSpec(attention, ffn_dim=c.integer("intermediate_size"))
    mixture = LayerSpec(
        attention,
        ffn_dim=expert_dim,
        experts=c.integer("n_routed_experts", "num_local_experts"),
        top_k=c.integer("num_experts_per_tok"),
        router=sigmoid_router(c, 1.0),
        shared_dim=expert_dim * c.integer("n_shared_experts", default=1, most=1 << 10),
    )
    dense_layers = c.integer("first_k_dense_replace", default=1, least=0)
    layers = [dense if number < dense_layers else mixture for number in range(c.layers())]
    return model(c, MODEL_TYPE, layers, norm_epsilon=1e-5)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The layers that predict several tokens are counted in such a file, and not used."""
    config = _GGUF.configuration(metadata, shapes)
    c = Config(config, MODEL_TYPE)
    head_dim = head_size(c)
    return spec(
        {
            **config,
            "num_hidden_layers": c.layers() - c.integer("num_nextn_predict_layers", default=0, least=0),
            "partial_rotary_factor": c.integer("rotary_dim", default=max(1, head_dim // 2)) / head_dim,
            "attention_bias": "blk.0.attn_q.bias" in shapes,
            "use_qk_norm": "blk.0.attn_q_norm.weight" in shapes,
        }
    )


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
