"""MiniMax-M2 (MiniMax-M2): a part of each head turns, query and key norms over all heads, sigmoid router with a bias
for the choice, every layer a mixture of experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource, ToolFormat
from edgemoe.families._common import grouped_attention, head_size, model
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, GgufNames
from edgemoe.families._names import ATTENTION, MIXTRAL_EXPERTS, Names
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "minimax_m2"

_NAMES = Names(
    {
        **ATTENTION,
        "router": ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        "selection_bias": ("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
    },
    MIXTRAL_EXPERTS,
)
_GGUF = GgufNames(
    architecture="minimax-m2",
    config={
        **CONFIG,
        "num_local_experts": "expert_count",
        "intermediate_size": "expert_feed_forward_length",
        "rotary_dim": "rope.dimension_count",
    },
    allowed={
        "feed_forward_length": (),  # of dense layers, which it does not have
        "expert_gating_func": (2,),
        "expert_weights_norm": (True,),
        "expert_weights_scale": (0.0, 1.0),
        "expert_shared_count": (0,),
    },
)
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (
    ToolFormat(
        "tagged",
        "<minimax:tool_call>",
        "</minimax:tool_call>",
        together=True,
        name_begin='<invoke name="',
        name_end='">',
        call_end="</invoke>",
        key_begin='<parameter name="',
        key_end='">',
        value_end="</parameter>",
        lines=True,
        signs=("<minimax:tool_call>",),
    ),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(
        hidden_act="silu",
        quantization_config=None,
        scoring_func="sigmoid",
        use_routing_bias=True,
        use_qk_norm=True,
        qk_norm_type="per_layer",
        shared_intermediate_size=0,
        attn_type_list=[1] * c.layers(),  # softmax attention
    )
    head_dim = head_size(c)
    rope = c.rope(head_dim, 5e6, partial=c.integer("rotary_dim", default=head_dim, most=head_dim) / head_dim)
    attention = replace(grouped_attention(c, head_dim, rope), qk_norm="full")
    layer = LayerSpec(
        attention,
        ffn_dim=c.integer("intermediate_size"),
        experts=c.integer("num_local_experts", "num_experts"),
        top_k=c.integer("num_experts_per_tok"),
        router=RouterSpec(scores="sigmoid", renormalize=True, selection_bias=True),
    )
    return model(c, MODEL_TYPE, [layer] * c.layers(), norm_epsilon=1e-6)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    return spec(_GGUF.configuration(metadata, shapes))


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
