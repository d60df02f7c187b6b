"""Qwen3.5-MoE's text part by itself (Qwen3_5MoeForCausalLM): as qwen3_5_moe."""

from __future__ import annotations

from edgemoe.families.qwen3_5_moe import TOOL_FORMATS, gguf_tensor_sources, spec, spec_from_gguf, tensor_sources

__all__ = [
    "GGUF_ARCHITECTURE",
    "MODEL_TYPE",
    "TOOL_FORMATS",
    "gguf_tensor_sources",
    "spec",
    "spec_from_gguf",
    "tensor_sources",
]

MODEL_TYPE = "qwen3_5_moe_text"
GGUF_ARCHITECTURE = None  # qwen3_5_moe's
