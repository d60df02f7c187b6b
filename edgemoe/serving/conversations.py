"""What a model has said lately: the tokens of its own words, which need not be those that their text becomes."""

from __future__ import annotations

import sys
import threading
from array import array

# For texts and tokens together; the oldest are forgotten.
BYTES = 4_000_000


class Conversations:
    """Texts of conversations that may go on, and the tokens that were read and written for them."""

    def __init__(self, limit: int = BYTES) -> None:
        self._limit = limit
        self._known: dict[str, array[int]] = {}  # the oldest first
        self._lock = threading.Lock()

    def remember(self, text: str, tokens: list[int]) -> None:
        """text: a prompt and its answer; tokens: of both."""
        with self._lock:
            self._known.pop(text, None)
            self._known[text] = array("i", tokens)
            sizes = [(known, sys.getsizeof(known) + 4 * len(ids)) for known, ids in self._known.items()]
            total = sum(size for _, size in sizes)
            for known, size in sizes[:-1]:  # the last one is kept in any case
                if total <= self._limit:
                    break
                del self._known[known]
                total -= size

    def recall(self, prompt: str) -> tuple[str, list[int]]:
        """The longest text that `prompt` goes on from, and its tokens; empty if there is none."""
        with self._lock:
            text = max((known for known in self._known if prompt.startswith(known)), key=len, default="")
            return text, list(self._known.get(text, ()))

    def clear(self) -> None:
        with self._lock:
            self._known.clear()
