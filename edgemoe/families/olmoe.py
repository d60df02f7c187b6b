"""OLMoE (OLMoE-1B-7B): attention with query and key norms over all heads, optionally clipped; softmax router whose
weights are not renormalized."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._common import grouped_attention, head_size, model
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, GgufNames
from edgemoe.families._names import ATTENTION, Names
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "olmoe"

_NAMES = Names({**ATTENTION, "router": "mlp.gate.weight"})
_GGUF = GgufNames(
    architecture="olmoe",
    config={
        **CONFIG,
        "num_experts": "expert_count",
        "clip_qkv": "attention.clamp_kqv",
        "norm_topk_prob": "expert_weights_norm",
    },
    allowed={
        "expert_gating_func": (0, 1),
        "expert_weights_scale": (0.0, 1.0),
        "expert_shared_count": (0,),
        "expert_feed_forward_length": (),  # of the tensors, which are checked
    },
)
GGUF_ARCHITECTURE = _GGUF.architecture


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu", quantization_config=None)
    head_dim = head_size(c)
    bias = c.flag("attention_bias", default=False)
    attention = replace(
        grouped_attention(c, head_dim, c.rope(head_dim)),
        qk_norm="full",
        bias=bias,
        output_bias=bias,
        clip_qkv=c.number("clip_qkv") if c.has("clip_qkv") else 0.0,
    )
    layer = LayerSpec(
        attention,
        ffn_dim=c.integer("intermediate_size"),
        experts=c.integer("num_experts", "num_local_experts"),
        top_k=c.integer("num_experts_per_tok"),
        router=RouterSpec(renormalize=c.flag("norm_topk_prob", default=False)),
    )
    return model(c, MODEL_TYPE, [layer] * c.layers(), norm_epsilon=1e-5)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    config = _GGUF.configuration(metadata, shapes)
    return spec({**config, "attention_bias": "blk.0.attn_q.bias" in shapes})


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
