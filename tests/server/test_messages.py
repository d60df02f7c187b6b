"""Anthropic's messages, as its own client sees them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import anthropic
import httpx2
import pytest
from scripted import ScriptedModel, call, content, reasoning

import edgemoe

USER = {"role": "user", "content": "Tell me about the sea"}
ASKED: Any = {"model": "claude", "max_tokens": 100, "messages": [USER]}
WEATHER: Any = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture
def told(scripted_url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=scripted_url, api_key="none", max_retries=0)


def ask(client: anthropic.Anthropic, **fields: Any) -> Any:
    return client.messages.create(**{**ASKED, **fields})


def seen(scripted: ScriptedModel) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages, arguments) of the answer that was asked for last."""
    messages, arguments = scripted.asked[-1]
    return list(messages), arguments


def test_an_answer_is_the_models(url: str, bundled: edgemoe.Model) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "claude", "max_tokens": 12, "messages": [USER], "extra_body": {"temperature": 0}}
    answer = client.messages.create(**asked)
    with bundled.chat([USER], max_tokens=12, temperature=0) as generation:
        text = "".join(generation)
    assert [block.text for block in answer.content if block.type == "text"] == [text]
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 12
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == generation.result.prompt_tokens
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text


def test_blocks_are_of_one_kind_each_and_come_in_order(told: anthropic.Anthropic, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: [
        *(reasoning("Hm"), reasoning("m.")),
        *(content("I look"), content(" it up.")),
        *call(0, '{"city": ', '"Rome"}'),
        *call(1, '{"city": "Oslo"}'),
    ]
    with told.messages.stream(**ASKED, tools=[WEATHER]) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    whole = ask(told, tools=[WEATHER])
    assert events.count("message_start") == events.count("message_stop") == 1
    for message in (final, whole):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert message.content[0].thinking == "Hmm."
        assert message.content[1].text == "I look it up."
        assert [block.input for block in message.content[2:]] == [{"city": "Rome"}, {"city": "Oslo"}]
        assert [block.id for block in message.content[2:]] == ["call_0", "call_1"]
        assert message.stop_reason == "tool_use"
        assert message.usage.input_tokens == 3
        assert message.usage.cache_read_input_tokens == 2
        assert message.usage.output_tokens == 3


def test_deltas_belong_to_the_block_they_are_in(scripted_http: httpx2.Client, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: [reasoning("Hm"), content("A"), *call(0, "", "{}"), content("B")]
    asked = {"messages": [USER], "max_tokens": 9, "stream": True, "tools": [WEATHER]}
    text = scripted_http.post("/v1/messages", json=asked).text
    open_block: str | None = None
    kinds = []
    for event in text.split("\n\n"):
        if not event.startswith("event: "):
            continue
        name, _, data = event.removeprefix("event: ").partition("\ndata: ")
        told = json.loads(data)
        assert told["type"] == name
        kinds.append(name)
        if name == "content_block_start":
            assert open_block is None
            open_block = told["content_block"]["type"]
        elif name == "content_block_stop":
            open_block = None
        elif name == "content_block_delta":
            wanted = {
                "thinking_delta": "thinking",
                "signature_delta": "thinking",
                "text_delta": "text",
                "input_json_delta": "tool_use",
            }
            assert wanted[told["delta"]["type"]] == open_block
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]


def test_an_empty_answer_is_a_message(told: anthropic.Anthropic, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: []
    assert ask(told).content == []
    with told.messages.stream(**ASKED) as stream:
        assert stream.get_final_message().stop_reason == "end_turn"


def test_a_stop_sequence_is_named(told: anthropic.Anthropic, scripted: ScriptedModel) -> None:
    scripted.finish_reason = "stop"
    scripted.more = {"stop_string": "END"}
    answer = ask(told, stop_sequences=["END", "STOP"])
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == "END"
    assert seen(scripted)[1]["stop"] == ("END", "STOP")


def test_arguments_that_were_cut_end_with_max_tokens(told: anthropic.Anthropic, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: call(0, '{"city": "Ro')
    scripted.finish_reason = "length"
    assert ask(told, tools=[WEATHER]).stop_reason == "max_tokens"


def test_a_round_with_tools_reaches_the_model_in_order(told: anthropic.Anthropic, scripted: ScriptedModel) -> None:
    ask(
        told,
        system=[{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        tools=[WEATHER],
        messages=[
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Two cities.", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Zürich"}},
                    {"type": "tool_use", "id": "b", "name": "weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "rain"}]},
                    {"type": "tool_result", "tool_use_id": "a", "content": "sun"},
                    {"type": "tool_result", "tool_use_id": "c", "is_error": True},
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
    )
    messages, arguments = seen(scripted)
    function = {"name": "weather", "arguments": '{"city": "Zürich"}'}
    assert messages == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        USER,
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Two cities.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": function},
                {"id": "b", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "rain"},
        {"role": "tool", "tool_call_id": "a", "content": "sun"},
        {"role": "tool", "tool_call_id": "c", "content": "error"},
        {"role": "user", "content": "And now?"},
    ]
    described = {key: WEATHER[key] for key in ("name", "description")} | {"parameters": WEATHER["input_schema"]}
    assert list(arguments["tools"]) == [{"type": "function", "function": described}]


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
    ],
)
def test_a_choice_of_tools_is_handed_on(
    told: anthropic.Anthropic, scripted: ScriptedModel, choice: dict[str, Any], wanted: Any
) -> None:
    ask(told, tools=[WEATHER], tool_choice=choice)
    assert seen(scripted)[1]["tool_choice"] == wanted
    assert "parallel_tool_calls" not in seen(scripted)[1]
    if choice["type"] != "none":
        ask(told, tools=[WEATHER], tool_choice={**choice, "disable_parallel_tool_use": True})
        assert seen(scripted)[1]["parallel_tool_calls"] is False


def test_tools_that_anthropic_runs_itself_are_passed_over(told: anthropic.Anthropic, scripted: ScriptedModel) -> None:
    ask(told, tools=[{"type": "web_search_20250305", "name": "web_search"}, WEATHER])
    assert len(seen(scripted)[1]["tools"]) == 1


def test_a_line_that_is_never_the_same_is_no_part_of_the_prompt(
    told: anthropic.Anthropic, scripted: ScriptedModel
) -> None:
    line = "x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch={};"
    prompts = []
    for number in ("9f3a1", "00b7c"):
        for system in (
            [{"type": "text", "text": line.format(number)}, {"type": "text", "text": "You are an agent."}],
            line.format(number) + "\nYou are an agent.",
        ):
            ask(told, system=system)
            prompts.append(seen(scripted)[0][0])
    assert prompts == [{"role": "system", "content": "You are an agent."}] * 4
    ask(told, system="Mention x-anthropic-billing-header: never.")
    assert seen(scripted)[0][0]["content"] == "Mention x-anthropic-billing-header: never."


def test_what_comes_after_that_line_is_not_computed_again(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    usages = []
    for number in ("9f3a1", "00b7c"):
        line = f"x-anthropic-billing-header: cc_version=2.1; cch={number};"
        system: Any = [{"type": "text", "text": line}, {"type": "text", "text": "You are an agent. " * 8}]
        usages.append(client.messages.create(**{**ASKED, "max_tokens": 1}, system=system).usage)
    assert usages[1].cache_read_input_tokens
    assert usages[1].cache_read_input_tokens > 0.8 * (usages[0].input_tokens + usages[0].cache_read_input_tokens)


def test_thinking_is_a_variable_where_the_template_has_one(
    told: anthropic.Anthropic, scripted: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = {"type": "disabled"}
    ask(told, thinking=off)
    assert "chat_template_kwargs" not in seen(scripted)[1]
    template = "{% if enable_thinking %}{% endif %}{{ thinking_budget }}"
    monkeypatch.setattr(scripted.real.tokenizer, "chat_template", template)
    ask(told, thinking=off)
    assert seen(scripted)[1]["chat_template_kwargs"] == {"enable_thinking": False}
    ask(told, thinking={"type": "enabled", "budget_tokens": 2000})
    assert seen(scripted)[1]["chat_template_kwargs"] == {"enable_thinking": True, "thinking_budget": 2000}
    ask(told)
    assert "chat_template_kwargs" not in seen(scripted)[1]


def test_tokens_are_counted_without_an_answer(url: str, bundled: edgemoe.Model) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    counted = client.messages.count_tokens(model="claude", messages=ASKED["messages"]).input_tokens
    with bundled.chat([USER], max_tokens=1) as generation:
        assert counted == generation.result.prompt_tokens


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]}, "content[0].input"),
        ({"system": 5}, "system"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 3}, "top_p"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"stream": "yes"}, "stream"),
        ({"quality": "best"}, "quality"),
    ],
)
def test_what_is_wrong_is_named(http: httpx2.Client, changes: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/messages", json={"max_tokens": 5, "messages": [USER], **changes})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert field in answer.json()["error"]["message"]


def test_a_stream_that_is_closed_ends_the_answer(told: anthropic.Anthropic, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: itertools.repeat(content("word "))
    with told.messages.stream(**ASKED) as stream:
        next(stream.text_stream)
    assert scripted.answers[0].closed.wait(20)
