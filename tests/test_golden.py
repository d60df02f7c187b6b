"""Digests of logits that are the same on every machine, with every instruction set and C library.

A change that is meant to change logits changes the digests below; `native/tests/golden.cpp` has more models, and runs
where Python does not come along.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from helpers import TINY_QWEN3_MOE, byte_level_tokenizer, tiny_weights, write_safetensors, write_tiny_qwen3_moe

import edgemoe
from edgemoe import _core
from edgemoe.convert import convert
from edgemoe.model_files import bundled_model

ISAS = _core.kernels.available_isas()
BUNDLED = {
    "f16": "96e647127d8e650a",
    "f32": "e0febe101d737a48",
    "q8_0": "5aa6f472e2e2456e",
}
TINY = "7e1b8eaa26d02e26"


def numbers(count: int, seed: int = 1) -> npt.NDArray[np.uint32]:
    """The upper halves of Knuth's linear congruential generator: integers that no library can change."""
    values, state = np.empty(count, np.uint32), seed
    for i in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values[i] = state >> 32
    return values


def digest(model: edgemoe.Model, count: int) -> str:
    tokens = (numbers(count) % model.spec.vocab_size).astype(np.int32)
    return hashlib.sha256(model.logits(tokens).tobytes()).hexdigest()[:16]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", BUNDLED)
def test_the_bundled_model(state: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa == "scalar" and state != "f16" and len(ISAS) > 1:
        pytest.skip("scalar takes seconds for each")
    monkeypatch.setenv("EDGEMOE_ISA", isa)
    with edgemoe.load(bundled_model(), cache_type_k=state, cache_type_v=state) as model:
        assert digest(model, 70) == BUNDLED[state]


@pytest.mark.parametrize("isa", ISAS)
def test_a_model_made_of_integers(tmp_path: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_qwen3_moe(tmp_path / "hf", dtype="F32", tokenizer=byte_level_tokenizer())
    tensors = {}
    for seed, (name, values) in enumerate(sorted(tiny_weights(TINY_QWEN3_MOE).items())):
        whole = (numbers(values.size, seed + 2) >> 16).astype(np.float32).reshape(values.shape) / np.float32(32768) - 1
        tensors[name] = 1 + whole / 8 if name.endswith("norm.weight") else whole / 4
    write_safetensors(folder / "model.safetensors", tensors, dict.fromkeys(tensors, "F32"))
    convert(folder, tmp_path / "model.emoe", 32)
    monkeypatch.setenv("EDGEMOE_ISA", isa)
    with edgemoe.load(tmp_path / "model.emoe") as model:
        assert digest(model, 200) == TINY
