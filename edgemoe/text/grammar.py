"""Text in a given language: grammars and JSON schemas, with the llguidance library.

The grammars are llama.cpp's GBNF. Every character of one becomes a lexeme of its own in the library's language, which
otherwise cuts text into the longest words first, as GBNF does not.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from edgemoe.errors import OptionError
from edgemoe.text.tokenizer import Tokenizer

# A character at a time takes more steps than the library expects; a hundred of them take a millisecond or less.
_LIMITS = LLParserLimits(step_max_items=4_000_000, max_items_in_row=20_000, verbose_errors=False)
# Between the parts of JSON: without a limit a model may go on with white space for ever.
_WHITESPACE = r"[ \n]|\n[ \t]{1,20}"

_vocabularies: weakref.WeakKeyDictionary[Tokenizer, LLTokenizer] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Language:
    """Which texts are allowed, in the library's form: Lark, or a JSON list of grammars. what: how messages call it."""

    text: str
    what: str

    def grammar(self) -> dict[str, Any]:
        """It as a part of another one."""
        if not self.text.startswith("{"):
            return {"lark_grammar": self.text}
        (grammar,) = json.loads(self.text)["grammars"]
        assert isinstance(grammar, dict)
        return grammar


class Constraint:
    """Where a text is in its language. Raises OptionError for one that cannot be used, and for a tokenizer whose tokens
    have no text of their own."""

    def __init__(self, tokenizer: Tokenizer, language: Language) -> None:
        if not tokenizer.has_pieces:
            raise OptionError(f"{tokenizer.name}: a grammar is not possible with this kind of tokenizer")
        vocabulary = _vocabulary(tokenizer)
        self._size = vocabulary.vocab_size
        self._matcher = LLMatcher(vocabulary, language.text, log_level=0, limits=_LIMITS)
        if self._matcher.is_error():
            raise OptionError(f"{language.what}: {_reason(self._matcher.get_error())}")

    @property
    def finished(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def allows(self, token: int) -> bool:
        # A model may have more logits than its tokenizer has tokens.
        return token < self._size and bool(self._matcher.validate_tokens([token]) == 1)

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [vocab]: the logits, -inf for tokens that may not follow. Raises OptionError where none may."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        self._check()
        masked = np.full_like(logits, -np.inf)
        allowed = np.flatnonzero(allowed)
        masked[allowed] = logits[allowed]
        if not np.isfinite(masked.max()):
            raise OptionError("the grammar allows no token here that the other options do not forbid")
        return masked

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OptionError(f"the grammar failed: {_reason(self._matcher.get_error())}")


def check_language(language: Language) -> None:
    """Refuses a grammar or schema that no tokenizer makes usable with OptionError."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(language.text, limits=_LIMITS)
    if failed:
        raise OptionError(f"{language.what}: {_reason(messages[0])}")


def language(grammar: str | None, json_schema: str | None, lenient: bool = False) -> Language:
    """That of a grammar, or of the JSON of a schema. Raises OptionError for what is no GBNF.

    lenient: what the library does not know of a schema is passed over.
    """
    if json_schema is not None:
        options: Any = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE, "lenient": lenient}
        return Language(LLMatcher.grammar_from_json_schema(json_schema, overrides=options), "json_schema")
    assert grammar is not None
    if not re.search(r"(?m)^\s*(%llguidance\b|start\s*:(?!:))", grammar):
        grammar = translate_gbnf(grammar)
    return Language(LLMatcher.grammar_from_lark(grammar), "grammar")


def _reason(message: str) -> str:
    """The line of the library's report that says what is wrong; the rest of it is the state of its parser."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith("<")]
    return (lines[0] if lines else "it cannot be used")[:300]


class _Vocabulary:
    """A tokenizer as llguidance's wrapper wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The library wants a token that ends the text, if it must be one that no model has.
        self.ends = list(tokenizer.end_ids) or [tokenizer.vocab_size]
        self.size = max(tokenizer.vocab_size, max(self.ends) + 1)
        self.tokens = [tokenizer.spelling(token) or b"<nothing>" for token in range(self.size)]
        self.special_token_ids = sorted({*self.ends, *(i for i in range(self.size) if tokenizer.is_special(i))})
        self.eos_token_id = self.ends[0]
        self._ids: dict[bytes, int] | None = None

    def __call__(self, text: bytes | str) -> Sequence[int]:
        """The tokens of text that the grammar leaves no choice about: they must be this text and nothing else, which
        what a tokenizer makes of a text's begin need not be."""
        data = text if isinstance(text, bytes) else text.encode()
        ids = self._tokenizer.encode(data.decode(errors="replace"), parse_special=False)
        if b"".join(map(self._tokenizer.spelling, ids)) == data:
            return ids
        if self._ids is None:  # seldom needed, and large
            special = set(self.special_token_ids)
            self._ids = {self._tokenizer.spelling(i): i for i in range(self.size) if i not in special}
            self._ids.pop(b"", None)
        ids, at = [], 0
        while at < len(data):
            ends = (end for end in range(min(len(data), at + 32), at, -1) if data[at:end] in self._ids)
            end = next(ends, None)
            if end is None:
                break
            ids.append(self._ids[data[at:end]])
            at = end
        return ids


def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """The tokenizer in the library's form; making it takes a second, so each is made once."""
    made = _vocabularies.get(tokenizer)
    if made is None:
        vocabulary = _Vocabulary(tokenizer)
        wrapper = TokenizerWrapper(vocabulary)
        made = LLTokenizer(wrapper, n_vocab=vocabulary.size, eos_token=vocabulary.ends)
        # The library has them in its own form now; they are tens of megabytes.
        vocabulary.tokens, wrapper.tokens = [], []
        _vocabularies[tokenizer] = made
    return made


# -- GBNF -----------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_TIMES = re.compile(r"\{[ \t]*(\d+)[ \t]*(?:(,)[ \t]*(\d*)[ \t]*)?\}")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX = {"x": 2, "u": 4, "U": 8}
_MAX_DEPTH = 100
_MAX_GRAMMAR = 1 << 20


def translate_gbnf(source: str) -> str:
    """A GBNF grammar, whose text is what the rule `root` describes, in llguidance's Lark dialect. Raises OptionError,
    which names the line."""
    if len(source) > _MAX_GRAMMAR:
        raise OptionError(f"grammar: it has {len(source)} characters, the limit is {_MAX_GRAMMAR}")
    return _Gbnf(source).translate()


class _Gbnf:
    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._rules: dict[str, str] = {}
        self._used: dict[str, int] = {}  # name -> where

    def translate(self) -> str:
        self._skip(lines=True)
        while self._at < len(self._source):
            begin = self._at
            name = self._name()
            self._skip()
            if not self._take("::="):
                raise self._error("expected ::=")
            self._skip(lines=True)
            if name in self._rules:
                self._at = begin
                raise self._error(f"there are two rules {name!r}")
            self._rules[name] = self._alternatives(0)
            if self._at < len(self._source) and self._source[self._at] not in "\r\n":
                raise self._error(f"unexpected {self._source[self._at]!r}")
            self._skip(lines=True)
        if "root" not in self._rules:
            raise OptionError("grammar: it has no rule 'root'")
        for name, at in self._used.items():
            if name not in self._rules:
                self._at = at
                raise self._error(f"there is no rule {name!r}")
        numbers = {name: f"r{number}" for number, name in enumerate(self._rules)}
        numbers["root"] = "start"
        named = re.compile("<([A-Za-z0-9_-]+)>")  # how a body names a rule; no character is written so
        return "".join(
            f"{numbers[name]}: {named.sub(lambda match: numbers[match[1]], body)}\n"
            for name, body in self._rules.items()
        )

    def _alternatives(self, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise self._error("too many parentheses in each other")
        found = [self._sequence(depth)]
        while self._take("|"):
            self._skip(lines=True)
            found.append(self._sequence(depth))
        return " | ".join(found)

    def _sequence(self, depth: int) -> str:
        items: list[str] = []
        while self._at < len(self._source):
            character = self._source[self._at]
            if character == '"':
                item = self._literal()
            elif character == "[":
                item = self._class()
            elif character == "." and self._take("."):
                item = "/[\\u{0}-\\u{10FFFF}]/"
            elif character == "(" and self._take("("):
                self._skip(lines=True)
                item = f"({self._alternatives(depth + 1)})"
                if not self._take(")"):
                    raise self._error("expected )")
            elif _NAME.match(character):
                at = self._at
                name = self._name()
                self._used.setdefault(name, at)
                item = f"<{name}>"
            else:
                break
            self._skip(lines=depth > 0)
            times = self._repetition()
            items.append(item + times if times != "{0,0}" else '""')
            self._skip(lines=depth > 0)
        return " ".join(items) or '""'

    def _repetition(self) -> str:
        times = _TIMES.match(self._source, self._at)
        if times:
            self._at = times.end()
            least, most = times[1], times[3] if times[2] else times[1]
            if len(least + most) > 12 or (most and int(most) < int(least)):
                raise self._error(f"{{{least},{most}}} is no range")
            least, most = str(int(least)), most and str(int(most))
            return f"{{{least},{most}}}"
        for sign in "*+?":
            if self._take(sign):
                return sign
        if self._source[self._at : self._at + 1] == "{":
            raise self._error("expected {n}, {n,} or {n,m}")
        return ""

    def _literal(self) -> str:
        self._take('"')
        codes = []
        while not self._take('"'):
            codes.append(f"/[{_spell(self._character())}]/")
        return f"({' '.join(codes)})" if codes else '""'

    def _class(self) -> str:
        self._take("[")
        negated = self._take("^")
        parts = []
        while not self._take("]"):
            first = last = self._character()
            if self._source[self._at : self._at + 1] == "-" and self._source[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._character()
            if last < first:
                raise self._error(f"{first!r}-{last!r} is no range")
            parts.append(_spell(first) + (f"-{_spell(last)}" if last != first else ""))
        if not parts and not negated:
            raise self._error("[] has no characters")
        return f"/[{'^' if negated else ''}{''.join(parts)}]/" if parts else "/[\\u{0}-\\u{10FFFF}]/"

    def _character(self) -> str:
        """One character of a literal or class, escaped or not."""
        if self._at >= len(self._source) or self._source[self._at] in "\r\n":
            raise self._error("the line ends within a literal or class")
        character = self._source[self._at]
        self._at += 1
        if character != "\\":
            return character
        kind = self._source[self._at : self._at + 1]
        self._at += 1
        if kind in _HEX:
            digits = self._source[self._at : self._at + _HEX[kind]]
            self._at += len(digits)
            if re.fullmatch(f"[0-9A-Fa-f]{{{_HEX[kind]}}}", digits):
                code = int(digits, 16)
                if code < 0x110000 and not 0xD800 <= code < 0xE000:
                    return chr(code)
            raise self._error(f"\\{kind}{digits} is no character")
        if kind not in _ESCAPES or not kind:
            raise self._error(f"unknown escape \\{kind}")
        return _ESCAPES[kind]

    def _name(self) -> str:
        match = _NAME.match(self._source, self._at)
        if not match:
            raise self._error("expected the name of a rule")
        self._at = match.end()
        return match[0]

    def _take(self, text: str) -> bool:
        found = self._source.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _skip(self, lines: bool = False) -> None:
        match = (_SPACE_AND_LINES if lines else _SPACE).match(self._source, self._at)
        assert match
        self._at = match.end()

    def _error(self, message: str) -> OptionError:
        return OptionError(f"grammar: line {self._source.count(chr(10), 0, self._at) + 1}: {message}")


def _spell(character: str) -> str:
    return f"\\u{{{ord(character):X}}}"
