"""One request: the text that continues a prompt, as an iterator with a result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edgemoe.engine import Cancel, Cancelled, Count, EngineCounters
from edgemoe.errors import EdgemoeError
from edgemoe.serving.session import Sequences, Session
from edgemoe.text.sampling import Sampler
from edgemoe.text.stream import StopStrings, TextStream

BUSY = "another thread is in this generation"


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What a generation has done, up to now or in all.

    text: all of it so far. tokens: drawn for it, the one that ended it included.
    finish_reason: "eos" (the model ended it), "stop" (a stop string did), "length" (max_tokens, or the context is
    full), "cancelled" (stop() or close()), "error"; empty while it is not finished.
    prompt_tokens: of the prompt. computed_prompt_tokens: positions that were computed before the first token, less than
    those of the prompt where a sequence held its beginning. computed_tokens: in all; more than were new where other
    generations took the sequence meanwhile.
    ttft_seconds: from the first call to the first token, None before it. seconds: from the first token to the last.
    counters: what the engine counted from the begin of this generation's steps on (docs/architecture.md).
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    computed_prompt_tokens: int
    computed_tokens: int
    ttft_seconds: float | None
    seconds: float
    counters: EngineCounters

    @property
    def generated_tokens(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class Tally:
    """What a generation counts while it runs; a model keeps that of its last one, when the generation is gone."""

    prompt_tokens: int
    count: Count
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    computed_prompt_tokens: int = 0
    computed_tokens: int = 0
    ttft_seconds: float | None = None
    seconds: float = 0.0

    def result(self) -> GenerationResult:
        return GenerationResult(
            "".join(self.pieces),
            tuple(self.tokens),
            self.finish_reason,
            self.prompt_tokens,
            self.computed_prompt_tokens,
            self.computed_tokens,
            self.ttft_seconds,
            self.seconds,
            self.count.counters,
        )


class Request:
    """What a generation needs to run. It does not know its `Generation`, so that nothing but its user holds that.

    end_ids: tokens that end the text. context: positions of a sequence. on_step: called with the tally before each
    token. on_text: called with the text that was generated, and all tokens, unless a stop string ended it.
    """

    def __init__(
        self,
        sequences: Sequences,
        tokens: list[int],
        sampler: Sampler,
        stream: TextStream,
        stops: StopStrings,
        max_tokens: int | None,
        end_ids: tuple[int, ...],
        context: int,
        on_step: Callable[[Tally], None],
        on_text: Callable[[str, list[int]], None],
    ) -> None:
        self.sequences = sequences
        self.session = Session(tokens)
        self.tally = Tally(len(tokens), self.session.count)
        self.cancel = Cancel()
        self._sampler = sampler
        self._stream = stream
        self._stops = stops
        self._max_tokens = max_tokens
        self._end_ids = end_ids
        self._context = context
        self._on_step = on_step
        self._on_text = on_text

    def pieces(self) -> Iterator[str]:
        """The text as it comes."""
        try:
            yield from self._run()
        except (GeneratorExit, KeyboardInterrupt):
            self.finish("cancelled")
            raise
        except BaseException:
            self.finish("error")
            raise

    def finish(self, reason: str) -> None:
        """It will not go on; the first reason counts. Waits for nothing: it is also called by the garbage collector."""
        if not self.tally.finish_reason:
            self.tally.finish_reason = reason
        self.session.done = True

    def _end(self, reason: str) -> None:
        self.finish(reason)
        self.sequences.wake()

    def _run(self) -> Iterator[str]:
        session, tally, stops, sampler = self.session, self.tally, self._stops, self._sampler
        reason, begin, first = "length", time.perf_counter(), 0.0
        while self._max_tokens is None or len(tally.tokens) < self._max_tokens:
            self._on_step(tally)
            try:
                logits = self.sequences.next_logits(session, self.cancel)
            except Cancelled:
                reason = "cancelled"
                break
            token = sampler.sample(logits, session.tokens)
            now = time.perf_counter()
            tally.computed_tokens = session.computed
            if tally.ttft_seconds is None:
                first = now
                tally.ttft_seconds = now - begin
                tally.computed_prompt_tokens = session.computed
            tally.tokens.append(token)
            tally.seconds = now - first
            if token in self._end_ids:
                reason = "eos"
                break
            session.tokens.append(token)
            piece, stopped = stops.push(self._stream.push(token))
            if stopped:
                self._end("stop")
            if piece:
                tally.pieces.append(piece)
                yield piece
            if stopped:
                return
            if sampler.finished:
                reason = "eos"
                break
            if len(session.tokens) > self._context:
                break
        piece, stopped = stops.push(self._stream.finish())
        if not stopped:
            piece += stops.finish()
        if piece:
            tally.pieces.append(piece)
        self._end("stop" if stopped else reason)
        if not stopped:
            self._on_text("".join(tally.pieces), session.tokens)
        if piece:
            yield piece


class Generation:
    """The text that continues a prompt, in pieces, as they come.

    It may be used from any thread, though from one at a time, and left at any point: nothing waits for a generation
    that is not read on. `result` says what it has done so far.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._pieces = request.pieces()
        self._busy = threading.Lock()
        self._closed = False

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        """The next piece of text. Raises ReadError, and EdgemoeError when the model is closed or another thread is in
        this generation."""
        if not self._busy.acquire(blocking=False):
            raise EdgemoeError(BUSY)
        try:
            if self._closed:
                raise StopIteration
            if self._request.tally.finish_reason in ("", "error"):
                self._request.sequences.check_open()
            piece = next(self._pieces)
            if self._closed:  # meanwhile
                raise StopIteration
            return piece
        finally:
            self._busy.release()
            if self._closed:
                self._end()

    def stop(self) -> None:
        """Ends the text where it is; what was held back of it still comes. From any thread, at once."""
        self._request.cancel.set()

    def close(self) -> None:
        """Ends the generation; nothing more comes. From any thread, at once; may be called again."""
        self._closed = True
        self._request.cancel.set()
        self._end()

    def _end(self) -> None:
        # Called after `_closed` is set, and by who was in the generation then after leaving it: one of them succeeds.
        if self._busy.acquire(blocking=False):
            try:
                self._pieces = iter(())
                self._request.finish("cancelled")
            finally:
                self._busy.release()
            self._request.sequences.wake()

    @property
    def result(self) -> GenerationResult:
        """What it has done so far; final once `finish_reason` is not empty."""
        self._request.sequences.settle(self._request.session.count)
        return self._request.tally.result()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def figures(run: EngineCounters) -> dict[str, float]:
    """Sums of the engine's counters as docs/architecture.md names them, rates and means with them."""
    return {
        "experts_requested": run.experts_requested,
        "experts_hit": run.experts_hit,
        "hit_rate": run.experts_hit / run.experts_requested if run.experts_requested else 0.0,
        "sections_read": run.sections_read,
        "bytes_read": run.bytes_read,
        "bytes_read_per_token": run.bytes_read / max(run.tokens, 1),
        "stall_ms": 1e3 * run.stall_seconds,
        "compute_ms": 1e3 * (run.seconds - run.stall_seconds),
        "evictions": run.evictions,
        "prefetch_issued": run.prefetch_issued,
        "prefetch_used": run.prefetch_used,
        "prefetch_late": run.prefetch_late,
        "prefetch_wasted": run.prefetch_wasted,
        "mean_bits": run.expert_bits / run.expert_uses if run.expert_uses else 0.0,
        "disk_mb_s": run.bytes_read / run.read_seconds / 1e6 if run.read_seconds else 0.0,
    }
