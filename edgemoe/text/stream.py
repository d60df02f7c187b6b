"""Text from tokens one at a time, and stop strings in text that arrives in pieces."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from edgemoe.errors import OptionError
from edgemoe.text.tokenizer import Tokenizer


class TextStream:
    """Turns token ids into text as they come.

    The pieces put together are `tokenizer.decode(ids)`. A piece holds whole characters only: the bytes of an unfinished
    character wait for the rest, bytes that cannot become a character are U+FFFD at once. Special tokens print nothing.

    continues: the text goes on after other text, so a space at its begin belongs to it (a SentencePiece tokenizer
        otherwise drops the first one).
    spelled: special tokens that print all the same.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False, spelled: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._spelled = spelled
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._spaces = 0 if continues else tokenizer.stripped_spaces
        # For tokenizers whose tokens have no bytes of their own: the tokens whose text is out, and the ones after them.
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; often all of its own, sometimes nothing yet."""
        if not self._tokenizer.has_pieces:
            return self._push_in_context(token_id)
        data = self._tokenizer.piece(token_id, skip_special=token_id not in self._spelled)
        while self._spaces and data:
            if not data.startswith(b" "):
                self._spaces = 0
                break
            data = data[1:]
            self._spaces -= 1
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        if self._tokenizer.has_pieces:
            return self._decoder.decode(b"", final=True)
        return self._difference()

    def _push_in_context(self, token_id: int) -> str:
        self._waiting.append(token_id)
        text = self._difference()
        # A byte of an unfinished character decodes to U+FFFD; a character has four bytes at most.
        if text.endswith("\ufffd") and len(self._waiting) < 4:
            return ""
        if text:
            self._shown, self._waiting = self._waiting, []
        return text

    def _difference(self) -> str:
        """What the waiting tokens add to the text of the shown ones."""
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._waiting)[len(before) :]


class StopStrings:
    """Watches for strings that end a generation, wherever the pieces of the text are cut.

    The stop string that is complete first counts. Text that may be the begin of one is held back.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        if isinstance(stops, (bytes, bytearray)) or not isinstance(stops, Iterable):
            raise OptionError(f"stop = {stops!r} is neither a text nor a list of texts")
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if not all(isinstance(stop, str) for stop in self._stops):
            raise OptionError(f"stop = {self._stops!r}: a stop string is a text")
        if not all(self._stops):
            raise OptionError(f"stop = {self._stops!r}: a stop string must not be empty")
        self._held = ""
        self.found: str | None = None  # the one that came

    def push(self, text: str) -> tuple[str, bool]:
        """(text to print now, whether a stop string came); the stop string and what follows it are dropped."""
        if self.found is not None:
            return "", True
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            end, at = min(ends)
            self._held, self.found = "", text[at:end]
            return text[:at], True
        held = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """What was held back, when the generation ended without a stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (and is not all of it)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
