"""A model run layer by layer computes what it computes otherwise, and says what its experts saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf_writer import tiny_qwen3_moe_gguf, write

import edgemoe
from edgemoe.convert import convert
from edgemoe.errors import MemoryBudgetError
from edgemoe.quantize.calibration import Statistics
from edgemoe.quantize.layerwise import LayerwiseModel, original_index
from edgemoe.source import SourceModel

Make = Callable[..., Path]
WINDOW = 24
POSITIONS = np.arange(5, WINDOW, 2, dtype=np.int32)


def run(path: Path, work: Path, observe: Any = None, memory: int = 10**8) -> tuple[npt.NDArray[Any], list[Any]]:
    spec = SourceModel.open(path).spec
    tokens = np.random.default_rng(0).integers(0, 260, (3, WINDOW)).astype(np.int32)
    model = LayerwiseModel(original_index(path, work), WINDOW, threads=2, memory=memory, work=work)
    residual = np.zeros((3, WINDOW, spec.hidden_size), np.float32)
    logits: list[Any] = []
    for layer in range(len(spec.layers)):
        watch = None if observe is None else lambda place, seen, layer=layer: observe(layer, place, seen)
        logits += model.run(layer, tokens, residual, watch, POSITIONS, 1)
    return tokens, logits


@pytest.mark.parametrize("options", [{"dtype": "BF16"}, {"dtype": "F32", "shards": 2}, {"tie_word_embeddings": True}])
def test_logits_are_the_whole_model_s(tiny_qwen3_moe: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_qwen3_moe(**options)
    convert(folder, tmp_path / "a.emoe", 32, 32)
    tokens, logits = run(folder, tmp_path)
    assert len(logits) == 2  # the first window's are not asked for
    with edgemoe.load(tmp_path / "a.emoe") as model:
        for window, found in zip(tokens[1:], logits, strict=True):
            np.testing.assert_array_equal(found, model.logits(window)[POSITIONS])


def test_a_gguf_file_runs_where_it_lies(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", *tiny_qwen3_moe_gguf())
    tokens, logits = run(path, tmp_path)
    with edgemoe.load(path) as model:
        np.testing.assert_array_equal(logits[0], model.logits(tokens[1])[POSITIONS])


def test_a_layer_says_what_its_experts_saw(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    folder = tiny_qwen3_moe(dtype="F32")
    source = SourceModel.open(folder)
    layer = source.spec.layers[1]
    kept = Statistics.empty(layer, source.spec.hidden_size, 2 * WINDOW, tmp_path)

    def observe(number: int, place: slice, seen: Mapping[str, npt.NDArray[Any]]) -> None:
        if number == 1:
            kept.observe(place, seen)

    run(folder, tmp_path, observe)
    assert (np.diff(kept.weights, axis=1) <= 0).all()
    np.testing.assert_allclose(kept.weights.sum(axis=1), 1, rtol=1e-5)
    picked = [np.flatnonzero(kept.picks == expert).size for expert in range(layer.experts)]
    assert sum(picked) == kept.picks.size
    expert = int(np.argmax(picked))
    seen = kept.expert(expert)
    matrices = {}
    for part in ("gate", "up", "down"):
        tensor = source.sources[f"layers.1.experts.{expert}.{part}"]
        matrices[part] = source.folder.read(tensor.name, tensor.rows, tensor.index).astype(np.float64)
    inputs = kept.inputs[seen.tokens].astype(np.float64)
    gate = inputs @ matrices["gate"].T
    hidden = gate / (1 + np.exp(-gate)) * (inputs @ matrices["up"].T)
    outputs = hidden @ matrices["down"].T
    np.testing.assert_allclose(kept.hidden[seen.tokens, seen.picks], hidden, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(seen.peak, np.abs(outputs).max(), rtol=1e-3)
    weights = seen.weights
    energy = (weights**2 * (outputs**2).sum(axis=1)).sum()
    np.testing.assert_allclose(seen.output_energy, energy, rtol=1e-3)
    np.testing.assert_allclose(seen.effective_tokens, weights.sum() ** 2 / (weights**2).sum())
    expected = (inputs * weights[:, None]).T @ inputs / weights.sum()
    np.testing.assert_allclose(seen.hessian("inputs"), expected, rtol=1e-3, atol=1e-5)
    mean = kept.all_experts().hessian("inputs")
    share = seen.effective_tokens / (seen.effective_tokens + 0.1 * len(mean))
    mixed = seen.mixed_hessian("inputs", mean)
    np.testing.assert_allclose(mixed, share * expected + (1 - share) * mean, rtol=1e-3, atol=1e-5)


def test_an_unused_expert_has_the_layer_s_hessian(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    layer = SourceModel.open(tiny_qwen3_moe()).spec.layers[0]
    kept = Statistics.empty(layer, 72, 4, tmp_path)
    kept.picks[:] = [0, 1]
    mean = np.eye(72, dtype=np.float32)
    np.testing.assert_array_equal(kept.expert(5).mixed_hessian("inputs", mean), mean)
    assert kept.expert(5).output_energy == kept.expert(5).peak == 0


def test_too_little_memory_is_refused(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    with pytest.raises(MemoryBudgetError, match=r"layer 0 takes .* to run"):
        run(tiny_qwen3_moe(), tmp_path, memory=10**4)
