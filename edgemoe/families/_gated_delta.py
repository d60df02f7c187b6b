"""What the families with Gated DeltaNet share: Qwen3-Next and Qwen3.5-MoE."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._common import grouped_attention, mixture_layers, model
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, LAYER, GgufNames, layers_used
from edgemoe.families._names import ATTENTION, Names, flat, gated
from edgemoe.spec import AttentionSpec, LayerSpec, ModelSpec, RouterSpec

_LINEAR, _FULL = _KINDS = ("linear_attention", "full_attention")

LAYERS: dict[str, str | tuple[str, ...]] = {
    **ATTENTION,
    "o": ("self_attn.o_proj.weight", "linear_attn.out_proj.weight"),
    "mixed": "linear_attn.in_proj_qkv.weight",
    "output_gate": "linear_attn.in_proj_z.weight",
    "beta": "linear_attn.in_proj_b.weight",
    "alpha": "linear_attn.in_proj_a.weight",
    "conv": "linear_attn.conv1d.weight",
    "decay_rate": "linear_attn.A_log",
    "step_bias": "linear_attn.dt_bias",
    "head_norm": "linear_attn.norm.weight",
    "router": "mlp.gate.weight",
    **gated("ffn", "mlp"),
    **gated("shared", "mlp.shared_expert"),
    "shared_gate": "mlp.shared_expert_gate.weight",
}
"""Names in folders, where each projection has its own."""


def gguf_names(architecture: str, **layer: str) -> GgufNames:
    """layer: tensors that not all architectures have."""
    return GgufNames(
        architecture=architecture,
        config={
            **CONFIG,
            "num_experts": "expert_count",
            "moe_intermediate_size": "expert_feed_forward_length",
            "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
            "full_attention_interval": "full_attention_interval",
            "rotary_dim": "rope.dimension_count",
            "linear_conv_kernel_dim": "ssm.conv_kernel",
            "linear_key_head_dim": "ssm.state_size",
            "linear_num_key_heads": "ssm.group_count",
            "linear_num_value_heads": "ssm.time_step_rank",
            "linear_values": "ssm.inner_size",
            "num_nextn_predict_layers": "nextn_predict_layers",
        },
        scaling=("yarn",),
        constants={"norm_topk_prob": True},
        # Sections of the rotated part take the positions of a text and of what is in it, which are the same for text.
        allowed={"rope.dimension_sections": (), "expert_gating_func": (0, 1), "expert_weights_norm": (True,)},
        layer={
            **LAYER,
            "o": ("attn_output.weight", "ssm_out.weight"),
            "ffn_norm": "post_attention_norm.weight",
            "mixed": "attn_qkv.weight",
            "output_gate": "attn_gate.weight",
            "conv": "ssm_conv1d.weight",
            "decay_rate": "ssm_a",
            "step_bias": "ssm_dt.bias",
            "head_norm": "ssm_norm.weight",
            **layer,
        },
    )


def gated_delta_spec(c: Config, family: str, *, fused: bool, tied: bool) -> ModelSpec:
    """fused: one projection gives beta and alpha. tied: the output head is the embedding.

    Every norm but that of the linear attention's heads is zero-centred.
    """
    c.require(hidden_act="silu", attention_bias=False, attn_output_gate=True, quantization_config=None)
    layers = c.layers()
    head_dim = c.integer("head_dim", default=256, most=1 << 14)
    attention = replace(
        grouped_attention(c, head_dim, c.rope(head_dim, partial=0.25, types=("default", "yarn"))),
        qk_norm="head",
        output_gate=True,
    )
    recurrence = AttentionSpec(
        kind="gated_delta",
        heads=c.integer("linear_num_value_heads", default=32),
        kv_heads=c.integer("linear_num_key_heads", default=16),
        head_dim=c.integer("linear_key_head_dim", default=128),
        value_dim=c.integer("linear_value_head_dim", default=128),
        scale=1.0,
        rope=None,
        conv_size=c.integer("linear_conv_kernel_dim", default=4),
        fused_beta_alpha=fused,
    )
    interval = c.integer("full_attention_interval", default=4)
    kinds = c.choices("layer_types", _KINDS, layers)
    kinds = kinds or [_LINEAR if (number + 1) % interval else _FULL for number in range(layers)]

    def layer(kind: str, mixture: bool) -> LayerSpec:
        mixer = attention if kind == _FULL else recurrence
        if not mixture:
            return LayerSpec(mixer, ffn_dim=c.integer("intermediate_size"))
        return LayerSpec(
            mixer,
            ffn_dim=c.integer("moe_intermediate_size"),
            experts=c.integer("num_experts"),
            top_k=c.integer("num_experts_per_tok"),
            router=RouterSpec(renormalize=c.flag("norm_topk_prob", default=True)),
            shared_dim=c.integer("shared_expert_intermediate_size"),
            shared_gate=True,
        )

    mixed = [layer(kind, mixture) for kind, mixture in zip(kinds, mixture_layers(c), strict=True)]
    return replace(model(c, family, mixed, norm_epsilon=1e-6), norm_offset=1.0, tied_embeddings=tied)


def gated_delta_sources(
    names: Names, spec: ModelSpec, tensors: Collection[str], root: str = "model."
) -> dict[str, TensorSource]:
    """Of a folder."""
    return {
        name: replace(source, negative_exp=True) if name.endswith(".decay_rate") else source
        for name, source in flat(names.sources(spec, tensors, root), "conv").items()
    }


def gguf_spec(
    names: GgufNames, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], family: str, *, fused: bool
) -> ModelSpec:
    """Of a GGUF file, in which one is added to zero-centred norms. Where beta and alpha have projections of their own,
    its value heads are in another order (`AttentionSpec.tiled_heads`)."""
    config = names.configuration(metadata, shapes)
    c = Config(config, family)
    value_heads = c.integer("linear_num_value_heads")
    values = c.integer("linear_values", least=value_heads)
    c.require(linear_values=values // value_heads * value_heads)
    config["linear_value_head_dim"] = values // value_heads
    config["num_hidden_layers"] = layers_used(
        c.layers(), c.integer("num_nextn_predict_layers", default=0, least=0), shapes
    )
    head_dim = c.integer("head_dim", default=256)
    config["partial_rotary_factor"] = c.integer("rotary_dim", default=max(1, head_dim // 4)) / head_dim
    tied = c.flag("tie_word_embeddings", default=False)
    spec = gated_delta_spec(Config(config, family), family, fused=fused, tied=tied)

    def reordered(layer: LayerSpec) -> LayerSpec:
        if layer.attention.kind != "gated_delta":
            return layer
        return replace(layer, attention=replace(layer.attention, tiled_heads=not fused))

    return replace(spec, norm_offset=0.0, layers=tuple(map(reordered, spec.layers)))
