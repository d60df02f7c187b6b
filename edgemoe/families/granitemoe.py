"""Granite 3 with experts (granite-3.1-1b-a400m, granite-3.1-3b-a800m): multipliers on embeddings, attention, residual
stream and logits, a router that chooses by its logits and normalizes the chosen ones.

GGUF files have query and key rows in such an order that neighbours are a rotary pair.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource, ToolFormat
from edgemoe.families._common import grouped_attention, head_size, model
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, GgufNames
from edgemoe.families._names import ATTENTION, Names
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "granitemoe"

_NAMES = Names(
    {**ATTENTION, "router": ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight")},
    stacked=(
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    ),
)
_GGUF = GgufNames(
    architecture="granitemoe",
    config={
        **CONFIG,
        "num_local_experts": "expert_count",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "attention_multiplier": "attention.scale",
        "logits_scaling": "logit_scale",
    },
    constants={"rope_interleaved": True},
    allowed={
        "rope.dimension_count": (),  # whole heads
        "expert_gating_func": (0, 1),
        "expert_weights_scale": (0.0, 1.0),
        "expert_shared_count": (0,),
        "expert_shared_feed_forward_length": (0,),
        "expert_feed_forward_length": (),  # of the tensors, which are checked
    },
)
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (
    ToolFormat("json", "<|tool_call|>", together=True, signs=("<|tool_call|>",), result_role="tool_response"),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu", quantization_config=None)
    head_dim = head_size(c)
    bias = c.flag("attention_bias", default=False)
    rope = c.rope(head_dim, interleaved=c.flag("rope_interleaved", default=False))
    attention = replace(
        grouped_attention(c, head_dim, rope),
        scale=c.number("attention_multiplier", default=1.0),
        bias=bias,
        output_bias=bias,
    )
    layer = LayerSpec(
        attention,
        ffn_dim=c.integer("intermediate_size"),
        experts=c.integer("num_local_experts", "num_experts"),
        top_k=c.integer("num_experts_per_tok"),
        router=RouterSpec(scores="softmax_topk", renormalize=False),
    )
    return replace(
        model(c, MODEL_TYPE, [layer] * c.layers(), norm_epsilon=1e-6),
        embedding_multiplier=c.number("embedding_multiplier", default=1.0),
        residual_multiplier=c.number("residual_multiplier", default=1.0),
        logits_divisor=c.number("logits_scaling", default=1.0),
    )


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    config = _GGUF.configuration(metadata, shapes)
    return spec({**config, "attention_bias": "blk.0.attn_q.bias" in shapes})


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
