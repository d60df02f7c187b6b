"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): grouped-query attention with per-head query and key norms,
softmax router, no shared expert. Some layers may be dense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, GgufNames
from edgemoe.families._names import ATTENTION, Names, gated
from edgemoe.spec import MAX_LAYERS, AttentionSpec, LayerSpec, ModelSpec, RouterSpec

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
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    head_dim = c.integer("head_dim", default=max(1, hidden // heads), most=1 << 14)
    attention = AttentionSpec(
        kind="full",
        heads=heads,
        kv_heads=c.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        value_dim=head_dim,
        scale=head_dim**-0.5,
        rope=c.rope(head_dim, types=("default", "linear", "yarn")),
        qk_norm="head",
    )
    dense_layers = c.integers("mlp_only_layers")
    sparse_step = c.integer("decoder_sparse_step", default=1)
    experts = c.integer("num_experts", "num_local_experts", least=0)

    def layer(number: int) -> LayerSpec:
        if not experts or number in dense_layers or (number + 1) % sparse_step:
            return LayerSpec(attention, ffn_dim=c.integer("intermediate_size"))
        return LayerSpec(
            attention,
            ffn_dim=c.integer("moe_intermediate_size"),
            experts=experts,
            top_k=c.integer("num_experts_per_tok"),
            router=RouterSpec(renormalize=c.flag("norm_topk_prob", default=False)),
        )

    return ModelSpec(
        family=MODEL_TYPE,
        vocab_size=c.integer("vocab_size"),
        hidden_size=hidden,
        context=c.integer("max_position_embeddings", most=1 << 30),
        layers=tuple(layer(number) for number in range(c.integer("num_hidden_layers", most=MAX_LAYERS))),
        norm_epsilon=c.number("rms_norm_eps", default=1e-6),
        tied_embeddings=c.flag("tie_word_embeddings", default=False),
    )


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    """Experts lie one by one, or stacked (transformers 5, `save_original_format=False`) with gate above up."""
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """Every layer of such a file is a mixture of experts."""
    return spec(_GGUF.configuration(metadata, shapes))


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
