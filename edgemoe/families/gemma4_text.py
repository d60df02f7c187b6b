"""Gemma 4's text part by itself (Gemma4ForCausalLM): as gemma4."""

from __future__ import annotations

from edgemoe.families.gemma4 import TOOL_FORMATS, gguf_tensor_sources, spec, spec_from_gguf, tensor_sources

__all__ = [
    "GGUF_ARCHITECTURE",
    "MODEL_TYPE",
    "TOOL_FORMATS",
    "gguf_tensor_sources",
    "spec",
    "spec_from_gguf",
    "tensor_sources",
]

MODEL_TYPE = "gemma4_text"
GGUF_ARCHITECTURE = None  # gemma4's
