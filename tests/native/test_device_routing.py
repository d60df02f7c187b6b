"""A device's choice of experts against the processor's, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from devices import ORDERS, canonical, numbers, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import SPECIAL, floats, same_bytes, seeds

from edgemoe._core import Device, kernels

Array = np.ndarray[Any, np.dtype[Any]]

SCORES = ["softmax", "softmax_topk", "sigmoid", "sparsemixer"]
orders = pytest.mark.parametrize("order", ORDERS)


@dataclass
class Router:
    scores: str
    top_k: int
    groups: int = 1
    groups_kept: int = 1
    group_score: str = "two_largest"
    renormalize: bool = False
    renormalize_least: float = 0.0
    renormalize_epsilon: float = 0.0
    weight_scale: float = 1.0
    mask_threshold: float = 0.02
    selection_bias: Array | None = None
    expert_scale: Array | None = None

    def __post_init__(self) -> None:
        for name in ("renormalize_least", "renormalize_epsilon", "weight_scale", "mask_threshold"):
            setattr(self, name, float(np.float32(getattr(self, name))))

    def shape(self, experts: int) -> bytes:
        return numbers(
            experts,
            self.top_k,
            SCORES.index(self.scores),
            self.groups,
            self.groups_kept,
            ["largest", "two_largest"].index(self.group_score),
            self.renormalize,
            self.renormalize_least,
            self.renormalize_epsilon,
            self.weight_scale,
            self.mask_threshold,
        )


def sort_keys(scores: Array) -> Array:
    return np.where(np.isnan(scores), np.float32(-np.inf), scores)


def largest(scores: Array, count: int) -> list[int]:
    keys = sort_keys(scores)
    return sorted(range(len(keys)), key=lambda number: (-keys[number], number))[:count]


def softmax(x: Array) -> Array:
    return np.asarray(kernels.softmax("scalar", x), np.float32)


def chosen(router: Router, scores: Array) -> tuple[Array, list[int], Array]:
    """CpuBackend::choose for one row: what becomes of the scores, picks and weights."""
    scores = scores.copy()
    if router.scores == "sparsemixer":
        order = largest(scores, router.top_k)
        weights = np.zeros(router.top_k, np.float32)
        for pick in range(router.top_k):
            best = scores[order[pick]]
            magnitude = np.abs(scores)
            distance = (best - scores) / np.where(magnitude < best, best, magnitude)
            choice = np.where(distance > np.float32(router.mask_threshold), np.float32(-np.inf), scores)
            choice[order[:pick]] = -np.inf
            weights[pick] = softmax(choice)[order[pick]]
    else:
        if router.scores == "softmax":
            scores = softmax(scores)
        if router.scores == "sigmoid":
            scores = np.asarray(kernels.sigmoid("scalar", scores), np.float32)
        choice = scores.copy()
        if router.selection_bias is not None:
            choice = np.asarray(kernels.add_scaled("scalar", 1.0, router.selection_bias, choice), np.float32)
        if router.groups > 1:
            parts = sort_keys(choice).reshape(router.groups, -1)
            ordered = -np.sort(-parts, axis=1)
            group_scores = ordered[:, 0]
            if router.group_score == "two_largest":
                second = ordered[:, 1] if ordered.shape[1] > 1 else np.full(router.groups, -np.inf, np.float32)
                group_scores = ordered[:, 0] + second
            kept = largest(group_scores, router.groups_kept)
            choice = np.where(np.isin(np.arange(choice.size) // parts.shape[1], kept), choice, np.float32(-np.inf))
        order = largest(choice, router.top_k)
        weights = scores[order]
        if router.scores == "softmax_topk":
            weights = softmax(weights)
    if router.renormalize:
        total = np.float32(0)
        for weight in weights:
            total += weight
        if total < np.float32(router.renormalize_least):
            total = np.float32(router.renormalize_least)
        total += np.float32(router.renormalize_epsilon)
        weights = weights / total
    weights = weights * np.float32(router.weight_scale)
    if router.expert_scale is not None:
        weights = weights * router.expert_scale[order]
    return scores, order, canonical(weights)


def check_choice(order: str, seed: int, router: Router, scores: Array) -> None:
    rows, experts = scores.shape
    with np.errstate(all="ignore"):
        expected = [chosen(router, row) for row in scores]
    picks = np.full((rows, router.top_k), -1, np.int32)
    weights = np.zeros((rows, router.top_k), np.float32)
    room = [np.zeros((rows, experts), np.float32), np.zeros((rows, experts), np.int32)]
    for wanted in (True, False):  # a layer that is looked ahead at wants no weights
        results = run(
            Device("emulated", order=order, seed=seed),
            "choose",
            rows,
            scores,
            router.selection_bias,
            router.expert_scale,
            picks,
            weights if wanted else None,
            *room,
            router.shape(experts),
        )
        same_bytes(np.array([row[1] for row in expected], np.int32), results[-4 if wanted else -3])
        if wanted:
            same_bytes(np.array([row[2] for row in expected], np.float32), results[-3])
            same_bytes(np.array([row[0] for row in expected], np.float32), results[0])


def some_scores(rng: np.random.Generator, kind: str, rows: int, experts: int) -> Array:
    if kind == "wild":
        return canonical(floats(rng, rows, experts, wild=True))
    scores = floats(rng, rows, experts)
    if kind == "ties":
        scores = np.rint(scores)
    if kind == "special":
        places = rng.integers(0, scores.size, max(1, scores.size // 4))
        scores.reshape(-1)[places] = rng.choice(SPECIAL, places.size)
    return scores


@orders
@pytest.mark.parametrize("scores", SCORES)
@settings(max_examples=20, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(1, 4),
    experts=st.integers(1, 150),
    top_k=st.integers(1, 40),
    kind=st.sampled_from(["plain", "ties", "special", "wild"]),
    renormalize=st.booleans(),
    least=st.sampled_from([0.0, 0.3]),
    epsilon=st.sampled_from([0.0, 1e-20, 0.1]),
    biased=st.booleans(),
    scaled=st.booleans(),
)
def test_choice(
    order: str,
    scores: str,
    seed: int,
    rows: int,
    experts: int,
    top_k: int,
    kind: str,
    renormalize: bool,
    least: float,
    epsilon: float,
    biased: bool,
    scaled: bool,
) -> None:
    rng = np.random.default_rng(seed)
    router = Router(
        scores,
        min(top_k, experts),
        renormalize=renormalize,
        renormalize_least=least,
        renormalize_epsilon=epsilon,
        weight_scale=float(rng.choice([1.0, 2.5])),
        mask_threshold=float(rng.choice([0.02, 1.0])),
        selection_bias=floats(rng, experts, wild=kind == "wild") if biased and scores != "sparsemixer" else None,
        expert_scale=floats(rng, experts, wild=kind == "wild") if scaled else None,
    )
    check_choice(order, seed, router, some_scores(rng, kind, rows, experts))


@orders
@pytest.mark.parametrize("group_score", ["largest", "two_largest"])
@settings(max_examples=20, deadline=None)
@given(
    seed=seeds,
    groups=st.integers(2, 40),
    size=st.integers(1, 9),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    kind=st.sampled_from(["plain", "ties", "special", "wild"]),
    biased=st.booleans(),
)
def test_groups_of_experts(
    order: str, group_score: str, seed: int, groups: int, size: int, scores: str, kind: str, biased: bool
) -> None:
    rng = np.random.default_rng(seed)
    kept = int(rng.integers(1, groups + 1))
    router = Router(
        scores,
        int(rng.integers(1, kept * size + 1)),
        groups=groups,
        groups_kept=kept,
        group_score=group_score,
        renormalize=True,
        renormalize_epsilon=1e-20,
        weight_scale=2.5,
        selection_bias=floats(rng, groups * size, wild=kind == "wild") if biased else None,
    )
    check_choice(order, seed, router, some_scores(rng, kind, 2, groups * size))


@orders
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("top_k", [1, 10])
def test_many_experts(order: str, scores: str, top_k: int) -> None:
    rng = np.random.default_rng(5)
    check_choice(order, 5, Router(scores, top_k, renormalize=top_k > 1), some_scores(rng, "plain", 2, 513))
