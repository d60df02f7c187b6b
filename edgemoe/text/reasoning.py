"""What a model thinks before it answers, told apart from the answer by the marks that it writes around it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from edgemoe.errors import OptionError
from edgemoe.text.stream import overlap
from edgemoe.text.tokenizer import Tokenizer

# Begin and end of the thoughts, at the begin of an answer.
_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
# The frame of gpt-oss's answers: messages with a header, which names a channel, and a body.
_FRAME = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_BODY_ENDS = ("<|end|>", "<|start|>", "<|return|>", "<|call|>")
_MARKS = tuple(dict.fromkeys([mark for pair in _PAIRS for mark in pair] + ["<|channel>", *_FRAME]))

FORMATS = ("auto", "deepseek", "none")


class Part(NamedTuple):
    """A piece of an answer. kind: "content" or "reasoning"."""

    kind: str
    text: str


def mark_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that are marks: to be spelled out, where special tokens otherwise print nothing."""
    ids = (tokenizer.token_id(mark) for mark in _MARKS)
    return frozenset(number for number in ids if number is not None) - frozenset(tokenizer.end_ids)


def end_of_thoughts(prompt: str) -> str:
    """The mark that ends the thoughts which this text before an answer has opened; empty where it has not."""
    before = prompt.rstrip()
    return next((end for begin, end in _PAIRS if before.endswith(begin)), "")


def check_format(name: str) -> None:
    if name not in FORMATS:
        raise OptionError(f"reasoning_format = {name!r} is not one of {', '.join(FORMATS)}")


class ReasoningSplitter:
    """Cuts an answer that arrives in pieces into thoughts and content; the marks belong to neither, white space around
    the thoughts neither.

    prompt: the text before the answer, which may have opened the thoughts already.
    format: "deepseek" or "auto": as said; "none": all of the text is content, marks included.
    """

    def __init__(self, prompt: str = "", format: str = "auto") -> None:
        check_format(format)
        self._held = ""
        self._close = ""
        self._fresh = True  # nothing of this part is out yet
        self._channel = ""
        self._state = "content" if format == "none" else "begin"
        if self._state == "begin":
            before = prompt.rstrip()
            if before.endswith("<|start|>assistant"):
                self._state = "header"
            self._close = end_of_thoughts(prompt)
            if self._close:
                self._state = "thoughts"

    def split(self, pieces: Iterable[str]) -> Iterator[Part]:
        """The parts of a whole answer."""
        for piece in pieces:
            yield from self.push(piece)
        yield from self.finish()

    def push(self, text: str) -> Iterator[Part]:
        """The parts that this text completes."""
        self._held += text
        yield from self._parts(last=False)

    def finish(self) -> Iterator[Part]:
        """What was held back, at the end of the answer."""
        yield from self._parts(last=True)

    def _parts(self, last: bool) -> Iterator[Part]:
        state = ""
        while state != self._state:  # until a state waits for more text
            state = self._state
            yield from getattr(self, f"_in_{state}")(last)
            if not self._held and not last:
                return

    def _in_begin(self, last: bool) -> Iterator[Part]:
        text = self._held.lstrip()
        for begin, end in _PAIRS:
            if text.startswith(begin):
                self._held, self._close, self._state = text[len(begin) :], end, "thoughts"
                return
        if text.startswith(("<|channel|>", "<|start|>")):
            self._held, self._state = text, "header"
        elif last or not any(mark.startswith(text) for mark in (*(pair[0] for pair in _PAIRS), *_FRAME[:2])):
            self._state = "content"
        yield from ()

    def _in_content(self, last: bool) -> Iterator[Part]:
        text, self._held = self._held, ""
        if text:
            yield Part("content", text)

    def _in_thoughts(self, last: bool) -> Iterator[Part]:
        at = self._held.find(self._close)
        if at >= 0:
            thoughts, rest = self._held[:at], self._held[at + len(self._close) :]
            yield from self._stripped("reasoning", thoughts, True)
            self._held, self._state, self._fresh = rest, "answer", True
        else:
            yield from self._stripped("reasoning", self._held, last, (self._close,))

    def _in_answer(self, last: bool) -> Iterator[Part]:
        """After the thoughts: white space before the content is dropped."""
        self._held = self._held.lstrip()
        if self._held:
            self._state = "content"
        yield from ()

    def _in_header(self, last: bool) -> Iterator[Part]:
        header, mark, rest = self._held.partition("<|message|>")
        if mark:
            channel = re.search(r"<\|channel\|>\s*(\w+)", header)
            self._channel = "reasoning" if channel and channel[1] == "analysis" else "content"
            self._held, self._state, self._fresh = rest, "body", True
        elif last:
            self._held = ""
        yield from ()

    def _in_body(self, last: bool) -> Iterator[Part]:
        ends = [(at, mark) for mark in _BODY_ENDS if (at := self._held.find(mark)) >= 0]
        if ends:
            at, mark = min(ends)
            body, rest = self._held[:at], self._held[at + (0 if mark == "<|start|>" else len(mark)) :]
            yield from self._stripped(self._channel, body, True)
            self._held, self._state = rest, "header"
        else:
            yield from self._stripped(self._channel, self._held, last, _BODY_ENDS)

    def _stripped(self, kind: str, text: str, complete: bool, marks: tuple[str, ...] = ()) -> Iterator[Part]:
        """Gives out what is certain of a part; thoughts lose the white space around them."""
        held = 0 if complete else max((overlap(text, mark) for mark in marks), default=0)
        out, rest = text[: len(text) - held], text[len(text) - held :]
        if kind == "reasoning":
            out = out.lstrip() if self._fresh else out
            kept = out.rstrip()
            out, rest = kept, "" if complete else out[len(kept) :] + rest
        self._held = rest
        if out:
            self._fresh = False
            yield Part(kind, out)
