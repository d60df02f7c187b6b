"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): grouped-query attention with biases, softmax router, a shared expert
with a sigmoid gate. Some layers may be dense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._common import grouped_attention, head_size, mixture_layers, model
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, GgufNames
from edgemoe.families._names import ATTENTION, Names, gated
from edgemoe.families._tools import JSON_IN_TAGS
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "qwen2_moe"

_NAMES = Names(
    {
        **ATTENTION,
        "router": "mlp.gate.weight",
        **gated("ffn", "mlp"),
        **gated("shared", "mlp.shared_expert"),
        "shared_gate": "mlp.shared_expert_gate.weight",
    }
)
_GGUF = GgufNames(
    architecture="qwen2moe",
    config={
        **CONFIG,
        "num_experts": "expert_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "norm_topk_prob": "expert_weights_norm",
    },
    scaling=("linear", "yarn"),
    allowed={"expert_gating_func": (0, 1), "expert_weights_scale": (0.0, 1.0), "expert_shared_count": (0, 1)},
)
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (JSON_IN_TAGS,)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu", use_sliding_window=False, quantization_config=None)
    head_dim = head_size(c)
    rope = c.rope(head_dim, types=("default", "linear", "yarn"))
    attention = replace(grouped_attention(c, head_dim, rope), bias=c.flag("qkv_bias", default=True))
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
            shared_dim=c.integer("shared_expert_intermediate_size"),
            shared_gate=True,
        )

    return model(c, MODEL_TYPE, [layer(mixture) for mixture in mixture_layers(c)], norm_epsilon=1e-6)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """Every layer of such a file is a mixture of experts; sizes that old files leave out are those of the tensors."""
    config = _GGUF.configuration(metadata, shapes)
    for name, tensor in (("moe_intermediate_size", "exps"), ("shared_expert_intermediate_size", "shexp")):
        shape = shapes.get(f"blk.0.ffn_gate_{tensor}.weight", ())
        if name not in config and len(shape) >= 2:
            config[name] = shape[-2]
    config["qkv_bias"] = "blk.0.attn_q.bias" in shapes
    return spec(config)


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
