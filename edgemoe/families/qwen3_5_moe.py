"""Qwen3.5-MoE (Qwen3.5-35B-A3B, Qwen3.5-397B-A17B, Qwen3.6): the layers of Qwen3-Next, each of whose
inputs has a projection of its own.

This is its text part: the tensors of vision, and the layers that predict several tokens, are not used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgemoe.families import TensorSource
from edgemoe.families._config import Config
from edgemoe.families._gated_delta import LAYERS, gated_delta_sources, gated_delta_spec, gguf_names, gguf_spec
from edgemoe.families._names import Names
from edgemoe.families._tools import FUNCTION_TAGS, JSON_IN_TAGS
from edgemoe.spec import ModelSpec

MODEL_TYPE = "qwen3_5_moe"

_NAMES = Names(LAYERS)
_GGUF = gguf_names("qwen35moe", beta="ssm_beta.weight", alpha="ssm_alpha.weight")
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (FUNCTION_TAGS, JSON_IN_TAGS)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """A configuration of the whole model, or of its text part."""
    c = Config(config, MODEL_TYPE)
    tied = c.flag("tie_word_embeddings", default=False)
    if c.has("text_config"):
        c.require(quantization_config=None)
        c = c.part("text_config")
        tied = c.flag("tie_word_embeddings", default=tied)
    c.require(norm_topk_prob=True)
    return gated_delta_spec(c, MODEL_TYPE, fused=False, tied=tied)


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    root = "model.language_model." if "text_config" in config else "model."
    return gated_delta_sources(_NAMES, spec, names, root)


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    return gguf_spec(_GGUF, metadata, shapes, MODEL_TYPE, fused=False)


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
