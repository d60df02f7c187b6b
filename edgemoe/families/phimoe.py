"""Phi-3.5-MoE (Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE): LayerNorms with biases, biases in attention and output head,
LongRoPE, a SparseMixer router.

LongRoPE's frequencies are chosen by the context that a model is loaded with. GGUF files state neither the router's
threshold nor the factors on cosine and sine ("rope.scaling.attn_factor" is what follows from the context lengths, 1.19,
not the configuration's short_mscale and long_mscale): they are taken to be those of all released models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._common import grouped_attention, head_size, model, window
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, LAYER, GgufNames
from edgemoe.families._names import ATTENTION, MIXTRAL_EXPERTS, MODEL, Names
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "phimoe"

_MSCALE = 1.243163121016122
_NAMES = Names(
    {
        **ATTENTION,
        "attention_norm_bias": "input_layernorm.bias",
        "ffn_norm_bias": "post_attention_layernorm.bias",
        "router": ("block_sparse_moe.gate.weight", "mlp.router.weight"),
    },
    MIXTRAL_EXPERTS,
    model={**MODEL, "final_norm_bias": "model.norm.bias", "head_bias": "lm_head.bias"},
)
_GGUF = GgufNames(
    architecture="phimoe",
    config={
        **CONFIG,
        "num_local_experts": "expert_count",
        "sliding_window": "attention.sliding_window",
    },
    allowed={
        "rope.dimension_count": (),  # whole heads
        "expert_gating_func": (0, 1),
        "expert_weights_scale": (0.0, 1.0),
        "expert_feed_forward_length": (),  # of the tensors, which are checked
        "rope.scaling.attn_factor": (),
    },
    layer={**LAYER, "attention_norm_bias": "attn_norm.bias", "ffn_norm_bias": "ffn_norm.bias"},
    model={
        "embedding": "token_embd.weight",
        "final_norm": "output_norm.weight",
        "final_norm_bias": "output_norm.bias",
        "head": "output.weight",
        "head_bias": "output.bias",
    },
    scaling=("longrope",),
    known=("rope_factors_short.weight", "rope_factors_long.weight"),
)
GGUF_ARCHITECTURE = _GGUF.architecture
GGUF_VALUES = _GGUF.known


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu", quantization_config=None)
    head_dim = head_size(c)
    bias = c.flag("attention_bias", default=False)
    attention = replace(
        grouped_attention(c, head_dim, c.rope(head_dim, 1e6, types=("default", "longrope"))),
        window=window(c),
        bias=bias,
        output_bias=bias,
    )
    layer = LayerSpec(
        attention,
        ffn_dim=c.integer("intermediate_size"),
        experts=c.integer("num_local_experts", "num_experts"),
        top_k=c.integer("num_experts_per_tok", default=2),
        router=RouterSpec(
            scores="sparsemixer",
            renormalize=False,
            mask_threshold=2 * c.number("router_jitter_noise", default=0.01),
        ),
    )
    return replace(
        model(c, MODEL_TYPE, [layer] * c.layers(), norm_epsilon=1e-5),
        norm="layer",
        head_bias=c.flag("lm_head_bias", default=False),
    )


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    if "rope_factors_long.weight" in metadata:  # some files have the factors and no type
        metadata = {"phimoe.rope.scaling.type": "longrope", **metadata}
    config = _GGUF.configuration(metadata, shapes)
    if "rope_scaling" in config:
        config["rope_scaling"] |= {"short_mscale": _MSCALE, "long_mscale": _MSCALE}
    if config.get("sliding_window") == 0:  # how conversions write that there is none
        del config["sliding_window"]
    return spec({**config, "attention_bias": "blk.0.attn_q.bias" in shapes, "lm_head_bias": "output.bias" in shapes})


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
