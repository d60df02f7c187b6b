"""Gemma 4 with experts, its text part (gemma-4-26B-A4B): layers that see a window and layers that see everything, each
with head sizes and rotary embedding of their own, normed values that global layers take from the key projection, GELU,
a dense part beside the experts, a scale for every expert, norms before and after every part, soft-capped logits.

Vision and audio tensors are not used. Per-layer embeddings and layers that share keys and values (gemma-4-E2B, E4B) are
refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from edgemoe.errors import UnsupportedModelError
from edgemoe.families import TensorSource, ToolFormat
from edgemoe.families._config import Config
from edgemoe.families._gguf import CONFIG, LAYER, GgufNames
from edgemoe.families._names import ATTENTION, Names, gated
from edgemoe.spec import AttentionSpec, LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "gemma4"
TOOL_FORMATS = (ToolFormat("gemma", "<|tool_call>", "<tool_call|>", quotes=('<|"|>',), signs=("<|tool_call>",)),)

_LOCAL, _GLOBAL = _KINDS = ("sliding_attention", "full_attention")
_NAMES = Names(
    {
        **ATTENTION,
        "attention_output_norm": "post_attention_layernorm.weight",
        "ffn_norm": "pre_feedforward_layernorm.weight",
        "ffn_output_norm": "post_feedforward_layernorm.weight",
        "expert_norm": "pre_feedforward_layernorm_2.weight",
        "expert_output_norm": "post_feedforward_layernorm_2.weight",
        "shared_output_norm": "post_feedforward_layernorm_1.weight",
        "output_scale": "layer_scalar",
        "router": "router.proj.weight",
        "router_norm": "router.scale",
        "expert_scale": "router.per_expert_scale",
        **gated("ffn", "mlp"),
        **gated("shared", "mlp"),
    },
    stacked=(("experts.gate_up_proj", "experts.down_proj"),),
)
_GGUF = GgufNames(
    architecture="gemma4",
    config={
        **CONFIG,
        "global_head_dim": "attention.key_length",
        "head_dim": "attention.key_length_swa",
        "sliding_window": "attention.sliding_window",
        "sliding_window_pattern": "attention.sliding_window_pattern",
        "global_theta": "rope.freq_base",
        "local_theta": "rope.freq_base_swa",
        "num_experts": "expert_count",
        "top_k_experts": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "final_logit_softcapping": "final_logit_softcapping",
        "num_kv_shared_layers": "attention.shared_kv_layers",
        "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    },
    allowed={
        "attention.value_length_swa": (),  # of the tensors, which are checked
        "rope.dimension_count": (),  # whole heads; what turns of them is in rope_freqs
        "rope.dimension_count_swa": (),
        "expert_gating_func": (0, 1),
        "expert_weights_norm": (True,),
        "expert_weights_scale": (0.0, 1.0),
        "expert_shared_count": (0, 1),
    },
    layer={
        **LAYER,
        "attention_output_norm": "post_attention_norm.weight",
        "ffn_output_norm": "post_ffw_norm.weight",
        "expert_norm": "pre_ffw_norm_2.weight",
        "expert_output_norm": "post_ffw_norm_2.weight",
        "shared_output_norm": "post_ffw_norm_1.weight",
        "output_scale": "layer_output_scale.weight",
        "router_norm": "ffn_gate_inp.scale",
        "expert_scale": "ffn_down_exps.scale",
        **{f"shared.{part}": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    },
    per_layer=frozenset({"num_key_value_heads", "sliding_window_pattern"}),
    known=("rope_freqs.weight",),
)
GGUF_ARCHITECTURE: str | None = _GGUF.architecture
GGUF_VALUES = ("rope_freqs.weight",)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    if c.has("text_config"):
        c = c.part("text_config")
    c.require(
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        quantization_config=None,
    )
    # Where it is left out, it is not zero.
    if c.integer("hidden_size_per_layer_input", default=256, least=0):
        raise UnsupportedModelError(f"{MODEL_TYPE}: hidden_size_per_layer_input other than 0 is not supported")
    if c.text("use_bidirectional_attention", "vision") != "vision":  # of image tokens only
        raise UnsupportedModelError(f"{MODEL_TYPE}: use_bidirectional_attention = 'all' is not supported")
    hidden, heads, layers = c.integer("hidden_size"), c.integer("num_attention_heads"), c.layers()
    window = c.integer("sliding_window", default=512, most=1 << 30)
    kinds = c.choices("layer_types", _KINDS, layers) or [
        _KINDS[(number + 1) % 6 == 0 or number == layers - 1] for number in range(layers)
    ]
    values_are_keys = c.flag("attention_k_eq_v", default=False)

    def attention(number: int, kind: str) -> AttentionSpec:
        head_dim = c.integer("head_dim", default=256, most=1 << 14)
        kv_heads = c.integer("num_key_value_heads", default=heads)
        if c.has("per_layer_config"):
            c.part("per_layer_config").allow(*map(str, range(layers)))
            own = c.part("per_layer_config").part(str(number))
            own.allow("head_dim", "num_key_value_heads")
            head_dim = own.integer("head_dim", default=head_dim, most=1 << 14)
            kv_heads = own.integer("num_key_value_heads", default=kv_heads)
        elif kind == _GLOBAL:
            head_dim = c.integer("global_head_dim", default=512, most=1 << 14)
            if values_are_keys:
                kv_heads = c.integer("num_global_key_value_heads", default=kv_heads)
        ropes = c.part("rope_parameters")
        usual = {_LOCAL: {}, _GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25}}[kind]
        return AttentionSpec(
            kind="full",
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=1.0,
            rope=c.rope(
                head_dim,
                1e4 if kind == _LOCAL else 1e6,
                partial=1.0,
                types=("default",) if kind == _LOCAL else ("default", "proportional"),
                parameters=ropes.part(kind) if ropes.has(kind) else Config(usual, MODEL_TYPE),
            ),
            qk_norm="head",
            window=window if kind == _LOCAL else None,
            value_norm=True,
            values_are_keys=values_are_keys and kind == _GLOBAL,
        )

    dense_dim, mixture = c.integer("intermediate_size"), c.flag("enable_moe_block", default=False)

    def layer(number: int, kind: str) -> LayerSpec:
        if not mixture:
            return LayerSpec(
                attention(number, kind), dense_dim, activation="gelu_tanh", output_norms=True, output_scale=True
            )
        return LayerSpec(
            attention(number, kind),
            ffn_dim=c.integer("moe_intermediate_size"),
            experts=c.integer("num_experts"),
            top_k=c.integer("top_k_experts"),
            router=RouterSpec(renormalize=True, input_norm=True, input_scale=hidden**-0.5, expert_scale=True),
            shared_dim=dense_dim,
            activation="gelu_tanh",
            output_norms=True,
            branch_norms=True,
            output_scale=True,
        )

    return ModelSpec(
        family=MODEL_TYPE,
        vocab_size=c.integer("vocab_size"),
        hidden_size=hidden,
        context=c.integer("max_position_embeddings", default=131072, most=1 << 30),
        layers=tuple(layer(number, kind) for number, kind in enumerate(kinds)),
        norm_epsilon=c.number("rms_norm_eps", default=1e-6),
        tied_embeddings=c.flag("tie_word_embeddings", default=True),
        embedding_multiplier=math.sqrt(hidden),
        logits_softcap=c.number("final_logit_softcapping") if c.has("final_logit_softcapping") else 0.0,
    )


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    """Whole models have their text part under "model.language_model."."""
    root = "model.language_model."
    return _NAMES.sources(spec, names, root if f"{root}norm.weight" in names else "model.")


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    config = _GGUF.configuration(metadata, shapes)
    c = Config(config, MODEL_TYPE)
    layers = c.layers()
    local = config.get("sliding_window_pattern")
    if not isinstance(local, list) or len(local) != layers:
        raise UnsupportedModelError(f"{MODEL_TYPE}: sliding_window_pattern is not a list of {layers} entries")
    heads = config.get("num_key_value_heads")
    heads = heads if isinstance(heads, list) else [heads] * layers
    if len(heads) != layers:
        raise UnsupportedModelError(f"{MODEL_TYPE}: attention.head_count_kv is not a list of {layers} entries")
    sizes = [c.integer("head_dim" if own else "global_head_dim", most=1 << 14) for own in local]
    # What divides each pair's frequency: 1 for those that turn, a number beyond all bounds for the others.
    factors = metadata.get("rope_freqs.weight", [1.0])
    turning = sum(factor == 1.0 for factor in factors)
    if factors[:turning] != [1.0] * turning or any(factor < 1e20 for factor in factors[turning:]):
        raise UnsupportedModelError(f"{MODEL_TYPE}: the factors of rope_freqs.weight are not supported")
    return spec(
        {
            **{name: value for name, value in config.items() if name != "rope_theta"},
            "layer_types": [_LOCAL if own else _GLOBAL for own in local],
            "per_layer_config": {
                str(number): {"head_dim": size, "num_key_value_heads": count}
                for number, (size, count) in enumerate(zip(sizes, heads, strict=True))
            },
            "num_key_value_heads": None,
            "attention_k_eq_v": any(
                not own and f"blk.{number}.attn_v.weight" not in shapes for number, own in enumerate(local)
            ),
            "hidden_size_per_layer_input": c.integer("hidden_size_per_layer_input", default=0, least=0),
            "enable_moe_block": c.integer("num_experts", default=0, least=0) > 0,
            "rope_parameters": {
                _LOCAL: {"rope_theta": c.number("local_theta", default=1e4)},
                _GLOBAL: {
                    "rope_type": "proportional",
                    "rope_theta": c.number("global_theta", default=1e6),
                    "partial_rotary_factor": min(1.0, (turning + 1e-6) / len(factors)),  # not rounded below it
                },
            },
        }
    )


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
