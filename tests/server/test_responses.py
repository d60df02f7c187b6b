"""OpenAI's responses, as its own client sees them."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from scripted import ScriptedModel, call, content, reasoning

import edgemoe

WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def told(scripted_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{scripted_url}/v1", api_key="none", max_retries=0)


def seen(scripted: ScriptedModel) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    messages, arguments = scripted.asked[-1]
    return list(messages), arguments


def test_an_answer_is_the_models(url: str, bundled: edgemoe.Model) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.responses.create(model="x", input="Tell me about the sea", max_output_tokens=12, temperature=0)
    message = {"role": "user", "content": "Tell me about the sea"}
    with bundled.chat([message], max_tokens=12, temperature=0) as generation:
        text = "".join(generation)
    assert answer.output_text == text
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and answer.usage.output_tokens == 12
    assert answer.usage.input_tokens == generation.result.prompt_tokens


def test_items_come_in_order_and_the_stream_tells_the_same(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: [
        *(reasoning("Hm"), reasoning("m.")),
        *(content("I look"), content(" it up.")),
        *call(0, '{"city": ', '"Rome"}'),
        *call(1, "", "{}"),
    ]
    asked: dict[str, Any] = {"model": "x", "input": "Hi", "tools": [WEATHER]}
    whole = told.responses.create(**asked)
    with told.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    for answer in (whole, final):
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
        assert answer.output_text == "I look it up."
        first: Any = answer.output[0]
        assert first.content[0].text == "Hmm."
        calls: list[Any] = list(answer.output[2:])
        assert [(one.call_id, one.name, one.arguments) for one in calls] == [
            ("call_0", "weather", '{"city": "Rome"}'),
            ("call_1", "weather", "{}"),
        ]
        assert answer.status == "completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert len({item.id for item in final.output}) == 4


def test_events_name_their_item(scripted_http: httpx2.Client, scripted: ScriptedModel) -> None:
    scripted.script = lambda _: [reasoning("Hm"), content("A"), *call(0, "{}"), content("B")]
    text = scripted_http.post("/v1/responses", json={"input": "Hi", "stream": True, "tools": [WEATHER]}).text
    assert text.endswith("data: [DONE]\n\n")
    open_item: dict[str, Any] | None = None
    done = []
    for event in text.split("\n\n"):
        name, _, data = event.removeprefix("event: ").partition("\ndata: ")
        if not data:
            continue
        told = json.loads(data)
        assert told["type"] == name
        if name == "response.output_item.added":
            assert open_item is None
            open_item = told["item"]
            assert told["output_index"] == len(done)
        elif name == "response.output_item.done":
            assert open_item is not None and told["item"]["id"] == open_item["id"]
            done.append(told["item"])
            open_item = None
        elif "item_id" in told:
            assert open_item is not None and told["item_id"] == open_item["id"]
            wanted = {"reasoning": "reasoning", "message": "output_text", "function_call": "function_call"}
            assert wanted[open_item["type"]] in name or "content_part" in name
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call", "message"]


@pytest.mark.parametrize("asked", [{"input": []}, {"input": ""}, {}, {"input": [], "instructions": "x"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_probe_without_input_is_answered(
    scripted_http: httpx2.Client, scripted: ScriptedModel, asked: dict[str, Any], stream: bool
) -> None:
    answer = scripted_http.post("/v1/responses", json={**asked, "stream": stream})
    assert answer.status_code == 200
    assert '"status":"completed"' in answer.text
    assert not scripted.asked


def test_tools_that_are_no_functions_are_passed_over(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    foreign: Any = [
        *({"type": kind} for kind in ("local_shell", "web_search", "image_generation")),
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
    ]
    told.responses.create(model="x", input="Hi", tools=[*foreign, WEATHER])
    assert [tool["function"]["name"] for tool in seen(scripted)[1]["tools"]] == ["weather"]
    told.responses.create(model="x", input="Hi", tools=foreign)
    assert "tools" not in seen(scripted)[1]


@pytest.mark.parametrize("field", ["previous_response_id", "conversation", "prompt", "background"])
def test_what_would_need_a_memory_is_refused_by_name(http: httpx2.Client, field: str) -> None:
    answer = http.post("/v1/responses", json={"input": "Hi", field: True if field == "background" else "resp_1"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert http.post("/v1/responses", json={"input": "", field: None}).status_code == 200


def test_a_conversation_with_tools_reaches_the_model_in_order(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    items: Any = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Two."}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call", "call_id": "b", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "sun"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "web_search_call", "id": "w", "status": "completed"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Mixed."}]},
        {"role": "user", "content": "Thanks"},
    ]
    told.responses.create(model="x", instructions="Be brief.", input=items, tools=[WEATHER])  # type: ignore[list-item]
    messages, _ = seen(scripted)
    assert messages == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Two.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
                {"id": "b", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "sun"},
        {"role": "tool", "tool_call_id": "b", "content": "rain"},
        {"role": "assistant", "content": "Mixed."},
        {"role": "user", "content": "Thanks"},
    ]


def test_json_of_a_type_is_parsed_by_the_client(told: openai.OpenAI, scripted: ScriptedModel) -> None:
    class City(pydantic.BaseModel):
        name: str

    scripted.script = lambda _: [content('{"name": '), content('"Rome"}')]
    answer = told.responses.parse(model="x", input="Hi", text_format=City)
    assert answer.output_parsed == City(name="Rome")
    assert seen(scripted)[1]["response_schema"]["properties"]["name"]["type"] == "string"
    told.responses.create(model="x", input="Hi", text={"format": {"type": "json_object"}})
    assert seen(scripted)[1]["response_schema"] == {}


@pytest.mark.parametrize(
    ("choice", "names", "wanted"),
    [
        ("required", ["weather", "now"], "required"),
        ({"type": "function", "name": "now"}, ["weather", "now"], {"type": "function", "function": {"name": "now"}}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]},
            ["now"],
            "required",
        ),
    ],
)
def test_a_choice_of_tools_is_handed_on(
    told: openai.OpenAI, scripted: ScriptedModel, choice: Any, names: list[str], wanted: Any
) -> None:
    tools: Any = [WEATHER, {**WEATHER, "name": "now"}]
    told.responses.create(model="x", input="Hi", tools=tools, tool_choice=choice)
    assert [tool["function"]["name"] for tool in seen(scripted)[1]["tools"]] == names
    assert seen(scripted)[1]["tool_choice"] == wanted


def test_effort_is_a_variable_where_the_template_has_one(
    told: openai.OpenAI, scripted: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripted.real.tokenizer, "chat_template", "{{ reasoning_effort }} {{ enable_thinking }}")
    for effort, variables in (
        ("xhigh", {"reasoning_effort": "high", "enable_thinking": True}),
        ("none", {"reasoning_effort": "low", "enable_thinking": False}),
    ):
        answer = told.responses.create(model="x", input="Hi", reasoning={"effort": effort})  # type: ignore[typeddict-item]
        assert seen(scripted)[1]["chat_template_kwargs"] == variables
        assert answer.reasoning is not None and answer.reasoning.effort == effort


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input": 5}, "input"),
        ({"input": [{"role": "robot", "content": "Hi"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "nonsense"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"truncation": "always"}, "truncation"),
        ({"metadata": 5}, "metadata"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_what_is_wrong_is_named(http: httpx2.Client, changes: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/responses", json={"input": "Hi", **changes})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
