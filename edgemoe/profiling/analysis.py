"""What a trace says about a model: does it suit offloading, and what would caches of several sizes do?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.processors import usable_processors
from edgemoe.profiling.metrics import affinity, bootstrap_interval, bootstrap_srp, recall, repetition, srp_of_counts
from edgemoe.profiling.simulate import simulate_engine
from edgemoe.profiling.trace import Trace

LENGTHS = (4, 16, 64, 256)  # tokens of a segment
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0)  # cache sizes, in units of the experts that work on one token
POLICIES = ("lru", "lfu", "belady")
BUDGETS = 16  # cache sizes that the engine's store is simulated at

_SAMPLE_EVERY = 16  # texts that look-ahead caches and confidence intervals are computed on, as in the paper
_ENGINE_PICKS = 8_000_000  # picks that the engine's store is simulated with
_PART_LIMIT = 16  # kinds of text that are told apart
_GROUP = 8  # texts of a task over all layers
_SHARED_TEXTS = 4  # texts of a kind that look-ahead caches over all layers are computed on: their stacks are deep

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Scores:
    """Segment measures of a group of layers (or one) at one segment length.

    srp, rho: segment routing best performance, and the cache it asks for in units of k. sch_fixed, sch_future: segment
    cache hit rates at RATIOS. Intervals are (low, high), None where there are fewer than two texts to draw from.
    """

    length: int
    srp: float
    rho: float
    srp_interval: tuple[float, float] | None
    sch_fixed: list[float]
    sch_future: list[float]
    sch_future_interval: list[tuple[float, float]] | None


@dataclass(slots=True)
class LayerReport:
    """One layer. hit_rates: policy -> [experts], of caches of 1.. slots. load: share of tokens that pick each expert.

    expert_srp: [experts] at the middle segment length. repetition: picks that the token before picked too.
    next_layer: picks that the picks of the layer before foretell (from a table made of other texts), None for the first
    one. predicted: picks that the trace's own predictions foretold.
    """

    layer: int
    experts: int
    k: int
    scores: list[Scores]
    hit_rates: dict[str, list[float]]
    load: list[float]
    expert_srp: list[float]
    repetition: float
    next_layer: float | None
    predicted: float | None


@dataclass(slots=True)
class PartReport:
    """One kind of text: SRP by segment length, LRU hit rate per layer at RATIOS (means over layers)."""

    name: str
    tokens: int
    srp: dict[int, float]
    lru: list[float]


@dataclass(slots=True)
class Profile:
    """Everything that `profile` found; plain values, for JSON.

    shared: policy -> [[slots, hit rate], ...] of one cache for all layers, by the accounting of the paper (every text
    starts with an empty cache). sampled: texts that look-ahead figures and intervals come from.
    engine: the engine's own counters for several numbers of slots, over the first engine_tokens tokens.
    distances: [part, part], how differently two kinds of text use the experts, 0..1 (total variation, mean of layers).
    """

    model: str
    source: str
    tokens: int
    texts: int
    sampled: int
    experts: list[int]
    top_k: list[int]
    scores: list[Scores]
    layers: list[LayerReport]
    shared: dict[str, list[list[float]]]
    engine_tokens: int
    engine: list[dict[str, float]]
    parts: list[PartReport]
    distances: list[list[float]]
    expert_bytes: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def total_experts(self) -> int:
        return sum(self.experts)

    @property
    def active_experts(self) -> int:
        return sum(self.top_k)

    def mean_rate(self, policy: str, ratio: float) -> float:
        """Hit rate of a cache per layer of `ratio` times the layer's k, mean over layers weighted by their picks."""
        rates = [layer.hit_rates[policy][slots_at(ratio, layer.k, layer.experts) - 1] for layer in self.layers]
        return float(np.average(rates, weights=[layer.k for layer in self.layers]))

    def shared_rate(self, policy: str, slots: float) -> float:
        """Hit rate of one cache for all layers, between the sizes that were computed."""
        points = np.asarray(self.shared[policy])
        return float(np.interp(slots, points[:, 0], points[:, 1]))


def slots_at(ratio: float, k: int, experts: int) -> int:
    return max(1, min(round(ratio * k), experts))


def profile(
    trace: Trace,
    *,
    expert_bytes: int | None = None,
    threads: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    resamples: int = 1000,
    progress: Progress | None = None,
) -> Profile:
    """Computes all measures of a trace. expert_bytes: size of one stored expert, where it is known.

    With 64 texts or more of a kind, look-ahead caches and confidence intervals come from every 16th text; otherwise
    from all of them.
    """
    notes: list[str] = []
    trace = _by_part(trace, notes)
    layers = trace.layers
    longest = int(np.diff(trace.starts).max())
    used = [m for m in lengths if m <= longest]
    if not used:
        raise ValueError(f"{trace.model}: the longest text has {longest} tokens, fewer than any segment")
    if len(used) < len(lengths):
        notes.append(f"No text is longer than {longest} tokens: longer segments are left out.")
    spans = _part_spans(trace)
    every = [_SAMPLE_EVERY if len(starts) > 4 * _SAMPLE_EVERY else 1 for _, _, starts in spans]

    threads = threads or usable_processors()
    with _Tasks(threads, progress) as tasks:
        by_layer = [
            [
                tasks.add(_curves, trace, layer, begin, end, starts, used, step)
                for (begin, end, starts), step in zip(spans, every, strict=True)
            ]
            for layer in layers
        ]
        shared_tasks = _shared_tasks(tasks, trace, spans, every, used, notes)
        found = [[task.result() for task in row] for row in tasks.finish(by_layer)]
        shared_found = [task.result() for task in tasks.finish([shared_tasks])[0]]

    sampled = sum(len(range(0, len(starts) - 1, step)) for (_, _, starts), step in zip(spans, every, strict=True))
    reports: list[LayerReport] = []
    model_counts: dict[int, Any] = dict.fromkeys(used, 0)
    model_sampled: dict[int, Any] = dict.fromkeys(used, 0)
    halves = _halves(trace, spans, every)
    for number, (layer, results) in enumerate(zip(layers, found, strict=True)):
        merged = _merge(results, used)
        for m in used:
            model_counts[m] = model_counts[m] + merged["windows"][m]["counts"].sum(axis=0)
            model_sampled[m] = model_sampled[m] + merged["windows"][m]["sampled_totals"]
        before = layers[number - 1] if number else None
        reports.append(_layer_report(trace, layer, before, merged, used, resamples, halves))
    shared = _merge_shared(shared_found, used)
    model_k = sum(trace.top_k)
    scores = [
        _scores(
            m,
            model_counts[m],
            model_sampled[m],
            shared["fixed"].get(m),
            shared["future"].get(m),
            shared["sizes"],
            model_k,
            sum(trace.experts),
            resamples,
        )
        for m in used
    ]
    engine_tokens = min(trace.tokens, max(1, _ENGINE_PICKS // model_k))
    counters = simulate_engine(
        head(trace, engine_tokens), _budgets(trace), expert_bytes=expert_bytes or 0, threads=threads
    )
    engine = [
        {
            "slots": c.capacity,
            "hit_rate": c.hit_rate,
            "experts_requested": c.experts_requested,
            "experts_hit": c.experts_hit,
            "sections_read": c.sections_read,
            "evictions": c.evictions,
            "experts_read_per_token": c.sections_read / c.tokens,
            "bytes_read_per_token": c.bytes_read_per_token,
        }
        for c in counters
    ]
    parts, distances = _parts(trace, layers, found, used)
    return Profile(
        model=trace.model,
        source=trace.source,
        tokens=trace.tokens,
        texts=len(trace.starts) - 1,
        sampled=sampled,
        experts=[trace.experts[layer] for layer in layers],
        top_k=[trace.top_k[layer] for layer in layers],
        scores=scores,
        layers=reports,
        shared=shared["rates"],
        engine_tokens=engine_tokens,
        engine=engine,
        parts=parts,
        distances=distances,
        expert_bytes=expert_bytes,
        notes=notes,
    )


class _Tasks:
    """Work for several threads (the core gives up the GIL), with progress; an interrupt drops what has not begun."""

    def __init__(self, threads: int, progress: Progress | None) -> None:
        self._pool = ThreadPoolExecutor(max(threads, 1))
        self._progress = progress
        self._all: list[Future[Any]] = []

    def add(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        task = self._pool.submit(function, *arguments)
        self._all.append(task)
        return task

    def finish(self, rows: list[list[Future[Any]]]) -> list[list[Future[Any]]]:
        pending = {task for row in rows for task in row}
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for task in done:
                task.result()
            if self._progress:
                self._progress(sum(task.done() for task in self._all), len(self._all))
        return rows

    def __enter__(self) -> _Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


Span = tuple[int, int, NDArray[np.int64]]  # first and last token of a part, starts of its texts from 0 on


def _by_part(trace: Trace, notes: list[str]) -> Trace:
    """The trace with each part's tokens together."""
    if len(trace.parts) > _PART_LIMIT:
        notes.append(f"{len(trace.parts)} kinds of text are too many to tell apart; they are taken together.")
        # A text still ends where it did: a part's number is kept, only the names go.
        return trace
    if (np.diff(trace.part) >= 0).all():
        return trace
    order = np.argsort(trace.part, kind="stable")
    return Trace(
        trace.model,
        trace.source,
        trace.experts,
        trace.top_k,
        trace.parts,
        trace.part[order],
        trace.position[order],
        trace.ids[order],
        None,
        None if trace.predicted is None else trace.predicted[order],
    )


def _part_spans(trace: Trace) -> list[Span]:
    starts = trace.starts
    if len(trace.parts) > _PART_LIMIT:
        return [(0, trace.tokens, starts)]
    spans = []
    for part in np.unique(trace.part):
        begin, end = np.searchsorted(trace.part, [part, part + 1])
        inside = starts[(starts >= begin) & (starts < end)]
        spans.append((int(begin), int(end), np.concatenate((inside, [end])) - begin))
    return spans


def _curves(
    trace: Trace, layer: int, begin: int, end: int, starts: NDArray[np.int64], lengths: list[int], every: int
) -> Any:
    from edgemoe._core import profiling

    return profiling.curves(
        trace.layer_picks(layer)[begin:end],
        trace.experts[layer],
        starts,
        lengths=lengths,
        policies=list(POLICIES),
        sampled_policies=[],
        future_lengths=lengths,
        every=every,
        by_expert=True,
    )


def _shared_tasks(
    tasks: _Tasks, trace: Trace, spans: list[Span], every: list[int], lengths: list[int], notes: list[str]
) -> list[Future[Any]]:
    if sum(trace.experts) > 1 << 16:
        notes.append("With more than 65536 experts in all, one cache for all layers is not computed.")
        return []
    result = []
    for (begin, _, starts), step in zip(spans, every, strict=True):
        texts = np.arange(len(starts) - 1)
        sampled = texts[::step][:_SHARED_TEXTS]
        rest = np.setdiff1d(texts, sampled)
        for group, full in ((sampled, True), (rest, False)):
            size = 1 if full else _GROUP
            for first in range(0, len(group), size):
                pieces = [(begin + int(starts[t]), begin + int(starts[t + 1])) for t in group[first : first + size]]
                result.append(tasks.add(_shared_curves, trace, pieces, lengths if full else [], full))
    return result


def _shared_curves(trace: Trace, pieces: list[tuple[int, int]], lengths: list[int], full: bool) -> Any:
    """Texts over all layers, whose experts are numbered through."""
    from edgemoe._core import profiling

    first = np.concatenate(([0], np.cumsum([trace.experts[layer] for layer in trace.layers])))
    offsets = np.repeat(first[:-1], [trace.top_k[layer] for layer in trace.layers]).astype(np.uint16)
    rows = np.concatenate([trace.ids[begin:end] + offsets for begin, end in pieces])
    sizes = [end - begin for begin, end in pieces]
    found = profiling.curves(
        rows.astype(np.uint16, copy=False),
        int(first[-1]),
        np.concatenate(([0], np.cumsum(sizes))),
        lengths=lengths,
        policies=["lru"],
        sampled_policies=["belady"] if full else [],
        future_lengths=lengths,
        every=1 if full else 0,
        by_expert=False,
    )
    found["picks"] = np.asarray(sizes) * rows.shape[1]
    found["full"] = full
    del found["load"]
    return found


def _merge(results: list[Any], lengths: list[int]) -> dict[str, Any]:
    """One layer's results of all parts as one."""
    windows = {}
    for m in lengths:
        pieces = [result["windows"][m] for result in results]
        windows[m] = {
            "windows": sum(piece["windows"] for piece in pieces),
            "counts": sum(piece["counts"] for piece in pieces),
            "fixed": sum(piece["fixed"] for piece in pieces),
            "sampled_totals": np.concatenate([piece["sampled_totals"] for piece in pieces]),
        }
    policies = {
        name: {
            "hits": sum(result["policies"][name]["hits"] for result in results),
            "sampled_hits": np.concatenate([result["policies"][name]["sampled_hits"] for result in results]),
        }
        for name in results[0]["policies"]
    }
    return {"windows": windows, "policies": policies, "load": sum(result["load"] for result in results)}


def _merge_shared(results: list[Any], lengths: list[int]) -> dict[str, Any]:
    if not results:
        return {"rates": {}, "fixed": {}, "future": {}, "sizes": np.zeros(0)}
    full = [result for result in results if result["full"]]
    picks = sum(int(result["picks"].sum()) for result in results)
    sizes = np.concatenate([result["picks"] for result in full])
    rates = {"lru": sum(result["policies"]["lru"]["hits"] for result in results) / picks}
    rates["belady"] = sum(result["policies"]["belady"]["hits"] for result in full) / sizes.sum()
    slots = np.unique(np.round(np.geomspace(1, len(rates["lru"]), 80)).astype(int))
    return {
        "rates": {name: [[int(c), float(rate[c - 1])] for c in slots] for name, rate in rates.items()},
        "fixed": {
            m: (
                sum(result["windows"][m]["fixed"] for result in full),
                sum(result["windows"][m]["windows"] for result in full),
            )
            for m in lengths
        },
        "future": {
            m: np.concatenate([result["policies"][f"sch_future_{m}"]["sampled_hits"] for result in full])
            for m in lengths
        },
        "sizes": sizes,
    }


def _scores(
    m: int,
    counts: NDArray[np.int64],
    sampled_totals: NDArray[np.int64],
    fixed: tuple[NDArray[np.int64], int] | None,
    future: NDArray[np.int64] | None,
    sizes: NDArray[np.int64],
    k: int,
    experts: int,
    resamples: int,
) -> Scores:
    score, rho = srp_of_counts(counts)
    slots = np.asarray([slots_at(ratio, k, experts) for ratio in RATIOS]) - 1
    drawn = len(sampled_totals) > 1
    interval = None
    if drawn:
        low, high = bootstrap_srp(sampled_totals, resamples=resamples)
        interval = (float(low), float(high))
    future_rates, future_interval = [], None
    if future is not None and len(future):
        future_rates = (future[:, slots].sum(axis=0) / sizes.sum()).tolist()
        if drawn:
            lows, highs = bootstrap_interval(future[:, slots], sizes, resamples=resamples)
            future_interval = list(zip(lows.tolist(), highs.tolist(), strict=True))
    return Scores(
        length=m,
        srp=float(score),
        rho=float(rho),
        srp_interval=interval,
        sch_fixed=[] if fixed is None or not fixed[1] else (fixed[0][slots] / (fixed[1] * m * k)).tolist(),
        sch_future=future_rates,
        sch_future_interval=future_interval,
    )


def _layer_report(
    trace: Trace,
    layer: int,
    before: int | None,
    merged: dict[str, Any],
    lengths: list[int],
    resamples: int,
    halves: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> LayerReport:
    experts, k, picks = trace.experts[layer], trace.top_k[layer], trace.layer_picks(layer)
    scores = []
    for m in lengths:
        future = merged["policies"][f"sch_future_{m}"]["sampled_hits"]
        sizes = future[:, -1]  # a cache of all experts hits always
        window = merged["windows"][m]
        scores.append(
            _scores(
                m,
                window["counts"].sum(axis=0),
                window["sampled_totals"],
                (window["fixed"], window["windows"]),
                future,
                sizes,
                k,
                experts,
                resamples,
            )
        )
    middle = 16 if 16 in lengths else lengths[-1]
    expert_srp, _ = srp_of_counts(merged["windows"][middle]["counts"])
    learn, test = halves
    next_layer = None
    if before is not None and len(learn) and len(test):
        earlier = trace.layer_picks(before)
        table = affinity(earlier[learn], trace.experts[before], picks[learn], experts)
        guess = table[earlier[test]].sum(axis=1)
        next_layer = recall(picks[test], np.argsort(-guess, axis=1)[:, :k])
    predicted = None
    if trace.predicted is not None:
        guesses = trace.predicted[:, trace.columns(layer)]
        known = (guesses != 0xFFFF).any(axis=1)
        predicted = recall(picks[known], guesses[known]) if known.any() else None
    sample = np.concatenate(halves)
    return LayerReport(
        layer=layer,
        experts=experts,
        k=k,
        scores=scores,
        hit_rates={name: (merged["policies"][name]["hits"] / picks.size).tolist() for name in POLICIES},
        load=(merged["load"] / trace.tokens).tolist(),
        expert_srp=expert_srp.tolist(),
        repetition=repetition(picks[np.sort(sample)]) if len(sample) else 0.0,
        next_layer=next_layer,
        predicted=predicted,
    )


def _halves(
    trace: Trace, spans: list[Span], every: list[int], limit: int = 8_000
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of the sampled texts: those to learn a table from, and others to try it on."""
    sides: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    count = 0
    for (begin, _, starts), step in zip(spans, every, strict=True):
        for number, text in enumerate(range(0, len(starts) - 1, step)):
            tokens = np.arange(begin + starts[text], begin + starts[text + 1])
            if len(starts) == 2:  # one text: its first half and its second
                sides[0].append(tokens[: len(tokens) // 2])
                sides[1].append(tokens[len(tokens) // 2 :])
            else:
                sides[number % 2].append(tokens)
            count += len(tokens)
            if count > limit:
                break
    first, second = (np.concatenate(side or [np.zeros(0, np.int64)])[:limit] for side in sides)
    return first.astype(np.int64), second.astype(np.int64)


def head(trace: Trace, tokens: int) -> Trace:
    """The first tokens of a trace, without weights and predictions."""
    return Trace(
        trace.model,
        trace.source,
        trace.experts,
        trace.top_k,
        trace.parts,
        trace.part[:tokens],
        trace.position[:tokens],
        trace.ids[:tokens],
    )


def _budgets(trace: Trace) -> list[int]:
    """Numbers of slots from one token's experts of a layer to all experts."""
    least, most = max(trace.top_k), sum(trace.experts)
    return [int(slots) for slots in np.unique(np.round(np.linspace(least, most, BUDGETS)))]


def _parts(
    trace: Trace, layers: tuple[int, ...], found: list[list[Any]], lengths: list[int]
) -> tuple[list[PartReport], list[list[float]]]:
    if len(trace.parts) > _PART_LIMIT:
        return [], []
    present = np.unique(trace.part)
    reports, loads = [], []
    weights = [trace.top_k[layer] for layer in layers]
    for number, part in enumerate(present):
        results = [row[number] for row in found]
        tokens = int((trace.part == part).sum())
        srp = {}
        for m in lengths:
            score, _ = srp_of_counts(sum(result["windows"][m]["counts"].sum(axis=0) for result in results))
            srp[m] = float(score)
        rates = [
            [
                result["policies"]["lru"]["hits"][slots_at(ratio, trace.top_k[layer], trace.experts[layer]) - 1]
                / (tokens * trace.top_k[layer])
                for layer, result in zip(layers, results, strict=True)
            ]
            for ratio in RATIOS
        ]
        reports.append(PartReport(trace.parts[part], tokens, srp, np.average(rates, axis=1, weights=weights).tolist()))
        loads.append(
            [result["load"] / (tokens * trace.top_k[layer]) for layer, result in zip(layers, results, strict=True)]
        )
    distances = [
        [float(np.mean([np.abs(a - b).sum() / 2 for a, b in zip(one, two, strict=True)])) for two in loads]
        for one in loads
    ]
    return reports, distances
