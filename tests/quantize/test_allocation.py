"""Bit allocation: the dynamic programme finds what trying everything finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.quantize.allocation import allocate, super_experts


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[int], int, list[int]]:
    experts, levels = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    errors = draw(
        st.lists(
            st.lists(st.floats(0, 1e6) | st.integers(0, 3).map(float), min_size=levels, max_size=levels),
            min_size=experts,
            max_size=experts,
        )
    )
    sizes = list(itertools.accumulate(draw(st.lists(st.integers(1, 9), min_size=levels, max_size=levels))))
    unit = draw(st.sampled_from([1, 4096]))
    least = draw(st.lists(st.integers(0, levels - 1), min_size=experts, max_size=experts))
    budget = draw(st.integers(0, experts * sizes[-1] * unit + 5))
    return np.array(errors), [size * unit for size in sizes], budget, least


@given(problems())
@settings(max_examples=150, deadline=None)
def test_equals_brute_force(problem: tuple[np.ndarray, list[int], int, list[int]]) -> None:
    errors, sizes, budget, least = problem
    best = None
    for levels in itertools.product(*(range(low, len(sizes)) for low in least)):
        spent = sum(sizes[level] for level in levels)
        if spent <= budget:
            total = sum(errors[expert, level] for expert, level in enumerate(levels))
            best = min(best, total) if best is not None else total
    if best is None:
        with pytest.raises(ValueError, match="at least"):
            allocate(errors, sizes, budget, least)
        return
    chosen = allocate(errors, sizes, budget, least)
    assert sum(sizes[level] for level in chosen) <= budget
    assert all(low <= level for low, level in zip(least, chosen, strict=True))
    found = sum(errors[expert, level] for expert, level in enumerate(chosen))
    assert found == pytest.approx(best, rel=1e-12, abs=1e-9)


def test_of_equal_errors_the_smaller_wins() -> None:
    assert allocate(np.zeros((3, 3)), [2, 3, 4], 12) == [0, 0, 0]


def test_a_real_layer_is_quick_and_fills_its_budget() -> None:
    rng = np.random.default_rng(0)
    errors = np.sort(rng.exponential(size=(128, 3)), axis=1)[:, ::-1]
    sizes = [4096 * n for n in (342, 524, 706)]
    budget = 128 * 4096 * 500
    chosen = allocate(errors, sizes, budget)
    assert budget - 182 * 4096 < sum(sizes[level] for level in chosen) <= budget


def test_super_experts() -> None:
    rng = np.random.default_rng(0)
    peaks = [rng.uniform(0, 5, 128) for _ in range(8)]
    peaks[1][17] = 900.0
    peaks[7][3] = 800.0  # in the last quarter: never one
    assert super_experts([None, *peaks]) == {(2, 17)}
    assert super_experts([None]) == set()
    assert super_experts([np.full(8, 2.0)] * 4) == set()
