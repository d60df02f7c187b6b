"""GLM-4.5 (GLM-4.5, GLM-4.5-Air, GLM-4.6): half of each head turns, optional query and key norms, sigmoid router with a
bias for the choice and groups, shared experts, dense first layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, LAYER, GgufNames
from edgemoe.families._names import ATTENTION, Names, gated
from edgemoe.spec import AttentionSpec, LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "glm4_moe"

_NAMES = Names(
    {
        **ATTENTION,
        "router": "mlp.gate.weight",
        "selection_bias": "mlp.gate.e_score_correction_bias",
        **gated("ffn", "mlp"),
        **gated("shared", "mlp.shared_experts"),
    }
)
_GGUF = GgufNames(
    architecture="glm4moe",
    config={
        **CONFIG,
        "n_routed_experts": "expert_count",
        "n_shared_experts": "expert_shared_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "first_k_dense_replace": "leading_dense_block_count",
        "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count",
        "routed_scaling_factor": "expert_weights_scale",
        "norm_topk_prob": "expert_weights_norm",
        "rotary_dim": "rope.dimension_count",
        "num_nextn_predict_layers": "nextn_predict_layers",
    },
    allowed={"expert_gating_func": (2,)},
    layer={**LAYER, "ffn_norm": "post_attention_norm.weight"},
)
GGUF_ARCHITECTURE = _GGUF.architecture


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(hidden_act="silu", quantization_config=None)
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    head_dim = c.integer("head_dim", default=max(1, hidden // heads), most=1 << 14)
    attention = AttentionSpec(
        kind="full",
        heads=heads,
        kv_heads=c.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        value_dim=head_dim,
        scale=head_dim**-0.5,
        rope=c.rope(head_dim, partial=0.5),
        qk_norm="head" if c.flag("use_qk_norm", default=False) else "none",
        bias=c.flag("attention_bias", default=False),
    )
    expert_dim = c.integer("moe_intermediate_size")
    router = RouterSpec(
        scores="sigmoid",
        renormalize=c.flag("norm_topk_prob", default=True),
        renormalize_epsilon=1e-20,
        selection_bias=True,
        groups=c.integer("n_group", default=1),
        groups_kept=c.integer("topk_group", default=1),
        weight_scale=c.number("routed_scaling_factor", default=1.0),
    )
    dense = LayerSpec(attention, ffn_dim=c.integer("intermediate_size"))
    mixture = LayerSpec(
        attention,
        ffn_dim=expert_dim,
        experts=c.integer("n_routed_experts", "num_local_experts"),
        top_k=c.integer("num_experts_per_tok"),
        router=router,
        shared_dim=expert_dim * c.integer("n_shared_experts", default=1, most=1 << 10),
    )
    dense_layers = c.integer("first_k_dense_replace", default=1, least=0)
    return ModelSpec(
        family=MODEL_TYPE,
        vocab_size=c.integer("vocab_size"),
        hidden_size=hidden,
        context=c.integer("max_position_embeddings", most=1 << 30),
        layers=tuple(dense if number < dense_layers else mixture for number in range(c.layers())),
        norm_epsilon=c.number("rms_norm_eps", default=1e-5),
        tied_embeddings=c.flag("tie_word_embeddings", default=False),
    )


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return _NAMES.sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The layers that predict several tokens are counted in such a file, and not used."""
    config = _GGUF.configuration(metadata, shapes)
    c = Config(config, MODEL_TYPE)
    head_dim = c.integer("head_dim", default=max(1, c.integer("hidden_size") // c.integer("num_attention_heads")))
    return spec(
        {
            **config,
            "num_hidden_layers": c.layers() - c.integer("num_nextn_predict_layers", default=0, least=0),
            "partial_rotary_factor": c.integer("rotary_dim", default=max(1, head_dim // 2)) / head_dim,
            "attention_bias": "blk.0.attn_q.bias" in shapes,
            "use_qk_norm": "blk.0.attn_q_norm.weight" in shapes,
        }
    )


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
