"""Chat completions of a live server, as OpenAI's own client sees them, and streams byte by byte."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from scripted import ScriptedModel, call, content, reasoning

import edgemoe

USER = {"role": "user", "content": "Tell me about the sea"}


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def told(scripted_url: str) -> openai.OpenAI:
    """Of the scripted model."""
    return openai.OpenAI(base_url=f"{scripted_url}/v1", api_key="none", max_retries=0)


def events(text: str) -> list[Any]:
    """What a stream's events hold; the last must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer_is_the_models(client: openai.OpenAI, bundled: edgemoe.Model) -> None:
    answer = client.chat.completions.create(model="gpt-5", messages=[USER], max_tokens=12, temperature=0)
    with bundled.chat([USER], max_tokens=12, temperature=0) as generation:
        text = "".join(generation)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == generation.result.prompt_tokens


def test_a_stream_is_the_same_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "x", "messages": [USER], "max_completion_tokens": 12, "seed": 7}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_no_usage_where_none_is_asked_for(http: httpx2.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 2, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert all("usage" not in chunk for chunk in events(answer.text))


def test_the_servers_limit_of_tokens_counts(http: httpx2.Client) -> None:
    asked = {"messages": [USER], "max_tokens": 100, "ignore_eos": True}
    assert http.post("/v1/chat/completions", json=asked).json()["usage"]["completion_tokens"] == 64
    asked.pop("max_tokens")
    assert http.post("/v1/chat/completions", json=asked).json()["usage"]["completion_tokens"] == 64


def test_several_answers_have_seeds_that_follow_each_other(http: httpx2.Client) -> None:
    def texts(seed: int, n: int) -> list[str]:
        asked = {"messages": [USER], "max_tokens": 6, "n": n, "seed": seed, "temperature": 1.5}
        choices = http.post("/v1/chat/completions", json=asked).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(n))
        return [choice["message"]["content"] for choice in choices]

    three = texts(11, 3)
    assert len(set(three)) == 3
    assert three[1:] == texts(12, 2)


def test_a_stream_of_several_answers_says_whose_each_piece_is(http: httpx2.Client) -> None:
    asked = {"messages": [USER], "max_tokens": 5, "n": 2, "seed": 3, "temperature": 1.5}
    whole = http.post("/v1/chat/completions", json=asked).json()
    texts = ["", ""]
    for chunk in events(http.post("/v1/chat/completions", json={**asked, "stream": True}).text):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


def test_stop_strings_end_an_answer(http: httpx2.Client) -> None:
    asked = {"messages": [USER], "max_tokens": 20, "grammar": 'root ::= "one two three"', "stop": ["tw", "xyz"]}
    choice = http.post("/v1/chat/completions", json=asked).json()["choices"][0]
    assert choice["message"]["content"] == "one "
    assert choice["finish_reason"] == "stop"


def test_thoughts_have_a_field_of_their_own(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: [reasoning("Hm"), reasoning("m."), content("Yes"), content(".")]
    answer = told.chat.completions.create(model="x", messages=[USER])
    assert answer.choices[0].message.content == "Yes."
    assert answer.choices[0].message.reasoning_content == "Hmm."  # type: ignore[attr-defined]
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens
    for chunk in told.chat.completions.create(model="x", messages=[USER], stream=True):
        delta = chunk.choices[0].delta
        assert not (delta.content and getattr(delta, "reasoning_content", None))


def test_tool_calls_come_with_text_for_arguments(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: [*call(0, '{"city": ', '"Rome"}'), *call(1, "{}", name="now")]
    tools: Any = [{"type": "function", "function": {"name": name}} for name in ("weather", "now")]
    answer = told.chat.completions.create(model="x", messages=[USER], tools=tools)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls = choice.message.tool_calls or []
    assert [(one.id, one.function.name, one.function.arguments) for one in calls] == [  # type: ignore[union-attr]
        ("call_0", "weather", '{"city": "Rome"}'),
        ("call_1", "now", "{}"),
    ]
    assert [tool["function"]["name"] for tool in scripted.asked[0][1]["tools"]] == ["weather", "now"]


def test_streamed_tool_calls_keep_their_index(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: [content("So: "), *call(0, '{"city": ', '"Rome"}'), *call(1, "", "{}", name="now")]
    tools: Any = [{"type": "function", "function": {"name": name}} for name in ("weather", "now")]
    with told.chat.completions.stream(model="x", messages=[USER], tools=tools) as stream:
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert [(one.function.name, one.function.arguments) for one in calls] == [
        ("weather", '{"city": "Rome"}'),
        ("now", "{}"),
    ]
    assert final.choices[0].message.content == "So: "
    assert final.choices[0].finish_reason == "tool_calls"


def test_what_was_cut_says_length_with_calls_too(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: call(0, '{"city": ')
    scripted.finish_reason = "length"
    tools: Any = [{"type": "function", "function": {"name": "weather"}}]
    assert told.chat.completions.create(model="x", messages=[USER], tools=tools).choices[0].finish_reason == "length"


def seen(scripted: ScriptedModel) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages, arguments) of the answer that was asked for last."""
    messages, arguments = scripted.asked[-1]
    return list(messages), arguments


def function(name: str, arguments: Any, id: Any = None) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_messages_of_all_kinds_reach_the_model(scripted_http: httpx2.Client, scripted: ScriptedModel) -> None:
    """Also from clients that leave out ids, or send null for what there is not."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "refusal": None,
            "tool_calls": [function("a", '{"x": 1}'), function("b", {"y": "ü"}, "own"), function("c", None)],
        },
        {"role": "tool", "content": "1", "tool_call_id": None},
        {"role": "tool", "content": "2", "tool_call_id": "own"},
        {"role": "tool", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "", "tool_calls": [function("a", "", "")]},
        {"role": "assistant", "content": "Done.", "tool_calls": None},
        {"role": "user", "content": ""},
    ]
    assert scripted_http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert seen(scripted)[0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One\ntwo", "name": "Ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [
                function("a", '{"x": 1}', "call_0"),
                function("b", '{"y": "ü"}', "own"),
                function("c", "{}", "call_2"),
            ],
        },
        {"role": "tool", "content": "1", "tool_call_id": "call_0"},
        {"role": "tool", "content": "2", "tool_call_id": "own"},
        {"role": "tool", "content": "3", "tool_call_id": "call_2"},
        {"role": "assistant", "content": None, "tool_calls": [function("a", "{}", "call_0")]},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": ""},
    ]


def test_everything_that_is_asked_for_is_handed_on(
    scripted_http: httpx2.Client, scripted: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripted.real.tokenizer, "chat_template", "{{ enable_thinking }} {{ reasoning_effort }}")
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}
    schema = {"type": "object"}
    asked = {
        "model": "gpt-5",
        "messages": [USER],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "reasoning_effort": "minimal",
        "chat_template_kwargs": {"enable_thinking": False, "style": "x"},
        "reasoning_format": "none",
        "max_tokens": 5,
        "max_completion_tokens": 7,
        "stop": "END",
        "seed": 3,
        "temperature": 0.5,
        "top_k": 4.0,
        "logit_bias": {"5": -100},
        "quality": "exact",
        "top_p": None,
        "store": True,
        "metadata": {"a": "b"},
        "user": "u",
        "nobody_knows_this": [1, 2],
    }
    assert scripted_http.post("/v1/chat/completions", json=asked).status_code == 200
    arguments = seen(scripted)[1]
    described = {"name": "f", "description": "", "parameters": {"type": "object"}, "strict": True}
    assert arguments == {
        "tools": ({"type": "function", "function": described},),
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_schema": schema,
        "reasoning_format": "none",
        "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low", "style": "x"},
        "max_tokens": 7,
        "stop": ("END",),
        "seed": 3,
        "temperature": 0.5,
        "top_k": 4,
        "logit_bias": {"5": -100},
        "quality": "exact",
    }


def test_thinking_is_a_variable_where_the_template_has_one(
    scripted_http: httpx2.Client, scripted: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripted.real.tokenizer, "chat_template", "{% if thinking %}{% endif %}{{ reasoning_effort }}")
    for fields, variables in (
        ({"thinking": {"type": "disabled"}}, {"thinking": False}),
        ({"reasoning_effort": "high"}, {"thinking": True, "reasoning_effort": "high"}),
        (
            {"reasoning_effort": "high", "thinking": {"type": "disabled"}},
            {"thinking": False, "reasoning_effort": "high"},
        ),
        ({}, None),
    ):
        scripted_http.post("/v1/chat/completions", json={"messages": [USER], **fields})
        assert seen(scripted)[1].get("chat_template_kwargs") == variables


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_object"}, {}),
        ({"type": "json_object", "schema": {"type": "array"}}, {"type": "array"}),
        ({"type": "text"}, None),
    ],
)
def test_forms_of_answers(
    scripted_http: httpx2.Client, scripted: ScriptedModel, form: dict[str, Any], schema: Any
) -> None:
    scripted_http.post("/v1/chat/completions", json={"messages": [USER], "response_format": form})
    assert seen(scripted)[1].get("response_schema") == schema


def test_json_that_was_cut_says_length(http: httpx2.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"const": "x" * 50}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"messages": [USER], "response_format": form, "max_tokens": 6}
    choice = http.post("/v1/chat/completions", json=asked).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("{")


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [function("a", 5)]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "json_schema": {}}, "json_schema"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 1 << 40}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e400}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning_format": "xml"}, "reasoning_format"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"quality": "best"}, "quality"),
        ({"model": 5}, "model"),
    ],
)
def test_what_is_wrong_is_named(http: httpx2.Client, changes: dict[str, Any], field: str) -> None:
    body = json.dumps({"messages": [USER], **changes}).replace("Infinity", "1e400")
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    told = answer.json()["error"]
    assert told["param"] == field
    assert field in told["message"]
    assert told["type"] == "invalid_request_error"


def test_json_of_a_type_is_parsed_by_the_client(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    class City(pydantic.BaseModel):
        name: str

    scripted.script = lambda _: [content('{"name": '), content('"Rome"}')]
    answer = told.chat.completions.parse(model="x", messages=[USER], response_format=City)
    assert answer.choices[0].message.parsed == City(name="Rome")
    assert seen(scripted)[1]["response_schema"]["properties"]["name"]["type"] == "string"


def test_a_stream_that_is_closed_ends_the_answer(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: itertools.repeat(content("word "))
    with told.chat.completions.create(model="x", messages=[USER], stream=True) as stream:
        next(iter(stream))
    assert scripted.answers[0].closed.wait(20)
