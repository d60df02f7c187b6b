"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): grouped-query attention with per-head query and key norms,
softmax router, no shared expert. Some layers may be dense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._config import Config
from edgemoe.families._gguf import GgufNames
from edgemoe.spec import MAX_LAYERS, AttentionSpec, LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "qwen3_moe"

_MODEL = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
    "ffn.gate": "mlp.gate_proj.weight",
    "ffn.up": "mlp.up_proj.weight",
    "ffn.down": "mlp.down_proj.weight",
}

_GGUF = GgufNames(
    architecture="qwen3moe",
    config={
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "max_position_embeddings": "context_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "norm_topk_prob": "expert_weights_norm",
    },
    constants={"norm_topk_prob": True},
    allowed={"expert_gating_func": (0, 1), "expert_weights_scale": (0.0, 1.0), "expert_shared_count": (0,)},
    layer={
        "attention_norm": "attn_norm.weight",
        "q": "attn_q.weight",
        "k": "attn_k.weight",
        "v": "attn_v.weight",
        "o": "attn_output.weight",
        "q_norm": "attn_q_norm.weight",
        "k_norm": "attn_k_norm.weight",
        "ffn_norm": "ffn_norm.weight",
        "router": "ffn_gate_inp.weight",
        "ffn.gate": "ffn_gate.weight",
        "ffn.up": "ffn_up.weight",
        "ffn.down": "ffn_down.weight",
    },
    experts={"gate": "ffn_gate_exps.weight", "up": "ffn_up_exps.weight", "down": "ffn_down_exps.weight"},
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
        rope=c.rope(head_dim),
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
    sources = {}
    for name in spec.dense_tensors():
        if name in _MODEL:
            sources[name] = TensorSource(_MODEL[name])
        else:
            _, layer_number, part = name.split(".", 2)
            sources[name] = TensorSource(f"model.layers.{layer_number}.{_LAYER[part]}")
    for number, layer in enumerate(spec.layers):
        size, there = layer.ffn_dim, f"model.layers.{number}.mlp.experts."
        stacked = there + "gate_up_proj" in names
        for expert in range(layer.experts):
            here = f"layers.{number}.experts.{expert}."
            if stacked:
                sources[here + "gate"] = TensorSource(there + "gate_up_proj", index=expert, rows=(0, size))
                sources[here + "up"] = TensorSource(there + "gate_up_proj", index=expert, rows=(size, 2 * size))
                sources[here + "down"] = TensorSource(there + "down_proj", index=expert)
            else:
                for part in ("gate", "up", "down"):
                    sources[here + part] = TensorSource(f"{there}{expert}.{part}_proj.weight")
    return sources


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """Every layer of such a file is a mixture of experts."""
    return spec(_GGUF.configuration(metadata, shapes))


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
