"""Tool calls in the text of an answer, read as it comes.

What a model writes is untrusted: every length is bounded, nothing is evaluated, and a call that is none is content
again, or, where its arguments have begun already, has the text that there was for arguments.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Generator

from edgemoe.families import ToolFormat
from edgemoe.text.literals import gemma_call, python_calls, sound, typed
from edgemoe.text.parts import Part
from edgemoe.text.reader import Reader, Steps
from edgemoe.text.tools import ToolUse

_MAX_NAME = 256
# Of what is read as one, arguments that stand before the name, say; those that come as they are written have no limit.
_MAX_HELD = 1 << 20


class NoCallError(Exception):
    """The text is no call after all."""


class CallReader:
    """Reads the calls of one answer. begins: marks that a call begins with."""

    def __init__(self, form: ToolFormat, use: ToolUse) -> None:
        self.form = form
        self.begins = tuple(mark for mark in (form.begin, form.loose_begin) if mark)
        self._use = use
        self._count = 0  # of calls that are at their end
        self._open = False  # whether one has begun that is not
        self._only_known = False
        self._name = ""

    def read(self, reader: Reader, mark: str, known: bool = False) -> Steps[bool]:
        """The calls behind this mark, which was taken, up to the mark at their end; whether that came. `reader.keep()`
        says where they began; raises NoCallError where they are none, with `reader.kept()` what is not told as a part
        of a call. known: there are calls of the tools only."""
        self._only_known = known
        try:
            yield from self._calls(reader, mark)
        except NoCallError:
            self._end_call()
            raise
        closed = not self.form.end or bool((yield from reader.mark((self.form.end,), spaced=True)))
        reader.forget()
        return closed

    def _calls(self, reader: Reader, mark: str) -> Steps[None]:
        syntax = self.form.syntax
        if syntax in ("json", "tagged") and mark == "<tool_call>":
            # The forms that share this tag are told apart by what stands in it: models mix them up.
            yield from reader.space()
            if (yield from reader.peek()) in ("{", "["):
                syntax = "json"
        if syntax == "json":
            yield from self._json(reader)
        elif syntax == "named":
            yield from self._named(reader)
        elif syntax == "tagged":
            yield from self._tagged(reader, mark)
        else:
            yield from self._at_once(reader, python_calls if syntax == "python" else gemma_call)

    def message(self, reader: Reader, name: str, ends: tuple[str, ...]) -> Steps[str]:
        """A call that is a message of its own: its body are the arguments. The mark that ended it."""
        begun, blank = False, ""
        self._name, mark = name.removeprefix("functions."), ""
        while not mark and not (reader.ended and reader.empty):
            text, mark = yield from reader.until(ends)
            if not begun:
                text = text.lstrip()
            kept = text.rstrip()
            if kept:
                yield self._first(blank + kept) if not begun else self._more(blank + kept)
                begun, blank = True, text[len(kept) :]
            else:
                blank += text
        if not begun:
            yield self._first("{}")
        self._end_call()
        return mark

    # -- what parts are made of -----------------------------------------------------------------------------------

    def _first(self, text: str, id: str | None = None) -> Part:
        self._open = True
        return Part("tool_call", text, self._count, self._name, id or self._new_id())

    def _more(self, text: str) -> Part:
        return Part("tool_call", text, self._count)

    def _whole(self, name: str, arguments: str, id: str | None = None) -> Part:
        self._name = name
        part = self._first(arguments, id)
        self._end_call()
        return part

    def _end_call(self) -> None:
        self._count += self._open
        self._open = False

    def _known(self, name: str) -> str:
        """The name of a tool; models write what the tool belongs to before it, at times."""
        name = sound(name).strip().strip("\"'")
        short = name.rpartition("functions.")[2]
        found = next((known for known in (name, short) if self._use.find(known) is not None), None)
        if found is None and self._only_known:
            raise NoCallError
        return name if found is None else found

    def _new_id(self) -> str:
        if self.form.id_length:
            letters = string.ascii_letters + string.digits
            return "".join(secrets.choice(letters) for _ in range(self.form.id_length))
        return f"call_{secrets.token_hex(12)}"

    # -- JSON -----------------------------------------------------------------------------------------------------

    def _json(self, reader: Reader) -> Steps[None]:
        """An object with name and arguments, several one after the other, or a list of them."""
        yield from reader.space()
        listed = bool((yield from reader.mark(("[",))))
        more = True
        while more:
            yield from reader.space()
            if not (yield from reader.mark(("{",))):
                raise NoCallError
            yield from self._json_call(reader)
            if listed:
                more = bool((yield from reader.mark((",",), spaced=True)))
            else:
                yield from reader.space()
                more = (yield from reader.peek()) == "{"
            if more:
                reader.keep()
        if listed:
            yield from reader.mark(("]",), spaced=True)

    def _json_call(self, reader: Reader) -> Steps[None]:
        """Behind its opening brace."""
        name = id = held = None
        begun = False
        yield from reader.space()
        end = yield from reader.mark(("}",))
        while not end:
            key = _text_of((yield from _json_value(reader, _MAX_NAME)))
            if not (yield from reader.mark((":",), spaced=True)):
                raise NoCallError
            yield from reader.space()
            if key == "name" and name is None:
                name = _text_of((yield from _json_value(reader, _MAX_NAME)))
            elif key in ("arguments", "parameters") and held is None and not begun:
                if name is not None and (yield from reader.peek()) == "{":
                    self._name, begun = self._known(name), True
                    reader.forget()
                    yield from self._stream(reader, id)
                else:
                    held = yield from _json_value(reader, _MAX_HELD)
            else:
                value = yield from _json_value(reader, _MAX_HELD)
                if key == "id" and value.startswith('"') and len(value) < _MAX_NAME:
                    id = _text_of(value)
            end = yield from reader.mark((",", "}"), spaced=True)
            if not end:
                raise NoCallError
            if end == ",":
                end = ""
                yield from reader.space()
        if begun:
            self._end_call()
        elif name is None:
            raise NoCallError
        else:
            name = self._known(name)
            reader.forget()
            yield self._whole(name, _object(held), id)

    def _stream(self, reader: Reader, id: str | None = None) -> Steps[None]:
        """Arguments as they are written; the call is not at its end."""
        first = True
        for piece in _json_pieces(reader):
            if piece is None:
                yield None
            else:
                yield self._first(piece, id) if first else self._more(piece)
                first = False

    # -- name, separator, JSON ------------------------------------------------------------------------------------

    def _named(self, reader: Reader) -> Steps[None]:
        form, found = self.form, False
        while not form.name_begin or (yield from reader.mark((form.name_begin,), spaced=True)):
            if found:
                reader.keep()
            stops = [mark for mark in (form.separator, form.call_end, form.end) if mark]
            name, mark = yield from reader.all_until(stops, _MAX_NAME)
            if mark != form.separator:
                raise NoCallError
            id = None
            name = name.strip().removeprefix(form.name_prefix)
            if form.numbered:
                id = form.name_prefix + name
                name = name.rpartition(":")[0] or name
            yield from reader.space()
            if (yield from reader.peek()) != "{":
                raise NoCallError
            self._name, found = self._known(name), True
            reader.forget()
            yield from self._stream(reader, id)
            self._end_call()
            yield from reader.mark((form.call_end.lstrip(),), spaced=True)
            if not form.name_begin:
                return
        if not found:
            raise NoCallError

    # -- every argument between marks -----------------------------------------------------------------------------

    def _tagged(self, reader: Reader, mark: str) -> Steps[None]:
        form, found = self.form, False
        while True:
            if mark != form.loose_begin or not mark:
                mark = form.name_begin
                if mark and not (yield from reader.mark((mark,), spaced=True)):
                    break
            mark = ""
            if found:
                reader.keep()
            yield from self._tagged_call(reader)
            found = True
            if not form.name_begin:
                return
        if not found:
            raise NoCallError

    def _tagged_call(self, reader: Reader) -> Steps[None]:
        """Behind the mark before its name."""
        form = self.form
        ends = tuple(mark for mark in (form.call_end, form.end) if mark)
        stops = (form.name_end,) if form.name_end else ("\n", form.key_begin, *ends)
        name, mark = yield from reader.all_until(stops, _MAX_NAME)
        if not name.strip() or not mark:
            raise NoCallError
        self._name = self._known(name)
        tool = self._use.find(self._name)
        reader.forget()
        yield self._first("{")
        first, mark = True, mark if mark in (form.key_begin, *ends) else ""
        while True:
            mark = mark or (yield from reader.mark((form.key_begin, *ends), spaced=True))
            if mark != form.key_begin:
                break
            key, mark = yield from reader.all_until((form.key_end,), _MAX_NAME)
            if not mark:
                raise NoCallError
            if form.value_begin:
                yield from reader.mark((form.value_begin,), spaced=True)
            schema = tool.property_schema(key) if tool is not None else {}
            lead = ("" if first else ", ") + json.dumps(key, ensure_ascii=False) + ": "
            if schema.get("type") == "string":
                complete = yield from self._tagged_text(reader, lead)
            else:
                value, complete = yield from reader.all_until((form.value_end,), _MAX_HELD)
                yield self._more(lead + typed(self._bare(value), schema))
            if not complete:
                raise NoCallError
            first, mark = False, ""
        yield self._more("}")
        self._end_call()
        if mark and mark == form.end != form.call_end:
            reader.unread(mark)

    def _tagged_text(self, reader: Reader, lead: str) -> Steps[str]:
        """A value that is a text, as it is written; the mark behind it, "" where the text ended without."""
        begun, held, mark = False, "", ""
        yield self._more(lead + '"')
        while not mark and not (reader.ended and reader.empty):
            text, mark = yield from reader.until((self.form.value_end,))
            if self.form.own_lines and not begun and text:
                text, begun = text.removeprefix("\n"), True
            text = held + text
            held = ""
            if self.form.own_lines and text.endswith("\n"):  # the line end before the mark is no part of the value
                text, held = text[:-1], "\n"
            if text:
                yield self._more(json.dumps(text, ensure_ascii=False)[1:-1])
        if not mark:
            return ""
        yield self._more('"')
        return mark

    def _bare(self, value: str) -> str:
        return value.removeprefix("\n").removesuffix("\n") if self.form.own_lines else value

    # -- what is read when all of it is there ---------------------------------------------------------------------

    def _at_once(self, reader: Reader, parse: Callable[[str], list[tuple[str, str]] | None]) -> Steps[None]:
        text, mark = yield from reader.all_until((self.form.end,), _MAX_HELD)
        calls = parse(text) if len(text) <= _MAX_HELD else None
        if not calls:
            raise NoCallError
        calls = [(self._known(name), arguments) for name, arguments in calls]
        reader.unread(mark)
        reader.forget()
        for name, arguments in calls:
            yield self._whole(name, arguments)


# -- JSON as it comes -------------------------------------------------------------------------------------------------

_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")


def _json_pieces(reader: Reader) -> Generator[str | None, None, None]:
    """The text of the value that comes next, in pieces, None where more text is needed. Control characters in strings,
    which models write as they are, become escapes. The value ends where its brackets do, whatever stands between."""
    depth, quoted = 0, False
    first = True
    while True:
        while reader.empty:
            if reader.ended:
                return
            yield None
        text = reader.held
        if first and text[0] not in '"{[':
            while not reader.ended and _scalar_end(text) == len(text):
                yield None
                text = reader.held
                if len(text) > _MAX_NAME:
                    break
            length = _scalar_end(text)
            if not 0 < length <= _MAX_NAME:
                raise NoCallError
            yield reader.take(length)
            return
        first = False
        at, pieces, done = 0, [], False
        while not done:
            found = (_IN_STRING if quoted else _STRUCTURE).search(text, at)
            if found is None:
                pieces.append(text[at:])
                at = len(text)
                break
            sign = found[0]
            if quoted and sign == "\\" and found.end() == len(text):  # what it escapes has not come
                pieces.append(text[at : found.start()])
                at = found.start()
                break
            pieces.append(text[at : found.start()])
            at = found.end()
            if not quoted:
                depth += (sign in "{[") - (sign in "}]")
                quoted = sign == '"'
                done = not depth and not quoted
            elif sign == '"':
                quoted = False
                done = not depth
            elif sign == "\\":
                sign += text[at]
                at += 1
            else:
                sign = json.dumps(sign)[1:-1]
            pieces.append(sign)
        reader.take(at)
        if any(pieces):
            yield "".join(pieces)
        if done:
            return
        if reader.ended:
            if not reader.empty:
                yield reader.rest()
            return
        if not reader.empty:  # a backslash alone: wait for what follows it
            yield None


def _scalar_end(text: str) -> int:
    found = _SCALAR.match(text)
    return found.end() if found else 0


def _json_value(reader: Reader, limit: int) -> Steps[str]:
    """The text of the value that comes next. Raises NoCallError where it is too long, or not all there."""
    pieces, size = [], 0
    for piece in _json_pieces(reader):
        if piece is None:
            yield None
            continue
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise NoCallError
    text = "".join(pieces)
    if _loaded(text) is None and text != "null":
        raise NoCallError
    return text


def _loaded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text_of(value: str) -> str:
    text = _loaded(value)
    if not isinstance(text, str):
        raise NoCallError
    return text


def _object(value: str | None) -> str:
    """Arguments as the text of an object: some models write it as a string."""
    if value is None or value == "null":
        return "{}"
    inner = _loaded(value)
    return sound(inner) if isinstance(inner, str) and isinstance(_loaded(inner), dict) else value
