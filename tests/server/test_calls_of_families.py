"""Tools and JSON of a schema through the APIs, with templates in the manner of each family's and a model of random
weights, which a grammar and a bias bring to the point."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from helpers import write_tiny_qwen3_moe
from scripted import serving
from text import tool_templates as templates
from tokenizers import Tokenizer as Backend

import edgemoe
from edgemoe.families import tool_formats

FRAME = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>"]
THOUGHTS = ["<think>", "</think>", "<|channel>", "<channel|>"]
FAMILIES = {
    "qwen3_moe": templates.QWEN3,
    "gpt_oss": templates.GPT_OSS,
    "deepseek_v3": templates.DEEPSEEK_V3_1,
    "glm4_moe": templates.GLM4,
    "granitemoe": templates.GRANITE,
    "lfm2_moe": templates.LFM2,
    "gemma4": templates.GEMMA4,
}
SCHEMA = {
    "type": "object",
    "properties": {"days": {"enum": [1, 2, 3]}},
    "required": ["days"],
    "additionalProperties": False,
}
USER = {"role": "user", "content": "Is it warm?"}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: bytes) -> Iterator[edgemoe.Model]:
    marks = sorted({mark for family in FAMILIES for form in tool_formats(family) for mark in form.tokens()})
    backend = Backend.from_buffer(tiny_tokenizer)
    backend.add_special_tokens([*FRAME, *THOUGHTS, "<|im_start|>", "<|im_end|>", *marks])
    folder = write_tiny_qwen3_moe(
        tmp_path_factory.mktemp("families") / "tiny",
        tokenizer=backend.to_str().encode(),
        vocab_size=448,
        max_position_embeddings=4096,
        chat_template=templates.CHATML,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEMOE_CACHE", str(folder.parent / "cache"))
        with edgemoe.load(folder, context=2048, threads=1) as model:
            yield model


@pytest.fixture(scope="module", params=FAMILIES)
def family(opened: edgemoe.Model, request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """(URL of a server of the family, fields that bring its model to the point)."""
    spec = opened.spec
    opened.tokenizer.use_chat_template(FAMILIES[request.param])
    opened.spec = dataclasses.replace(spec, family=request.param)
    wanted = {"</think>": 100, "<channel|>": 100, "<|end|>": 100, "<think>": -100, "<|channel>": -100}
    if request.param == "gpt_oss":
        wanted |= {"f": 50, "c": 50}
    ids = {opened.tokenizer.token_id(text): value for text, value in wanted.items()}
    bias = {str(token): value for token, value in ids.items() if token is not None}
    with serving(opened) as url:
        yield url, {"logit_bias": bias, "ignore_eos": True, "seed": 1}
    opened.spec = spec


@pytest.mark.parametrize("stream", [False, True])
def test_chat_completions(family: tuple[str, dict[str, Any]], stream: bool) -> None:
    url, fields = family
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    asked: dict[str, Any] = {"model": "x", "messages": [USER], "max_tokens": 400, "extra_body": fields}
    called = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}

    def answer(**more: Any) -> Any:
        if not stream:
            return client.chat.completions.create(**asked, **more).choices[0]
        with client.chat.completions.stream(**asked, **more) as events:
            return events.get_final_completion().choices[0]

    choice = answer(**called)
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.id
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["days"] in (1, 2, 3)
    assert not (choice.message.content or "").strip()
    choice = answer(response_format=form)
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content)["days"] in (1, 2, 3)
    # What was called, and what came of it, is told to the model in its own manner.
    told = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump(include={"id", "type", "function"})]},
        {"role": "tool", "tool_call_id": call.id, "content": "very warm"},
    ]
    again = client.chat.completions.create(
        model="x",
        messages=told,
        tools=[tool],
        max_tokens=1,
        extra_body=fields,  # type: ignore[arg-type, list-item]
    )
    assert again.usage is not None and again.usage.prompt_tokens > 20


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_messages(family: tuple[str, dict[str, Any]], stream: bool) -> None:
    url, fields = family
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    tool = {"name": "weather", "input_schema": SCHEMA, "strict": True}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    asked: dict[str, Any] = {"model": "x", "max_tokens": 400, "messages": [USER], "extra_body": fields}
    asked |= {"tools": [tool], "tool_choice": choice}
    if stream:
        with client.messages.stream(**asked) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**asked)
    assert answer.stop_reason == "tool_use"
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert call.name == "weather"
    assert call.input["days"] in (1, 2, 3)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "very warm"}
    asked["messages"] = [
        USER,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]},
        {"role": "user", "content": [result]},
    ]
    asked |= {"max_tokens": 1, "tool_choice": {"type": "auto"}}
    assert client.messages.create(**asked).usage.output_tokens == 1


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_responses(family: tuple[str, dict[str, Any]], stream: bool) -> None:
    url, fields = family
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
    asked: dict[str, Any] = {"model": "x", "input": [USER], "max_output_tokens": 400, "extra_body": fields}

    def answer(**more: Any) -> Any:
        if not stream:
            return client.responses.create(**asked, **more)
        with client.responses.stream(**asked, **more) as events:
            return events.get_final_response()

    called = answer(tools=[tool], tool_choice="required", parallel_tool_calls=False)
    assert called.status == "completed"
    (call,) = [item for item in called.output if item.type == "function_call"]
    assert call.name == "weather"
    assert json.loads(call.arguments)["days"] in (1, 2, 3)
    form = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}}
    assert json.loads(answer(text=form).output_text)["days"] in (1, 2, 3)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "very warm"}
    items = [item.model_dump(exclude_none=True) for item in called.output]
    asked |= {"input": [USER, *items, output], "max_output_tokens": 16}
    again = client.responses.create(**asked, tools=[tool])  # type: ignore[list-item]
    assert again.status == "incomplete"  # the client's helper for streams wants them complete
    assert again.usage is not None and again.usage.output_tokens == 16
