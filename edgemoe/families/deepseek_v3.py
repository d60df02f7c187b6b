"""DeepSeek-V3 (DeepSeek-V3, R1, V3.1): multi-head latent attention, sigmoid router with groups and a bias for choosing,
shared expert, dense first layers. Layers that predict several tokens are not used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgemoe.families import TensorSource, _common
from edgemoe.families._common import sigmoid_router
from edgemoe.families._config import Config
from edgemoe.families._latent import gguf_configuration, latent_attention, latent_gguf_sources, latent_sources
from edgemoe.families._tools import DEEPSEEK, DEEPSEEK_FENCED, KIMI
from edgemoe.spec import AttentionSpec, LayerSpec, ModelSpec

MODEL_TYPE = "deepseek_v3"
GGUF_ARCHITECTURE = None  # deepseek_v2's, which tells them apart
TOOL_FORMATS = (DEEPSEEK_FENCED, DEEPSEEK, KIMI)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    c.require(moe_layer_freq=1)
    dense_layers = c.integer("first_k_dense_replace", default=3, least=0)
    attention = latent_attention(config, c, q_rank=1536, interleaved=c.flag("rope_interleave", default=True))
    return model(c, attention, [number < dense_layers for number in range(c.layers())], MODEL_TYPE, 2.5)


def model(c: Config, attention: AttentionSpec, dense: list[bool], family: str, weight_scale: float) -> ModelSpec:
    """A model of this router. dense: which layers are; weight_scale: its default."""
    c.require(hidden_act="silu", topk_method="noaux_tc", scoring_func="sigmoid", quantization_config=None)
    expert_dim = c.integer("moe_intermediate_size")
    mixture = LayerSpec(
        attention,
        ffn_dim=expert_dim,
        experts=c.integer("n_routed_experts", "num_local_experts"),
        top_k=c.integer("num_experts_per_tok"),
        router=sigmoid_router(c, weight_scale),
        shared_dim=expert_dim * c.integer("n_shared_experts", default=1, most=1 << 10),
    )
    layers = [LayerSpec(attention, ffn_dim=c.integer("intermediate_size")) if d else mixture for d in dense]
    return _common.model(c, family, layers, norm_epsilon=1e-6)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    return latent_sources(spec, names)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    return spec(gguf_configuration(metadata, shapes))


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return latent_gguf_sources(spec, names)
