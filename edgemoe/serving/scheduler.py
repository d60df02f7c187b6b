"""Who goes into the next pass: sessions of many users on one engine.

Every step is one pass over one batch: a row for each session that goes on, and rows of prompts that ride along. Logits
have the same bits whatever else is in a batch, so nobody sees the others but in time.

A step is made by whoever waits for one: a thread that wants its next token drives the engine until it has it, and so
computes what the others want, too; a thread of the scheduler's own does so for those who wait on an event loop. No lock
is held between two steps, so a session may stop anywhere, for as long as it likes, and on any thread.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgemoe.engine import Cancel, Cancelled, Count, Engine, EngineCounters
from edgemoe.errors import EdgemoeError, StateError
from edgemoe.options import EngineOptions, Quality
from edgemoe.serving.pace import Pace
from edgemoe.serving.sequences import EngineSequences, common_prefix
from edgemoe.serving.session import Drawn, EngineSequence, LogitsDrawer, Session

if TYPE_CHECKING:
    import asyncio

    from edgemoe.profiling.trace import TraceWriter
    from edgemoe.serving.prompt_cache import PromptCache

# A session that nobody has waited for so many seconds may lose its sequence to one that has none.
PAUSE = 0.02
# A session's count is brought up to date after so many seconds of steps that follow each other.
COUNTED = 0.01
# Where everything is in memory, rows of prompts that ride along make a step take about so many seconds, though at least
# so many go together.
INTERVAL = 0.1
LEAST_ROWS = 32
# A prompt of which so many tokens were computed goes to the prompt cache at once.
KEPT_AT_ONCE = 1024
# So many positions must be free for each session when another one begins, so that it need not leave again at once.
MARGIN = 128
# How far a session may be drawn ahead of who reads it on an event loop.
AHEAD = 64


_AT_WORK = "the model is at work: a signal handler cannot use it"


class _Part(NamedTuple):
    """A session's rows of a step. wanted: the last of them, whose logits are drawn from."""

    session: Session
    sequence: EngineSequence
    tokens: list[int]
    wanted: bool


class Scheduler:
    """Drives an engine for sessions. All calls may come from any thread, except where they say otherwise."""

    def __init__(
        self,
        engine: Engine,
        options: EngineOptions,
        resident: bool,
        max_gap: float,
        cache: PromptCache | None = None,
    ) -> None:
        """options: the engine's. resident: every expert stays in memory. max_gap: seconds that a session may pause at
        most because others have their turn. cache: keeps what sequences held."""
        self._engine = engine
        self._sequences = EngineSequences(engine, options.sequences, cache)
        self._chunk = options.chunk
        self._quality = options.quality  # of rows that have none of their own
        self._positions = options.positions or options.context
        self._marks = engine.has_constants(0)
        self._resident = resident
        self._max_gap = max_gap
        self._pace = Pace(max_gap)
        self._paced = False  # whether it chose who is in the step that is being made
        self._lock = threading.RLock()  # of what is below; held for moments only
        self._gate = threading.Condition(self._lock)  # told after every step, and when something ends
        self._waiters = 0  # at the gate, without the scheduler's own thread
        self._driver: int | None = None  # the thread that makes steps, or has the engine for itself
        self._claims = 0  # of those who want it for themselves
        self._thread: threading.Thread | None = None
        self._ending = False  # the interpreter is
        self._numbers = itertools.count(1)
        self._sessions: list[weakref.ref[Session]] = []  # in the order in which they came
        self._apart: list[weakref.ref[Session]] = []  # whose pass failed: each is tried alone
        self._parts: Sequence[_Part] = ()  # of the pass that is under way
        self._cancel = Cancel()  # of that pass
        self._row_seconds = 0.0  # of a row among many
        self._rotation = 0  # who is first where there are more streams than rows
        self._trace: tuple[TraceWriter, str] | None = None
        # Whose the last steps were, and the engine's counters when they began.
        self._counted: tuple[list[Count], EngineCounters] = ([], engine.counters())
        self._counted_at = 0.0

    # -- for who wants tokens -----------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the model is closed."""
        return self._engine.closed

    def check_open(self) -> None:
        """Raises EdgemoeError if the model is closed."""
        self._engine.check_open()

    def next(self, session: Session) -> Drawn | None:
        """What comes next for a session; None if it has ended. One thread at a time for each session.

        Raises EdgemoeError when the model is closed, ReadError, and what the session's drawer raises.
        """
        while (drawn := session.fetch()) is None and not session.done:
            self._engine.check_open()
            session.waiting = True
            try:
                self._drive(session)
            finally:
                session.waiting = False
        return drawn

    async def next_async(self, session: Session) -> Drawn | None:
        """The same on an event loop."""
        import asyncio  # takes longer to import than a first token should wait, and not everybody needs it

        loop = asyncio.get_running_loop()
        while (drawn := session.fetch()) is None and not session.done:
            self._engine.check_open()
            ready = loop.create_future()

            session.wake = _waker(loop, ready)
            session.eager = session.waiting = True
            session.ahead = AHEAD
            try:
                # Whatever happens from now on wakes it; this is what may have happened before.
                if not (session.drawn or session.done or session.cancelled):
                    with self._lock:
                        self._join(session)
                        self._engine.check_open()
                        self._start_thread()
                        self._gate.notify_all()
                    await ready
            finally:
                session.waiting = False
        return drawn

    def cancel(self, session: Session) -> None:
        """Ends what is under way for a session: its pass at the next layer, if that is nobody else's, too. Waits for
        nothing."""
        session.cancelled = True
        self._cancel_pass()
        self.wake()
        if session.wake is not None:
            session.wake()

    def cancel_all(self) -> None:
        """The same for all sessions."""
        for reference in list(self._sessions):
            session = reference()
            if session is not None and not session.done:
                self.cancel(session)

    def wake(self) -> None:
        """To be called when something has ended that others may be waiting for."""
        with self._lock:
            self._gate.notify_all()

    def keep(self) -> None:
        """Has the prompt cache keep what all sequences hold. A pass that is under way ends at its next layer."""
        with self._alone(cancel=True):
            if not self._engine.closed:
                self._sequences.keep_all()

    def close(self) -> None:
        """After the engine was closed: whoever waits learns it."""
        self.give_up(None)

    def give_up(self, error: BaseException | None) -> None:
        """Wakes whoever waits; if nobody closed the engine, with this error."""
        for reference in list(self._sessions):
            session = reference()
            if session is None:
                continue
            if error is not None and not self._engine.closed:
                session.fail(
                    error if isinstance(error, Exception) else EdgemoeError(f"the scheduler failed: {error!r}")
                )
            if session.wake is not None:
                session.wake()
        self.wake()

    def status(self) -> dict[str, int]:
        """running: sessions that have a sequence; waiting: that wait for one; sequences: that there are; positions:
        that all of them together may have; positions_used: that they hold, shared ones counted more than once."""
        sessions = [session for reference in list(self._sessions) if (session := reference()) and not session.done]
        with_sequence = {id(holder) for sequence in self._sequences.all if (holder := sequence.holder) is not None}
        others = [session for session in sessions if id(session) not in with_sequence]
        return {
            "running": len(sessions) - len(others),
            "waiting": sum(session.waiting or session.eager for session in others),
            "sequences": len(self._sequences.all),
            "positions": self._positions,
            "positions_used": sum(len(sequence.tokens) for sequence in self._sequences.all),
        }

    # -- for who wants the engine itself ------------------------------------------------------------------------

    def next_logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """float32 [vocab] after the tokens, of which only what no sequence holds is computed. Raises as `next`."""
        session = Session(tokens, LogitsDrawer())
        try:
            drawn = self.next(session)
            if drawn is None or drawn.logits is None:
                raise EdgemoeError("it was stopped")
            return drawn.logits
        finally:
            session.done = True

    def all_logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """float32 [tokens - first, vocab]: the logits after each of the tokens from `first` on, computed anew, in one
        step."""
        with self._alone():
            self._engine.check_open()
            sequence = self._free_sequence()
            self._sequences.empty(sequence)
            self._count([])
            wanted = np.arange(first, len(tokens), dtype=np.int32)
            positions = np.arange(len(tokens), dtype=np.int32)
            ids = np.full(len(tokens), sequence.id, np.int32)
            try:
                while True:
                    try:
                        return self._engine.forward(tokens, positions, ids, wanted)
                    except StateError:  # before anything was computed
                        if not self._make_room(None):
                            raise
            finally:
                sequence.hold(tokens.tolist()[: self._engine.length(sequence.id)] if not self._engine.closed else [])
                self._sequences.touch(sequence)
                self._record(positions)

    def forward(
        self,
        tokens: Sequence[int],
        positions: ArrayLike,
        sequence_ids: ArrayLike,
        wanted: ArrayLike,
        qualities: Sequence[Quality],
        quality: ArrayLike | None,
    ) -> NDArray[np.float32]:
        """`Engine.forward` in any of the sequences, where one with a row at position 0 begins anew; what they hold is
        not known afterwards. What it counts is of no session."""
        places = np.asarray(positions, np.int32).reshape(-1)
        ids = np.asarray(sequence_ids, np.int32).reshape(-1)
        begun = ids[places == 0] if len(ids) == len(places) else ids[:0]
        with self._alone():
            self._engine.check_open()
            for sequence in self._sequences.all:
                sequence.hold([])
                if sequence.id in begun:
                    self._engine.truncate(sequence.id, 0)
            self._count([])
            try:
                return self._engine.forward(tokens, places, sequence_ids, wanted, qualities=qualities, quality=quality)
            finally:
                self._record(places)

    def snapshot(self) -> tuple[tuple[int, ...], NDArray[np.uint8]]:
        """The tokens and the state of the sequence that was used last, of those of the engine's own quality."""
        with self._alone():
            sequence = max(self._sequences.all, key=lambda sequence: (sequence.quality is None, sequence.turn))
            known = () if sequence.quality is not None else tuple(sequence.tokens)
            return known, self._engine.snapshot(sequence.id)

    def restore(self, tokens: Sequence[int], state: NDArray[np.uint8]) -> None:
        """Puts a state back, in place of the sequence that was used least recently, an idle one if there is one."""
        with self._alone():
            self._engine.check_open()
            idle = self._sequences.idle
            sequence = idle[0] if idle else min(self._sequences.all, key=lambda sequence: sequence.turn)
            sequence.hold([])
            while True:
                try:
                    self._engine.restore(sequence.id, state)
                    break
                except StateError:
                    if not self._make_room(None):
                        raise
            sequence.hold(list(tokens))
            self._sequences.touch(sequence)

    def record(self, trace: tuple[TraceWriter, str] | None) -> None:
        """From now on what the routers choose goes to this trace, as this kind of text; None: no more. Meanwhile each
        session has its passes for itself."""
        with self._alone():
            if trace is not None and self._trace is not None:
                raise EdgemoeError("a trace is being recorded already")
            self._trace = trace
            if not self._engine.closed:
                self._engine.record_routing(trace is not None)
                self._engine.take_routing()

    def settle(self, count: Count) -> None:
        """Brings a session's count up to date: what is read after a step belongs to it, until the next one begins.
        Does not wait for a pass that is under way; if it is another session's, the count is up to date."""
        for _ in range(100):
            if self._engine.running or not any(counted is count for counted in self._counted[0]):
                return
            if self._engine.lock.acquire(timeout=0.001):  # who has it otherwise begins or ends a step
                try:
                    if any(counted is count for counted in self._counted[0]):
                        self._count(self._counted[0])
                finally:
                    self._engine.lock.release()
                return

    # -- who drives ---------------------------------------------------------------------------------------------

    def _drive(self, session: Session) -> None:
        """Makes one step, if nobody else does, otherwise waits for the end of theirs."""
        me, mine, made = threading.get_ident(), False, True
        try:
            with self._lock:
                if not session.number:
                    self._join(session)
                if self._driver == me:
                    raise EdgemoeError(_AT_WORK)
                if self._driver is not None or self._claims:
                    self._wait(1)
                    return
                mine = True  # before it is so: an interrupt may come anywhere
                self._driver = me
            made = self._step()
        finally:
            if mine:
                self._driver = None  # first, and without a call, for the same reason
                self._left()
        if not made:
            with self._lock:
                self._wait(PAUSE)

    @contextlib.contextmanager
    def _alone(self, cancel: bool = False) -> Iterator[None]:
        """The engine, for who wants it for itself, between two steps. cancel: ends the one that is under way."""
        me, mine, claimed = threading.get_ident(), False, False
        try:
            with self._lock:
                if self._driver == me:
                    raise EdgemoeError(_AT_WORK)
                claimed = True
                self._claims += 1
                if cancel:
                    self._cancel.set()
                while self._driver is not None:
                    self._wait(1)
                mine = True
                self._driver = me
                claimed = False
                self._claims -= 1
            with self._engine.lock:
                yield
        finally:
            if mine:
                self._driver = None
            if claimed:
                self._claims -= 1
            self._left()

    def _left(self) -> None:
        """Tells those who wait that nobody drives."""
        with self._lock:
            if self._waiters or self._thread is not None:
                self._gate.notify_all()

    def _wait(self, seconds: float) -> None:
        """With the lock held, which others have meanwhile."""
        self._waiters += 1
        try:
            self._gate.wait(seconds)
        finally:
            self._waiters -= 1

    def _join(self, session: Session) -> None:
        if not session.number:
            session.number = next(self._numbers)
            self._sessions.append(weakref.ref(session))

    def _start_thread(self) -> None:
        if self._thread is None:
            run = (weakref.ref(self), self._lock, self._gate)
            thread = threading.Thread(target=_run, args=run, name="edgemoe scheduler", daemon=True)
            thread.start()
            self._thread = thread
            # The interpreter's end does not wait for such a thread, and takes away what it computes with.
            atexit.register(_stop, weakref.ref(self), thread)

    def _has_eager(self) -> bool:
        """Whether somebody on an event loop wants something. With the gate's lock held."""
        sessions = (reference() for reference in self._sessions)
        return any(session is not None and session.eager and self._wants(session, True) for session in sessions)

    def _cancel_pass(self) -> None:
        """Ends the pass that is under way at its next layer, if few of its rows are of sessions that go on."""
        parts = self._parts
        rows = sum(len(part.tokens) for part in parts)
        left = sum(len(part.tokens) for part in parts if not part.session.cancelled)
        # What the others lose is less than what they would wait for.
        if parts and (left == 0 or (2 * left < rows and rows >= LEAST_ROWS)):
            self._cancel.set()

    # -- steps, by the driver -----------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Makes one pass; false if there is nothing to do now."""
        with self._engine.lock:
            self._engine.check_idle()
            parts = self._plan()
            if not parts:
                return False
            self._cancel, self._parts = Cancel(), parts
            if any(part.session.cancelled for part in parts):  # before it could be seen that this is its pass
                self._cancel_pass()
            try:
                logits = self._pass(parts)
            finally:
                self._parts = ()
        try:
            if logits is not None:
                row = 0
                for part in parts:
                    if part.wanted:
                        part.session.draw(logits[row])
                        row += 1
        finally:
            for part in parts:
                if part.session.wake is not None:
                    part.session.wake()
        return True

    def _wants(self, session: Session, shared: bool) -> bool:
        """Whether the next token should be computed. shared: there are other sessions."""
        if session.done or session.cancelled or session.error is not None:
            return False
        if len(session.drawn) >= session.ahead:
            return False
        if session.waiting or session.eager:
            return True
        return shared and time.monotonic() - session.fetched < PAUSE

    def _plan(self) -> list[_Part]:
        """The rows of the next pass."""
        if len(self._sessions) == 1:
            session = self._sessions[0]()
            if session is not None and self._wants(session, False):
                sequence = session.sequence
                if sequence is not None and sequence.known and sequence.holder is session:
                    new = session.tokens[len(sequence.tokens) :]
                    if len(new) == 1:  # as below, in less time
                        self._paced = False
                        return [_Part(session, sequence, new, True)]
        sessions = [session for reference in self._sessions if (session := reference()) is not None]
        if any(session.done for session in sessions) or len(sessions) < len(self._sessions):
            with self._lock:
                self._sessions = [
                    reference
                    for reference in self._sessions
                    if (session := reference()) is not None and not session.done
                ]
            sessions = [session for session in sessions if not session.done]
        shared = len(sessions) > 1
        held: list[Session] = []
        queue: list[Session] = []
        for session in sessions:
            if self._wants(session, shared):
                sequence = session.sequence
                (held if sequence is not None and sequence.holder is session else queue).append(session)
        for session in queue:  # nobody overtakes who waits longer
            if not self._admit(session, held):
                break
            held.append(session)
        if not held:
            return []
        if len(held) > 1 and (self._apart or self._trace is not None):
            held = [self._next_alone(held)]
        return self._rows(held)

    def _next_alone(self, held: list[Session]) -> Session:
        """One of those that are tried alone, if there are some."""
        while self._apart:
            session = self._apart.pop(0)()
            if session is not None and session in held:
                return session
        return min(held, key=lambda session: session.sequence.turn if session.sequence else 0)

    def _admit(self, session: Session, held: list[Session]) -> bool:
        """Gives the session a sequence, if one is to be had, and room for its tokens beside those of `held`."""
        if held:
            promised = sum(len(other.tokens) - len(other.sequence.tokens) for other in held if other.sequence)
            needed = len(session.tokens) - self._sequences.shared(session)
            if promised + needed + MARGIN * (len(held) + 1) > self._sequences.room(self._positions):
                return False
        if self._sequences.take(session) is not None:
            return True
        now = time.monotonic()
        resting = [
            sequence
            for sequence in self._sequences.all
            if (holder := sequence.holder) is not None
            and not self._wants(holder, False)
            and now - holder.fetched > PAUSE
        ]
        if not resting:
            return False
        min(resting, key=lambda sequence: sequence.turn).take_away()
        return self._sequences.take(session) is not None

    def _patience(self, sequence: EngineSequence) -> float:
        """Seconds that nobody must have waited for a session before it loses its sequence: as long as it takes to
        compute it again, so that slow readers do not take it from each other at every token."""
        return max(PAUSE, min(self._row_seconds * len(sequence.tokens), self._max_gap))

    def _free_sequence(self) -> EngineSequence:
        """A sequence that no session has; the session that came last may lose its own."""
        if not self._sequences.idle:
            self._take_from_newest(None)
        return self._sequences.idle[0]

    def _make_room(self, oldest: Session | None) -> bool:
        """Frees blocks: of what nobody needs now, otherwise of the session that came last, which is computed again when
        there is room; false if only `oldest` is left."""
        return self._sequences.make_room() or self._take_from_newest(oldest)

    def _take_from_newest(self, oldest: Session | None) -> bool:
        """Takes the sequence away from the session that came last, though not from `oldest`."""
        holders = [
            (holder.number, sequence)
            for sequence in self._sequences.all
            if (holder := sequence.holder) is not None and holder is not oldest
        ]
        if not holders:
            return False
        newest = max(holders, key=lambda pair: pair[0])[1]
        newest.take_away()
        self._sequences.empty(newest)
        return True

    def _rows(self, sessions: list[Session]) -> list[_Part]:
        parts: list[_Part] = []
        prompts: list[Session] = []
        streams: list[Session] = []
        for session in sessions:
            sequence = session.sequence
            assert sequence is not None
            if not sequence.known or len(sequence.tokens) >= len(session.tokens):
                if sequence.quality != session.quality:  # the same tokens have left something else behind
                    sequence.hold([])
                common = common_prefix(sequence.tokens, session.tokens)
                self._sequences.go_back(sequence, min(common, len(session.tokens) - 1))
                sequence.known, sequence.quality = True, session.quality
            # Who has nothing yet waits for no turn of others.
            goes_on = len(session.tokens) - len(sequence.tokens) == 1 and len(session.tokens) > session.prompt
            (streams if goes_on else prompts).append(session)
        self._paced = len(streams) > 1 and not prompts and not self._resident
        if self._paced:
            streams = self._pace.choose(streams)
        most = self._chunk - min(LEAST_ROWS, self._chunk // 2) if prompts else self._chunk
        if len(streams) > most:  # by turns
            begin = self._rotation % len(streams)
            streams = [*streams[begin:], *streams[:begin]][:most]
            self._rotation += most
        for session in streams:
            parts.append(self._part(session, 1))
        room = self._chunk - len(parts)
        if parts and prompts and self._resident and self._row_seconds:
            room = min(room, max(int(INTERVAL / self._row_seconds), LEAST_ROWS))
        # Equal shares, so that a short prompt does not wait for a long one.
        for left in range(len(prompts), 0, -1):
            session = prompts[len(prompts) - left]
            share = max(room // left, 1)
            if room <= 0:
                break
            part = self._part(session, share)
            parts.append(part)
            room -= len(part.tokens)
        return parts

    def _part(self, session: Session, most: int) -> _Part:
        """The session's next rows, `most` at most."""
        sequence = session.sequence
        assert sequence is not None
        held, total = len(sequence.tokens), len(session.tokens)
        end = min(held + most, total)
        # What another answer to this prompt, or what follows an answer that is told otherwise, can go back to.
        mark = session.prompt - 1
        if self._marks and held < mark < end:
            end = mark
        return _Part(session, sequence, session.tokens[held:end], end == total)

    def _pass(self, parts: list[_Part]) -> NDArray[np.float32] | None:
        """float32 [parts that want them, vocab]; None where the pass failed, which the sessions know then."""
        self._count_for([part.session.count for part in parts])
        tokens: list[int] = []
        positions: list[int] = []
        ids: list[int] = []
        wanted: list[int] = []
        for part in parts:
            begin, count = len(part.sequence.tokens), len(part.tokens)
            tokens += part.tokens
            positions += range(begin, begin + count)
            ids += [part.sequence.id] * count
            if part.wanted:
                wanted.append(len(tokens) - 1)
            part.sequence.known = False
            self._sequences.touch(part.sequence)
        qualities, numbers = self._qualities(parts)
        begin_time = time.perf_counter()
        try:
            logits = self._engine.forward(
                tokens, positions, ids, wanted, self._cancel, qualities=qualities, quality=numbers
            )
        except StateError as error:  # before anything was computed
            for part in parts:
                part.sequence.known = True
            holders = [holder for sequence in self._sequences.all if (holder := sequence.holder) is not None]
            going_on = [holder for holder in holders if self._wants(holder, True)] or [part.session for part in parts]
            oldest = min(going_on, key=lambda session: session.number)
            if not self._make_room(oldest):
                oldest.fail(error)
            return None
        except BaseException as error:
            self._failed(parts, error)
            if isinstance(error, Exception):
                return None
            raise
        finally:
            if self._trace is not None:
                self._record(np.array(positions, np.int32))
        seconds = time.perf_counter() - begin_time
        for part in parts:
            part.sequence.tokens.extend(part.tokens)
            part.sequence.known = True
            part.session.computed += len(part.tokens)
            if (
                part.wanted
                and part.session.computed >= KEPT_AT_ONCE
                and len(part.session.tokens) == part.session.prompt
            ):
                self._sequences.keep(part.sequence)
            if self._marks and len(part.sequence.tokens) == part.session.prompt - 1:
                self._engine.mark(part.sequence.id)
        if len(tokens) >= LEAST_ROWS:
            row = seconds / len(tokens)
            self._row_seconds = row if not self._row_seconds else 0.5 * (self._row_seconds + row)
        if self._paced:
            self._pace.measured(len(parts), seconds)
        return logits

    def _qualities(self, parts: list[_Part]) -> tuple[list[Quality], list[int] | None]:
        """What the rows' own qualities are, for `Engine.forward`."""
        own = [part.session.quality for part in parts]
        if all(quality is None for quality in own):
            return [], None
        known = list(dict.fromkeys(quality or self._quality for quality in own))
        return known, [known.index(q or self._quality) for q, part in zip(own, parts, strict=True) for _ in part.tokens]

    def _failed(self, parts: list[_Part], error: BaseException) -> None:
        """After a pass that failed: what was finished of it is kept and known; layers with a recurrence went back to
        their mark."""
        for part in parts:
            tokens = part.sequence.tokens + part.tokens
            length = 0 if self._engine.closed else self._engine.length(part.sequence.id)
            part.sequence.hold(tokens[:length])
        if isinstance(error, Cancelled) or not isinstance(error, Exception) or self._engine.closed:
            return
        for part in parts:
            part.session.fetched = 0.0  # who is not waited for is not drawn ahead any more
        if len(parts) == 1:
            session = parts[0].session
            if session.waiting or session.eager:
                session.fail(error)
        else:  # which of them it was of is found by trying
            self._apart += [weakref.ref(part.session) for part in parts]

    # -- counts and traces, with the engine's lock held ---------------------------------------------------------

    def _count_for(self, counts: list[Count]) -> None:
        """A step for `counts` begins. Asking the engine costs more than it tells, so steps of the same sessions that
        follow each other are counted together."""
        last = self._counted[0]
        if last != counts or time.monotonic() - self._counted_at > COUNTED:  # compared by identity
            self._count(counts)

    def _count(self, counts: list[Count]) -> None:
        """Adds what was counted since to those whose steps these were; from now on it is for `counts`."""
        (last, before), now = self._counted, self._engine.counters()
        if last:
            more = now - before
            for count in last:
                count.add(more)
        self._counted = (counts, now)
        self._counted_at = time.monotonic()

    def _record(self, positions: NDArray[np.int32]) -> None:
        """Writes the routing of the last pass to the trace, if there is one. positions: of the pass, which may have
        failed after some of them."""
        if self._trace is not None:
            writer, part = self._trace
            routing = self._engine.take_routing()
            done = len(routing.picks)
            writer.extend([part] * done, positions[:done], routing.picks, routing.weights, routing.predicted)


def _waker(loop: asyncio.AbstractEventLoop, ready: asyncio.Future[None]) -> Callable[[], None]:
    """What sets the future, from any thread."""

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(set_ready)

    return wake


def _run(reference: weakref.ref[Scheduler], lock: threading.RLock, gate: threading.Condition) -> None:
    """Makes steps as long as sessions on event loops want some. The scheduler may be gone meanwhile."""
    while True:
        scheduler = reference()
        if scheduler is None or scheduler._engine.closed:
            return
        with lock:
            if scheduler._ending:
                return
            if scheduler._driver is not None or scheduler._claims or not scheduler._has_eager():
                del scheduler
                gate.wait(1)
                continue
            scheduler._driver = threading.get_ident()
        made, failure = True, None
        try:
            made = scheduler._step()
        except BaseException as error:  # the engine is closed, which those who wait find out, or this is a fault
            failure = error
        with lock:
            scheduler._driver = None
            if failure is not None:
                scheduler._thread = None  # who comes now needs another one
            gate.notify_all()
            if not made:
                gate.wait(PAUSE)
        if failure is not None:
            scheduler.give_up(failure)
            return


def _stop(reference: weakref.ref[Scheduler], thread: threading.Thread) -> None:
    """Ends the scheduler's thread."""
    scheduler = reference()
    if scheduler is not None and thread.is_alive():
        scheduler._ending = True
        scheduler._cancel.set()
        scheduler.wake()
        thread.join(10)
