"""Tiny GGUF files with weights that are quantized, not drawn as blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import BLOCKS, Tensor, tiny_qwen3_moe_gguf, write

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tools.ggml_quantize import quantize

# The `gguf` package quantizes to those that tools/ggml_quantize.py has no function of its own for.
OWN = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "f32")


def tiny_tensors(kind: str | dict[str, str], **sizes: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `gguf_writer.tiny_qwen3_moe_gguf`, with real weights, quantized to `kind`, or to kinds by the names of tensors
    (their last part before ".weight"); "" stands for the others. What has no rows of whole blocks stays float32."""
    kinds = kind if isinstance(kind, dict) else {"": kind}
    metadata, tensors = tiny_qwen3_moe_gguf(kind="f32", **sizes)
    rng = np.random.default_rng(3)
    result = {}
    for name, tensor in tensors.items():
        values = rng.standard_normal(tensor.shape).astype(np.float32)
        values = 1 + values / 10 if "norm" in name else 2.5 * values * np.float32(tensor.shape[-1]) ** -0.5
        part = name.split(".")[-2]
        # A router is quantized only where its kind is named: few files have one.
        plain = len(tensor.shape) == 1 or (part == "ffn_gate_inp" and part not in kinds)
        chosen = "f32" if plain else kinds.get(part, kinds.get("", "f32"))
        if tensor.shape[-1] % BLOCKS[chosen][1]:
            chosen = "f32"
        if chosen not in OWN:
            pytest.importorskip("gguf")
        result[name] = Tensor(tensor.shape, BLOCKS[chosen][0], quantize(chosen, values).tobytes())
    return metadata, result


def tiny(folder: Path, kind: str | dict[str, str] = "q4_k", **sizes: int) -> Path:
    return write(folder / "tiny.gguf", *tiny_tensors(kind, **sizes))
