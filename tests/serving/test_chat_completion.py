"""`Model.create_chat_completion`: OpenAI's shapes without a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai.types.chat
import pytest

import edgemoe
from edgemoe.errors import OptionError
from edgemoe.text.named_templates import NAMED_TEMPLATES

USER = {"role": "user", "content": "Tell me about the sea"}


@pytest.fixture(scope="module")
def model() -> Iterator[edgemoe.Model]:
    with edgemoe.load(context=256) as opened:
        opened.tokenizer.use_chat_template(NAMED_TEMPLATES["chatml"])
        yield opened


def test_an_answer_is_a_completion(model: edgemoe.Model) -> None:
    answer = model.create_chat_completion([USER], max_tokens=8, temperature=0)
    told = openai.types.chat.ChatCompletion.model_validate(answer)
    with model.chat([USER], max_tokens=8, temperature=0) as generation:
        assert told.choices[0].message.content == "".join(generation)
    assert told.usage is not None and told.usage.completion_tokens == 8
    assert told.model == "mini-qwen3moe"


def test_a_stream_is_its_chunks(model: edgemoe.Model) -> None:
    asked: dict[str, Any] = {"max_tokens": 8, "seed": 3, "n": 2, "stop": ("zzz",), "temperature": 1.5}
    whole: Any = model.create_chat_completion([USER], **asked)
    texts = ["", ""]
    for chunk in model.create_chat_completion([USER], stream=True, **asked):
        told = openai.types.chat.ChatCompletionChunk.model_validate(chunk)
        for choice in told.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 2


def test_a_stream_that_is_dropped_ends_its_answer(model: edgemoe.Model) -> None:
    stream: Any = model.create_chat_completion([USER], stream=True)
    next(stream)
    next(stream)
    stream.close()
    assert model.create_chat_completion([USER], max_tokens=1)


@pytest.mark.parametrize(
    "fields",
    [{"max_token": 5}, {"n": 0}, {"stop": [""]}, {"response_format": "json"}, {"tools": [object()]}, {"functions": []}],
)
def test_a_field_that_is_wrong_is_an_option_error_that_names_it(model: edgemoe.Model, fields: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(fields)) if "tools" not in fields else "JSON"):
        model.create_chat_completion([USER], **fields)
