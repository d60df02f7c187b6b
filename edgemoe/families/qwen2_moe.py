"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): grouped-query attention with biases, softmax router, a shared expert
with a sigmoid gate. Some layers may be dense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, GgufNames
from edgemoe.families._names import ATTENTION, Names, gated
from edgemoe.spec import AttentionSpec, LayerSpec, ModelSpec, RouterSpec

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


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu", use_sliding_window=False, quantization_config=None)
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
        bias=c.flag("qkv_bias", default=True),
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
            shared_dim=c.integer("shared_expert_intermediate_size"),
            shared_gate=True,
        )

    return ModelSpec(
        family=MODEL_TYPE,
        vocab_size=c.integer("vocab_size"),
        hidden_size=hidden,
        context=c.integer("max_position_embeddings", most=1 << 30),
        layers=tuple(layer(number) for number in range(c.layers())),
        norm_epsilon=c.number("rms_norm_eps", default=1e-6),
        tied_embeddings=c.flag("tie_word_embeddings", default=False),
    )


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
