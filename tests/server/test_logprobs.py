"""How likely each token was, in the shapes of the protocols, streamed or not."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

import edgemoe

USER = {"role": "user", "content": "Tell me about the sea"}
ASKED: dict[str, Any] = {"model": "x", "messages": [USER], "max_tokens": 6, "seed": 1, "logprobs": True}


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_chat_completions_tell_every_token(client: openai.OpenAI, bundled: edgemoe.Model) -> None:
    choice = client.chat.completions.create(**ASKED, top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    told = choice.logprobs.content
    assert len(told) == 6
    text = b"".join(bytes(entry.bytes or []) for entry in told)
    assert text.decode(errors="replace") == choice.message.content
    prompt = bundled.tokenizer.apply_chat_template([USER])
    logits = bundled.next_logits(bundled.tokenizer.encode(prompt)).astype(np.float64)
    likeliest = logits - np.logaddexp.reduce(logits)
    top = [entry.logprob for entry in told[0].top_logprobs]
    assert top == pytest.approx(sorted(likeliest)[-3:][::-1], abs=1e-4)
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= entry.top_logprobs[0].logprob for entry in told)


def test_a_stream_tells_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED, top_logprobs=2).choices[0].logprobs
    assert whole is not None
    told: list[Any] = []
    for chunk in client.chat.completions.create(**ASKED, top_logprobs=2, stream=True):
        logprobs = chunk.choices[0].logprobs
        told += (logprobs.content or []) if logprobs is not None else []
    assert told == whole.content


def test_no_top_ones_and_none_at_all(client: openai.OpenAI, http: httpx2.Client) -> None:
    logprobs = client.chat.completions.create(**ASKED).choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.top_logprobs for entry in logprobs.content] == [[]] * 6
    choice = http.post("/v1/chat/completions", json={**ASKED, "logprobs": False}).json()["choices"][0]
    assert choice["logprobs"] is None


def test_the_token_that_ends_is_not_told(client: openai.OpenAI, bundled: edgemoe.Model) -> None:
    end = {str(token): 200 for token in bundled.tokenizer.end_ids[:1]}
    asked: Any = {**ASKED, "logit_bias": end}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == ""
    assert choice.logprobs is not None and choice.logprobs.content == []


def test_completions_tell_texts_and_offsets(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "x", "prompt": "The old man", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked).choices[0]
    told = whole.logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.text_offset and told.top_logprobs
    assert "".join(told.tokens) == whole.text
    assert told.text_offset == [len("".join(told.tokens[:number])) for number in range(6)]
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert logprob == max(top.values()) == top[token]
    streamed: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
    for chunk in client.completions.create(**asked, stream=True):
        logprobs = chunk.choices[0].logprobs
        for key, values in streamed.items():
            values += getattr(logprobs, key) or []
    assert streamed == told.model_dump()


def test_responses_tell_them_where_they_are_asked_to(client: openai.OpenAI, http: httpx2.Client) -> None:
    asked: dict[str, Any] = {"model": "x", "input": "The sea", "max_output_tokens": 4, "top_logprobs": 2}
    answer: Any = client.responses.create(**asked, include=["message.output_text.logprobs"])
    told = answer.output[0].content[0].logprobs
    assert len(told) == 4
    assert all(len(entry.top_logprobs) == 2 for entry in told)
    text = http.post("/v1/responses", json={"input": "The sea", "max_output_tokens": 4, "stream": True}).text
    for line in text.splitlines():
        if line.startswith("data: {"):
            assert json.loads(line[6:]).get("logprobs", []) == []
