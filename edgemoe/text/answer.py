"""An answer's text taken apart by its marks: what the model thinks, what it answers, the tools that it calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from edgemoe.errors import OptionError
from edgemoe.families import ToolFormat
from edgemoe.text.call_syntax import CallReader, NoCallError
from edgemoe.text.parts import Part
from edgemoe.text.reader import Reader, Steps
from edgemoe.text.stream import overlap
from edgemoe.text.tokenizer import Tokenizer

# Begin and end of the thoughts, at the begin of an answer.
THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
# The frame of gpt-oss's answers: messages with a header, which names a channel, and a body.
_FRAME = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_HEADER_BEGINS = ("<|start|>", "<|channel|>", "<|message|>")
_BODY_ENDS = ("<|end|>", "<|start|>", "<|return|>", "<|call|>")
_CHANNELS = ("analysis", "commentary", "final")
_MAX_HEADER = 512
_START = r"(?:<\|start\|>\s{0,2}[\w.-]*)?"
_CHANNEL = (
    r"\s{0,2}(?:<\|channel\|>\s{0,2}(?P<channel>\w*)(?:\s{1,2}to=(?P<late>[\w.:/-]*))?"
    r"\s{0,2}(?:<\|constrain\|>)?\s{0,2}[\w/.-]*\s{0,2})?"
)
_HEADER = re.compile(_START + r"(?:\s{0,2}to=(?P<to>[\w.:/-]*))?" + _CHANNEL)
_BEGUN_HEADER = re.compile(_START + r"(?:\s{0,2}t(?:o(?:=[\w.:/-]*)?)?)?" + _CHANNEL)
_MARKS = (*(mark for pair in THOUGHTS for mark in pair), "<|channel>", *_FRAME)

FORMATS = ("auto", "deepseek", "none")


def mark_ids(tokenizer: Tokenizer, form: ToolFormat | None = None) -> frozenset[int]:
    """The tokens that are marks, those of tool calls of this form with them: to be spelled out, where special tokens
    otherwise print nothing."""
    texts = {*_MARKS, *(() if form is None else form.tokens())}
    ids = (tokenizer.token_id(text) for text in texts)
    return frozenset(number for number in ids if number is not None) - frozenset(tokenizer.end_ids)


def end_of_thoughts(prompt: str) -> str:
    """The mark that ends the thoughts which this text before an answer has opened; empty where it has not."""
    before = prompt.rstrip()
    return next((end for begin, end in THOUGHTS if before.endswith(begin)), "")


def is_framed(prompt: str) -> bool:
    """Whether an answer to this text begins with the header of a message (gpt-oss)."""
    return prompt.rstrip().endswith("<|start|>assistant")


def check_format(name: str) -> None:
    if name not in FORMATS:
        raise OptionError(f"reasoning_format = {name!r} is not one of {', '.join(FORMATS)}")


class AnswerSplitter:
    """Cuts an answer that arrives in pieces into thoughts, content and tool calls; the marks belong to none of them,
    white space around thoughts and calls neither. Wherever the text is cut, the parts put together are the same.

    prompt: the text before the answer, which may have opened the thoughts already.
    format: "deepseek" or "auto": as said; "none": thoughts are content, with their marks.
    calls: what reads tool calls, where there may be some.
    """

    def __init__(self, prompt: str = "", format: str = "auto", calls: CallReader | None = None) -> None:
        check_format(format)
        self._calls = calls
        self._reader = Reader()
        self._steps = self._answer(prompt, format != "none")

    def split(self, pieces: Iterable[str]) -> Iterator[Part]:
        """The parts of a whole answer."""
        for piece in pieces:
            yield from self.push(piece)
        yield from self.finish()

    def push(self, text: str) -> Iterator[Part]:
        """The parts that this text completes."""
        if text:
            self._reader.push(text)
            yield from self._run()

    def finish(self) -> Iterator[Part]:
        """What was held back, at the end of the answer."""
        self._reader.end()
        yield from self._run()

    def _run(self) -> Iterator[Part]:
        for part in self._steps:
            if part is None:
                return
            yield part

    def _answer(self, prompt: str, apart: bool) -> Steps[None]:
        harmony = self._calls is not None and self._calls.form.syntax == "harmony"
        close, framed = end_of_thoughts(prompt), is_framed(prompt)
        if not apart and not (harmony and framed):
            yield from self._content()
            return
        if not close and not framed:
            begin = yield from self._reader.mark((*(begin for begin, _ in THOUGHTS), *_HEADER_BEGINS[:2]), spaced=True)
            close = dict(THOUGHTS).get(begin, "")
            framed = begin in _HEADER_BEGINS
            self._reader.unread(begin if framed else "")
        if framed:
            yield from self._messages(apart)
            return
        if close:
            yield from self._thoughts(close)
            yield from self._reader.space()
        yield from self._content()

    def _thoughts(self, close: str) -> Steps[None]:
        """Thoughts up to this mark, or to a call: some models forget the mark. Calls by a name that no tool has are
        thoughts."""
        begins = () if self._calls is None else self._calls.begins
        mark, blank = yield from self._body("reasoning", (close, *begins))
        while self._calls is not None and mark in begins:
            self._reader.unread(mark)
            self._reader.keep()
            self._reader.take(len(mark))
            try:
                yield from self._calls.read(self._reader, mark, known=True)
                return
            except NoCallError:
                text = self._reader.kept()
                self._reader.forget()
                if not text:  # the call had begun
                    return
                yield Part("reasoning", blank + text)
            mark, blank = yield from self._body("reasoning", (close, *begins), fresh=False)

    def _body(self, kind: str, ends: tuple[str, ...], fresh: bool = True) -> Steps[tuple[str, str]]:
        """Text up to one of these marks, which is returned; thoughts lose the white space around them, that behind them
        is returned, too. fresh: they begin here."""
        blank, mark = "", ""
        while not mark and not (self._reader.ended and self._reader.empty):
            text, mark = yield from self._reader.until(ends)
            if kind == "reasoning":
                text = blank + text
                text = text.lstrip() if fresh else text
                kept = text.rstrip()
                text, blank = kept, text[len(kept) :]
            if text:
                fresh = False
                yield Part(kind, text)
        return mark, blank

    def _content(self) -> Steps[None]:
        if self._calls is None:
            yield from self._body("content", ())
            return
        # White space before a call, and between calls, belongs to neither.
        blank, fresh, lost = "", False, ""
        while True:
            text, mark = yield from self._reader.until((*self._calls.begins, *filter(None, (lost,))))
            if not text and not mark:
                break
            text = blank + text
            text = text.lstrip() if fresh else text
            kept = text.rstrip()
            blank = text[len(kept) :]
            if kept:
                fresh = False
                yield Part("content", kept)
            if mark and mark == lost:  # of a call that was broken off
                blank, fresh, lost = "", True, ""
            elif mark:
                self._reader.unread(mark)
                self._reader.keep()
                self._reader.take(len(mark))
                lost = ""
                try:
                    closed = yield from self._calls.read(self._reader, mark)
                    blank, fresh, lost = "", True, "" if closed else self._calls.form.end
                except NoCallError:
                    text = self._reader.kept()
                    self._reader.forget()
                    if text:
                        yield Part("content", blank + text)
                        blank, fresh = "", False
                    else:
                        blank, fresh, lost = "", True, self._calls.form.end
        if blank and not fresh:
            yield Part("content", blank)

    # -- messages with headers ------------------------------------------------------------------------------------

    def _messages(self, apart: bool) -> Steps[None]:
        while True:
            header = yield from self._header()
            if header is None:
                if not (yield from self._reader.peek()):
                    return
                # Not in a frame: content. A mark that begins nothing is content, too.
                begin = yield from self._reader.mark(_HEADER_BEGINS)
                if begin:
                    yield Part("content", begin)
                mark, _ = yield from self._body("content", (*_HEADER_BEGINS, *_BODY_ENDS))
                self._reader.unread(mark if mark in _HEADER_BEGINS else "")
                continue
            channel, recipient = header
            if not apart and channel == "analysis":
                yield Part("content", "<|channel|>analysis<|message|>")
                mark, _ = yield from self._body("content", _BODY_ENDS)
                yield Part("content", mark if mark != "<|start|>" else "<|end|>")
            elif recipient and self._calls is not None:
                mark = yield from self._calls.message(self._reader, recipient, _BODY_ENDS)
            else:
                mark, _ = yield from self._body("reasoning" if channel == "analysis" else "content", _BODY_ENDS)
            self._reader.unread(mark if mark == "<|start|>" else "")

    def _header(self) -> Steps[tuple[str, str] | None]:
        """Takes a message's header: its channel, and the function that it is for. None where there is none, or at the
        end of the text."""
        while True:
            text = self._reader.held
            before, mark, _ = text.partition("<|message|>")
            if mark:
                found = _HEADER.fullmatch(before) if len(before) <= _MAX_HEADER else None
                if found is None:
                    return None
                self._reader.take(len(before) + len(mark))
                return found["channel"] or "", found["to"] or found["late"] or ""
            certain = text[: len(text) - max(overlap(text, mark) for mark in _FRAME)]
            lead = certain.lstrip()
            begun = _BEGUN_HEADER.fullmatch(certain)
            may_be = begun is not None and lead.startswith((*_HEADER_BEGINS, "to="))
            if not may_be and not "to=".startswith(lead):
                return None
            if self._reader.ended:
                channel = begun["channel"] or "" if begun is not None else ""
                framed = lead.startswith(_HEADER_BEGINS) or certain != text
                if framed and any(name.startswith(channel) for name in _CHANNELS):  # a frame without anything in it
                    self._reader.rest()
                return None
            if len(text) > _MAX_HEADER:
                return None
            yield None
