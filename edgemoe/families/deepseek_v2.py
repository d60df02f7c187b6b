"""DeepSeek-V2 (DeepSeek-V2, V2-Lite, Coder-V2): multi-head latent attention, softmax router that may choose within
groups, shared experts, dense first layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgemoe.families import TensorSource, deepseek_v3
from edgemoe.families._common import model
from edgemoe.families._config import Config
from edgemoe.families._latent import (
    GGUF,
    gguf_configuration,
    latent_attention,
    latent_gguf_sources,
    latent_sources,
)
from edgemoe.families._tools import DEEPSEEK, DEEPSEEK_FENCED
from edgemoe.spec import LayerSpec, ModelSpec, RouterSpec

MODEL_TYPE = "deepseek_v2"
GGUF_ARCHITECTURE = GGUF.architecture
TOOL_FORMATS = (DEEPSEEK_FENCED, DEEPSEEK)

_GREEDY, _GROUPS = "greedy", "group_limited_greedy"


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(
        hidden_act="silu",
        mlp_bias=False,
        moe_layer_freq=1,
        scoring_func="softmax",
        norm_topk_prob=False,
        quantization_config=None,
    )
    attention = latent_attention(config, c, q_rank=1536, interleaved=True)
    expert_dim = c.integer("moe_intermediate_size")
    grouped = c.text("topk_method", _GREEDY) == _GROUPS
    if not grouped:
        c.require(topk_method=_GREEDY)
    router = RouterSpec(
        renormalize=False,
        groups=c.integer("n_group") if grouped else 1,
        groups_kept=c.integer("topk_group") if grouped else 1,
        group_score="largest",
        weight_scale=c.number("routed_scaling_factor", default=1.0),
    )
    dense = LayerSpec(attention, ffn_dim=c.integer("intermediate_size"))
    mixture = LayerSpec(
        attention,
        ffn_dim=expert_dim,
        experts=c.integer("n_routed_experts", default=64),
        top_k=c.integer("num_experts_per_tok"),
        router=router,
        shared_dim=expert_dim * c.integer("n_shared_experts", default=2, most=1 << 10),
    )
    dense_layers = c.integer("first_k_dense_replace", default=0, least=0)
    layers = [dense if number < dense_layers else mixture for number in range(c.layers())]
    return model(c, MODEL_TYPE, layers, norm_epsilon=1e-6)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return latent_sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """Of all families of this architecture: what the router computes tells them apart."""
    config = gguf_configuration(metadata, shapes)
    c = Config(config, MODEL_TYPE)
    biased = any(name.endswith(".exp_probs_b.bias") for name in shapes)
    gating = c.integer("gating", default=2 if biased else 1)
    if gating == 2 and biased:
        return deepseek_v3.spec(config)
    c.require(gating=1)
    if c.integer("n_group", default=1) > 1:
        config["topk_method"] = _GROUPS
    return spec(config)


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return latent_gguf_sources(spec, names)
