"""Qwen3-Next (Qwen3-Next-80B-A3B, Qwen3-Coder-Next): three layers of Gated DeltaNet for one of gated attention, where a
part of each head turns; zero-centred norms, softmax router, a shared expert with a sigmoid gate.

Layers that predict several tokens are not used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from edgemoe.families import Slices, TensorSource
from edgemoe.families._config import Config
from edgemoe.families._gated_delta import LAYERS, gated_delta_sources, gated_delta_spec, gguf_names, gguf_spec
from edgemoe.families._names import Names
from edgemoe.families._tools import JSON_IN_TAGS
from edgemoe.spec import ModelSpec

MODEL_TYPE = "qwen3_next"

_NAMES = Names(
    {
        **LAYERS,
        "mixed": "linear_attn.in_proj_qkvz.weight",
        "output_gate": "linear_attn.in_proj_qkvz.weight",
        "beta_alpha": "linear_attn.in_proj_ba.weight",
    }
)
_GGUF = gguf_names("qwen3next", beta_alpha="ssm_ba.weight")
GGUF_ARCHITECTURE = _GGUF.architecture
TOOL_FORMATS = (JSON_IN_TAGS,)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    c = Config(config, MODEL_TYPE)
    return gated_delta_spec(c, MODEL_TYPE, fused=True, tied=c.flag("tie_word_embeddings", default=False))


def tensor_sources(spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]) -> dict[str, TensorSource]:
    """One projection gives, for each key head, its query, its key, and the values and gates of its value heads."""
    sources = gated_delta_sources(_NAMES, spec, names)
    for number, layer in enumerate(spec.layers):
        attention, here = layer.attention, f"layers.{number}."
        if attention.kind != "gated_delta":
            continue
        keys, values = attention.head_dim, attention.heads // attention.kv_heads * attention.value_dim
        ends = [0, keys, 2 * keys, 2 * keys + values, 2 * keys + 2 * values]
        ranges = tuple(pairwise(ends))
        for part, own in (("mixed", ranges[:3]), ("output_gate", ranges[3:])):
            sources[here + part] = replace(sources[here + part], slices=Slices(attention.kv_heads, own))
    return sources


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    return gguf_spec(_GGUF, metadata, shapes, MODEL_TYPE, fused=True)


def gguf_tensor_sources(spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
    return _GGUF.sources(spec, names)
