"""ERNIE-4.5 (ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B): neighbours are the rotary pairs, softmax router with a bias for
the choice, shared experts, some dense layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._common import grouped_attention, head_size, model
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, GgufNames
from edgemoe.families._names import ATTENTION, MODEL, Names, gated
from edgemoe.families._tools import JSON_IN_TAGS
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "ernie4_5_moe"

_NAMES = Names(
    {
        **ATTENTION,
        "router": "mlp.gate.weight",
        "selection_bias": ("mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),
        **gated("ffn", "mlp"),
        **gated("shared", "mlp.shared_experts"),
    },
    model={**MODEL, "head_bias": "lm_head.bias"},
)
_GGUF = GgufNames(
    architecture="ernie4_5-moe",
    config={
        **CONFIG,
        "moe_num_experts": "expert_count",
        "moe_k": "expert_used_count",
        "moe_num_shared_experts": "expert_shared_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "moe_layer_interval": "interleave_moe_layer_step",
        "moe_layer_start_index": "leading_dense_block_count",
    },
    allowed={
        "expert_gating_func": (0, 1),
        "expert_weights_norm": (True,),
        "expert_weights_scale": (0.0, 1.0),
        "expert_shared_feed_forward_length": (),  # of the tensors, which are checked
        "rope.dimension_count": (),
    },
)
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (JSON_IN_TAGS,)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu", quantization_config=None)
    head_dim = head_size(c)
    bias = c.flag("use_bias", default=False)
    attention = replace(
        grouped_attention(c, head_dim, c.rope(head_dim, 500000.0, interleaved=True)),
        bias=bias,
        output_bias=bias,
    )
    expert_dim = c.integer("moe_intermediate_size")
    dense = LayerSpec(attention, ffn_dim=c.integer("intermediate_size"), ffn_bias=bias)
    shared = c.integer("moe_num_shared_experts", default=2, least=0, most=1 << 10)
    mixture = LayerSpec(
        attention,
        ffn_dim=expert_dim,
        experts=c.integer("moe_num_experts", "num_experts"),
        top_k=c.integer("moe_k", "num_experts_per_tok"),
        router=RouterSpec(
            renormalize=True,
            renormalize_least=c.number("moe_norm_min", default=1e-12),
            selection_bias=True,
        ),
        shared_dim=expert_dim * shared,
        ffn_bias=bias,
    )
    first = c.integer("moe_layer_start_index", default=1, least=0)
    last = c.integer("moe_layer_end_index", default=-1, least=-1)
    step = c.integer("moe_layer_interval", default=1)

    def layer(number: int) -> LayerSpec:
        inside = first <= number and (last == -1 or number <= last)
        return mixture if inside and (number + 1) % step == 0 else dense

    layers = [layer(number) for number in range(c.layers())]
    return replace(model(c, MODEL_TYPE, layers, norm_epsilon=1e-5, tied=True), head_bias=bias)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    config = _GGUF.configuration(metadata, shapes)
    return spec({**config, "use_bias": "blk.0.attn_q.bias" in shapes})


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
