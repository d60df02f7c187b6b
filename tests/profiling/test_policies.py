"""Segment and cache measures against simulations written from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemoe.profiling.metrics import POLICIES, affinity, hit_rates, recall, repetition, sch_fixed, srp

Picks = NDArray[np.int64]


def random_picks(rng: np.random.Generator) -> tuple[Picks, int]:
    """Picks of random size: from even to very local, and with few or many experts."""
    experts = int(rng.integers(1, 14))
    k = int(rng.integers(1, experts + 1))
    tokens = int(rng.integers(1, 40))
    drift = np.cumsum(rng.normal(size=(tokens, experts)), 0) * rng.choice([0, 0.3, 1]) + rng.normal(
        size=(tokens, experts)
    )
    return np.argsort(-drift, axis=1)[:, :k], experts


def hits_by_definition(picks: Picks, slots: int, policy: str, m: int) -> int:
    """One cache of so many slots, token by token."""
    tokens = [[int(expert) for expert in row] for row in picks]
    cached: set[int] = set()
    seen: set[int] = set()
    last_use: dict[int, int] = {}
    count: dict[int, int] = {}
    clock = hits = 0
    for i, row in enumerate(tokens):
        for expert in row:
            if expert in seen:
                hits += expert in cached
            else:
                hits += len(seen) < slots
                seen.add(expert)
        for position, expert in enumerate(row):
            pending = row[position + 1 :]

            def value(y: int, i: int = i, row: list[int] = row, pending: list[int] = pending) -> tuple[int, int]:
                """What the policy would lose with y; the least goes."""
                if policy == "lru":
                    return 0, last_use[y]
                if policy == "lfu":
                    return count[y], last_use[y]
                if policy == "least_stale":
                    return int(y in row and y not in pending), last_use[y]
                if policy == "sch_future":
                    return sum(y in later for later in tokens[i + 1 : i + m]) + (y in pending), last_use[y]
                for distance, later in enumerate([pending, *tokens[i + 1 :]]):
                    if y in later:
                        return -distance, -later.index(y)
                return -len(tokens) - 1, 0

            if expert not in cached:
                if len(cached) == slots:
                    cached.remove(min(cached, key=value))
                cached.add(expert)
            clock += 1
            last_use[expert] = clock
            count[expert] = count.get(expert, 0) + 1
    return hits


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(60))
def test_hits_are_those_of_a_plain_simulation(policy: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    picks, experts = random_picks(rng)
    m = int(rng.integers(1, 20))
    rates = hit_rates(picks, experts, policy, m)
    assert rates.shape == (experts,)
    expected = [hits_by_definition(picks, slots, policy, m) / picks.size for slots in range(1, experts + 1)]
    assert rates.tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_long_sequences_and_many_experts(policy: str) -> None:
    # Long enough for wide keys, for a used-up time axis and for blocks that end inside the stack.
    rng = np.random.default_rng(7)
    drift = np.cumsum(rng.normal(size=(700, 90)), 0) * 0.2 + rng.normal(size=(700, 90))
    picks = np.argsort(-drift, axis=1)[:, :80]
    rates = hit_rates(picks, 90, policy, 9)
    for slots in (1, 79, 81, 90):
        assert rates[slots - 1] == hits_by_definition(picks, slots, policy, 9) / picks.size


@pytest.mark.parametrize("seed", range(100))
def test_fixed_sets_are_the_best_of_each_window(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    picks, experts = random_picks(rng)
    m = int(rng.integers(1, len(picks) + 1))
    caught = np.zeros(experts, dtype=np.int64)
    for start in range(len(picks) - m + 1):
        counts = np.bincount(picks[start : start + m].ravel(), minlength=experts)
        caught += np.cumsum(np.sort(counts)[::-1])
    total = (len(picks) - m + 1) * m * picks.shape[1]
    assert sch_fixed(picks, experts, m).tolist() == (caught / total).tolist()


@pytest.mark.parametrize("seed", range(100))
def test_srp_is_the_best_threshold(seed: int) -> None:
    rng = np.random.default_rng(2000 + seed)
    picks, experts = random_picks(rng)
    m = int(rng.integers(1, len(picks) + 1))
    active = np.zeros((len(picks), experts), dtype=bool)
    np.put_along_axis(active, picks, True, axis=1)
    counts = np.array([active[start : start + m].sum(axis=0) for start in range(len(picks) - m + 1)])
    best, rho = -1.0, 0.0
    for threshold in range(m + 1):
        called = counts >= threshold
        f1 = 2 * counts[called].sum() / max(m * called.sum() + counts.sum(), 1)
        if f1 > best:
            best, rho = f1, m * called.sum() / counts.sum()
    assert srp(picks, experts, m) == (best, rho)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_expert_and_all_experts(policy: str) -> None:
    one = np.zeros((5, 1), dtype=np.uint16)
    assert hit_rates(one, 1, policy, 4).tolist() == [1.0]
    everyone = np.tile(np.arange(6), (5, 1))
    rates = hit_rates(everyone, 6, policy, 4)
    assert rates[-1] == 1.0
    assert (np.diff(rates) >= 0).all()
    assert sch_fixed(everyone, 6, 5)[-1] == 1.0
    assert srp(everyone, 6, 5) == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_order_of_the_policies(seed: int) -> None:
    """More slots never hurt, nothing beats Belady one by one, and what a pass has touched is what it used last."""
    picks, experts = random_picks(np.random.default_rng(3000 + seed))
    best = hit_rates(picks[:, :1], experts, "belady")
    for policy in POLICIES:
        assert (np.diff(hit_rates(picks, experts, policy, 8)) >= 0).all()
        assert (hit_rates(picks[:, :1], experts, policy, 8) <= best).all()
    assert (hit_rates(picks, experts, "least_stale") == hit_rates(picks, experts, "lru")).all()


def test_id_types_and_views_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    picks = np.argsort(rng.random((60, 20)), axis=1)[:, :3]
    expected = hit_rates(picks, 20, "lru").tolist()
    wide = np.zeros((60, 2, 3), dtype=np.uint16)
    wide[:, 1] = picks
    for same in (picks.astype(np.uint8), picks.astype(np.uint16), np.asfortranarray(picks), wide[:, 1]):
        assert hit_rates(same, 20, "lru").tolist() == expected


@pytest.mark.parametrize(
    ("picks", "experts", "words"),
    [
        (np.array([[0, 5]]), 5, "expert 5, but there are 5"),
        (np.array([[0, 1], [2, 2]]), 5, "token 1 has expert 2 twice"),
        (np.array([[0, -1]]), 5, "expert -1"),
        (np.array([0, 1]), 5, "tokens, k"),
        (np.zeros((0, 2), dtype=np.int64), 5, "tokens, k"),
        (np.zeros((3, 1)), 5, "float64"),
    ],
)
def test_picks_that_are_none_are_refused(picks: Picks, experts: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hit_rates(picks, experts, "lru")


def test_wrong_arguments_are_refused() -> None:
    picks = np.zeros((4, 1), dtype=np.uint16)
    with pytest.raises(ValueError, match="fifo"):
        hit_rates(picks, 2, "fifo")
    with pytest.raises(ValueError, match="m it looks at"):
        hit_rates(picks, 2, "sch_future")
    with pytest.raises(ValueError, match="at least m = 5"):
        sch_fixed(picks, 2, 5)


def test_a_window_beyond_the_text_sees_all_of_it() -> None:
    picks, experts = random_picks(np.random.default_rng(11))
    far = hit_rates(picks, experts, "sch_future", 10**9)
    assert far.tolist() == hit_rates(picks, experts, "sch_future", len(picks)).tolist()


def test_affinity_counts_pairs() -> None:
    here, following = np.array([[0, 1], [0, 2]]), np.array([[3], [1]])
    table = affinity(here, 3, following, 4)
    assert table.tolist() == [[0, 0.5, 0, 0.5], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert recall(np.array([[0, 1], [2, 3]]), np.array([[1, 7, 0], [4, 5, 3]])) == 0.75
    assert repetition(np.array([[0, 1], [1, 2], [3, 1]])) == 0.5
