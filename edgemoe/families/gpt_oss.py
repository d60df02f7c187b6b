"""gpt-oss (gpt-oss-20b, gpt-oss-120b): layers that see a window alternate with layers that see everything, attention
sinks, YaRN, biases everywhere, a clamped SwiGLU, experts in MXFP4.

In folders the rows of gate and up alternate, and experts lie as MXFP4 blocks with their scales or, [input, output], in
a float type. GGUF files have gates and ups apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.errors import UnsupportedModelError, quote
from edgemoe.families import TensorSource, ToolFormat
from edgemoe.families._common import grouped_attention, model
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, LAYER, GgufNames
from edgemoe.families._names import ATTENTION, MODEL
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "gpt_oss"

_KINDS = ("sliding_attention", "full_attention")
_LAYER = {
    **ATTENTION,
    "sinks": "self_attn.sinks",
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
}
# Every second row of the source, from this one on.
_FIRST = {"gate": ("gate_up_proj", (0, 2)), "up": ("gate_up_proj", (1, 2)), "down": ("down_proj", None)}
_GGUF = GgufNames(
    architecture="gpt-oss",
    config={
        **CONFIG,
        "num_local_experts": "expert_count",
        "intermediate_size": "expert_feed_forward_length",
        "sliding_window": "attention.sliding_window",
    },
    # What files do not state: the correction range of its YaRN is not rounded to whole pairs.
    constants={"rope_scaling": {"truncate": False}},
    allowed={
        "feed_forward_length": (),  # of the dense layers, which it does not have
        "expert_gating_func": (0, 1, 3),
        "expert_weights_scale": (0.0, 1.0),
        "expert_shared_count": (0,),
    },
    layer={**LAYER, "ffn_norm": "post_attention_norm.weight"},
    scaling=("yarn",),
)
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (ToolFormat("harmony", "", parallel=False, signs=("<|channel|>", "<|call|>")),)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu")
    if c.has("quantization_config"):
        method = c.part("quantization_config").text("quant_method", "")
        if method != "mxfp4":
            raise UnsupportedModelError(
                f"{MODEL_TYPE}: quant_method = {quote(method)} is not supported (only 'mxfp4' is)"
            )
    head_dim = c.integer("head_dim", default=64, most=1 << 14)
    bias = c.flag("attention_bias", default=True)
    window, layers = c.integer("sliding_window", default=128, most=1 << 30), c.layers()
    kinds = c.choices("layer_types", _KINDS, layers) or [_KINDS[number % 2] for number in range(layers)]

    def layer(kind: str) -> LayerSpec:
        return LayerSpec(
            replace(
                grouped_attention(c, head_dim, c.rope(head_dim, 150000.0, types=("default", "yarn"))),
                window=window if kind == "sliding_attention" else None,
                sinks=True,
                bias=bias,
                output_bias=bias,
            ),
            ffn_dim=c.integer("intermediate_size"),
            experts=c.integer("num_local_experts", "num_experts"),
            top_k=c.integer("num_experts_per_tok", "experts_per_token", default=4),
            router=RouterSpec(scores="softmax_topk", renormalize=False, bias=True),
            expert_bias=True,
            activation="clamped_swiglu",
            swiglu_alpha=c.number("swiglu_alpha", default=1.702),
            swiglu_limit=c.number("swiglu_limit", default=7.0),
        )

    return model(c, MODEL_TYPE, [layer(kind) for kind in kinds], norm_epsilon=1e-5, context=131072)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    names = frozenset(names)
    sources = {}
    for name in spec.dense_tensors():
        if name in MODEL:
            sources[name] = TensorSource(MODEL[name])
            continue
        _, layer_number, part = name.split(".", 2)
        if part.startswith("expert_"):
            matrix, every = _FIRST[part.removeprefix("expert_").removesuffix("_bias")]
            sources[name] = TensorSource(f"model.layers.{layer_number}.mlp.experts.{matrix}_bias", every=every)
        else:
            sources[name] = TensorSource(f"model.layers.{layer_number}.{_LAYER[part]}")
    for number, layer in enumerate(spec.layers):
        for expert in range(layer.experts):
            for part, (matrix, every) in _FIRST.items():
                there = f"model.layers.{number}.mlp.experts.{matrix}"
                if there + "_blocks" in names:
                    source = TensorSource(there + "_blocks", index=expert, every=every, scales=there + "_scales")
                else:
                    source = TensorSource(there, index=expert, transpose=True, every=every)
                sources[f"layers.{number}.experts.{expert}.{part}"] = source
    return sources


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    return spec(_GGUF.configuration(metadata, shapes))


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
