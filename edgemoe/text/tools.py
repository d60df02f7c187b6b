"""Tools that a model may call, as a client describes them, and which of them an answer has to call."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgemoe.errors import OptionError, quote

MAX_TOOLS = 1024
MAX_DEFINITION = 1 << 18  # characters of JSON of one tool
MAX_DEFINITIONS = 1 << 22  # of all of them
_MAX_DEPTH = 64
# OpenAI's names, and those of Model Context Protocol servers.
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")

Choice = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    parameters: JSON schema of its arguments, an object. strict: they must be of that schema.
    definition: all of it, as the client gave it, for the template.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool
    definition: Mapping[str, Any]

    def property_schema(self, name: str) -> Mapping[str, Any]:
        """The schema of an argument; empty where there is none that says something."""
        properties = self._resolved(self.parameters).get("properties")
        schema = properties.get(name) if isinstance(properties, Mapping) else None
        return self._resolved(schema) if isinstance(schema, Mapping) else {}

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a reference within the schema stands for."""
        for _ in range(8):
            reference = schema.get("$ref")
            if not isinstance(reference, str) or not reference.startswith("#/"):
                break
            found: Any = self.parameters
            for step in reference[2:].split("/"):
                step = step.replace("~1", "/").replace("~0", "~")
                found = found.get(step) if isinstance(found, Mapping) else None
            if not isinstance(found, Mapping):
                break
            schema = found
        return schema


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request and how they are to be used.

    tools: those the model is told about; none where the choice is "none". choice: "auto", "none" or "required", a call
    there must be. callable: the tools that may be called, fewer where one was named. parallel: there may be several
    calls.
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = "none"
    callable: tuple[Tool, ...] = ()
    parallel: bool = True

    @classmethod
    def given(cls, tools: Sequence[Mapping[str, Any]], tool_choice: Any = "auto", parallel: bool = True) -> ToolUse:
        """From OpenAI's function tools and its `tool_choice`. Raises OptionError, which names the tool."""
        known = _tools(tools)
        if not isinstance(parallel, bool):
            raise OptionError(f"parallel_tool_calls = {quote(parallel)} is neither true nor false")
        if isinstance(tool_choice, Mapping):
            function = tool_choice.get("function")
            name = function.get("name") if isinstance(function, Mapping) else None
            chosen = tuple(tool for tool in known if tool.name == name)
            if tool_choice.get("type") != "function" or not chosen:
                raise OptionError(f"tool_choice: there is no tool {quote(name)}")
            return cls(known, "required", chosen, parallel)
        if tool_choice not in ("auto", "none", "required"):
            raise OptionError(f"tool_choice = {quote(tool_choice)} is not auto, none, required or a function")
        if tool_choice == "required" and not known:
            raise OptionError("tool_choice = 'required', but there are no tools")
        if tool_choice == "none" or not known:
            return cls()
        return cls(known, tool_choice, known, parallel)

    def find(self, name: str) -> Tool | None:
        return next((tool for tool in self.tools if tool.name == name), None)


def _tools(given: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise OptionError(f"tools = {quote(given)} is not a list")
    given = list(given)
    if len(given) > MAX_TOOLS:
        raise OptionError(f"there are {len(given)} tools, the limit is {MAX_TOOLS}")
    tools: dict[str, Tool] = {}
    size = 0
    for number, item in enumerate(given):
        tool, length = _tool(item, f"tools[{number}]")
        if tool.name in tools:
            raise OptionError(f"tools[{number}]: there are two tools {tool.name!r}")
        tools[tool.name] = tool
        size += length
        if size > MAX_DEFINITIONS:
            raise OptionError(f"tools: they have more than {MAX_DEFINITIONS} characters as JSON")
    return tuple(tools.values())


def _tool(item: Any, where: str) -> tuple[Tool, int]:
    """(the tool, characters of its definition)."""
    function = item.get("function") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or item.get("type", "function") != "function":
        raise OptionError(f"{where}: its type is not 'function'")
    if not isinstance(function, Mapping):
        raise OptionError(f"{where}: it has no function")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(f"{where}: the name {quote(name)} is not 1 to 128 letters, digits and characters of '_-.:/'")
    where += f" {name!r}"
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise OptionError(f"{where}: its description is not a text")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise OptionError(f"{where}: strict is neither true nor false")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise OptionError(f"{where}: its parameters are not a JSON schema, an object")
    if parameters.get("type", "object") != "object":
        raise OptionError(f"{where}: the type of its parameters is {quote(parameters['type'])}, not 'object'")
    if _deeper(item, _MAX_DEPTH):
        raise OptionError(f"{where}: its definition is nested more than {_MAX_DEPTH} deep")
    try:
        text = json.dumps(item)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{where}: its definition is not JSON: {error}") from None
    if len(text) > MAX_DEFINITION:
        raise OptionError(f"{where}: its definition has {len(text)} characters, the limit is {MAX_DEFINITION}")
    # Templates take it for granted that these are there.
    copy = json.loads(text)["function"]
    copy = {key: value for key, value in copy.items() if value is not None}
    copy = {"name": name, "description": "", **copy}
    copy.setdefault("parameters", {"type": "object", "properties": {}})
    definition = {"type": "function", "function": copy}
    return Tool(name, description or "", copy["parameters"], strict is True, definition), len(text)


def _deeper(value: Any, limit: int) -> bool:
    """Whether lists and maps stand in each other more than `limit` times."""
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for item in level:
            inner += item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else ()
        level = inner
        if not level:
            return False
    return True
