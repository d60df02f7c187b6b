"""Conversations with tools through the API, with templates in the manner of each family's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tool_templates as templates
from helpers import write_tiny_qwen3_moe
from tokenizers import Tokenizer as Backend

import edgemoe
from edgemoe.errors import OptionError
from edgemoe.families import family_names, tool_formats
from edgemoe.text.call_writing import Call, written
from edgemoe.text.tool_messages import prepared, template_tools
from edgemoe.text.tools import ToolUse

FRAME = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>"]
MARKS = sorted({token for name in family_names() for form in tool_formats(name) for token in form.tokens()})
SPECIAL = [*FRAME, *MARKS, "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|channel>", "<channel|>"]

# name -> (family, template, how its calls are to look in the conversation)
TEMPLATES: dict[str, tuple[str, str, str]] = {
    "qwen3": ("qwen3_moe", templates.QWEN3, '<tool_call>\n{"name": "weather", "arguments": {"days":2}}\n</tool_call>'),
    "qwen3-coder": (
        "qwen3_moe",
        templates.QWEN3_CODER,
        "<tool_call>\n<function=weather>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
    ),
    "gpt-oss": (
        "gpt_oss",
        templates.GPT_OSS,
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"days": 2}<|call|>',
    ),
    "deepseek-v3.1": (
        "deepseek_v3",
        templates.DEEPSEEK_V3_1,
        "<\uff5ctool\u2581call\u2581begin\uff5c>weather<\uff5ctool\u2581sep\uff5c>"
        '{"days":2}<\uff5ctool\u2581call\u2581end\uff5c>',
    ),
    "deepseek-v3": (
        "deepseek_v3",
        templates.DEEPSEEK_V3,
        "<\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>weather\n```json\n"
        '{"days":2}\n```<\uff5ctool\u2581call\u2581end\uff5c>',
    ),
    "glm": (
        "glm4_moe",
        templates.GLM4,
        "<tool_call>weather\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
    ),
    "granite": ("granitemoe", templates.GRANITE, '<|tool_call|>[{"name": "weather", "arguments": {"days": 2}}]'),
    "lfm2": ("lfm2_moe", templates.LFM2, "<|tool_call_start|>[weather(days=2)]<|tool_call_end|>"),
    "gemma": ("gemma4", templates.GEMMA4, "<|tool_call>call:weather{days:2}<tool_call|>"),
    "minimax": (
        "minimax_m2",
        templates.MINIMAX,
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="days">2</parameter>\n</invoke>',
    ),
    "mixtral": ("mixtral", templates.MIXTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"days": 2}, "id": "'),
    "chatml": ("olmoe", templates.CHATML, '<tool_call>\n{"name": "weather", "arguments": {"days": 2}}\n</tool_call>'),
}
SCHEMA = {
    "type": "object",
    "properties": {"days": {"enum": [1, 2, 3]}},
    "required": ["days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "It looks.", "parameters": SCHEMA, "strict": True}}
    for name in ("weather", "tides")
]
ASKED = [{"role": "user", "content": "Is it warm?"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"days":2}'}}
TOLD = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "very-warm"},
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: bytes) -> Iterator[edgemoe.Model]:
    backend = Backend.from_buffer(tiny_tokenizer)
    backend.add_special_tokens(SPECIAL)
    folder = write_tiny_qwen3_moe(
        tmp_path_factory.mktemp("tools") / "tiny",
        tokenizer=backend.to_str().encode(),
        vocab_size=448,
        max_position_embeddings=4096,
        chat_template=templates.CHATML,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEMOE_CACHE", str(folder.parent / "cache"))
        with edgemoe.load(folder, context=2048, threads=1) as model:
            yield model


@pytest.fixture
def model(opened: edgemoe.Model) -> Iterator[Callable[[str], edgemoe.Model]]:
    """The model with the template, and under the name, of a family."""
    spec = opened.spec

    def of(name: str) -> edgemoe.Model:
        family, template, _ = TEMPLATES[name]
        opened.tokenizer.use_chat_template(template)
        opened.spec = dataclasses.replace(spec, family=family)
        return opened

    yield of
    opened.spec = spec


def bias(model: edgemoe.Model, framed: bool) -> dict[int, float]:
    """What brings a model of random weights to the point: it ends thoughts at once, and begins none."""
    wanted = dict.fromkeys(["</think>", "<channel|>", "<|end|>"], 100.0) | dict.fromkeys(
        ["<think>", "<|channel>"], -100.0
    )
    if framed:
        wanted |= {"f": 50.0, "c": 50.0}
    return {token: value for text, value in wanted.items() if (token := model.tokenizer.token_id(text)) is not None}


def parts_of(answer: Any) -> tuple[str, list[tuple[str, str]]]:
    """(content, calls) of an answer without thoughts."""
    content, calls = "", []
    for part in answer:
        if part.kind == "content":
            content += part.text
        else:
            assert part.kind == "tool_call"
            if part.name is not None:
                assert part.index == len(calls) and part.id
                calls.append((part.name, part.text))
            else:
                calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return content, calls


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_and_a_schema(model: Callable[[str], edgemoe.Model], name: str) -> None:
    loaded = model(name)
    options: dict[str, Any] = {"max_tokens": 400, "logit_bias": bias(loaded, name == "gpt-oss"), "ignore_eos": True}
    for choice in ("required", {"type": "function", "function": {"name": "tides"}}):
        answer = loaded.chat_parts(ASKED, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=1, **options)
        content, calls = parts_of(answer)
        assert answer.result.finish_reason == "eos", answer.result.text
        assert not content.strip(), answer.result.text
        ((called, arguments),) = calls
        assert called in ("weather", "tides") and (choice == "required" or called == "tides")
        assert json.loads(arguments)["days"] in (1, 2, 3)
    answer = loaded.chat_parts(ASKED, response_schema=SCHEMA, seed=1, **options)
    content, calls = parts_of(answer)
    assert json.loads(content)["days"] in (1, 2, 3) and not calls, answer.result.text
    assert answer.result.finish_reason == "eos"
    # What max_tokens cuts is content as far as it goes.
    whole = len(answer.result.tokens)
    answer = loaded.chat_parts(ASKED, response_schema=SCHEMA, seed=1, **{**options, "max_tokens": whole - 2})
    content, _ = parts_of(answer)
    assert answer.result.finish_reason == "length" and content.lstrip().startswith("{") and "}" not in content


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_model_is_told(model: Callable[[str], edgemoe.Model], name: str) -> None:
    loaded = model(name)
    text = prompt(loaded, ASKED, tools=TOOLS)
    assert "weather" in text and "tides" in text
    assert "weather" not in prompt(loaded, ASKED, tools=TOOLS, tool_choice="none")
    text = prompt(loaded, TOLD, tools=TOOLS)
    assert TEMPLATES[name][2] in text, text
    assert text.count("very-warm") == 1 and text.index("very-warm") > text.index(TEMPLATES[name][2])
    # Without tools, too; with thoughts and words beside the call; two calls at once.
    assert "very-warm" in prompt(loaded, TOLD)
    beside = {**TOLD[1], "content": "I look.", "reasoning_content": "Hm."}
    text = prompt(loaded, [TOLD[0], beside, TOLD[2]], tools=TOOLS)
    assert "I look." in text and TEMPLATES[name][2] in text
    second = {"id": "call_2", "type": "function", "function": {"name": "tides", "arguments": "{}"}}
    both = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [CALL, second]},
        {"role": "tool", "tool_call_id": "call_1", "content": "very-warm"},
        {"role": "tool", "tool_call_id": "call_2", "content": "very-low"},
    ]
    text = prompt(loaded, both, tools=TOOLS)
    assert text.count("very-warm") == text.count("very-low") == 1 and text.index("very-warm") < text.index("very-low")
    # A call that was broken off does not break the conversation.
    broken = {**CALL, "function": {"name": "weather", "arguments": '{"days'}}
    assert "days" in prompt(loaded, [*ASKED, {"role": "assistant", "content": "", "tool_calls": [broken]}, TOLD[2]])


def prompt(model: edgemoe.Model, messages: Any, tools: Any = (), **options: Any) -> str:
    """The text that the model is given."""
    told, variables = prepared(messages, ToolUse.given(tools, **options), model.tokenizer, model.spec.family)
    return model.tokenizer.apply_chat_template(told, variables=variables)


def test_forms_by_template_and_family(model: Callable[[str], edgemoe.Model]) -> None:
    found = {}
    for name, (family, _, _) in TEMPLATES.items():
        tools = template_tools(model(name).tokenizer, family)
        found[name] = (tools.form.syntax, tools.tools, tools.calls, tools.results)
    assert found == {
        "qwen3": ("json", True, "text", "tool"),
        "qwen3-coder": ("tagged", True, "object", "tool"),
        "gpt-oss": ("harmony", True, "object", "tool"),
        "deepseek-v3.1": ("named", False, "text", "tool"),
        "deepseek-v3": ("named", False, "text", "tool"),
        "glm": ("tagged", True, "object", "tool"),
        "granite": ("json", True, "", "tool_response"),
        "lfm2": ("python", True, "", "tool"),
        "gemma": ("gemma", True, "object", "tool"),
        "minimax": ("tagged", True, "object", "tool"),
        "mixtral": ("json", True, "object", "tool"),
        "chatml": ("json", False, "", ""),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "x"}, "tools = 'x' is not a list"),
        ({"tools": [5]}, r"tools\[0\]: its type is not 'function'"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]: its type is not 'function'"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]: it has no function"),
        ({"tools": [{"function": {"name": "a b"}}]}, r"tools\[0\]: the name 'a b' is not"),
        ({"tools": [{"function": {"name": "</tool_call>"}}]}, "the name '</tool_call>' is not"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, r"tools\[1\]: there are two tools 'weather'"),
        ({"tools": [{"function": {"name": "a", "parameters": []}}]}, r"tools\[0\] 'a': its parameters are not"),
        ({"tools": [{"function": {"name": "a", "parameters": {"type": "string"}}}]}, "'a': the type of its parameters"),
        ({"tools": [{"function": {"name": "a", "description": 1}}]}, "'a': its description is not a text"),
        ({"tools": [{"function": {"name": "a", "strict": 1}}]}, "'a': strict is neither"),
        ({"tools": [{"function": {"name": "a", "parameters": {"x": "x" * 300_000}}}]}, "'a': its definition has 300"),
        ({"tools": [{"function": {"name": "a", "parameters": {"x": {1, 2}}}}]}, "'a': its definition is not JSON"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice = 'some' is not auto"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "there is no tool 'x'"),
        ({"tool_choice": "required"}, "but there are no tools"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls = 1"),
        ({"response_schema": {}, "json_schema": "{}"}, "exclude each other"),
        ({"response_schema": {"type": "thing"}}, "json_schema: "),
    ],
)
def test_wrong_tools(model: Callable[[str], edgemoe.Model], options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        model("qwen3").chat_parts(ASKED, **options)


def test_deep_definitions(model: Callable[[str], edgemoe.Model]) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(100):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(OptionError, match="'a': its definition is nested more than 64 deep"):
        model("qwen3").chat_parts(ASKED, tools=[{"function": {"name": "a", "parameters": schema}}])


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"tool_calls": 5}, r"messages\[0\]: tool_calls is not a list"),
        ({"tool_calls": [{}]}, r"messages\[0\]: tool_calls\[0\] has no function with a name"),
        ({"tool_calls": [{"function": {"name": "a", "arguments": 5}}]}, r"the arguments of tool_calls\[0\] are 5"),
    ],
)
def test_wrong_calls(model: Callable[[str], edgemoe.Model], message: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        model("qwen3").chat_parts([{"role": "assistant", "content": "", **message}])
    with pytest.raises(OptionError, match=r"messages\[1\] is 5, not an object"):
        model("qwen3").chat_parts([*ASKED, 5])  # type: ignore[list-item]


def test_what_a_model_writes_by_itself(model: Callable[[str], edgemoe.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced tokens, marks among them: thoughts, words and two calls where there may be two."""
    script: list[int] = []
    monkeypatch.setattr("edgemoe.text.sampling.Sampler.sample", lambda *_: script.pop(0))
    for name, (family, _, _) in TEMPLATES.items():
        loaded = model(name)
        form = template_tools(loaded.tokenizer, family).form
        calls = [Call("weather", {"days": 2}, "functions.weather:0"), Call("tides", {}, "functions.tides:1")]
        calls = calls if form.parallel else calls[:1]
        if name == "gpt-oss":
            text = "<|channel|>analysis<|message|>Hm.<|end|>"
            text += "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        else:
            opened = "<think>" in loaded.tokenizer.apply_chat_template(ASKED)[-9:]
            text = ("" if opened else "<think>") + "Hm.</think>\n\nI look.\n"
        text += written(form, calls)
        script[:] = [*loaded.tokenizer.encode(text.removesuffix("<|call|>")), loaded.tokenizer.end_ids[0]]
        answer = loaded.chat_parts(ASKED, tools=[plain(tool) for tool in TOOLS])
        told = {"reasoning": "", "content": "", **{str(index): "" for index in range(len(calls))}}
        names = []
        for part in answer:
            told[part.kind if part.index is None else str(part.index)] += part.text
            names += [part.name] if part.name else []
        assert (told.pop("reasoning"), told.pop("content")) == ("Hm.", "I look."), name
        assert names == [call.name for call in calls], name
        assert [json.loads(arguments) for arguments in told.values()] == [call.arguments for call in calls], name
        assert answer.result.finish_reason == "eos"
        # Without tools, or where none is to be called, it is content.
        script[:] = [*loaded.tokenizer.encode(text.removesuffix("<|call|>")), loaded.tokenizer.end_ids[0]]
        answer = loaded.chat_parts(ASKED, tools=TOOLS, tool_choice="none")
        assert {part.kind for part in answer} == {"reasoning", "content"}


def test_a_result_costs_its_new_tokens_only(
    model: Callable[[str], edgemoe.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    script: list[int] = []
    monkeypatch.setattr("edgemoe.text.sampling.Sampler.sample", lambda *_: script.pop(0))
    loaded = model("qwen3")
    tools = [plain(tool) for tool in TOOLS]
    # As a model writes it, not as JSON is written here: it comes back as it was.
    arguments = '{"days" : 2 }'
    text = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
    script[:] = [*loaded.tokenizer.encode(text), loaded.tokenizer.token_id("<|im_end|>")]
    (call,) = parts_of(loaded.chat_parts(ASKED, tools=tools))[1]
    assert call == ("weather", arguments)
    function = {"name": "weather", "arguments": arguments}
    told = [*ASKED, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}]
    script[:] = [loaded.tokenizer.token_id("<|im_end|>")]
    answer = loaded.chat_parts([*told, {"role": "tool", "tool_call_id": "1", "content": "warm"}], tools=tools)
    assert parts_of(answer) == ("", [])
    new = "<|im_end|>\n<|im_start|>user\n<tool_response>\nwarm\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert answer.result.computed_prompt_tokens <= len(loaded.tokenizer.encode(new)) + 1
    assert answer.result.prompt_tokens > 300


def plain(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool that is not strict: its calls need no grammar."""
    return {**tool, "function": {**tool["function"], "strict": False}}
