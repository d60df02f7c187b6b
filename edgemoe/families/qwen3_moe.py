"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): grouped-query attention with per-head query and key norms,
softmax router, no shared expert. Some layers may be dense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._common import grouped_attention, head_size, mixture_layers, model
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, GgufNames
from edgemoe.families._names import ATTENTION, Names, gated
from edgemoe.families._tools import FUNCTION_TAGS, JSON_IN_TAGS
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "qwen3_moe"

_NAMES = Names({**ATTENTION, "router": "mlp.gate.weight", **gated("ffn", "mlp")})
_GGUF = GgufNames(
    architecture="qwen3moe",
    config={
        **CONFIG,
        "num_experts": "expert_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "norm_topk_prob": "expert_weights_norm",
    },
    constants={"norm_topk_prob": True},
    scaling=("linear", "yarn"),
    allowed={"expert_gating_func": (0, 1), "expert_weights_scale": (0.0, 1.0), "expert_shared_count": (0,)},
)
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (FUNCTION_TAGS, JSON_IN_TAGS)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(
        hidden_act="silu",
        attention_bias=False,
        qkv_bias=False,
        use_qk_norm=True,
        use_sliding_window=False,
        shared_expert_intermediate_size=0,
        quantization_config=None,
    )
    head_dim = head_size(c)
    rope = c.rope(head_dim, types=("default", "linear", "yarn"))
    attention = replace(grouped_attention(c, head_dim, rope), qk_norm="head")
    experts = c.integer("num_experts", "num_local_experts", least=0)

    def layer(mixture: bool) -> LayerSpec:
        if not mixture or not experts:
            return LayerSpec(attention, ffn_dim=c.integer("intermediate_size"))
        return LayerSpec(
            attention,
            ffn_dim=c.integer("moe_intermediate_size"),
            experts=experts,
            top_k=c.integer("num_experts_per_tok"),
            router=RouterSpec(renormalize=c.flag("norm_topk_prob", default=False)),
        )

    return model(c, MODEL_TYPE, [layer(mixture) for mixture in mixture_layers(c)], norm_epsilon=1e-6)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    """Experts lie one by one, or stacked (transformers 5, `save_original_format=False`) with gate above up."""
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """Every layer of such a file is a mixture of experts."""
    return spec(_GGUF.configuration(metadata, shapes))


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
