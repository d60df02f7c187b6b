"""GLM-4.7-Flash (GLM-4.7-Flash): the layers of DeepSeek-V3, of which any may be dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.families import deepseek_v3
from edgemoe.families._config import Config
from edgemoe.families._latent import latent_attention
from edgemoe.families._tools import KEYS_AND_VALUES
from edgemoe.families.deepseek_v3 import gguf_tensor_sources, spec_from_gguf, tensor_sources
from edgemoe.spec import ModelSpec

__all__ = ["GGUF_ARCHITECTURE", "MODEL_TYPE", "gguf_tensor_sources", "spec", "spec_from_gguf", "tensor_sources"]

MODEL_TYPE = "glm4_moe_lite"
GGUF_ARCHITECTURE = None  # deepseek_v2's, which tells them apart
TOOL_FORMATS = (KEYS_AND_VALUES,)

_DENSE, _SPARSE = _KINDS = ("dense", "sparse")


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    layers, dense_layers = c.layers(), c.integer("first_k_dense_replace", default=1, least=0)
    kinds = c.choices("mlp_layer_types", _KINDS, layers)
    kinds = kinds or [_DENSE if number < dense_layers else _SPARSE for number in range(layers)]
    attention = latent_attention(config, c, q_rank=768, interleaved=c.flag("rope_interleave", default=True))
    return deepseek_v3.model(c, attention, [kind == _DENSE for kind in kinds], MODEL_TYPE, 1.8)
