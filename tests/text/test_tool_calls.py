"""Tool calls in the text of an answer, in the forms of all families."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.families import ToolFormat, family_names, tool_formats
from edgemoe.families._tools import JSON_IN_TAGS
from edgemoe.text.answer import AnswerSplitter
from edgemoe.text.call_syntax import CallReader
from edgemoe.text.call_writing import Call, written
from edgemoe.text.tools import ToolUse

FORMS = {f"{name}-{number}": form for name in family_names() for number, form in enumerate(tool_formats(name))}
# Each form once: families share some.
NAMES = list({form: name for name, form in reversed(FORMS.items())}.values())
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


@pytest.mark.parametrize("name", NAMES)
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


FRAGMENTS = [
    *sorted({token for form in FORMS.values() for token in form.tokens()}),
    *("<think>", "</think>", "<|start|>", "assistant", "<|channel|>", "final", "analysis", "commentary", "<|message|>"),
    *(
        "<|end|>",
        "<|call|>",
        "<|return|>",
        " to=functions.",
        "get_weather",
        '{"name": "',
        '", "arguments": ',
        "{}",
        "}",
        "{",
    ),
    *(
        '"',
        "[",
        "]",
        "(",
        ")",
        ", ",
        ": ",
        "=",
        "\n",
        " ",
        "\\",
        "\\n",
        "call:",
        "<function=",
        "<parameter=",
        "days",
        "city",
    ),
    *(
        ">",
        "</",
        "<",
        "|",
        "```json\n",
        "```",
        "'",
        "3",
        "WORD",
        "Ä",
        "TEXT with spaces",
        "true",
        "null",
        "functions.",
        ":0",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_text_in_any_pieces(name: str, data: st.DataObject) -> None:
    """Whatever a model writes, the parts do not depend on the cuts, and no words are lost."""
    form = FORMS[name]
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=30)))
    if data.draw(st.booleans()):
        text = written(form, CALLS[:1])[: data.draw(st.integers(0, 200))] + text
    prompt = data.draw(st.sampled_from(["", "<|start|>assistant", "<think>\n"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    whole = split(form, text, [], prompt)
    assert split(form, text, cuts, prompt) == whole
    assert split(form, text, 1, prompt) == whole
    parts = " ".join(piece for part in whole for piece in part[1:])
    for word in ("WORD", "TEXT"):
        assert parts.count(word) == text.count(word), (text, whole)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # What is no call is content, all of it.
        ("qwen3_moe-1", "Use <tool_call> here.", [("content", "Use <tool_call> here.")]),
        ("qwen3_moe-1", "<tool_call>\n[1, 2]\n</tool_call>", [("content", "<tool_call>\n[1, 2]\n</tool_call>")]),
        ("qwen3_moe-1", '<tool_call>\n{"name": "get_we', [("content", '<tool_call>\n{"name": "get_we')]),
        (
            "qwen3_moe-1",
            '<tool_call>{"name": 5, "arguments": {}}',
            [("content", '<tool_call>{"name": 5, "arguments": {}}')],
        ),
        ("lfm2_moe-0", "<|tool_call_start|>[f(x=)]", [("content", "<|tool_call_start|>[f(x=)]")]),
        ("gemma4-0", "<|tool_call>call:f{a", [("content", "<|tool_call>call:f{a")]),
        ("glm4_moe-0", "<tool_call></tool_call>x", [("content", "<tool_call></tool_call>x")]),
        # What has begun as a call has what there was for arguments.
        ("qwen3_moe-1", '<tool_call>{"name": "f", "arguments": {"a": "b', [("call", "f", '{"a": "b')]),
        ("qwen3_moe-0", "<tool_call><function=f><parameter=a>b", [("call", "f", '{"a": "b"')]),
        ("qwen3_moe-0", "<tool_call><function=get_weather><parameter=city>b", [("call", "get_weather", '{"city": "b')]),
        (
            "qwen3_moe-1",
            '<tool_call>{"name": "f", "arguments": {}}}</tool_call>Yes.',
            [("call", "f", "{}"), ("content", "}"), ("content", "Yes.")],
        ),
        # What models get wrong.
        ("qwen3_moe-1", '<tool_call>{"arguments": {"a": 1}, "name": "f"}', [("call", "f", '{"a": 1}')]),
        ("qwen3_moe-1", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', [("call", "f", '{"a": 1}')]),
        ("qwen3_moe-1", '<tool_call>{"name": "f"}</tool_call>', [("call", "f", "{}")]),
        ("qwen3_moe-1", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("call", "f", "{}")]),
        (
            "qwen3_moe-1",
            '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}\n{"name": "g", "arguments": {}}</tool_call>',
            [("call", "f", '{"a": "x\\ny"}'), ("call", "g", "{}")],
        ),
        (
            "qwen3_moe-0",
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
            [("call", "f", "{}")],
        ),
        ("qwen3_moe-0", "<function=get-time>\n</function>\n</tool_call>", [("call", "get-time", "{}")]),
        (
            "qwen3_moe-0",
            "<tool_call><function=get_weather><parameter=days>many</parameter><parameter=exact>True</parameter>"
            "<parameter=note>null</parameter><parameter=more>{'a': (1, None)}</parameter><parameter=x>1.50</parameter>"
            "<parameter=y>NaN</parameter>"
            "</function></tool_call>",
            [
                (
                    "call",
                    "get_weather",
                    '{"days": "many", "exact": true, "note": null, "more": {"a": [1, null]}, "x": 1.50, "y": "NaN"}',
                )
            ],
        ),
        ("glm4_moe-0", "<tool_call>get-time</tool_call>", [("call", "get-time", "{}")]),
        (
            "glm4_moe-0",
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>a</arg_value></tool_call>",
            [("call", "get_weather", '{"city": "a"}')],
        ),
        ("granitemoe-0", '<|tool_call|>{"name": "f", "arguments": {}}', [("call", "f", "{}")]),
        ("mixtral-0", '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abc"}]', [("call", "f", "{}")]),
        (
            "lfm2_moe-0",
            '<|tool_call_start|>[f(s=\'it\'s\', t="""a\n"b" """, n=-1.5e3, u=\'\\u00e9\\ud83d\\ude42\', '
            "l=(1,), d={'a': {}})]",
            [
                (
                    "call",
                    "f",
                    '{"s": "it\'s", "t": "a\\n\\"b\\" ", "n": -1.5e3, "u": "é🙂", "l": [1], "d": {"a": {}}}',
                )
            ],
        ),
        ("lfm2_moe-0", '<|tool_call_start|>[{"name": "f", "arguments": {"a": 1}}]', [("call", "f", '{"a": 1}')]),
        ("lfm2_moe-0", "<|tool_call_start|>\n```python\nf(a=1)\n```\n<|tool_call_end|>", [("call", "f", '{"a": 1}')]),
        ("lfm2_moe-0", "<|tool_call_start|>[f(x=" + "[" * 5000, [("content", "<|tool_call_start|>[f(x=" + "[" * 5000)]),
        (
            "lfm2_moe-0",
            "<|tool_call_start|>[f(x=__import__('os'))]",
            [("content", "<|tool_call_start|>[f(x=__import__('os'))]")],
        ),
        (
            "gemma4-0",
            '<|tool_call>call:f{a:<|"|>{x},<|"|>,b:[1,{c:two words}]}',
            [("call", "f", '{"a": "{x},", "b": [1, {"c": "two words"}]}')],
        ),
        ("gemma4-0", "<|tool_call>call:f{a:" + "[" * 5000, [("content", "<|tool_call>call:f{a:" + "[" * 5000)]),
        ("gpt_oss-0", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant", [("reasoning", "Hm")]),
        (
            "gpt_oss-0",
            '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
            [("call", "f", '{"a": 1}')],
        ),
        ("gpt_oss-0", "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>", [("call", "f", "{}")]),
    ],
)
def test_calls_that_are_not_as_they_should_be(name: str, text: str, expected: list[Any]) -> None:
    joined: list[Any] = []
    for part in expected:
        if joined and part[0] == joined[-1][0] == "content":
            joined[-1] = ("content", joined[-1][1] + part[1])
        else:
            joined.append(part)
    for cuts in (1, 3, len(text)):
        assert split(FORMS[name], text, cuts) == joined


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hm.\n</think>\n\nYes.", [("reasoning", "Hm."), ("content", "Yes.")]),
        (
            'Hm.\n<tool_call>{"name": "get-time", "arguments": {}}</tool_call>',
            [("reasoning", "Hm."), ("call", "get-time", "{}")],
        ),
        ("A <tool_call> is it.</think>Yes.", [("reasoning", "A <tool_call> is it."), ("content", "Yes.")]),
        (
            'A <tool_call>{"name": "f", "arguments": {}}</tool_call> .</think>Yes.',
            [("reasoning", 'A <tool_call>{"name": "f", "arguments": {}}</tool_call> .'), ("content", "Yes.")],
        ),
    ],
)
def test_calls_among_thoughts(text: str, expected: list[Any]) -> None:
    for cuts in (1, 4, len(text)):
        assert split(JSON_IN_TAGS, text, cuts, "<think>\n") == expected


def test_unknown_names_among_thoughts() -> None:
    for form in FORMS.values():
        if form.syntax != "harmony":
            text = f"A {written(form, [Call('f', {'days': 1})])} .</think>Yes."
            thoughts = text.partition(".</think>")[0] + "."
            assert split(form, text, 3, "<think>") == [("reasoning", thoughts), ("content", "Yes.")]


def test_thoughts_left_in() -> None:
    def content(name: str, prompt: str, text: str) -> list[Any]:
        splitter = AnswerSplitter(prompt, "none", CallReader(FORMS[name], use()))
        parts = list(splitter.split([text]))
        return ["".join(part.text for part in parts if part.kind == kind) for kind in ("content", "tool_call")]

    text = "<think>Hm</think>\n" + written(JSON_IN_TAGS, CALLS[1:2])
    assert content("qwen3_moe-1", "", text) == ["<think>Hm</think>", "{}"]
    thoughts = "<|channel|>analysis<|message|>Hm<|end|>"
    text = f"{thoughts}<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{}}<|call|>"
    assert content("gpt_oss-0", "<|start|>assistant", text) == [thoughts, "{}"]


def test_ids() -> None:
    def ids(name: str, text: str) -> list[str]:
        parts = AnswerSplitter("", "auto", CallReader(FORMS[name], use())).split([text])
        return [part.id or "" for part in parts if part.name is not None]

    # An id that stands behind the arguments comes too late: they are told as they are written.
    assert ids("mixtral-0", '[TOOL_CALLS][{"name": "f", "id": "abcdefghi", "arguments": {}}]') == ["abcdefghi"]
    (made,) = ids("mixtral-0", '[TOOL_CALLS][{"name": "f", "arguments": {}}]')
    assert len(made) == 9 and made.isalnum()
    (made,) = ids("qwen3_moe-1", '<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    assert made.startswith("call_") and len(made) == 29
    assert ids("deepseek_v3-2", written(FORMS["deepseek_v3-2"], CALLS)) == [call.id for call in CALLS]


def test_nothing_is_lost_where_it_is_too_long() -> None:
    long = "Z" * ((1 << 20) + 9)
    for name, text in (
        ("lfm2_moe-0", f"<|tool_call_start|>[f(x='{long}')]<|tool_call_end|>"),
        ("qwen3_moe-1", f'<tool_call>{{"arguments": {{"a": "{long}"}}, "name": "f"}}</tool_call>'),
        ("qwen3_moe-1", f'<tool_call>{{"name": "{long}", "arguments": {{}}}}</tool_call>'),
        ("qwen3_moe-1", f'<tool_call>{{"name": {"9" * 5000}}}</tool_call>'),
    ):
        assert split(FORMS[name], text, 100_000) == [("content", text)]
    text = f"<tool_call><function=get_weather><parameter=days>{long}</parameter></function></tool_call>"
    whole = "".join(piece for part in split(FORMS["qwen3_moe-0"], text, 100_000) for piece in part[1:])
    assert whole.count("Z") == len(long)
