"""One request: the text that continues a prompt, as an iterator with a result."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgemoe.engine import Count, EngineCounters
from edgemoe.errors import EdgemoeError
from edgemoe.serving.scheduler import Scheduler
from edgemoe.serving.session import Drawn, Session, TokenLogprob
from edgemoe.text.sampling import Sampler
from edgemoe.text.stream import StopStrings, TextStream
from edgemoe.text.tokenizer import Tokenizer

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
    counters: what the engine counted in this generation's steps (docs/architecture.md), which others may have shared.
    logprobs: of each of the tokens, where they were asked for. stop_string: the one that ended the text.
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
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_string: str | None = None

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
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_string: str | None = None

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
            tuple(self.logprobs),
            self.stop_string,
        )


class TextDrawer:
    """Draws the tokens of a text, and makes text of them.

    end_ids: tokens that end the text. context: positions of a sequence. logprobs: so many of the likeliest tokens are
    told with each; None for nothing about it. on_text: called with the text and all tokens when the text has ended,
    unless a stop string ended it.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: Tokenizer,
        stream: TextStream,
        stops: StopStrings,
        max_tokens: int | None,
        context: int,
        logprobs: int | None,
        on_text: Callable[[str, list[int]], None] | None,
    ) -> None:
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._stream = stream
        self._stops = stops
        self._left = math.inf if max_tokens is None else max_tokens
        self._context = context
        self._logprobs = logprobs
        self._on_text = on_text
        self._pieces: list[str] = []

    def draw(self, logits: NDArray[np.float32], tokens: list[int], computed: int) -> Drawn:
        token = self._sampler.sample(logits, tokens)
        at = time.perf_counter()
        logprob = None if self._logprobs is None else self._logprob(logits, token, self._logprobs)
        self._left -= 1
        if token in self._tokenizer.end_ids:
            return self._last("", token, "eos", tokens, computed, at, logprob)
        tokens.append(token)
        piece, stopped = self._stops.push(self._stream.push(token))
        if stopped:
            return Drawn(piece, token, "stop", computed, at, logprob, self._stops.found)
        if self._sampler.finished:
            return self._last(piece, token, "eos", tokens, computed, at, logprob)
        if self._left <= 0 or len(tokens) > self._context:
            return self._last(piece, token, "length", tokens, computed, at, logprob)
        self._pieces.append(piece)
        return Drawn(piece, token, "", computed, at, logprob)

    def finish(self, reason: str, tokens: list[int], computed: int) -> Drawn:
        return self._last("", None, reason, tokens, computed, time.perf_counter(), None)

    def _last(
        self,
        piece: str,
        token: int | None,
        reason: str,
        tokens: list[int],
        computed: int,
        at: float,
        logprob: TokenLogprob | None,
    ) -> Drawn:
        """The end of the text, with what was held back of it."""
        rest, stopped = self._stops.push(self._stream.finish())
        piece += rest
        if stopped:
            return Drawn(piece, token, "stop", computed, at, logprob, self._stops.found)
        piece += self._stops.finish()
        if self._on_text is not None and (self._pieces or piece):
            self._on_text("".join(self._pieces) + piece, tokens)
        return Drawn(piece, token, reason, computed, at, logprob)

    def _logprob(self, logits: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
        shifted = logits.astype(np.float64) - float(logits.max())
        shifted -= math.log(np.exp(shifted).sum())
        likeliest = np.argsort(-shifted, kind="stable")[:count] if count else ()
        top = tuple((int(i), self._tokenizer.spelling(int(i)), float(shifted[i])) for i in likeliest)
        return TokenLogprob(token, self._tokenizer.spelling(token), float(shifted[token]), top)


class Generation:
    """The text that continues a prompt, in pieces, as they come: an iterator, and an asynchronous one.

    It may be used from any thread, though from one at a time, and left at any point: nothing waits for a generation
    that is not read on. `result` says what has been read of it so far.
    """

    def __init__(self, scheduler: Scheduler, session: Session, tally: Tally, on_step: Callable[[Tally], None]) -> None:
        """on_step: called with the tally before something is computed for this generation."""
        self._scheduler = scheduler
        self._session = session
        self._tally = tally
        self._on_step = on_step
        self._begun: float | None = None
        self._first = 0.0
        self._busy = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        tally = self._tally
        state = tally.finish_reason or ("not begun" if self._begun is None else "running")
        return f"<edgemoe.Generation: {len(tally.tokens)} tokens after {tally.prompt_tokens}, {state}>"

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        """The next piece of text. Raises ReadError, and EdgemoeError when the model is closed or another thread is in
        this generation."""
        self._enter()
        try:
            while self._goes_on():
                piece = self._read(self._scheduler.next(self._session))
                if piece:
                    return piece
            raise StopIteration
        except StopIteration:
            raise
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            self._busy.release()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> str:
        """The same on an event loop, which it does not block. A task that is cancelled leaves the generation as it is;
        `close` ends it."""
        from asyncio import CancelledError

        self._enter()
        try:
            while self._goes_on():
                piece = self._read(await self._scheduler.next_async(self._session))
                if piece:
                    return piece
        except CancelledError:
            raise
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            self._busy.release()
        raise StopAsyncIteration

    def stop(self) -> None:
        """Ends the text where it is; what was held back of it still comes. From any thread, at once."""
        self._scheduler.cancel(self._session)

    def close(self) -> None:
        """Ends the generation; nothing more comes. From any thread, at once; may be called again."""
        self._closed = True
        self._session.done = True
        self._scheduler.cancel(self._session)
        self._finish("cancelled")

    @property
    def result(self) -> GenerationResult:
        """What has been read of it so far; final once `finish_reason` is not empty."""
        self._scheduler.settle(self._session.count)
        return self._tally.result()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise EdgemoeError(BUSY)
        if self._begun is None:
            self._begun = time.perf_counter()

    def _goes_on(self) -> bool:
        """Whether there is more to read. Raises EdgemoeError when the model is closed before the text has ended."""
        reason = self._tally.finish_reason
        if self._closed:
            return False
        if not reason:
            if not self._session.drawn:
                self._on_step(self._tally)
            return True
        if reason == "error":
            self._scheduler.check_open()
        return False

    def _read(self, drawn: Drawn | None) -> str:
        if drawn is None or self._closed:  # closed meanwhile, on another thread
            return ""
        tally = self._tally
        tally.computed_tokens = drawn.computed
        if drawn.token is not None:
            if tally.ttft_seconds is None:
                assert self._begun is not None
                self._first = drawn.at
                tally.ttft_seconds = drawn.at - self._begun
                tally.computed_prompt_tokens = drawn.computed
            tally.tokens.append(drawn.token)
            tally.seconds = drawn.at - self._first
            if drawn.logprob is not None:
                tally.logprobs.append(drawn.logprob)
        if drawn.piece:
            tally.pieces.append(drawn.piece)
        if drawn.reason:
            tally.stop_string = drawn.stop
            self._finish(drawn.reason)
        return drawn.piece

    def _failed(self, error: BaseException) -> None:
        if self._scheduler.closed and isinstance(error, EdgemoeError):
            return  # it is said again to who asks again
        self._session.done = True
        self._finish("error" if isinstance(error, Exception) else "cancelled")

    def _finish(self, reason: str) -> None:
        """The first reason counts."""
        if not self._tally.finish_reason:
            self._tally.finish_reason = reason


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
        "device_hits": run.device_hits,
        "device_hit_rate": run.device_hits / run.expert_uses if run.expert_uses else 0.0,
        "device_uploads": run.device_uploads,
        "device_upload_bytes": run.device_upload_bytes,
        "mean_bits": run.expert_bits / run.expert_uses if run.expert_uses else 0.0,
        "disk_mb_s": run.bytes_read / run.read_seconds / 1e6 if run.read_seconds else 0.0,
    }
