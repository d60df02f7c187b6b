"""A generation in parts: what the model thinks, what it answers, and the tools that it calls."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from edgemoe.errors import EdgemoeError
from edgemoe.serving.generation import BUSY, Generation, GenerationResult
from edgemoe.text.parts import Part

if TYPE_CHECKING:
    from edgemoe.text.answer import AnswerSplitter


class Answer:
    """An answer in parts (`Part`: thoughts, content, tool calls), as they come: an iterator, and an asynchronous
    one. Otherwise as a `Generation`.

    generation: whose text it takes apart; its result has all of the text, with the marks around the thoughts.
    """

    def __init__(self, generation: Generation, splitter: AnswerSplitter) -> None:
        self.generation = generation
        self._splitter = splitter
        self._ready: deque[Part] = deque()
        self._ended = False
        self._busy = threading.Lock()

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> Part:
        """The next part. Raises as `Generation`."""
        if not self._busy.acquire(blocking=False):
            raise EdgemoeError(BUSY)
        try:
            while not self._ready and not self._ended:
                self._take(next(self.generation, None))
            if not self._ready:
                raise StopIteration
            return self._ready.popleft()
        finally:
            self._busy.release()

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Part:
        """The same on an event loop, as `Generation`."""
        if not self._busy.acquire(blocking=False):
            raise EdgemoeError(BUSY)
        try:
            while not self._ready and not self._ended:
                self._take(await anext(self.generation, None))
            if not self._ready:
                raise StopAsyncIteration
            return self._ready.popleft()
        finally:
            self._busy.release()

    def _take(self, piece: str | None) -> None:
        self._ended = piece is None
        self._ready.extend(self._splitter.finish() if piece is None else self._splitter.push(piece))

    @property
    def result(self) -> GenerationResult:
        """As `Generation.result`."""
        return self.generation.result

    def stop(self) -> None:
        """As `Generation.stop`."""
        self.generation.stop()

    def close(self) -> None:
        """As `Generation.close`, except that parts which were told apart already still come."""
        self.generation.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
