"""Measures of routing against the definition, written out."""

import numpy as np
import pytest

from edgemoe.profiling.metrics import srp


def brute_force(picks: np.ndarray, num_experts: int, m: int) -> tuple[float, float]:
    """Every rule "active from so many picks in the window on", scored position by position."""
    tokens = len(picks)
    active = np.zeros((tokens, num_experts), dtype=bool)
    for t in range(tokens):
        active[t, picks[t]] = True
    best = (-1.0, 0.0)
    for threshold in range(m + 1):
        hit = called = actual = 0
        for start in range(tokens - m + 1):
            for e in range(num_experts):
                count = int(active[start : start + m, e].sum())
                actual += count
                if count >= threshold:
                    hit += count
                    called += m
        f1 = 2 * hit / max(called + actual, 1)
        if f1 > best[0]:
            best = (f1, called / actual)
    return best


@pytest.mark.parametrize(("experts", "k", "m"), [(6, 2, 4), (8, 3, 16), (5, 1, 1), (4, 2, 7)])
def test_srp_is_the_best_over_all_thresholds(experts: int, k: int, m: int) -> None:
    rng = np.random.default_rng(experts)
    drift = np.cumsum(rng.normal(size=(40, experts)), 0) * 0.5 + rng.normal(size=(40, experts))
    picks = np.argsort(-drift, axis=1)[:, :k]
    assert srp(picks, experts, m) == pytest.approx(brute_force(picks, experts, m))


def test_constant_picks_are_foretold_exactly() -> None:
    picks = np.tile(np.array([[3, 1]]), (32, 1))
    assert srp(picks, 8, 16) == (1.0, 1.0)


def test_more_jumps_mean_a_lower_score() -> None:
    rng = np.random.default_rng(0)
    even = np.argsort(rng.random((400, 32)), axis=1)[:, :4]
    local = np.argsort(rng.random((400, 8)), axis=1)[:, :4] + 8 * (np.arange(400)[:, None] // 100)
    assert srp(even, 32, 16)[0] < 0.35 < srp(local, 32, 16)[0]


@pytest.mark.parametrize("m", [0, 9])
def test_a_window_longer_than_the_text_is_refused(m: int) -> None:
    with pytest.raises(ValueError, match="at least m"):
        srp(np.zeros((8, 1), dtype=np.int64), 4, m)
