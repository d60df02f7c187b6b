"""Tool calls in the text of an answer, in the forms of all families."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from edgemoe.families import ToolFormat, family_names, tool_formats
from edgemoe.text.answer import AnswerSplitter
from edgemoe.text.call_syntax import CallReader
from edgemoe.text.call_writing import Call, written
from edgemoe.text.tools import ToolUse

FORMS = {f"{name}-{number}": form for name in family_names() for number, form in enumerate(tool_formats(name))}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"enum": ["C", "F"]},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object"},
        "note": {"type": ["string", "null"]},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    for name in ("get_weather", "get-time", "mcp.files.read")
]
CALLS = [
    Call(
        "get_weather",
        {"city": "São Paulo\n\"quoted\" {[<b>]} \\ 'x' ", "days": 3, "exact": True},
        "functions.get_weather:0",
    ),
    Call("get-time", {}, "functions.get-time:1"),
    Call(
        "mcp.files.read",
        {"units": "C", "tags": ["a", "b, c"], "more": {"deep": {"er": [1, 2.5, None, False]}}, "note": None},
        "functions.mcp.files.read:2",
    ),
]


def use(**options: Any) -> ToolUse:
    return ToolUse.given(TOOLS, **options)


def split(form: ToolFormat, text: str, cuts: list[int] | int, prompt: str = "") -> list[Any]:
    """What an answer consists of: ("content", text), ("reasoning", text), ("call", name, arguments as text)."""
    if isinstance(cuts, int):
        cuts = list(range(cuts, len(text), cuts))
    ends = [0, *sorted(cuts), len(text)]
    splitter = AnswerSplitter(prompt, "auto", CallReader(form, use()))
    found: list[Any] = []
    ids = set()
    for part in splitter.split(text[begin:end] for begin, end in itertools.pairwise(ends)):
        if part.kind != "tool_call":
            assert part.text and part.index is None and part.name is None and part.id is None
            if found and found[-1][0] == part.kind:
                found[-1] = (part.kind, found[-1][1] + part.text)
            else:
                found.append((part.kind, part.text))
        elif part.name is not None:
            assert part.id and part.id not in ids and part.index == len(ids)
            ids.add(part.id)
            found.append(("call", part.name, part.text))
        else:
            assert part.index == len(ids) - 1 and part.id is None and part.text
            found[-1] = (*found[-1][:2], found[-1][2] + part.text)
    return found


def cuts_of(text: str) -> list[Any]:
    chance = random.Random(len(text))
    some = [sorted(chance.sample(range(len(text)), min(len(text), 9))) for _ in range(20)]
    return [1, 2, 3, 5, 8, 13, max(len(text), 1), *some]


@pytest.mark.parametrize("name", FORMS)
def test_calls_of_every_form(name: str) -> None:
    form = FORMS[name]
    for calls in (CALLS, CALLS[:1], CALLS[1:2]):
        for before, after in (("", ""), ("I will look.\n\n", ""), ("I will look.", "\nThat is it.")):
            text = before + written(form, calls) + after
            if form.syntax == "harmony":
                framed = f"<|channel|>commentary<|message|>{before}<|end|>" if before else ""
                text = (framed + written(form, calls)).removeprefix("<|start|>assistant")
                after = ""
            expected: list[Any] = (
                [("content", before if form.syntax == "harmony" else before.rstrip())] if before else []
            )
            expected += [("call", call.name, call.arguments) for call in calls]
            expected += [("content", after.lstrip())] if after else []
            if after and not form.end:
                expected[-1] = ("content", after.lstrip())
            for cuts in cuts_of(text):
                found = split(form, text, cuts)
                found = [(*part[:2], json.loads(part[2])) if part[0] == "call" else part for part in found]
                assert found == expected, (cuts, text)
