"""One conversation's turn: its tokens, what draws the next one, what was drawn and not yet fetched, and the sequence of
the engine that it has."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.engine import Count
from edgemoe.errors import EdgemoeError
from edgemoe.options import Quality


class TokenLogprob(NamedTuple):
    """A token that was drawn, in the model's own distribution, before anything of how it was sampled.

    token: its id. text: its bytes, empty where it has none of its own. logprob: natural logarithm of its probability.
    top: the likeliest tokens, (token, text, logprob) each, in their order.
    """

    token: int
    text: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...]


class Drawn(NamedTuple):
    """What one row of logits has become.

    piece: text that it completes. token: None at the end, for what was held back. reason: why the text ends here; empty
    where it goes on. computed: positions that were computed for the session by then. at: time.perf_counter() of it.
    stop: the stop string that ended the text. logits: float32 [vocab], where these are what was asked for.
    """

    piece: str
    token: int | None
    reason: str
    computed: int
    at: float
    logprob: TokenLogprob | None = None
    stop: str | None = None
    logits: NDArray[np.float32] | None = None


class Drawer(Protocol):
    """Makes something of logits. It does not know its session, so that nothing but a user holds that."""

    def draw(self, logits: NDArray[np.float32], tokens: list[int], computed: int) -> Drawn:
        """logits: float32 [vocab] after `tokens`, to which the drawer appends what it draws, unless the text ends."""

    def finish(self, reason: str, tokens: list[int], computed: int) -> Drawn:
        """The text ends where it is."""


class Session:
    """One request on its way: what the scheduler computes rows for.

    tokens: so far; the drawer appends to them. prompt: how many of them are the prompt. computed: positions that its
    passes computed. count: of what the engine counted in its steps. quality: of its rows, None for the engine's.
    waiting: somebody waits for what comes next. ahead: so much may be drawn before it is fetched, where that
    helps others too. eager: draw as far ahead whether or not others do. sequence: the one that it was given last, which
    is its own as long as that says so.
    """

    __slots__ = (
        "__weakref__",
        "_drawer",
        "_lock",
        "ahead",
        "cancelled",
        "computed",
        "count",
        "done",
        "drawn",
        "eager",
        "error",
        "fetched",
        "number",
        "prompt",
        "quality",
        "sequence",
        "tokens",
        "waiting",
        "wake",
    )

    def __init__(self, tokens: list[int], drawer: Drawer, quality: Quality | None = None) -> None:
        self.tokens = tokens
        self.prompt = len(tokens)
        self.quality = quality
        self.computed = 0
        self.count = Count()
        self.drawn: deque[Drawn] = deque()
        self.error: BaseException | None = None
        self.cancelled = False
        self.done = False  # nothing more will be drawn, and it needs no sequence any more
        self.waiting = False
        self.eager = False
        self.ahead = 4
        self.fetched = 0.0  # time.monotonic() when something was fetched last
        self.number = 0  # in the order in which sessions came; 0 before it has come
        self.sequence: EngineSequence | None = None
        self.wake: Callable[[], None] | None = None  # to be called from any thread when there is something to fetch
        self._drawer = drawer
        self._lock = threading.Lock()

    def draw(self, logits: NDArray[np.float32]) -> None:
        """Takes logits, float32 [vocab], after its tokens. An error is told to who fetches."""
        with self._lock:
            if self.done:
                return
            try:
                drawn = self._drawer.draw(logits, self.tokens, self.computed)
            except Exception as error:
                self.fail(error)
                return
            except (KeyboardInterrupt, SystemExit):  # on the thread that happens to drive
                self.fail(EdgemoeError("the drawing of its token was interrupted"))
                raise
            except BaseException as error:  # a library's panic
                self.fail(EdgemoeError(f"its token could not be drawn: {error}"))
                return
            if drawn.reason:
                self.done = True
            self.drawn.append(drawn)

    def end(self) -> None:
        """Ends the text of a session that was cancelled: what was held back can be fetched."""
        with self._lock:
            if not self.done:
                self.drawn.append(self._drawer.finish("cancelled", self.tokens, self.computed))
                self.done = True

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.done = True

    def fetch(self) -> Drawn | None:
        """What was drawn and not fetched yet, None if there is nothing. Raises the error that ended it, once."""
        if self.cancelled and not self.done:
            self.end()
        if self.drawn:
            self.fetched = time.monotonic()
            return self.drawn.popleft()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return None


class EngineSequence:
    """One of the engine's sequences. tokens: that it holds, computed at `quality` (None: the engine's). known: the
    engine holds exactly those, and the holder's tokens begin with them. turn: of its last use, counted."""

    __slots__ = ("_holder", "id", "known", "quality", "tokens", "turn")

    def __init__(self, id: int) -> None:
        self.id = id
        self.tokens: list[int] = []
        self.quality: Quality | None = None
        self.known = False
        self.turn = 0
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

    def take_away(self) -> None:
        self._holder = None

    def hold(self, tokens: list[int]) -> None:
        """Somebody else changed what the engine holds: `tokens`, or unknown ones after them."""
        self.known = False
        self.tokens = tokens
        if not tokens:
            self.quality = None


class LogitsDrawer:
    """For who wants the logits themselves."""

    def draw(self, logits: NDArray[np.float32], tokens: list[int], computed: int) -> Drawn:
        return Drawn("", None, "done", computed, time.perf_counter(), logits=logits.copy())

    def finish(self, reason: str, tokens: list[int], computed: int) -> Drawn:
        return Drawn("", None, reason, computed, time.perf_counter())
