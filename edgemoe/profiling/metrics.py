"""Measures of how a model routes its tokens.

Picks are expert ids ``[tokens, k]`` of one layer and one text, in the order of the text, each row by descending score,
no id twice in a row.

A cache hit is counted as in the code of arXiv 2505.16056: all picks of a token are judged against what the cache held
before the token, and the first pick of an expert is a hit as long as fewer experts have been picked before than the
cache has slots (a free slot costs nothing), so that a cache of all experts hits always. Then the picks are used one
after another in the order of the row, each missing one taking the place of the expert that the policy gives up.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

# What hit_rates knows. Policies that look ahead: sch_future, belady.
POLICIES = ("lru", "lfu", "least_stale", "sch_future", "belady")

Picks = NDArray[np.integer]


def srp(picks: Picks, num_experts: int, m: int) -> tuple[float, float]:
    """Segment routing best performance, the local routing consistency of arXiv 2505.16056 (section 3).

    The best F1 score with which the picks in windows of ``m`` consecutive tokens can be told by a rule that knows, for
    every window, only how often each expert is picked in it and calls the expert active for all of the window or for
    none of it. The counts of all overlapping windows and all experts are pooled before the best threshold is taken.

    Args:
        picks: expert ids ``[tokens, k]`` of one layer, in the order of the text, no id twice in a row.
        num_experts: number of experts of the layer.
        m: tokens in a window, at least 1 and at most ``tokens``.

    Returns:
        ``(srp, rho)``: the best F1 score in 0..1, and ``P / N`` at its threshold: pairs of a token and an expert called
        active over pairs that are (the size of the cache that the rule asks for, in units of ``k``).
    """
    tokens = len(picks)
    if picks.ndim != 2 or not 1 <= m <= tokens:
        raise ValueError(f"picks must be [tokens, k] with at least m = {m} tokens, not {picks.shape}")
    total = np.zeros((tokens + 1, num_experts), dtype=np.int64)
    np.put_along_axis(total[1:], np.asarray(picks, dtype=np.int64), 1, axis=1)
    np.cumsum(total, axis=0, out=total)
    windows = np.bincount((total[m:] - total[:-m]).ravel(), minlength=m + 1)
    score, rho = srp_of_counts(windows)
    return float(score), float(rho)


def srp_of_counts(windows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """SRP and rho from ``windows [..., m + 1]``: pairs of a window and an expert in which it is picked 0..m times.

    Counts may be added over experts, layers and texts before: that is how a group's score is defined.
    """
    m = windows.shape[-1] - 1
    true_positives = np.cumsum((np.arange(m + 1) * windows)[..., ::-1], axis=-1)[..., ::-1]
    predicted = m * np.cumsum(windows[..., ::-1], axis=-1)[..., ::-1]
    positives = true_positives[..., :1]
    f1 = 2 * true_positives / np.maximum(predicted + positives, 1)
    best = f1.argmax(axis=-1, keepdims=True)
    rho = np.take_along_axis(predicted, best, axis=-1) / np.maximum(positives, 1)
    return np.take_along_axis(f1, best, axis=-1)[..., 0], rho[..., 0]


def sch_fixed(picks: Picks, num_experts: int, m: int) -> NDArray[np.float64]:
    """Segment cache hit rate with a fixed set per segment (the first version of arXiv 2505.16056).

    For every window of ``m`` consecutive tokens the experts picked most often in it are kept, chosen with hindsight.

    Returns:
        ``[num_experts]``: entry ``c - 1`` is the share of the picks in all overlapping windows that ``c`` kept experts
        serve.
    """
    from edgemoe._core import profiling

    rows = _rows(picks)
    tokens, k = rows.shape
    if not 1 <= m <= tokens:
        raise ValueError(f"picks must be [tokens, k] with at least m = {m} tokens, not {picks.shape}")
    caught: NDArray[np.int64] = profiling.fixed(rows, num_experts, m)
    rates: NDArray[np.float64] = caught / ((tokens - m + 1) * m * k)
    return rates


def sch_future(picks: Picks, num_experts: int, m: int) -> NDArray[np.float64]:
    """Segment cache hit rate of a cache that knows the next tokens (arXiv 2505.16056): see ``hit_rates``."""
    return hit_rates(picks, num_experts, "sch_future", m)


def hit_rates(picks: Picks, num_experts: int, policy: str, m: int | None = None) -> NDArray[np.float64]:
    """Hit rates of caches of 1..num_experts slots that start empty and serve the picks of one layer.

    policy: which expert is given up for a missing one. Never the one just used; among the others
        "lru": the least recently used.
        "lfu": the one picked least often so far (since the start, in the cache or not), then the least recently used.
        "least_stale": one that the current forward pass (the token) has not touched before one that it has, then the
            least recently used. What a pass has touched is by definition more recently used than what it has not, so
            in one layer, and wherever a pass touches an expert once, this is LRU to the last hit.
        "sch_future": the one that the ``m`` tokens from the current one on pick least often (picks already served not
            counted), then the least recently used.
        "belady": the one whose next use is farthest away: the optimum for picks that come one by one (k = 1). As a
            row is judged at once, a policy that drops what the same token still needs can come out slightly ahead.
    m: tokens that "sch_future" looks at, the current one included, at least 1.

    Returns:
        ``[num_experts]``: entry ``c - 1`` is the hit rate with ``c`` slots; the last one is 1.
    """
    from edgemoe._core import profiling

    rows = _rows(picks)
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    if policy == "sch_future" and (m is None or m < 1):
        raise ValueError(f"sch_future needs the number of tokens m it looks at, at least 1, not {m}")
    window = min(m, len(rows) + 1) if m is not None and policy == "sch_future" else 0
    hits: NDArray[np.int64] = profiling.hits(rows, num_experts, policy, window)
    return hits / rows.size


def affinity(picks: Picks, num_experts: int, next_picks: Picks, next_num_experts: int) -> NDArray[np.float64]:
    """Inter-layer affinity (ExFlow): ``[num_experts, next_num_experts]``, P(next layer picks e' | this layer picks e).

    Both ``[tokens, k]`` of the same tokens. A row sums to the next layer's ``k``, or to 0 where e is never picked.
    """
    if len(picks) != len(next_picks):
        raise ValueError(f"picks of {len(picks)} and of {len(next_picks)} tokens are not of the same tokens")
    together = np.zeros(num_experts * next_num_experts, dtype=np.int64)
    for slot in range(picks.shape[1]):
        pairs = picks[:, slot, None].astype(np.int64) * next_num_experts + next_picks
        together += np.bincount(pairs.ravel(), minlength=len(together))
    counts = np.bincount(np.asarray(picks).ravel(), minlength=num_experts)
    return together.reshape(num_experts, next_num_experts) / np.maximum(counts, 1)[:, None]


def recall(picks: Picks, predicted: Picks) -> float:
    """Share of the picks ``[tokens, k]`` that are among the predicted ids ``[tokens, any]`` of the same token."""
    if len(picks) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(picks)} tokens")
    found = np.zeros(picks.shape, dtype=bool)
    for column in np.asarray(predicted).T:
        found |= picks == column[:, None]
    return float(found.mean()) if found.size else 0.0


def repetition(picks: Picks) -> float:
    """Share of the picks that the token before picked too; the first token does not count."""
    return recall(picks[1:], picks[:-1]) if len(picks) > 1 else 0.0


def bootstrap_interval(
    numerators: NDArray[np.number],
    denominators: NDArray[np.number],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Basic bootstrap interval of ``sum(numerators) / sum(denominators)`` over sequences.

    ``numerators [sequences, ...]``, ``denominators [sequences]``. Returns (low, high), each ``[...]``. A basic interval
    is twice the estimate less the quantiles, and may leave 0..1.
    """
    weights = bootstrap_weights(len(numerators), resamples, seed)
    flat = np.asarray(numerators, dtype=np.float64).reshape(len(numerators), -1)
    estimate = flat.sum(axis=0) / max(float(denominators.sum()), 1.0)
    values = (weights @ flat) / np.maximum(weights @ np.asarray(denominators, np.float64), 1.0)[:, None]
    low, high = _basic(estimate, values, confidence)
    return low.reshape(numerators.shape[1:]), high.reshape(numerators.shape[1:])


def bootstrap_srp(
    windows: NDArray[np.int64], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Basic bootstrap interval of SRP over sequences; ``windows [sequences, ..., m + 1]`` as in ``srp_of_counts``."""
    weights = bootstrap_weights(len(windows), resamples, seed)
    estimate, _ = srp_of_counts(windows.sum(axis=0))
    drawn = weights @ windows.reshape(len(windows), -1).astype(np.float64)
    values, _ = srp_of_counts(drawn.reshape(resamples, *windows.shape[1:]).round().astype(np.int64))
    return _basic(estimate, values, confidence)


def bootstrap_weights(sequences: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """``[resamples, sequences]``: how often each sequence is drawn when as many are drawn as there are."""
    if sequences < 1 or resamples < 1:
        raise ValueError(f"{resamples} resamples of {sequences} sequences")
    rng = np.random.default_rng(seed)
    return rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=resamples).astype(np.float64)


def _basic(
    estimate: NDArray[np.float64], values: NDArray[np.float64], confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ordered = np.sort(values, axis=0)
    low = round(len(ordered) * (1 - confidence) / 2)
    high = min(len(ordered) - low, len(ordered) - 1)
    return 2 * estimate - ordered[high], 2 * estimate - ordered[low]


def _rows(picks: Picks) -> NDArray[np.uint16]:
    """As uint8 or uint16, which the core takes both."""
    rows = np.asarray(picks)
    if rows.ndim != 2 or rows.size == 0 or rows.dtype.kind not in "iu":
        raise ValueError(f"picks must be integers [tokens, k], not {rows.dtype} {rows.shape}")
    if rows.dtype.itemsize > 2 or rows.dtype.kind == "i":
        if int(rows.min()) < 0 or int(rows.max()) > 0xFFFF:
            raise ValueError(f"picks have expert {int(rows.min() if rows.min() < 0 else rows.max())}")
        rows = rows.astype(np.uint16)
    return cast(NDArray[np.uint16], rows)
