"""LFM2-MoE (LFM2-8B-A1B): gated short convolutions, in some layers grouped-query attention with per-head query and key
norms; sigmoid router with a bias for the choice, dense first layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.families import TensorSource, ToolFormat
from edgemoe.families._common import grouped_attention, head_size
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, LAYER, GgufNames
from edgemoe.families._names import MODEL, Names, flat
from edgemoe.spec import AttentionSpec, LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "lfm2_moe"

_CONVOLUTION, _ATTENTION = _KINDS = ("conv", "full_attention")
_FEED_FORWARD = {"gate": "w1", "up": "w3", "down": "w2"}
_NAMES = Names(
    {
        "attention_norm": "operator_norm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": ("self_attn.out_proj.weight", "conv.out_proj.weight"),
        "q_norm": "self_attn.q_layernorm.weight",
        "k_norm": "self_attn.k_layernorm.weight",
        "mixed": "conv.in_proj.weight",
        "conv": "conv.conv.weight",
        "ffn_norm": "ffn_norm.weight",
        "router": "feed_forward.gate.weight",
        "selection_bias": "feed_forward.expert_bias",
        **{f"ffn.{part}": f"feed_forward.{name}.weight" for part, name in _FEED_FORWARD.items()},
    },
    experts={part: f"feed_forward.experts.{{}}.{name}.weight" for part, name in _FEED_FORWARD.items()},
    stacked=(("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),),
    model={**MODEL, "final_norm": "model.embedding_norm.weight"},
)
_GGUF = GgufNames(
    architecture="lfm2moe",
    config={
        **CONFIG,
        "norm_eps": "attention.layer_norm_rms_epsilon",
        "rotary_dim": "rope.dimension_count",
        "conv_L_cache": "shortconv.l_cache",
        "num_dense_layers": "leading_dense_block_count",
        "num_experts": "expert_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "norm_topk_prob": "expert_weights_norm",
        "routed_scaling_factor": "expert_weights_scale",
    },
    per_layer=frozenset({"num_key_value_heads"}),
    allowed={"expert_gating_func": (2,)},
    layer={
        **LAYER,
        "mixed": "shortconv.in_proj.weight",
        "conv": "shortconv.conv.weight",
        "o": ("attn_output.weight", "shortconv.out_proj.weight"),
    },
    model={"embedding": "token_embd.weight", "final_norm": "token_embd_norm.weight", "head": "output.weight"},
)
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (
    ToolFormat("python", "<|tool_call_start|>", "<|tool_call_end|>", together=True, signs=("<|tool_call_start|>",)),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    hidden, head_dim, layers = c.integer("hidden_size"), head_size(c), c.layers()
    c.require(conv_bias=False, quantization_config=None, rotary_dim=head_dim)
    attention = replace(grouped_attention(c, head_dim, c.rope(head_dim, 1e6)), qk_norm="head")
    convolution = AttentionSpec(
        kind="short_conv",
        heads=1,
        kv_heads=1,
        head_dim=hidden,
        value_dim=hidden,
        scale=1.0,
        rope=None,
        conv_size=c.integer("conv_L_cache", default=3, most=64),
    )
    kinds = c.choices("layer_types", _KINDS, layers)
    if not kinds:  # the form of the first configurations
        attending = c.integers("full_attn_idxs")
        kinds = [_ATTENTION if number in attending else _CONVOLUTION for number in range(layers)]
    dense_layers = c.integer("num_dense_layers", default=2, least=0)
    router = RouterSpec(
        scores="sigmoid",
        renormalize=c.flag("norm_topk_prob", default=True),
        renormalize_epsilon=1e-6,
        selection_bias=c.flag("use_expert_bias", default=True),
        weight_scale=c.number("routed_scaling_factor", default=1.0),
    )

    def layer(number: int) -> LayerSpec:
        mixer = attention if kinds[number] == _ATTENTION else convolution
        if number < dense_layers:
            return LayerSpec(mixer, ffn_dim=c.integer("intermediate_size"))
        return LayerSpec(
            mixer,
            ffn_dim=c.integer("moe_intermediate_size"),
            experts=c.integer("num_experts"),
            top_k=c.integer("num_experts_per_tok"),
            router=router,
        )

    tied = c.flag("tie_embedding", default=c.flag("tie_word_embeddings", default=True))
    return ModelSpec(
        family=MODEL_TYPE,
        vocab_size=c.integer("vocab_size"),
        hidden_size=hidden,
        context=c.integer("max_position_embeddings", most=1 << 30),
        layers=tuple(layer(number) for number in range(layers)),
        norm_epsilon=c.number("norm_eps", default=1e-5),
        tied_embeddings=tied,
    )


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return flat(_NAMES.sources(spec, names), "conv")


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """Layers without key/value heads are convolutions."""
    config = _GGUF.configuration(metadata, shapes)
    layers = Config(config, MODEL_TYPE).layers()
    counts = config.get("num_key_value_heads")
    counts = counts if isinstance(counts, list) else [counts] * layers
    kinds = [_ATTENTION if count else _CONVOLUTION for count in counts]
    config |= {"layer_types": kinds, "num_key_value_heads": next(filter(None, counts), None)}
    config["use_expert_bias"] = any(name.endswith(".exp_probs_b.bias") for name in shapes)
    return spec(config)


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return flat(_GGUF.sources(spec, names), "conv")
