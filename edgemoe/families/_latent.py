"""What the families with multi-head latent attention share: DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash.

Their GGUF files all have the architecture "deepseek2"."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgemoe.errors import UnsupportedModelError
from edgemoe.families import Slices, TensorSource
from edgemoe.families._config import Config, yarn_attention_factor
from edgemoe.families._gguf import CONFIG, LAYER, GgufNames, layers_used
from edgemoe.families._names import ATTENTION, Names, flat, gated
from edgemoe.spec import AttentionSpec, ModelSpec

_NAMES = Names(
    {
        **ATTENTION,
        "q": ("self_attn.q_b_proj.weight", "self_attn.q_proj.weight"),
        "q_down": "self_attn.q_a_proj.weight",
        "q_norm": "self_attn.q_a_layernorm.weight",
        "kv_down": "self_attn.kv_a_proj_with_mqa.weight",
        "kv_norm": "self_attn.kv_a_layernorm.weight",
        "k_up": "self_attn.kv_b_proj.weight",
        "v_up": "self_attn.kv_b_proj.weight",
        "router": "mlp.gate.weight",
        "selection_bias": "mlp.gate.e_score_correction_bias",
        **gated("ffn", "mlp"),
        **gated("shared", "mlp.shared_experts"),
    }
)
GGUF = GgufNames(
    architecture="deepseek2",
    config={
        **{name: key for name, key in CONFIG.items() if name != "head_dim"},
        "q_lora_rank": "attention.q_lora_rank",
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_head_dim": "attention.key_length_mla",
        "v_head_dim": "attention.value_length_mla",
        "qk_rope_head_dim": "rope.dimension_count",
        "yarn_log_multiplier": "rope.scaling.yarn_log_multiplier",
        "n_routed_experts": "expert_count",
        "n_shared_experts": "expert_shared_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "first_k_dense_replace": "leading_dense_block_count",
        "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count",
        "routed_scaling_factor": "expert_weights_scale",
        "norm_topk_prob": "expert_weights_norm",
        "gating": "expert_gating_func",
        "num_nextn_predict_layers": "nextn_predict_layers",
    },
    scaling=("yarn",),
    constants={"norm_topk_prob": False},
    # What the latent and the rotated key take together.
    allowed={"attention.key_length": (), "attention.value_length": ()},
    layer={
        **LAYER,
        "q": ("attn_q_b.weight", "attn_q.weight"),
        "q_down": "attn_q_a.weight",
        "q_norm": "attn_q_a_norm.weight",
        "kv_down": "attn_kv_a_mqa.weight",
        "kv_norm": "attn_kv_a_norm.weight",
        "k_up": "attn_k_b.weight",
        "v_up": "attn_v_b.weight",
    },
)

# The norms of latents have this epsilon, whatever the model's other norms have.
_LATENT_EPSILON = 1e-6


def latent_attention(config: Mapping[str, Any], c: Config, q_rank: int, interleaved: bool) -> AttentionSpec:
    """q_rank: the default of the family; a null means that queries have no latent."""
    heads = c.integer("num_attention_heads")
    c.require(num_key_value_heads=heads, attention_bias=False)
    plain, rope_dim = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim")
    head_dim = plain + rope_dim
    rope = c.rope(rope_dim, interleaved=interleaved, types=("default", "yarn"))
    scale = head_dim**-0.5
    scaling = c.part("rope_parameters" if c.has("rope_parameters") else "rope_scaling")
    if "yarn" in (scaling.text("rope_type", ""), scaling.text("type", "")) and scaling.has("mscale_all_dim"):
        scale *= yarn_attention_factor(scaling.number("factor"), scaling.number("mscale_all_dim")) ** 2
    return AttentionSpec(
        kind="mla",
        heads=heads,
        kv_heads=1,
        head_dim=head_dim,
        value_dim=c.integer("v_head_dim"),
        scale=scale,
        rope=rope,
        q_rank=c.integer("q_lora_rank", default=0 if "q_lora_rank" in config else q_rank, least=0),
        kv_rank=c.integer("kv_lora_rank"),
        rope_dim=rope_dim,
        latent_norm_epsilon=_LATENT_EPSILON,
    )


def latent_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    """One projection gives every head's key, as far as it is not rotated, and behind it its value. The key's part is
    turned around: it takes queries to the latent."""
    sources = _NAMES.sources(spec, names)
    for number, layer in enumerate(spec.layers):
        attention, here = layer.attention, f"layers.{number}."
        plain = attention.head_dim - attention.rope_dim
        keys = Slices(attention.heads, ((0, plain),), transpose=True)
        values = Slices(attention.heads, ((plain, plain + attention.value_dim),))
        sources[here + "k_up"] = replace(sources[here + "k_up"], slices=keys)
        sources[here + "v_up"] = replace(sources[here + "v_up"], slices=values)
    return sources


def latent_gguf_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return flat(GGUF.sources(spec, names), "k_up", "v_up")


def gguf_configuration(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The metadata as a config.json of these families. Raises UnsupportedModelError for files of before 2025-04, whose
    heads are not split as latent attention needs them."""
    if "blk.0.attn_kv_b.weight" in shapes:
        raise UnsupportedModelError(
            "tensor blk.0.attn_kv_b.weight: the file is of an old form (attn_k_b and attn_v_b are supported)"
        )
    config = GGUF.configuration(metadata, shapes)
    c = Config(config, GGUF.architecture)
    rope_dim = c.integer("qk_rope_head_dim")
    config["qk_nope_head_dim"] = c.integer("qk_head_dim", least=rope_dim + 1) - rope_dim
    config["num_hidden_layers"] = layers_used(
        c.layers(), c.integer("num_nextn_predict_layers", default=0, least=0), shapes
    )
    config.setdefault("q_lora_rank", None)
    del config["num_key_value_heads"]  # 1, of the latent
    if "rope_scaling" in config and "yarn_log_multiplier" in config:
        # A tenth of mscale_all_dim; mscale, which is not told, has the same value in all models.
        mscale = round(10 * c.number("yarn_log_multiplier"), 6)
        config["rope_scaling"] |= {"mscale": mscale, "mscale_all_dim": mscale}
    return config
