"""Mixtral (Mixtral-8x7B, 8x22B): grouped-query attention, softmax router with renormalized weights.

GGUF files call it "llama", with query and key rows in such an order that neighbours are a rotary pair; models of that
name without experts are not of this family.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource, ToolFormat
from edgemoe.families._common import grouped_attention, head_size, model, window
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, GgufNames
from edgemoe.families._names import ATTENTION, MIXTRAL_EXPERTS, Names
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "mixtral"

_NAMES = Names({**ATTENTION, "router": ("block_sparse_moe.gate.weight", "mlp.gate.weight")}, MIXTRAL_EXPERTS)
_GGUF = GgufNames(
    architecture="llama",
    config={
        **CONFIG,
        "num_local_experts": "expert_count",
        "head_dim": "rope.dimension_count",
        "sliding_window": "attention.sliding_window",
    },
    constants={"rope_interleaved": True},
    allowed={
        "attention.key_length": (),  # of the tensors, which are checked
        "attention.value_length": (),
        "expert_gating_func": (0, 1),
        "expert_weights_norm": (True,),
        "expert_weights_scale": (0.0, 1.0),
        "expert_shared_count": (0,),
        "expert_feed_forward_length": (),
    },
)
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (ToolFormat("json", "[TOOL_CALLS]", together=True, id_length=9, signs=("[TOOL_CALLS]",)),)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu", quantization_config=None)
    head_dim = head_size(c)
    rope = c.rope(head_dim, 1e6, interleaved=c.flag("rope_interleaved", default=False))
    attention = replace(grouped_attention(c, head_dim, rope), window=window(c))
    layer = LayerSpec(
        attention,
        ffn_dim=c.integer("intermediate_size"),
        experts=c.integer("num_local_experts", "num_experts"),
        top_k=c.integer("num_experts_per_tok", default=2),
        router=RouterSpec(renormalize=True),
    )
    return model(c, MODEL_TYPE, [layer] * c.layers(), norm_epsilon=1e-5)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    return spec(_GGUF.configuration(metadata, shapes))


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
