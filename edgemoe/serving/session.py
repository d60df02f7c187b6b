"""Sessions that share an engine: each has its tokens, the engine's sequences go to those that compute.

A session whose sequence another one took computes its tokens again when it goes on: logits have the same bits, so
nobody sees a difference but in time. Turns are taken step by step, one forward pass each; no lock is held between two
steps, so a session may stop anywhere, for as long as it likes, and on any thread.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgemoe.engine import Cancel, Cancelled, Count, Engine, EngineCounters
from edgemoe.errors import EdgemoeError, StateError
from edgemoe.options import Quality

if TYPE_CHECKING:
    from edgemoe.profiling.trace import TraceWriter

# A session keeps its sequence for so many tokens, or a quarter of those it had to compute to begin with, if these are
# more: where several take turns on too few sequences, most of the time is then spent on new tokens.
SLICE = 32
# As long as its steps follow each other within so many seconds.
PAUSE = 0.02
# A session's count is brought up to date after so many seconds of steps that follow each other.
COUNTED = 0.01


class Session:
    """The tokens of one generation, with those it goes on from. `Sequences.next_logits` says what comes after them.

    tokens: append to it what is said next. prompt: how many of them are the prompt. computed: positions that its passes
    computed. count: of what the engine counted from the begin of its steps on. done: it will not go on, and needs no
    sequence any more.
    """

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.prompt = len(tokens)
        self.computed = 0
        self.count = Count()
        self.done = False
        self.sequence: _Sequence | None = None  # that it was given last; another session may have it by now


class _Sequence:
    """One of the engine's sequences: the tokens it holds, and the session that has it."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.tokens: list[int] = []
        self.known = False  # the engine holds exactly `tokens`, and the holder's tokens begin with them
        self.left = 0  # tokens of the holder's slice
        self.stepped = 0.0  # when the last step ended
        self.turn = 0  # of the last step, counted
        self._holder: weakref.ref[Session] | None = None

    @property
    def holder(self) -> Session | None:
        # A session that was dropped holds nothing. Nobody has to be told: finalizers run at any time on any thread,
        # also within a lock, and must not wait for one.
        session = None if self._holder is None else self._holder()
        return None if session is None or session.done else session

    def give(self, session: Session) -> None:
        self._holder = weakref.ref(session)
        self.known = False
        session.sequence = self

    def hold(self, tokens: list[int]) -> None:
        """Somebody else changed what the engine holds: `tokens`, or unknown ones after them."""
        self.known = False
        self.tokens = tokens


class Sequences:
    """The engine's sequences, and who has them.

    A session that begins takes the idle sequence that holds the longest beginning of its tokens, otherwise the one that
    was used least recently among those whose holder's slice is over or who pauses. Sessions that wait are served in the
    order in which they came.
    """

    def __init__(self, engine: Engine, count: int, chunk: int) -> None:
        """count: of sequences, which the engine must have room for. chunk: tokens of one pass."""
        self._trace: tuple[TraceWriter, str] | None = None
        self._engine = engine
        self._chunk = chunk
        self._sequences = [_Sequence(0), *(_Sequence(engine.add_sequence()) for _ in range(count - 1))]
        self._stepped = threading.Condition(engine.lock)
        self._turns = 0
        # Appended to before the lock is asked for: who comes back for the next step must see who waits already.
        self._waiting: list[Session] = []
        # Whose step was the last, and the engine's counters when it began. Not the session itself: it may be dropped.
        self._counted: tuple[Count | None, EngineCounters] = (None, engine.counters())
        self._counted_at = 0.0

    def check_open(self) -> None:
        """Raises EdgemoeError if the model is closed."""
        self._engine.check_open()

    def wake(self) -> None:
        """To be called when a session is done: who waits for its sequence need not wait until it seems to pause."""
        if self._engine.lock.acquire(blocking=False):  # otherwise a step is under way, whose end wakes them
            try:
                self._stepped.notify_all()
            finally:
                self._engine.lock.release()

    def next_logits(self, session: Session, cancel: Cancel | None = None) -> NDArray[np.float32]:
        """float32 [vocab] after the session's tokens, of which only what no sequence holds for it is computed.

        Raises EdgemoeError when the model is closed, Cancelled once `cancel` is set, ReadError.
        """
        cancel = Cancel() if cancel is None else cancel
        while True:
            try:
                self._waiting.append(session)
                with self._engine.lock:
                    sequence = self._wait(session, cancel)
                    try:
                        logits = self._advance(sequence, session, cancel)
                    finally:
                        self._end_step(sequence)
            finally:
                self._leave(session)
            if logits is not None:
                return logits

    def all_logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """float32 [tokens - first, vocab]: the logits after each of the tokens from `first` on, computed anew, in one
        step."""
        session, cancel = Session([]), Cancel()
        try:
            self._waiting.append(session)
            with self._engine.lock:
                sequence = self._wait(session, cancel)
                try:
                    sequence.hold([])
                    self._engine.truncate(sequence.id, 0)
                    return self._forward(sequence, tokens, np.arange(first, len(tokens), dtype=np.int32), cancel)
                finally:
                    session.done = True
                    self._end_step(sequence)
        finally:
            session.done = True
            self._leave(session)

    def record(self, trace: tuple[TraceWriter, str] | None) -> None:
        """From now on what the routers choose goes to this trace, as this kind of text; None: no more."""
        with self._engine.lock:
            if trace is not None and self._trace is not None:
                raise EdgemoeError("a trace is being recorded already")
            self._trace = trace
            if not self._engine.closed:
                self._engine.record_routing(trace is not None)
                self._engine.take_routing()

    def forward(
        self,
        tokens: Sequence[int],
        positions: ArrayLike,
        sequence_ids: ArrayLike,
        wanted: ArrayLike,
        qualities: Sequence[Quality],
        quality: ArrayLike | None,
    ) -> NDArray[np.float32]:
        """`Engine.forward` in any of the sequences; what they hold is not known afterwards. What it counts is of no
        session."""
        places = np.asarray(positions, np.int32).reshape(-1)
        with self._engine.lock:
            self._engine.check_idle()
            for sequence in self._sequences:
                sequence.hold([])
            self._count(None)
            try:
                return self._engine.forward(tokens, places, sequence_ids, wanted, qualities=qualities, quality=quality)
            finally:
                self._record(places)

    def snapshot(self) -> tuple[tuple[int, ...], NDArray[np.uint8]]:
        """The tokens and the state of the sequence that was used last."""
        with self._engine.lock:
            sequence = max(self._sequences, key=lambda sequence: sequence.turn)
            return tuple(sequence.tokens), self._engine.snapshot(sequence.id)

    def restore(self, tokens: Sequence[int], state: NDArray[np.uint8]) -> None:
        """Puts a state back, in place of the sequence that was used least recently, an idle one if there is one."""
        with self._engine.lock:
            self._engine.check_idle()
            sequence = min(self._sequences, key=lambda sequence: (sequence.holder is not None, sequence.turn))
            sequence.hold([])
            self._engine.restore(sequence.id, state)
            sequence.hold(list(tokens))
            sequence.turn = self._next_turn()

    def settle(self, count: Count) -> None:
        """Brings a session's count up to date: what is read after a step belongs to it, until the next one begins.
        Does not wait for a pass that is under way; if it is another session's, the count is up to date."""
        while not self._engine.running:
            if self._engine.lock.acquire(timeout=0.001):  # who has it otherwise begins or ends a step
                try:
                    if self._counted[0] is count:
                        self._count(count)
                finally:
                    self._engine.lock.release()
                return

    # -- turns, with the lock held ------------------------------------------------------------------------------

    def _wait(self, session: Session, cancel: Cancel) -> _Sequence:
        """The session's sequence, once it is its turn."""
        while True:
            self._engine.check_idle()
            if cancel.is_set():
                raise Cancelled
            sequence = session.sequence
            if sequence is not None and self._waiting[0] is session and sequence.holder is session:
                break  # as below, in less time
            choices = self._choices(session)
            if choices:
                sequence = self._choose(session, choices)
                break
            # Woken up after every step; when a session pauses, or is dropped, nobody is.
            self._stepped.wait(PAUSE)
        self._leave(session)
        if sequence.holder is not session:
            sequence.give(session)
            sequence.left = SLICE
        if self._counted[0] is not session.count or sequence.stepped - self._counted_at > COUNTED:
            self._count(session.count)
        return sequence

    def _leave(self, session: Session) -> None:
        if session in self._waiting:
            self._waiting.remove(session)

    def _choices(self, session: Session) -> list[_Sequence]:
        """The sequences that the session may have now; none while it is another one's turn."""
        now, waiting = time.monotonic(), list(self._waiting)
        held = {holder: sequence for sequence in self._sequences if (holder := sequence.holder) is not None}
        free = []
        for sequence in self._sequences:
            holder = sequence.holder
            pauses = holder not in waiting and now - sequence.stepped > PAUSE
            if holder is None or sequence.left <= 0 or pauses:
                free.append(sequence)
        for other in waiting:
            if other.done and other is not session:
                continue  # an interrupt kept it from leaving
            choices = [held[other]] if other in held else free
            if choices:
                return choices if other is session else []
        return []

    def _choose(self, session: Session, choices: list[_Sequence]) -> _Sequence:
        def rank(sequence: _Sequence) -> tuple[bool, int, int]:
            idle = sequence.holder is None
            return idle, common_prefix(sequence.tokens, session.tokens) if idle else 0, -sequence.turn

        return choices[0] if len(choices) == 1 else max(choices, key=rank)

    def _end_step(self, sequence: _Sequence) -> None:
        sequence.stepped = time.monotonic()
        sequence.turn = self._next_turn()
        if self._waiting:
            self._stepped.notify_all()

    def _next_turn(self) -> int:
        self._turns += 1
        return self._turns

    def _count(self, count: Count | None) -> None:
        """Adds what was counted since the last step began to that step's session; from now on it is for `count`."""
        (last, before), now = self._counted, self._engine.counters()
        if last is not None:
            last.add(now - before)
        self._counted = (count, now)
        self._counted_at = time.monotonic()

    # -- passes, with the lock held -----------------------------------------------------------------------------

    def _advance(self, sequence: _Sequence, session: Session, cancel: Cancel) -> NDArray[np.float32] | None:
        """One pass of the session: float32 [vocab] if it reached the end of the tokens."""
        engine, id, total = self._engine, sequence.id, len(session.tokens)
        held = len(sequence.tokens)
        if not sequence.known or held >= total:
            held = self._go_back(sequence, min(common_prefix(sequence.tokens, session.tokens), total - 1))
        end = min(held + self._chunk, total)
        # What another answer to this prompt, or what follows an answer that is told otherwise, can go back to.
        mark = session.prompt - 1
        marks = held < mark and engine.has_constants(id)
        if marks:
            end = min(end, mark)
        last = end == total
        new = np.array(session.tokens[held:end], np.int32)
        wanted = np.array([len(new) - 1] if last else [], np.int32)
        logits = self._forward(sequence, new, wanted, cancel)
        sequence.known = True
        session.computed += len(new)
        if marks and end == mark:
            engine.mark(id)
        sequence.left += len(new) // 4
        if not last:
            return None
        sequence.left -= 1
        row: NDArray[np.float32] = logits[0]
        return row

    def _go_back(self, sequence: _Sequence, length: int) -> int:
        """Truncates a sequence to the most positions, up to `length`, that its layers can go back to."""
        engine = self._engine
        length = min(length, engine.length(sequence.id))
        marked = engine.marked(sequence.id)
        for possible in (length, marked if marked < length else 0, 0):
            try:
                engine.truncate(sequence.id, possible)
            except StateError:  # a window has moved on, or a recurrence went over it
                continue
            break
        held = engine.length(sequence.id)
        del sequence.tokens[held:]
        return held

    def _forward(
        self,
        sequence: _Sequence,
        tokens: NDArray[np.int32],
        wanted: NDArray[np.int32],
        cancel: Cancel,
    ) -> NDArray[np.float32]:
        """Appends `tokens`. If it fails, what was finished is kept and known; layers with a recurrence go back to their
        mark."""
        engine, count = self._engine, len(tokens)
        begin = len(sequence.tokens)
        positions = np.arange(begin, begin + count, dtype=np.int32)
        sequence.known = False
        try:
            logits = engine.forward(tokens, positions, np.full(count, sequence.id, np.int32), wanted, cancel)
            sequence.tokens.extend(tokens.tolist())
            return logits
        except BaseException:
            sequence.tokens = (sequence.tokens[:begin] + tokens.tolist())[: engine.length(sequence.id)]
            raise
        finally:
            self._record(positions)

    def _record(self, positions: NDArray[np.int32]) -> None:
        """Writes the routing of the last pass to the trace, if there is one. positions: of the pass, which may have
        failed after some of them."""
        if self._trace is not None:
            writer, part = self._trace
            routing = self._engine.take_routing()
            done = len(routing.picks)
            writer.extend([part] * done, positions[:done], routing.picks, routing.weights, routing.predicted)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = min(len(left), len(right))
    if left[:count] == right[:count]:
        return count
    return next(i for i in range(count) if left[i] != right[i])
