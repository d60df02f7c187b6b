"""Chat templates: jinja2 programs that come with a model, so untrusted code.

They run in jinja2's immutable sandbox, which keeps them away from Python's internals and from the messages, and within
a budget of work, so that a hostile or broken one ends with an error instead of a full memory or an endless loop.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from edgemoe.errors import OptionError, TokenizerError

MAX_TEMPLATE = 1 << 20  # characters of source
MAX_OUTPUT = 1 << 24  # characters of a rendered conversation, beyond those of its messages

# Work that a template may do: a loop's turn costs STEP, so that there are about a million of them (a second), and four
# characters of a string made cost 1, so that there are some hundred million. Templates in use need a thousand turns.
_BUDGET = 1 << 26
_STEP = 64
_MAX_WIDTH = 256  # of an indentation or a padded field

# What templates of published models use; others of jinja2's filters are for web pages.
# fmt: off
_FILTERS = (
    "abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string", "sum",
    "title", "tojson", "trim", "unique", "upper",
)
# fmt: on
_STRING_METHODS_REFUSED = {"str.expandtabs", "str.format_map", "str.maketrans", "str.translate"}
# A width of four digits, or one that is a value itself.
_WIDE_FIELD = re.compile(r"\d{4,}|\*|\{[^{}]*:[^}]*\{")

# Names for filters that the source is rewritten to use; no template can spell them.
_LOOP, _CONCAT = " loop", " concat"


class ChatTemplate:
    """A compiled chat template.

    source: the template; name: what messages call the model. Raises TokenizerError where it does not compile.
    """

    def __init__(self, source: str, name: str) -> None:
        self._name = name
        if len(source) > MAX_TEMPLATE:
            self._fail(f"it has {len(source)} characters, the limit is {MAX_TEMPLATE}")
        self._environment = _Environment()
        # The budget belongs to the environment, one rendering at a time.
        self._lock = threading.Lock()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:
            self._fail(_describe(error))

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """The conversation as text. Raises TokenizerError; `messages` are not changed."""
        check_variables(variables)
        plain = [dict(message) for message in messages]
        for number, message in enumerate(plain):
            if not isinstance(message.get("role"), str):
                raise TokenizerError(f"message {number} has no role")
        size = len(json.dumps(plain, default=str))
        values: dict[str, Any] = {"tools": None, "documents": None, **variables}
        values.update(messages=plain, add_generation_prompt=add_generation_prompt)
        with self._lock:
            self._environment.budget = _BUDGET + _STEP * size
            self._environment.largest = MAX_OUTPUT + size
            pieces: list[str] = []
            room = MAX_OUTPUT + size
            try:
                for piece in self._template.generate(values):
                    pieces.append(piece)
                    room -= len(piece)
                    if room < 0:
                        raise _TooMuchError("its text is too long")
            except (Exception, RecursionError, MemoryError) as error:
                self._fail(_describe(error))
        return "".join(pieces)

    def _fail(self, reason: str) -> NoReturn:
        raise TokenizerError(f"{self._name}: the chat template failed: {' '.join(reason.split())}") from None


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuses variables that a template gets from elsewhere with OptionError."""
    for name in ("messages", "add_generation_prompt"):
        if name in variables:
            raise OptionError(f"{name!r} is not a variable of a chat template that can be set")


class _TooMuchError(Exception):
    """The template's budget is used up."""


def _describe(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return (str(error) or type(error).__name__)[:500] + line


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2 as transformers sets it up for chat templates, with a budget."""

    # Operators whose result may be much larger than their operands.
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
            # Folding constants would run filters while compiling, outside of any budget.
            optimized=False,
            finalize=self._finalize,
        )
        self.budget = _BUDGET
        self.largest = MAX_OUTPUT
        self.filters = {name: self._guarded(name, self.filters[name]) for name in _FILTERS if name != "tojson"}
        self.filters["tojson"] = self._to_json
        self.filters[_LOOP] = lambda items, cost: _CountedLoop(items, cost, self.spend)
        self.filters[_CONCAT] = self._concat
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise _TooMuchError("it does too much work")

    def pay(self, length: int) -> None:
        """For a string or list of this length, before it is made where possible."""
        if length > self.largest:
            raise _TooMuchError(f"it makes a text of {length} characters, the limit is {self.largest}")
        self.spend(length >> 2)

    def weigh(self, value: Any) -> int:
        """Pays for the text of a value before it is made (a list may hold another one many times over) and returns
        about how long it will be."""
        waiting, length = [value], 0
        while waiting:
            item = waiting.pop()
            size = len(item) if isinstance(item, (str, list, tuple, dict)) else 8
            length += size + 1
            self.pay(size)
            self.spend(_STEP // 2)
            if isinstance(item, (list, tuple)):
                waiting.extend(item)
            elif isinstance(item, dict):
                waiting.extend(item.keys())
                waiting.extend(item.values())
        return length

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Rewriter().visit(source), name, filename, defer_init)

    def _finalize(self, value: Any) -> Any:
        self.weigh(value)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, (str, list, tuple)) and isinstance(times, int):
                    self.pay(len(items) * max(times, 0))
        elif operator == "**":
            self._limit_width(right)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        return self._paid(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.spend(4 * _STEP)  # a macro's call is slow
        # The sandbox wraps str.format.
        subject = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(subject, str):
            __self._check_growth(f"str.{getattr(__obj, '__name__', '')}", subject, [*args, *kwargs.values()])
        return __self._paid(super().call(__context, __obj, *args, **kwargs))

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for what it makes. jinja2 may pass a context or itself as the first argument."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.spend(_STEP)
            subject, rest = args[first], args[first + 1 :]
            if name == "join" and not isinstance(subject, (str, list, tuple)):
                subject = list(subject)
            self._check_growth(name, subject, [*rest, *kwargs.values()])
            return self._paid(function(*args[:first], subject, *rest, **kwargs))

        return guarded

    def _paid(self, result: Any) -> Any:
        if isinstance(result, (str, list, tuple)):
            self.pay(len(result))
        elif isinstance(result, int) and result.bit_length() > 1024:
            raise _TooMuchError("it makes a number of more than 1024 bits")
        return result

    def _check_growth(self, name: str, subject: Any, given: Sequence[Any]) -> None:
        """Pays in advance for a filter (`name`), or a string's method (`str.name`), that makes much out of little."""
        kind = name.rpartition(".")[2]
        if name in _STRING_METHODS_REFUSED:
            raise SecurityError(f"the string method {name} is not available to templates")
        if kind in ("center", "ljust", "rjust", "zfill", "indent", "batch", "slice", "round"):
            for value in given:
                self._limit_width(value)
        if name == "string":
            self.weigh(subject)
        elif name == "indent":
            width = max((len(value) for value in given if isinstance(value, str)), default=_MAX_WIDTH)
            self.pay((str(subject).count("\n") + 1) * width)
        elif kind == "replace" and len(given) >= 2:
            text, old, new = str(subject), str(given[0]), str(given[1])
            self.pay((text.count(old) + 1) * len(new) + len(text))
        elif kind == "join":
            # The method joins its argument with the subject, the filter the other way round.
            items, separators = (given[:1], [subject]) if name == "str.join" else ([subject], given)
            separator = sum(len(item) for item in separators if isinstance(item, str))
            for item in items:
                if isinstance(item, (str, list, tuple)):
                    self.pay(self.weigh(item) + len(item) * separator)
        elif kind == "format":
            self._check_format(subject, given)

    def _check_format(self, text: str, values: Any) -> None:
        if _WIDE_FIELD.search(text):
            raise _TooMuchError("it formats a field that is too wide")
        self.pay(self.weigh(values) * (text.count("{") + text.count("%") + 1))

    def _limit_width(self, value: Any) -> None:
        if isinstance(value, int) and abs(value) > _MAX_WIDTH:
            raise _TooMuchError(f"{value} is too much (the limit is {_MAX_WIDTH})")

    def _concat(self, parts: Iterable[Any]) -> str:
        parts = list(parts)
        self.weigh(parts)
        return "".join(map(str, parts))

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers has it: jinja2's own escapes characters that matter in web pages only."""
        if isinstance(indent, int) and not 0 <= indent <= 16:
            raise _TooMuchError(f"an indentation of {indent} is too wide")
        self.pay(self.weigh(value) * (1 + (indent or 0)))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Rewriter(NodeTransformer):
    """Puts the budget where jinja2 has no hook for it: a loop's turns and the operator `~`."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
        # Text in the body is output, or captured, in every turn.
        cost = _STEP + sum(len(text.data) for part in node.body for text in _find(part, nodes.TemplateData))
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _LOOP, [nodes.Const(cost)], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, _CONCAT, [], [], None, None, lineno=node.lineno)


def _find(node: nodes.Node, kind: type[nodes.TemplateData]) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, kind) else list(node.find_all(kind))


class _CountedLoop:
    """What a `for` goes over; each turn is paid for."""

    def __init__(self, items: Any, cost: int, spend: Callable[[int], None]) -> None:
        self._items, self._cost, self._spend = items, cost, spend

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._spend(self._cost)
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: Any) -> str:
    text = str(form)
    if len(text) > 100 or _WIDE_FIELD.search(text):
        raise _TooMuchError("a date format is too long")
    return datetime.datetime.now().strftime(text)
