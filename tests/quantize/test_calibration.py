"""Hessians of what an expert saw."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.quantize import calibration
from edgemoe.quantize.calibration import Statistics


@pytest.fixture
def seen() -> Statistics:
    """Of 20 tokens, each of which chose 2 of 4 experts."""
    rng = np.random.default_rng(0)
    return Statistics(
        rng.standard_normal((20, 8)).astype(np.float32),
        rng.standard_normal((20, 2, 5)).astype(np.float32),
        np.array([rng.permutation(4)[:2] for _ in range(20)], np.int32),
        rng.random((20, 2)).astype(np.float32),
        *np.ones((2, 20, 2), np.float32),
    )


@pytest.mark.parametrize("number", [1, None])
def test_hessians_are_means_over_the_router_s_weights(
    seen: Statistics, number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_TOKENS", 3)
    expected = {"inputs": np.zeros((8, 8)), "hidden": np.zeros((5, 5))}
    total = 0.0
    for token in range(20):
        for slot in range(2):
            if number is None or seen.picks[token, slot] == number:
                weight = float(seen.weights[token, slot])
                total += weight
                for part, values in (("inputs", seen.inputs[token]), ("hidden", seen.hidden[token, slot])):
                    expected[part] += weight * np.outer(values, values)
    expert = seen.all_experts() if number is None else seen.expert(number)
    for part, sums in expected.items():
        np.testing.assert_allclose(expert.hessian(part), sums / total, rtol=1e-4, atol=1e-6)


def test_an_expert_of_no_weight_has_no_hessian(seen: Statistics) -> None:
    seen.weights[:] = 0
    for part in ("inputs", "hidden"):
        assert not seen.all_experts().hessian(part).any()
