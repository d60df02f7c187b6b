"""Values that models write in other notations than JSON, as JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

_MAX_DEPTH = 64
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NAME = re.compile(r"[\w.:/-]+")
_KEY = re.compile(r"[^\s=(),'\"]+")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_HEX = {"x": 2, "u": 4, "U": 8}
_GEMMA_QUOTE = '<|"|>'
_GEMMA_KEY = re.compile(r"[^:{}\[\],]+")
_GEMMA_BARE = re.compile(r"[^{}\[\],]+")


def sound(text: str) -> str:
    """Escaped pairs of surrogates as the characters that they are; one alone is U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def python_calls(text: str) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON) of `[f(a=1, b="x"), g()]`, or of one call without the brackets; None for anything else.
    A list of JSON objects with name and arguments is taken too, and fences around it are left out."""
    text = re.sub(r"\A\s*```\w*", "", text).rstrip().removesuffix("```")
    if re.match(r"\s*\[?\s*\{", text):
        return _json_calls(text)
    parser = _Literals(text)
    try:
        return parser.calls()
    except _NoValueError:
        return None


def gemma_call(text: str) -> list[tuple[str, str]] | None:
    """As `python_calls`, of `call:f{a:1,b:<|"|>x<|"|>}`."""
    parser = _Literals(text)
    try:
        return parser.gemma_call()
    except _NoValueError:
        return None


def typed(text: str, schema: Mapping[str, Any]) -> str:
    """A bare value as JSON, by what its schema says it is: a string where it may be one and is nothing else."""
    types = schema.get("type")
    types = {types} if isinstance(types, str) else set(types) if isinstance(types, list) else _types(schema)
    bare = text.strip()
    if types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    value = _WORDS.get(bare, bare)
    try:
        loaded = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        literal = _literal(bare) if types & {"object", "array"} else None
        return literal if literal is not None else json.dumps(text, ensure_ascii=False)
    fits = not types or _type(loaded) in types or (_type(loaded) == "integer" and "number" in types)
    if not fits and "string" in types:
        return json.dumps(text, ensure_ascii=False)
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _types(schema: Mapping[str, Any]) -> set[str]:
    """What the alternatives of a schema are; empty where it does not say."""
    types: set[str] = set()
    for keyword in ("anyOf", "oneOf"):
        alternatives = schema.get(keyword)
        for one in alternatives if isinstance(alternatives, list) else ():
            kind = one.get("type") if isinstance(one, Mapping) else None
            if not isinstance(kind, str):
                return set()
            types.add(kind)
    values = schema.get("enum")
    if not types and isinstance(values, list):
        types = {_type(value) for value in values}
    return types


def _type(value: Any) -> str:
    for kind, name in ((str, "string"), (bool, "boolean"), (int, "integer"), (float, "number"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "object"


def _literal(text: str) -> str | None:
    """A list or map as Python writes it."""
    parser = _Literals(text)
    try:
        value = parser.value(0)
        parser.space()
        return value if parser.at_end else None
    except _NoValueError:
        return None


def _json_calls(text: str) -> list[tuple[str, str]] | None:
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    calls = []
    for item in found if isinstance(found, list) else [found]:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str):
            return None
        arguments = item.get("arguments") or item.get("parameters") or {}
        calls.append((name, sound(json.dumps(arguments, ensure_ascii=False))))
    return calls


class _NoValueError(Exception):
    """The text is not what it should be."""


class _Literals:
    """A parser of such notations; everything is JSON text as soon as it is read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._text)

    def calls(self) -> list[tuple[str, str]]:
        calls = []
        listed = self.take("[")
        while True:
            name = self._match(_NAME)
            self._need("(")
            arguments = []
            while not self.take(")"):
                key = self._match(_KEY)
                self._need("=")
                arguments.append(f"{json.dumps(key, ensure_ascii=False)}: {self.value(0)}")
                if not self.take(","):
                    self._need(")")
                    break
            calls.append((name, "{" + ", ".join(arguments) + "}"))
            if not (listed and self.take(",")) or (listed and self._next() == "]"):
                break
        if listed:
            self._need("]")
        self.space()
        if not self.at_end:
            raise _NoValueError
        return calls

    def gemma_call(self) -> list[tuple[str, str]]:
        self._need("call:")
        name = self._match(_NAME)
        self.space()
        value = self.gemma_value(0)
        self.space()
        if not value.startswith("{") or not self.at_end:
            raise _NoValueError
        return [(name, value)]

    def value(self, depth: int) -> str:
        """A Python or JSON value."""
        if depth > _MAX_DEPTH:
            raise _NoValueError
        sign = self._next()
        if sign and sign in "\"'":
            return json.dumps(self._quoted(sign), ensure_ascii=False)
        if sign and sign in "[(":
            self._at += 1
            return "[" + ", ".join(self._items(")" if sign == "(" else "]", depth)) + "]"
        if sign == "{":
            self._at += 1
            return "{" + ", ".join(self._pairs(depth)) + "}"
        return self._bare()

    def gemma_value(self, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise _NoValueError
        if self.take(_GEMMA_QUOTE):
            return json.dumps(self._gemma_text(), ensure_ascii=False)
        items: list[str] = []
        if self.take("["):
            while not self.take("]"):
                items.append(self.gemma_value(depth + 1))
                if not self.take(",") and self._next() != "]":
                    raise _NoValueError
            return "[" + ", ".join(items) + "]"
        if self.take("{"):
            while not self.take("}"):
                key = self._gemma_text() if self.take(_GEMMA_QUOTE) else self._match(_GEMMA_KEY).strip()
                self._need(":")
                items.append(f"{json.dumps(key, ensure_ascii=False)}: {self.gemma_value(depth + 1)}")
                if not self.take(",") and self._next() != "}":
                    raise _NoValueError
            return "{" + ", ".join(items) + "}"
        bare = self._match(_GEMMA_BARE).strip()
        value = _WORDS.get(bare, bare)
        return value if value in _WORDS.values() or _NUMBER.fullmatch(value) else json.dumps(bare, ensure_ascii=False)

    def _items(self, end: str, depth: int) -> list[str]:
        items: list[str] = []
        while not self.take(end):
            items.append(self.value(depth + 1))
            if not self.take(",") and self._next() != end:
                raise _NoValueError
        return items

    def _pairs(self, depth: int) -> list[str]:
        pairs: list[str] = []
        while not self.take("}"):
            sign = self._next()
            if not sign or sign not in "\"'":
                raise _NoValueError
            key = json.dumps(self._quoted(sign), ensure_ascii=False)
            self._need(":")
            pairs.append(f"{key}: {self.value(depth + 1)}")
            if not self.take(",") and self._next() != "}":
                raise _NoValueError
        return pairs

    def _quoted(self, sign: str) -> str:
        """A string. Models forget to escape quotes within: one ends the string only where something may follow it."""
        quote = sign * 3 if self._text.startswith(sign * 3, self._at) else sign
        self._at += len(quote)
        pieces: list[str] = []
        stop = re.compile(rf"\\|{quote}")
        while True:
            found = stop.search(self._text, self._at)
            if found is None:
                raise _NoValueError
            pieces.append(self._text[self._at : found.start()])
            self._at = found.end()
            if found[0] == "\\":
                pieces.append(self._escape())
            elif len(quote) == 3 or re.compile(r"\s*(?:[,)\]}:]|\Z)").match(self._text, self._at):
                return sound("".join(pieces))
            else:
                pieces.append(found[0])

    def _escape(self) -> str:
        kind = self._text[self._at : self._at + 1]
        self._at += 1
        digits = self._text[self._at : self._at + _HEX.get(kind, 0)]
        if digits and re.fullmatch(f"[0-9A-Fa-f]{{{_HEX[kind]}}}", digits) and int(digits, 16) < 0x110000:
            self._at += len(digits)
            return chr(int(digits, 16))
        return _ESCAPES.get(kind, kind if kind in "\\'\"/" else "\\" + kind)

    def _gemma_text(self) -> str:
        end = self._text.find(_GEMMA_QUOTE, self._at)
        if end < 0:
            raise _NoValueError
        text, self._at = self._text[self._at : end], end + len(_GEMMA_QUOTE)
        return text

    def _bare(self) -> str:
        found = re.compile(r"[-+.\w]+").match(self._text, self._at)
        word = found[0] if found else ""
        value = _WORDS.get(word, word.removeprefix("+"))
        if not found or (value not in _WORDS.values() and not _NUMBER.fullmatch(value)):
            raise _NoValueError
        self._at = found.end()
        return value

    def _match(self, pattern: re.Pattern[str]) -> str:
        self.space()
        found = pattern.match(self._text, self._at)
        if found is None:
            raise _NoValueError
        self._at = found.end()
        return found[0]

    def _next(self) -> str:
        self.space()
        return self._text[self._at : self._at + 1]

    def take(self, text: str) -> bool:
        self.space()
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _need(self, text: str) -> None:
        if not self.take(text):
            raise _NoValueError

    def space(self) -> None:
        found = re.compile(r"\s*").match(self._text, self._at)
        assert found
        self._at = found.end()
