"""Text that arrives in pieces, read as if all of it were there.

A parser is a generator: it yields what it has found, and None where it cannot go on without more text. `Reader` holds
what has come and was not taken; its methods are such generators, and are called with `yield from`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

from edgemoe.text.parts import Part
from edgemoe.text.stream import overlap

T = TypeVar("T")
Steps = Generator[Part | None, None, T]


class Reader:
    """What has come of a text. `push` and `end` are for whoever has the text, the rest is for parsers.

    ended: nothing more will come.
    """

    def __init__(self) -> None:
        self.ended = False
        self._text = ""
        self._at = 0
        self._kept: int | None = None  # from here on, what was taken can be had back

    def push(self, text: str) -> None:
        done = self._at if self._kept is None else self._kept
        self._text = self._text[done:] + text
        self._at -= done
        if self._kept is not None:
            self._kept = 0

    def end(self) -> None:
        self.ended = True

    @property
    def empty(self) -> bool:
        """Whether all that has come was taken."""
        return self._at == len(self._text)

    @property
    def held(self) -> str:
        """What has come and was not taken."""
        return self._text[self._at :]

    def unread(self, text: str) -> None:
        """Gives back what was taken last."""
        self._at -= len(text)

    def keep(self) -> None:
        """From now on what is taken is remembered, for `kept`, until `forget`."""
        self._kept = self._at

    def kept(self) -> str:
        return "" if self._kept is None else self._text[self._kept : self._at]

    def forget(self) -> None:
        self._kept = None

    def rest(self) -> str:
        """Takes all that has come, without waiting."""
        text, self._at = self._text[self._at :], len(self._text)
        return text

    def peek(self) -> Steps[str]:
        """The next character, which is not taken; "" at the end."""
        while self.empty and not self.ended:
            yield None
        return self._text[self._at : self._at + 1]

    def take(self, length: int) -> str:
        """Takes so many characters of those that have come."""
        text = self._text[self._at : self._at + length]
        self._at += len(text)
        return text

    def space(self) -> Steps[str]:
        """Takes white space, up to something else or the end."""
        taken = ""
        while (yield from self.peek()).isspace():
            held = self._text[self._at :]
            taken += self.take(len(held) - len(held.lstrip()))
        return taken

    def mark(self, marks: Iterable[str], spaced: bool = False) -> Steps[str]:
        """Takes the one of these marks that comes next, the longest if several do; "" where none does.

        spaced: white space may stand before it, and is taken with it.
        """
        marks = [mark for mark in marks if mark]
        longest = max(map(len, marks), default=0)
        while True:
            at = self._at
            if spaced:
                held = self._text[at:]
                at += len(held) - len(held.lstrip())
            text = self._text[at : at + longest]
            if self.ended or not any(len(mark) > len(text) and mark.startswith(text) for mark in marks):
                found = max((mark for mark in marks if text.startswith(mark)), key=len, default="")
                if found:
                    self._at = at + len(found)
                return found
            yield None

    def until(self, marks: Iterable[str]) -> Steps[tuple[str, str]]:
        """(text before the next of these marks, that mark); both are taken. Text that is certain comes without its
        mark, "", as soon as there is some; both are empty at the end."""
        marks = tuple(marks)
        while True:
            text = self._text
            found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark, self._at)) >= 0]
            if found:
                at, _, mark = min(found)
                if not self.ended and any(self._cut(at, other) for other in marks if len(other) > len(mark)):
                    before = self.take(at - self._at)
                    if before:
                        return before, ""
                    yield None
                    continue
                before = self.take(at - self._at)
                self.take(len(mark))
                return before, mark
            if self.ended:
                return self.rest(), ""
            held = text[self._at :]
            certain = len(held) - max((overlap(held, mark) for mark in marks), default=0)
            if certain:
                return self.take(certain), ""
            yield None

    def all_until(self, marks: Iterable[str], limit: int) -> Steps[tuple[str, str]]:
        """As `until`, with all of the text before the mark at once; "" for the mark at the end, and where there are
        more than `limit` characters without one."""
        marks = tuple(marks)
        pieces: list[str] = []
        room = limit
        while True:
            text, mark = yield from self.until(marks)
            pieces.append(text)
            room -= len(text)
            if room < 0:
                self.unread(mark)
                return "".join(pieces), ""
            if mark or (self.ended and self.empty):
                return "".join(pieces), mark

    def _cut(self, at: int, mark: str) -> bool:
        """Whether the text from here on is the begin of this mark, and not all of it."""
        text = self._text[at : at + len(mark)]
        return len(text) < len(mark) and mark.startswith(text)
