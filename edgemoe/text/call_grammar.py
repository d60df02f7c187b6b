"""Grammars of tool calls, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgemoe.errors import OptionError
from edgemoe.families import ToolFormat
from edgemoe.text.grammar import language
from edgemoe.text.tokenizer import Tokenizer
from edgemoe.text.tools import Tool

# Of the schemas in one grammar, as JSON: compiling takes a second for each million.
_MAX_SCHEMAS = 1 << 18
_ANY_TEXT = "/(?s:.*)/"
_TOKEN = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])")


class Rules:
    """A grammar in the making: rules, and grammars of other kinds that they refer to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: list[str] = []
        self._others: list[dict[str, Any]] = []
        self._room = _MAX_SCHEMAS

    def language(self, start: str) -> str:
        """All of it, for llguidance; start: what a text consists of."""
        rules = "".join(f"{rule}\n" for rule in self._rules)
        first = {"name": "answer", "lark_grammar": f"start: {start}\n{rules}"}
        return json.dumps({"grammars": [first, *self._others]})

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of a new rule."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def replace(self, name: str, body: str) -> None:
        """Gives a rule another body, which may refer to it."""
        self._rules[int(name[1:])] = f"{name}: {body}"

    def other(self, grammar: Mapping[str, Any]) -> str:
        """How a rule refers to a grammar of another kind."""
        name = f"g{len(self._others)}"
        self._others.append({**grammar, "name": name})
        return f"@{name}"

    def json(self, schema: Mapping[str, Any], lenient: bool = True) -> str:
        """JSON of this schema; lenient: as much of it as can be kept. Raises OptionError for a schema that is too large
        and has to be kept."""
        text = json.dumps(schema)
        self._room -= len(text)
        if self._room < 0:
            if not lenient:
                raise OptionError("the schemas are too large for a grammar")
            text = '{"type": "object"}' if schema.get("type") == "object" else "{}"
        return self.other(language(None, text, lenient).grammar())

    def mark(self, text: str) -> str:
        """Exactly this text, whose special tokens are those; nothing for an empty one."""
        pieces = []
        literal = ""
        for piece in _TOKEN.split(text):
            token = self._special(piece)
            if token is None:
                literal += piece
                continue
            pieces += [_literal(literal)] if literal else []
            pieces.append(f"<[{token}]>")
            literal = ""
        pieces += [_literal(literal)] if literal else []
        return " ".join(pieces)

    def until(self, mark: str, never: Sequence[str] = ()) -> str:
        """Any text up to this mark, and the mark; none of the others is in it."""
        pieces = _TOKEN.split(mark)
        for number, piece in enumerate(pieces):
            if self._special(piece) is not None:  # which is no text; what stands before it is
                return f"{self._without(never)} {self.mark(''.join(pieces[number:]))}"
        return self.rule(self._without(never), f"[suffix={_literal(mark)}]")

    def without(self, marks: Sequence[str]) -> str:
        """Any text, also none, in which these marks are not."""
        return self.rule(f'{self._without(marks)} | ""')

    def _without(self, marks: Sequence[str]) -> str:
        literals = [mark for mark in marks if mark and self._special(mark) is None]
        if not literals:
            return _ANY_TEXT
        name = f"T{len(self._rules)}"
        inner = "|".join("".join(f"[\\u{{{ord(character):X}}}]" for character in mark) for mark in literals)
        self._rules.append(f"{name}: {_ANY_TEXT} & ~/(?s:.*)({inner})(?s:.*)/")
        return name

    def _special(self, text: str) -> int | None:
        token = self._tokenizer.token_id(text)
        return token if token is not None and self._tokenizer.is_special(token) else None


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class CallRules:
    """The rules for the calls of some tools in one form.

    schemas: what is put in place of a tool's parameters, by its name.
    """

    def __init__(self, rules: Rules, form: ToolFormat, tools: Sequence[Tool], schemas: Mapping[str, Any]) -> None:
        self._rules = rules
        self._form = form
        self._tools = tools
        self._schemas = schemas

    def calls(self, several: bool) -> str:
        """One call, or several, with their marks; behind the first one's begin mark (`form.begin`)."""
        form, mark = self._form, self._rules.mark
        line = "\n" if form.lines else ""
        call = self._rules.rule(" | ".join(self._named(self._call, tool) for tool in self._tools))
        if form.together:
            listed = form.syntax in ("json", "python")
            between = '", "' if listed else mark(line)
            body = f"{call} ({between} {call})*" if several else call
            body = f'" "? "[" {body} "]"' if listed else f"{mark(line)} {body} {mark(line)}"
            return self._rules.rule(f"{body} {mark(form.end)}")
        one = self._rules.rule(f"{mark(line)} {call} {mark(line + form.end)}")
        return self._rules.rule(f'{one} ("\\n"? {mark(form.begin)} {one})*' if several else one)

    def message(self) -> str:
        """gpt-oss: all of a call's message but its end, from the header on."""
        mark, rule = self._rules.mark, self._rules.rule
        kind = rule(f'((" "? {mark("<|constrain|>")} "json") | " json")? {mark("<|message|>")}')
        calls = []
        for tool in self._tools:
            name, arguments = _literal(tool.name), self._named(self._arguments, tool)
            early = f'" to=functions." {name} {mark("<|channel|>")} "commentary"'
            late = f'{mark("<|channel|>")} "commentary to=functions." {name}'
            calls.append(rule(f"({early} | {late}) {kind} {arguments}"))
        return rule(" | ".join(calls))

    def _named(self, rule: Callable[[Tool], str], tool: Tool) -> str:
        """What this makes of the tool; errors name it."""
        try:
            return rule(tool)
        except OptionError as error:
            raise OptionError(f"tool {tool.name!r}: {error}") from None

    def _call(self, tool: Tool) -> str:
        form, mark = self._form, self._rules.mark
        name = tool.name
        if form.syntax == "json":
            begin = mark(f'{{"name": "{name}", "arguments": ')
            id = f'(", \\"id\\": \\"" /[A-Za-z0-9]{{{form.id_length}}}/ "\\"")?' if form.id_length else ""
            return self._rules.rule(f'{begin} {self._arguments(tool)} {id} "}}"')
        if form.syntax == "named":
            number = '":" /[0-9]{1,4}/' if form.numbered else ""
            begin = f"{mark(form.name_begin + form.name_prefix + name)} {number} {mark(form.separator)}"
            return self._rules.rule(f"{begin} {self._arguments(tool)} {mark(form.call_end)}")
        if form.syntax == "python":
            pairs = self._pairs(tool, lambda key, *schema: f"{mark(key + '=')} {self._python(*schema)}", ", ")
            return self._rules.rule(f'{mark(name + "(")} {pairs} ")"')
        if form.syntax == "gemma":
            pairs = self._pairs(tool, lambda key, *schema: f"{mark(key + ':')} {self._gemma(*schema)}", ",")
            return self._rules.rule(f'{mark("call:" + name + "{")} {pairs} "}}"')
        pairs = self._pairs(tool, self._tagged, "")
        begin = f"{mark(form.name_begin + name + form.name_end)} {self._line}"
        return self._rules.rule(f"{begin} {pairs} {mark(form.call_end)}")

    @property
    def _line(self) -> str:
        """A line end between the parts of a call: GLM's templates differ in whether there is one."""
        return '"\\n"' if self._form.lines else '"\\n"?'

    def _arguments(self, tool: Tool) -> str:
        schema = self._schemas.get(tool.name, tool.parameters)
        return self._rules.json({"type": "object", **schema}, not tool.strict)

    def _pairs(self, tool: Tool, pair: Callable[[str, Mapping[str, Any], bool], str], between: str) -> str:
        """Arguments in the order of the schema, those that may be left out or not."""
        schema = self._schemas.get(tool.name, tool.parameters)
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return self._rules.rule('""')
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        definitions = definitions if "$ref" in json.dumps(properties) else {}
        first = rest = self._rules.rule('""')
        for key, inner in reversed(list(properties.items())):
            found = tool.property_schema(key)
            whole = found if found else inner if isinstance(inner, Mapping) else {}
            one = self._rules.rule(pair(key, {**definitions, **whole}, not tool.strict))
            optional = key not in required
            lead = self._rules.mark(between)
            first = self._rules.rule(f"{one} {rest}" + (f" | {first}" if optional else ""))
            rest = self._rules.rule(f"{lead} {one} {rest}" + (f" | {rest}" if optional else ""))
        return first

    def _tagged(self, key: str, schema: Mapping[str, Any], lenient: bool) -> str:
        form, mark = self._form, self._rules.mark
        line = "\n" if form.own_lines else ""
        begin = mark(form.key_begin + key + form.key_end)
        begin += f" {self._line} {mark(form.value_begin)}" if form.value_begin else f" {mark(line)}"
        values = _texts(schema)
        if values:
            value = f"({' | '.join(map(mark, values))}) {mark(line + form.value_end)}"
        elif _may_be_text(schema):
            value = self._rules.until(line + form.value_end)
        else:
            value = f"{self._rules.json(schema, lenient)} {mark(line + form.value_end)}"
        return f"{begin} {value} {self._line}"

    def _python(self, schema: Mapping[str, Any], lenient: bool) -> str:
        """JSON, but for what Python writes otherwise."""
        types = schema.get("type")
        types = types if isinstance(types, list) else [types]
        words = [*(("True", "False") if "boolean" in types else ()), *(("None",) if "null" in types else ())]
        if set(types) <= {"boolean", "null"}:
            return f"({' | '.join(map(_literal, words))})"
        return f"({' | '.join([self._rules.json(schema, lenient), *map(_literal, words)])})"

    def _gemma(self, schema: Mapping[str, Any], lenient: bool) -> str:
        quote = self._form.quotes[0]
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list) and values and not any(isinstance(value, (list, dict)) for value in values):
            texts = (quote + value + quote if isinstance(value, str) else json.dumps(value) for value in values)
            return f"({' | '.join(map(self._rules.mark, texts))})"
        text = f"{self._rules.mark(quote)} {self._rules.until(quote)}"
        if schema.get("type") == "string":
            return text
        if schema.get("type") in ("integer", "number", "boolean", "null"):
            return self._rules.json(schema, lenient)
        plain = self._rules.json({"type": ["number", "boolean", "null"]})
        value = self._rules.rule('""')  # its body comes later: it is about itself
        entry = self._rules.rule(f'/[A-Za-z_][A-Za-z0-9_.-]*/ ":" {value}')
        array = self._rules.rule(f'"[" ({value} ("," {value})*)? "]"')
        map_ = self._rules.rule(f'"{{" ({entry} ("," {entry})*)? "}}"')
        self._rules.replace(value, f"{text} | {plain} | {array} | {map_}")
        return {"array": array, "object": map_}.get(str(schema.get("type")), value)


def _texts(schema: Mapping[str, Any]) -> list[str]:
    """The texts that a value may be, where its schema lists them."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values and all(isinstance(value, str) and value for value in values):
        return values
    return []


def _may_be_text(schema: Mapping[str, Any]) -> bool:
    """Whether a bare value need not be JSON."""
    types = schema.get("type")
    types = [types] if isinstance(types, str) else types
    if isinstance(types, list):
        return "string" in types
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(alternatives, list):
        return any(isinstance(one, Mapping) and _may_be_text(one) for one in alternatives)
    return not any(key in schema for key in ("properties", "items", "enum", "const", "$ref", "allOf"))
