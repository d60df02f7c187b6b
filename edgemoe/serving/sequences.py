"""The engine's sequences: which tokens each holds, and which session has it.

A session gets the sequence that saves it the most work: an idle one that holds its beginning, or the beginning that
another one holds, whose blocks the engine lets it share. What nobody needs any more stays until its room is wanted; the
oldest leaves first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgemoe.engine import Engine
from edgemoe.errors import StateError
from edgemoe.serving.session import EngineSequence, Session

if TYPE_CHECKING:
    from edgemoe.serving.prompt_cache import PromptCache

# Fewer tokens are computed again as fast as the prompt cache is read.
KEPT = 256
# A shorter common beginning is computed again rather than shared.
SHARED = 16
# Positions of a block, which sequences share whole.
BLOCK = 64


class EngineSequences:
    """All of them. To be used by one thread at a time, with the engine's lock held."""

    def __init__(self, engine: Engine, count: int, cache: PromptCache | None) -> None:
        """count: of sequences, which the engine must have room for. cache: where what they held is kept."""
        self._engine = engine
        self._cache = cache
        self.all = [EngineSequence(0), *(EngineSequence(engine.add_sequence()) for _ in range(count - 1))]
        self._turns = 0

    def touch(self, sequence: EngineSequence) -> None:
        self._turns += 1
        sequence.turn = self._turns

    @property
    def idle(self) -> list[EngineSequence]:
        """Those that nobody has, the one used least recently first."""
        return sorted((one for one in self.all if one.holder is None), key=lambda one: one.turn)

    def take(self, session: Session) -> EngineSequence | None:
        """Gives the session a sequence, and with it what it need not compute; None where all are taken."""
        idle = self.idle
        if not idle:
            return None
        tokens, oldest = session.tokens, idle[0]
        best, shared = oldest, _saved(oldest, session)
        for one in self.all:
            common = _saved(one, session)
            if common > shared or (common == shared > 0 and one.holder is None and best.holder is not None):
                best, shared = one, common
        cache = self._cache if session.quality is None else None
        if cache is not None and cache.find(tokens) >= shared + KEPT and self._load(oldest, tokens):
            oldest.give(session)
            return oldest
        chosen = best
        # What another one holds beyond the common beginning is worth keeping: it may be gone back to.
        if best.holder is not None or (best is not oldest and len(best.tokens) > shared):
            shares = shared >= SHARED and self._share(best, oldest, min(shared, len(tokens) - 1))
            chosen = oldest if shares or best.holder is not None else best
        if _saved(chosen, session) < len(chosen.tokens):
            self.keep(chosen)
        chosen.give(session)
        return chosen

    def go_back(self, sequence: EngineSequence, length: int) -> None:
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
        del sequence.tokens[engine.length(sequence.id) :]

    def empty(self, sequence: EngineSequence) -> None:
        """Frees what the sequence holds."""
        sequence.hold([])
        self._engine.truncate(sequence.id, 0)

    def keep(self, sequence: EngineSequence) -> None:
        """Has the prompt cache keep what the sequence holds, if it is worth it."""
        cache, tokens = self._cache, sequence.tokens
        if cache is None or sequence.quality is not None or len(tokens) < KEPT or cache.busy:
            return
        with contextlib.suppress(Exception):  # MemoryError, no more threads, ...: it is only a cache
            if self._engine.length(sequence.id) == len(tokens) and not cache.holds(tokens):
                cache.save(tokens.copy(), self._engine.snapshot(sequence.id))

    def keep_all(self) -> None:
        """The same for all of them, until it is written."""
        if self._cache is not None:
            for sequence in self.all:
                self._cache.wait()
                self.keep(sequence)
            self._cache.wait()

    def make_room(self) -> bool:
        """Frees what the idle sequence holds that was used least recently; false if none holds anything."""
        for sequence in self.idle:
            if sequence.tokens or self._engine.length(sequence.id):
                self.keep(sequence)
                self.empty(sequence)
                return True
        return False

    def shared(self, session: Session) -> int:
        """Positions of whole blocks that a session can share with one that runs."""
        running = (one for one in self.all if one.holder is not None)
        return max((_saved(one, session) for one in running), default=0) // BLOCK * BLOCK

    def room(self, positions: int) -> int:
        """Positions, of all that there are, that can be written without a session's losing its sequence."""
        free = self._engine.free_positions()
        free += sum(self._engine.held_positions(sequence.id) for sequence in self.idle)
        # Blocks that idle ones share with each other count for none of them.
        held = sum(-(-len(one.tokens) // BLOCK) * BLOCK for one in self.all if one.holder is not None)
        return max(free, positions - held)

    def _load(self, target: EngineSequence, tokens: list[int]) -> bool:
        """Puts what the prompt cache has of these tokens in place of what a sequence holds."""
        cache, engine = self._cache, self._engine
        assert cache is not None
        self.keep(target)
        self.empty(target)
        try:
            found = cache.load(tokens)
            while found is not None:
                try:
                    engine.restore(target.id, found[1])
                    break
                except StateError:
                    if not self.make_room():
                        found = None
            if found is not None and engine.length(target.id) == len(found[0]):
                target.tokens = found[0]
                return True
        except Exception:  # not a state of this engine, no memory, ...: it is only a cache
            cache.forget(tokens)
        self.empty(target)
        return False

    def _share(self, source: EngineSequence, target: EngineSequence, length: int) -> bool:
        """Puts the first `length` positions of one sequence in place of what another one holds, or as many as the
        layers can share; false if that is none."""
        engine = self._engine
        self.keep(target)
        self.empty(target)
        engine.remove_sequence(target.id)
        marked = engine.marked(source.id)
        for possible in (length, marked):
            if 0 < possible <= length:
                try:
                    target.id = engine.fork(source.id, possible)
                except StateError:  # a window has moved on, or a recurrence went over it
                    continue
                except BaseException:
                    target.id = engine.add_sequence()
                    raise
                target.tokens, target.quality = source.tokens[:possible], source.quality
                return True
        target.id = engine.add_sequence()
        return False


def _saved(sequence: EngineSequence, session: Session) -> int:
    """How many of the session's tokens the sequence holds."""
    return common_prefix(sequence.tokens, session.tokens) if sequence.quality == session.quality else 0


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = min(len(left), len(right))
    if left[:count] == right[:count]:
        return count
    return next(i for i in range(count) if left[i] != right[i])
