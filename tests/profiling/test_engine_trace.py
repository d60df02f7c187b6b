"""Traces that the engine writes while it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgemoe
from edgemoe.convert import convert
from edgemoe.errors import ContextLengthError
from edgemoe.profiling.trace import read_trace


@pytest.fixture
def pack(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> Path:
    convert(tiny_qwen3_moe(num_hidden_layers=3, mlp_only_layers=[1]), tmp_path / "tiny.emoe", 8)
    return tmp_path / "tiny.emoe"


def test_a_trace_holds_the_routing_of_every_computed_token(pack: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 320, 20)
    with edgemoe.load(pack) as model:
        with model.trace(tmp_path / "whole.trace", part="noise"):
            model.logits(tokens)
        with model.trace(tmp_path / "steps.trace"):
            for position in range(20):
                model.next_logits(tokens[: position + 1].tolist())
    whole, steps = read_trace(tmp_path / "whole.trace"), read_trace(tmp_path / "steps.trace")
    assert (whole.experts, whole.top_k, whole.parts) == ((6, 0, 6), (2, 0, 2), ("noise",))
    assert whole.position.tolist() == list(range(20))
    assert whole.weights is not None
    assert whole.predicted is not None
    assert steps.position.tolist() == list(range(20))
    assert np.array_equal(whole.ids, steps.ids)
    pairs = whole.weights.reshape(20, 2, 2).astype(np.float64)
    assert np.allclose(pairs.sum(-1), 1, atol=2e-3)  # renormalized by the model
    assert (pairs[..., 0] >= pairs[..., 1]).all()
    # Nothing looks ahead to the first layer; the last one is predicted from the first.
    assert (whole.predicted[:, :2] == 0xFFFF).all()
    assert (whole.predicted[:, 2:] < 6).all()


def test_passes_of_any_kind_are_traced(pack: Path, tmp_path: Path) -> None:
    with edgemoe.load(pack, parallel=2) as model:
        with model.trace(tmp_path / "all.trace"):
            model.forward([1, 2, 3], [0, 0, 1], [0, 1, 1], [])
            model.logits([4, 5])
            model.next_logits([4, 5, 6])
        with model.trace(tmp_path / "one.trace"):
            model.logits([4, 5])
    trace = read_trace(tmp_path / "all.trace")
    assert trace.position.tolist() == [0, 0, 1, 0, 1, 2]
    np.testing.assert_array_equal(trace.ids[3:5], read_trace(tmp_path / "one.trace").ids)


def test_a_failed_run_leaves_no_trace(pack: Path, tmp_path: Path) -> None:
    with edgemoe.load(pack) as model:
        with pytest.raises(ContextLengthError), model.trace(tmp_path / "broken.trace"):
            model.logits([1] * (model.context + 1))
        assert list(tmp_path.glob("broken*")) == []
        model.logits([1, 2])
