"""Whether streams of text decode side by side or by turns.

Where experts are read from disk, streams side by side share reads, but each turns the others' experts out of memory: a
stream that has the engine for a while uses its own again. Which of both gives more tokens per second depends on the
model, the memory and the texts, so both are tried and measured: `width` streams decode side by side for a slice of some
tokens each, then the next ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgemoe.serving.session import Session

SLICE = 32
"""Steps of a slice, unless another stream would pause too long."""
LEAST = 4
"""A slice of fewer steps gains nothing from what is in memory: a width that leaves no more is not used."""
TRIED_AGAIN = 100
"""Slices after which a width that is not used is measured again."""
MARGIN = 1.02
"""So much faster must another width be to take the place of the one in use."""


@dataclass(slots=True)
class _Width:
    """What is known of decoding so many streams side by side. rate: tokens per second, 0 if it was never measured.
    seconds: of a step. slice: number of the slice in which it was measured last."""

    rate: float = 0.0
    seconds: float = 0.0
    slice: int = 0


class Pace:
    """Chooses who decodes in the next step."""

    def __init__(self, max_gap: float) -> None:
        """max_gap: seconds that a stream may pause at most because others have their turn."""
        self._max_gap = max_gap
        self._known: dict[tuple[int, int], _Width] = {}  # (streams, rounded to a power of two; width)
        self._served: dict[int, int] = {}  # session's number -> the slice it decoded in last
        self._group: frozenset[int] = frozenset()  # numbers of the sessions that have their turn
        self._width = 0
        self._streams = 0
        self._slice = 0
        self._steps = 0  # left of this slice
        self._tokens = 0  # measured in this slice
        self._seconds = 0.0

    def choose(self, streams: Sequence[Session]) -> list[Session]:
        """Those of the streams that decode in the next step: at least one."""
        count = len(streams)
        if count == 1:
            return list(streams)
        chosen = [session for session in streams if session.number in self._group]
        if self._steps <= 0 or not chosen or _rounded(count) != self._streams:
            chosen = self._next_group(streams)
        return chosen

    def measured(self, tokens: int, seconds: float) -> None:
        """What the step took that was chosen last, of decoding only."""
        self._steps -= 1
        self._tokens += tokens
        self._seconds += seconds

    def _next_group(self, streams: Sequence[Session]) -> list[Session]:
        self._end_slice()
        self._slice += 1
        self._streams = _rounded(len(streams))
        self._width = min(self._choose_width(len(streams)), len(streams))
        chosen = sorted(streams, key=lambda session: self._served.get(session.number, 0))[: self._width]
        self._served = {session.number: self._served.get(session.number, 0) for session in streams}
        for session in chosen:
            self._served[session.number] = self._slice
        self._group = frozenset(session.number for session in chosen)
        self._steps = self._slice_steps(self._width, len(streams))
        return [session for session in streams if session.number in self._group]

    def _end_slice(self) -> None:
        if self._tokens and self._seconds:
            known = self._known.setdefault((self._streams, _rounded(self._width)), _Width())
            steps = max(self._tokens / max(len(self._group), 1), 1)
            rate, step = self._tokens / self._seconds, self._seconds / steps
            known.rate = rate if not known.rate else 0.5 * (known.rate + rate)
            known.seconds = step if not known.seconds else 0.5 * (known.seconds + step)
            known.slice = self._slice
        self._tokens, self._seconds = 0, 0.0

    def _choose_width(self, count: int) -> int:
        widths = [width for width in _widths(count) if self._slice_steps(width, count) >= LEAST] or [count]
        known = {width: self._known.get((self._streams, _rounded(width)), _Width()) for width in widths}
        for width in widths:
            if not known[width].rate or self._slice - known[width].slice > TRIED_AGAIN:
                return width
        current = self._width if self._width in known else widths[0]
        best = max(widths, key=lambda width: known[width].rate)
        return best if known[best].rate > MARGIN * known[current].rate else current

    def _slice_steps(self, width: int, count: int) -> int:
        """Steps of a slice, so that the others' pause is not too long."""
        others = -(-count // width) - 1
        # A width that was not measured takes no longer than a wider one.
        wider = (
            known.seconds
            for (streams, other), known in self._known.items()
            if streams == _rounded(count) and other >= _rounded(width) and known.seconds
        )
        seconds = min(wider, default=0.0)
        if not others or not seconds:
            return SLICE
        return min(SLICE, int(self._max_gap / (others * seconds)))


def _rounded(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _widths(count: int) -> list[int]:
    """The widths that are tried: all, a quarter of them, one."""
    return sorted({count, max(count // 4, 1), 1}, reverse=True)
