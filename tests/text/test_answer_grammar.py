"""When a grammar begins in an answer, and the calls that it allows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from small_tokenizers import byte_level_backend, wrap
from test_tool_calls import CALLS, FORMS, NAMES, TOOLS
from tokenizers import AddedToken

from edgemoe.errors import OptionError
from edgemoe.families import ToolFormat
from edgemoe.families._tools import JSON_IN_TAGS
from edgemoe.text.answer_grammar import answer_constraint
from edgemoe.text.call_writing import Call, written
from edgemoe.text.grammar import Constraint
from edgemoe.text.tokenizer import Tokenizer
from edgemoe.text.tools import ToolUse

FRAME = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>"]
THINK = ["<think>", "</think>"]
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
NONE = ToolUse()


def tokenizer(special: list[str], plain: list[str] | None = None) -> Tokenizer:
    backend = byte_level_backend()
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain or []])
    return wrap(backend, eos_token_ids=[1])


FRAMED, THINKING, PLAIN = tokenizer(FRAME), tokenizer([], THINK), tokenizer([])


def use(tools: list[Any] = TOOLS, **options: Any) -> ToolUse:
    return ToolUse.given(tools, **options)


def weather(strict: bool = True, **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]}
    function = {"name": "weather", "strict": strict, "parameters": {**schema, **parameters}}
    return {"type": "function", "function": function}


def follow(tokens: Tokenizer, constraint: Constraint | None, text: str) -> str:
    """How far a text may go: "ends" (nothing can follow), "may end", "goes on", or what was not refused of it."""
    assert constraint is not None
    constraint._matcher.reset()
    said = b""
    for token in tokens.encode(text):
        if not constraint.allows(token):
            return said.decode(errors="replace")
        constraint.accept(token)
        said += tokens.spelling(token)
    if constraint.finished:
        return "ends"
    return "may end" if constraint.allows(tokens.end_ids[0]) else "goes on"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_required_call(name: str, special: bool) -> None:
    form = FORMS[name]
    marks = sorted({*form.tokens(), *(FRAME if form.syntax == "harmony" else [])})
    tokens = tokenizer(marks if special else [], [] if special else marks)
    prompt = "<|start|>assistant" if form.syntax == "harmony" else ""
    constraint = answer_constraint(prompt, tokens, use(tool_choice="required"), form)
    calls = [call._replace(id="abcdefghi") if form.id_length else call for call in CALLS]
    for some in (calls, calls[:1], calls[1:2], calls[2:]):
        text = written(form, some if form.parallel else some[:1])
        text = text.removeprefix("<|start|>assistant").removesuffix("<|call|>")
        assert follow(tokens, constraint, text) in ("ends", "may end"), text
    assert follow(tokens, constraint, "Hello") == ""
    unknown = written(form, [Call("nothing", {})]).removeprefix("<|start|>assistant").removesuffix("<|call|>")
    assert follow(tokens, constraint, unknown) not in ("ends", "may end", "goes on")
    one = answer_constraint(prompt, tokens, use(tool_choice="required", parallel=False), form)
    text = written(form, calls[:1]).removeprefix("<|start|>assistant").removesuffix("<|call|>")
    assert follow(tokens, one, text) == "ends"
    assert follow(tokens, one, written(form, calls)) not in ("ends", "may end", "goes on")
    chosen = {"type": "function", "function": {"name": "get-time"}}
    named = answer_constraint(prompt, tokens, use(tool_choice=chosen, parallel=False), form)
    assert follow(tokens, named, text) not in ("ends", "may end", "goes on")
    text = written(form, calls[1:2]).removeprefix("<|start|>assistant").removesuffix("<|call|>")
    assert follow(tokens, named, text) == "ends"


def test_arguments_are_of_their_schema() -> None:
    for name, form in ((name, FORMS[name]) for name in NAMES):
        if form.syntax == "harmony":
            continue
        tokens = tokenizer(sorted(form.tokens()))
        constraint = answer_constraint("", tokens, use([weather()], tool_choice="required"), form)
        good, bad = (written(form, [Call("weather", {"days": days})]) for days in (3, "many"))
        assert follow(tokens, constraint, good) in ("ends", "may end"), name
        assert follow(tokens, constraint, bad) not in ("ends", "may end", "goes on"), name
        assert follow(tokens, constraint, written(form, [Call("weather", {})])) not in ("ends", "may end"), name


def test_content_after_thoughts() -> None:
    for prompt, before in (
        ("", ""),
        ("", "<think>A {cat}?</think>\n\n"),
        ("", "<think>\n</think>"),
        ("<think>\n", "A cat? </think>\n"),
        ("<think>\n\n</think>\n\n", ""),
    ):
        constraint = answer_constraint(prompt, THINKING, NONE, None, json_schema=SCHEMA)
        assert follow(THINKING, constraint, before + '{"a": 1}') == "ends", (prompt, before)
        assert follow(THINKING, constraint, before + '{"b": 1}') == before + '{"'
        for grammar in ('root ::= "yes" | "no"', '%llguidance {}\nstart: "yes" | no\nno: "no"'):
            constraint = answer_constraint(prompt, THINKING, NONE, None, grammar=grammar)
            assert follow(THINKING, constraint, before + "no") == "ends"
            assert follow(THINKING, constraint, before + "yes.") == before + "yes"
    constraint = answer_constraint("<think>\n\n</think>", THINKING, NONE, None, json_schema=SCHEMA)
    assert follow(THINKING, constraint, "<think>") == ""
    constraint = answer_constraint("", PLAIN, NONE, None, json_schema=SCHEMA)
    assert follow(PLAIN, constraint, "<think>") == ""  # a model without such a token does not think
    assert answer_constraint("", PLAIN, NONE, None) is None


def test_content_in_a_frame() -> None:
    final = "<|channel|>final<|message|>"
    constraint = answer_constraint("<|start|>assistant", FRAMED, NONE, None, json_schema=SCHEMA)
    thoughts = "<|channel|>analysis<|message|>Let me see: {}<|end|><|start|>assistant"
    for before in (final, "<|channel|>final <|constrain|>json<|message|>", thoughts + final, thoughts * 2 + final):
        assert follow(FRAMED, constraint, before + '{"a": 1}') == "ends", before
        assert follow(FRAMED, constraint, before + '{"b": 1}') == before + '{"'
    assert follow(FRAMED, constraint, '{"a": 1}') == ""
    constraint = answer_constraint("<|start|>assistant", FRAMED, NONE, None, grammar='root ::= "yes"')
    assert follow(FRAMED, constraint, thoughts + final + "yes") == "ends"
    strict = answer_constraint("<|start|>assistant", FRAMED, use([weather()]), FORMS["gpt_oss-0"])
    call = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    early = " to=functions.weather<|channel|>commentary json<|message|>"
    for before in (call, early, thoughts + call):
        assert follow(FRAMED, strict, before + '{"days": 1}') == "ends"
        assert follow(FRAMED, strict, before + "{}") == before + "{"
    assert follow(FRAMED, strict, thoughts + final + "It is {warm}.") == "may end"


@pytest.mark.parametrize("special", [True, False])
def test_strict_tools_leave_the_rest_free(special: bool) -> None:
    for name, form in ((name, FORMS[name]) for name in NAMES):
        if form.syntax == "harmony":
            continue
        tokens = tokenizer(sorted(form.tokens())) if special else PLAIN
        assert answer_constraint("", tokens, use([weather(strict=False)]), form) is None
        constraint = answer_constraint("", tokens, use([weather()]), form)
        call, wrong = (written(form, [Call("weather", {"days": days})]) for days in (3, "many"))
        assert follow(tokens, constraint, "It is <b>warm</b> {[today]}.") == "may end", name
        assert follow(tokens, constraint, "I look.\n" + call) == "may end", name
        assert follow(tokens, constraint, call + "\n" + call + "\nThat is it.") == "may end", name
        # A call without the mark that it should begin with would escape.
        loose = [wrong[wrong.index(form.loose_begin) :]] if form.loose_begin else []
        for text in (wrong, "I look.\n" + wrong, call + wrong, *loose, *("I look. " + text for text in loose)):
            assert follow(tokens, constraint, text) not in ("ends", "may end", "goes on"), name
        one = answer_constraint("", tokens, use([weather(strict=False)], parallel=False), form)
        assert follow(tokens, one, "I look.\n" + call) == "ends", name
        assert follow(tokens, one, "I look.") == "may end", name


def test_a_schema_or_a_call() -> None:
    call = written(JSON_IN_TAGS, [Call("weather", {"days": 1})])
    constraint = answer_constraint("", PLAIN, use([weather(strict=False)]), JSON_IN_TAGS, json_schema=SCHEMA)
    assert follow(PLAIN, constraint, '{"a": 1}') == "ends"
    assert follow(PLAIN, constraint, call) == "may end"
    assert follow(PLAIN, constraint, "Hello") == ""


RECURSIVE = {
    "properties": {"tree": {"$ref": "#/$defs/tree"}},
    "$defs": {"tree": {"type": "object", "properties": {"inner": {"$ref": "#/$defs/tree"}}}},
    "required": ["tree"],
}


@pytest.mark.parametrize("name", ["qwen3_moe-0", "qwen3_moe-1", "glm4_moe-0", "lfm2_moe-0", "gemma4-0"])
def test_schemas_that_refer_to_themselves(name: str) -> None:
    form: ToolFormat = FORMS[name]
    tokens = tokenizer(sorted(form.tokens()))
    constraint = answer_constraint("", tokens, use([weather(**RECURSIVE)], tool_choice="required"), form)
    text = written(form, [Call("weather", {"tree": {"inner": {"inner": {}}}})])
    assert follow(tokens, constraint, text) in ("ends", "may end")


def test_large_schemas() -> None:
    large = {"required": [], "properties": {f"p{number}": {"enum": ["x" * 200]} for number in range(1000)}}
    tools = [weather(False, **large), {"type": "function", "function": {"name": "other", "parameters": large}}]
    constraint = answer_constraint("", PLAIN, use(tools, tool_choice="required"), JSON_IN_TAGS)
    for name in ("weather", "other"):
        assert follow(PLAIN, constraint, written(JSON_IN_TAGS, [Call(name, {"p7": "x" * 200})])) == "may end"
    tools[1]["function"]["strict"] = True
    with pytest.raises(OptionError, match="tool 'other': the schemas are too large"):
        answer_constraint("", PLAIN, use(tools, tool_choice="required"), JSON_IN_TAGS)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"properties": {"a": {"type": "thing"}}}, "tool 'weather': "),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "tool 'weather': "),
        ({"properties": {"a": {"not": {}}}}, "tool 'weather': .*not"),
    ],
)
def test_schemas_that_cannot_be_kept(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        answer_constraint("", PLAIN, use([weather(**parameters)], tool_choice="required"), JSON_IN_TAGS)
    # Without strict, as much of it as can be kept.
    loose = answer_constraint("", PLAIN, use([weather(False, **parameters)], tool_choice="required"), JSON_IN_TAGS)
    arguments = {"a": "x", "days": 1}
    assert follow(PLAIN, loose, written(JSON_IN_TAGS, [Call("weather", arguments)])) == "may end"
    followed = follow(PLAIN, loose, written(JSON_IN_TAGS, [Call("weather", {"a": "x"})]))
    assert (followed == "may end") == (message != "tool 'weather': .*not")
