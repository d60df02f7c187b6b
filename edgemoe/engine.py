"""The engine as the rest of the program sees it: calls from any thread, one at a time.

Everything in Python that computes with a model goes through `Engine`; only this file knows `_core.Engine`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgemoe import _core
from edgemoe._core import EngineCounters, LayerRecord, MemoryPlan, RoutingRecord
from edgemoe.errors import DeviceError, EdgemoeError, OptionError
from edgemoe.formats.index import ModelIndex
from edgemoe.options import EngineOptions, Quality

__all__ = [
    "Cancel",
    "Cancelled",
    "Count",
    "Engine",
    "EngineCounters",
    "LayerRecord",
    "MemoryPlan",
    "RoutingRecord",
    "plan_memory",
]

Cancel = _core.Cancel
"""Ends a pass between two layers: `set()` from any thread; it stays set."""

Cancelled = _core.Cancelled
"""Raised by a pass whose `Cancel` was set."""


class Count:
    """A sum of what an engine counts, made step by step. counters: the sum so far."""

    __slots__ = ("counters",)

    def __init__(self) -> None:
        self.counters = EngineCounters()

    def add(self, counters: EngineCounters) -> None:
        self.counters += counters


def plan_memory(index: ModelIndex, options: EngineOptions) -> MemoryPlan:
    """What an engine with these options would take. Raises as `Engine`."""
    with _named(index):
        return _core.plan(index, options)


@contextmanager
def _named(index: ModelIndex) -> Iterator[None]:
    """What only the core can know to be wrong, EDGEMOE_ISA or the sizes of tensors, is said of the file."""
    try:
        yield
    except ValueError as error:
        raise OptionError(f"{index.path}: {error}") from error


@contextmanager
def _with_way_out() -> Iterator[None]:
    """A device that fails is the end of what was loaded: its errors say what to do."""
    try:
        yield
    except DeviceError as error:
        raise type(error)(f"{error}; load the model again, or with --gpu none to compute without the device") from error


class Engine:
    """An engine of the core, whose calls must not run at the same time.

    lock: held during every call but `residency`; reentrant. Who needs several calls to be one step holds it around
    them.
    isa: the instruction set in use. direct_io: whether weights are read past the page cache.
    After `close` every call but `counters` raises EdgemoeError.
    """

    def __init__(self, index: ModelIndex, options: EngineOptions, device: _core.Device | None = None) -> None:
        """Reads the dense weights. device: what computes `options.device_layers`; nobody else uses it.

        Raises TypeError for a field of `index` or `options` that is missing, unknown or of another type than the engine
        reads; OptionError for what it cannot compute; ReadError; ThreadError; DeviceError."""
        with _named(index):
            core = _core.Engine(index, options, device)
        self.lock = threading.RLock()
        self.isa = core.isa
        self.direct_io = core.direct_io
        self._core: _core.Engine | None = core
        self._closed = False
        self._running: Cancel | None = None  # of the pass that is under way
        self._counters = core.counters()  # when it was closed

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def running(self) -> bool:
        """Whether a pass is under way."""
        return self._running is not None

    def check_open(self) -> None:
        """Raises EdgemoeError if the model is closed."""
        if self._closed or self._core is None:
            raise EdgemoeError("the model is closed")

    def check_idle(self) -> None:
        """Raises EdgemoeError if the model is closed, or at work. To be called with the lock held: then it is at work
        only if this is a signal handler that interrupted a pass."""
        if self._running is not None:
            raise EdgemoeError("the model is at work: a signal handler cannot use it")
        self.check_open()

    def close(self) -> None:
        """Gives the memory back. A pass that is under way ends at its next layer. Waits for nothing else."""
        self._closed = True
        running = self._running
        if running is not None:
            running.set()
        with self.lock:
            if self._core is not None:
                self._counters = self._core.counters()
            self._core = None

    def forward(
        self,
        tokens: ArrayLike,
        positions: ArrayLike,
        sequence_ids: ArrayLike,
        wanted: ArrayLike,
        cancel: Cancel | None = None,
        *,
        qualities: Sequence[Quality] = (),
        quality: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """One pass: logits float32 [wanted, vocab] after those tokens whose indexes are in `wanted`.

        tokens, positions, sequence_ids: int32 [tokens]; token i stands at positions[i] of sequence sequence_ids[i]; a
        sequence goes on where it ends. A token's experts are computed at qualities[quality[i]], or at qualities[0]
        without `quality`; without both at the engine's own. Raises ContextLengthError, ReadError, ValueError; Cancelled
        once `cancel` is set; StateError where there is no room for the positions, before anything is computed or
        changed.

        After an error each sequence goes on at `length`: chunks that were finished are kept, and of an unfinished one
        nothing. Where the engine has a single sequence and layers with a recurrence or convolution, it goes back to its
        mark, or to 0.
        """
        arrays = [np.asarray(array, np.int32).reshape(-1) for array in (tokens, positions, sequence_ids, wanted)]
        numbers = None if quality is None else _quality_numbers(quality, len(qualities))
        with self.lock:
            core = self._idle()
            try:
                self._running = Cancel() if cancel is None else cancel
                self.check_open()  # after the pass can be seen by close()
                with _with_way_out():
                    return core.forward(arrays[0], arrays[1], arrays[2], arrays[3], self._running, qualities, numbers)
            except Cancelled:
                self.check_open()
                raise
            finally:
                self._running = None
                del core  # an error that somebody keeps would keep it, and what it has of a device's memory

    def forward_layer(
        self,
        layer: int,
        tokens: NDArray[np.int32],
        residual: NDArray[np.float32],
        embed: bool,
        wanted: NDArray[np.int32],
    ) -> LayerRecord:
        """Takes the tokens of a sequence, from its first on, through one layer only.

        residual: [tokens, hidden], contiguous, before the layer; changed in place to what it is after it. embed: what
        goes into the layer is the tokens' embedding. wanted: indexes of tokens whose logits are wanted after the last
        layer. Sequence 0 is empty afterwards. Raises ReadError, ValueError.
        """
        with self.lock:
            return self._idle().forward_layer(layer, tokens, residual, embed, wanted)

    def add_sequence(self) -> int:
        """The id of a new, empty sequence. Sequence 0 is there from the beginning. Raises StateError where there is no
        room for another one."""
        with self.lock:
            return self._idle().add_sequence()

    def fork(self, id: int, length: int) -> int:
        """The id of a new sequence that begins with the first `length` positions of another one.

        Keys and values of whole blocks are shared, and copied when one of the two writes to them; recurrences and
        convolutions are copied. Raises StateError where there is no room for another sequence, or a layer does not keep
        its state at that length: a window has moved on, a recurrence is neither at its end nor at its mark.
        ValueError for a length that the sequence does not have.
        """
        with self.lock, _with_way_out():
            return self._idle().fork(id, length)

    def remove_sequence(self, id: int) -> None:
        """Its id may be given to a new one."""
        with self.lock:
            self._idle().remove_sequence(id)

    def free_positions(self) -> int:
        """Positions that can still be written, of all sequences together, a multiple of 64: blocks of that many are
        taken when the first of their positions is written, or shared ones are written to."""
        with self.lock:
            return self._idle().free_positions()

    def held_positions(self, id: int) -> int:
        """How many more can be written once this sequence is removed or truncated to 0: of blocks that it shares with
        others, none."""
        with self.lock:
            return self._idle().held_positions(id)

    def length(self, id: int) -> int:
        """Positions of a sequence."""
        with self.lock:
            return self._idle().length(id)

    def truncate(self, id: int, length: int) -> None:
        """Forgets all positions from `length` on. Raises StateError where the sequence cannot go back so far."""
        with self.lock, _with_way_out():
            self._idle().truncate(id, length)

    def mark(self, id: int) -> None:
        """Keeps a copy of what `truncate` could not get back otherwise, in place of the last one."""
        with self.lock:
            self._idle().mark(id)

    def marked(self, id: int) -> int:
        """The length that `mark` was called at; 0 if there is no copy."""
        with self.lock:
            return self._idle().marked(id)

    def has_constants(self, id: int) -> bool:
        """Whether layers have states that go back to a mark only."""
        with self.lock:
            return self._idle().has_constants(id)

    def snapshot(self, id: int) -> NDArray[np.uint8]:
        """A sequence's state, for `restore`; opaque."""
        with self.lock, _with_way_out():
            return self._idle().snapshot(id)

    def restore(self, id: int, source: NDArray[np.uint8]) -> None:
        """Puts a state back that `snapshot` of an engine with the same options gave. Raises ValueError."""
        with self.lock, _with_way_out():
            self._idle().restore(id, source)

    def record_routing(self, on: bool) -> None:
        """While switched on, every finished chunk's routing is kept until it is taken."""
        with self.lock:
            self._idle().record_routing(on)

    def take_routing(self) -> RoutingRecord:
        """What was kept; nothing where recording is switched off."""
        with self.lock:
            return self._idle().take_routing()

    def counters(self) -> EngineCounters:
        """Sums since the engine was made, up to its end if it was closed."""
        with self.lock:
            if self._core is None:
                return self._counters
            if self.running:
                self.check_idle()
            return self._core.counters()

    def residency(self) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """What is in memory of each expert now, and how often it was read: two arrays [layers, experts].

        The first: levels in memory, 0 for none of them, 255 where the layer has no such expert. The second: reads so
        far, each of one level or of several at once. Waits for no pass, so it may be asked for at any time, some times
        a second. Raises EdgemoeError.
        """
        core = self._core
        if self._closed or core is None:
            raise EdgemoeError("the model is closed")
        return core.residency()

    def _idle(self) -> _core.Engine:
        self.check_idle()
        assert self._core is not None
        return self._core


def _quality_numbers(quality: ArrayLike, count: int) -> NDArray[np.uint8]:
    numbers = np.asarray(quality).reshape(-1)
    wrong = numbers[(numbers < 0) | (numbers >= min(count, 256))]
    if len(wrong):
        raise ValueError(f"quality {wrong[0]} is not one of the {count} that are given")
    return numbers.astype(np.uint8)
