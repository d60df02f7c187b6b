"""What a level or a mode of a nested pack costs: perplexity, and divergence from the model before quantization.

Both are of one held-out text, cut into windows as llama-perplexity does: the first half of a window is context only,
after each position of the second half the model's distribution of the next token is compared with the original's,
KL(original || quantized) in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.engine import LayerRecord
from edgemoe.formats.index import ExpertLayer, LevelQuality, MeasuredQuality, ModeQuality
from edgemoe.options import EXACT, Quality
from edgemoe.quantize.layerwise import LayerwiseModel, temporary_array

Floats = npt.NDArray[np.float32]

MODES = {"high": 0.003, "balanced": 0.01, "fast": 0.03}
"""Mode -> how much higher than in exact mode its perplexity may be, as a share."""

# Runs of the model that may be spent on finding the thresholds of a mode.
_STEPS = 6
# Rows of logits whose probabilities are computed together.
_ROWS = 16


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """float64 [rows, vocab]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


class Reference:
    """What the original model says about the held-out text.

    windows: int32 [windows, window]. positions: those in a window whose next token is predicted.
    """

    def __init__(self, windows: npt.NDArray[np.int32], vocab: int, work: Path) -> None:
        count, window = windows.shape
        self.windows = windows
        self.work = work
        self.positions = np.arange(window // 2, window - 1, dtype=np.int32)
        self._logits: Floats = temporary_array(work, (count, len(self.positions), vocab), np.float32)
        self._added = 0

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return len(self.windows) * len(self.positions)

    def add(self, logits: Floats) -> None:
        """The original's logits [positions, vocab] of the next window."""
        self._logits[self._added] = logits
        self._added += 1

    def perplexity(self) -> float:
        return self.compare(iter(self._logits))[0]

    def compare(self, logits: Iterator[Floats]) -> tuple[float, float]:
        """(perplexity, mean KL divergence from the original in nats) of a model's logits, window by window."""
        loss = divergence = 0.0
        for window, (values, original) in enumerate(zip(logits, self._logits, strict=True)):
            targets = self.windows[window, self.positions + 1]
            for begin in range(0, len(targets), _ROWS):
                rows = slice(begin, begin + _ROWS)
                own, theirs = log_softmax(values[rows]), log_softmax(original[rows])
                loss -= float(own[np.arange(len(own)), targets[rows]].sum())
                divergence += float((np.exp(theirs) * (theirs - own)).sum())
        try:
            perplexity = math.exp(loss / self.tokens)
        except OverflowError:
            perplexity = math.inf
        return perplexity, max(divergence / self.tokens, 0.0)


def levels_dropped(weights: npt.NDArray[Any], thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
    """How many levels below an expert's highest it works at: int [tokens, top_k] for router weights [tokens, top_k] in
    descending order: the thresholds that the share of the weights before it exceeds (HOBBIT's importance, Tang et al.
    2024, arXiv 2411.01433, section 4)."""
    total = weights.sum(axis=1, keepdims=True)
    before = (np.cumsum(weights, axis=1) - weights) / np.where(total > 0, total, 1)
    before[:, :1] = 0
    dropped: npt.NDArray[np.int64] = (before[:, :, None] > np.array(thresholds, np.float64)).sum(axis=2)
    return dropped


def thresholds_at(place: float, levels: int) -> tuple[float, ...]:
    """The thresholds at a place on the way from all experts at their highest level (1) to all at the lowest
    (`lowest_place`): the first is `place`, each further one lies halfway between the one before it and 1."""
    if place >= 1:
        return ()
    return tuple(max(1 - (1 - place) * 0.5**number, -1.0) for number in range(levels - 1))


def lowest_place(levels: int) -> float:
    return 1 - 2.0 ** (levels - 2) - 0.01


def find_thresholds(
    measure: Callable[[tuple[float, ...]], ModeQuality], levels: int, exact: ModeQuality, budgets: Mapping[str, float]
) -> dict[str, ModeQuality]:
    """The cheapest thresholds found for each mode by bisection, whose cost is within its budget.

    The cost is the increase of the mean negative log-likelihood over exact mode, or that of the divergence if it is
    more: on few tokens the former may be small by chance.
    """
    known = {1.0: exact}

    def cost(place: float) -> float:
        if place not in known:
            known[place] = measure(thresholds_at(place, levels))
        found = known[place]
        return max(math.log(found.perplexity / exact.perplexity), found.kl - exact.kl)

    chosen = {}
    for name, budget in budgets.items():
        allowed = math.log1p(budget)
        low, high = lowest_place(levels), 1.0
        if cost(low) <= allowed:
            chosen[name] = known[low]
            continue
        for _ in range(_STEPS):
            inside = [place for place in known if low < place < high]
            middle = min(inside, key=lambda place: abs(place - (low + high) / 2)) if inside else (low + high) / 2
            if cost(middle) <= allowed:
                high = middle
            else:
                low = middle
        chosen[name] = known[high]
    return chosen


def evaluate(
    model: LayerwiseModel,
    reference: Reference,
    observe: Callable[[int, LayerRecord], None] | None = None,
) -> tuple[float, float]:
    """(perplexity, mean KL divergence in nats) of a model. observe: called with the number of each layer and what
    `Engine.forward_layer` hands out for a window."""
    residual = temporary_array(reference.work, (*reference.windows.shape, model.spec.hidden_size), np.float32)
    for number in range(len(model.spec.layers)):

        def watch(_: slice, seen: LayerRecord, number: int = number) -> None:
            if observe is not None:
                observe(number, seen)

        logits = model.run(number, reference.windows, residual, watch, reference.positions)
        if number + 1 < len(model.spec.layers):
            for _ in logits:
                pass
    return reference.compare(logits)


def most_runs(levels: int) -> int:
    """How often the text goes through a model of so many levels while it is measured, at most."""
    return levels + len(MODES) * (_STEPS + 1)


def measure(
    model: Callable[[Quality], LayerwiseModel],
    experts: Mapping[int, ExpertLayer],
    reference: Reference,
    text: str,
) -> MeasuredQuality:
    """model: the pack's model at a quality."""
    levels = next(iter(experts.values())).levels

    def run(quality: Quality) -> ModeQuality:
        thresholds = quality.thresholds
        widths = list[float]()

        def observe(number: int, seen: LayerRecord) -> None:
            if number in experts:
                widths.append(_mean_bits(experts[number], seen.picks, seen.weights, thresholds))

        return ModeQuality(thresholds, *evaluate(model(quality), reference, observe), float(np.mean(widths)))

    exact = run(EXACT)
    single = [run(Quality(level_cap=level)) for level in range(len(levels) - 1)] + [exact]
    modes = {"exact": exact}
    if len(levels) > 1:
        modes |= find_thresholds(lambda thresholds: run(Quality(thresholds=thresholds)), len(levels), exact, MODES)
    return MeasuredQuality(
        text=text,
        tokens=reference.tokens,
        reference=reference.perplexity(),
        levels=tuple(
            LevelQuality(level.bits, found.perplexity, found.kl) for level, found in zip(levels, single, strict=True)
        ),
        modes=modes,
    )


def _mean_bits(
    layer: ExpertLayer, picks: npt.NDArray[Any], weights: npt.NDArray[Any], thresholds: Sequence[float]
) -> float:
    top = np.array([len(sections) - 1 for sections in layer.sections])[picks]
    bits = np.array([level.bits for level in layer.levels])
    return float(bits[np.maximum(top - levels_dropped(weights, thresholds), 0)].mean())
