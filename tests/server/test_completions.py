"""Texts that are continued, and the tokens of texts."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

import edgemoe

PROMPT = "The old man looked at the sea and"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def text_of(model: edgemoe.Model, prompt: Any, **options: Any) -> str:
    return "".join(model.generate(prompt, **options))


def test_a_text_is_continued(client: openai.OpenAI, bundled: edgemoe.Model) -> None:
    answer = client.completions.create(model="x", prompt=PROMPT, max_tokens=9, temperature=0)
    assert answer.choices[0].text == text_of(bundled, PROMPT, max_tokens=9, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == len(bundled.tokenizer.encode(PROMPT))


def test_openais_limit_counts_where_there_is_none(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="x", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_several_prompts_of_text_or_tokens_have_several_answers(client: openai.OpenAI, bundled: edgemoe.Model) -> None:
    prompts = [PROMPT, "Once"]
    ids = [bundled.tokenizer.encode(prompt) for prompt in prompts]
    asked: dict[str, Any] = {"model": "x", "max_tokens": 5, "n": 2, "seed": 5, "temperature": 1.5}
    expected = [
        text_of(bundled, prompt, max_tokens=5, seed=5 + choice, temperature=1.5)
        for prompt in prompts
        for choice in range(2)
    ]
    for prompt in (prompts, ids):
        answer = client.completions.create(prompt=prompt, **asked)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 20
    texts = ["", "", "", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected
    assert client.completions.create(prompt=ids[0], **{**asked, "n": 1}).choices[0].text == expected[0]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_the_prompt_itself(client: openai.OpenAI, bundled: edgemoe.Model, stream: bool) -> None:
    for prompt in (PROMPT, bundled.tokenizer.encode(PROMPT)):
        asked: Any = {"model": "x", "prompt": prompt, "max_tokens": 4, "temperature": 0, "echo": True}
        answer = client.completions.create(stream=stream, **asked)
        chunks: Any = list(answer) if stream else [answer]
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        assert text == PROMPT + text_of(bundled, PROMPT, max_tokens=4, temperature=0)


def test_an_echo_alone_computes_nothing(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="x", prompt=PROMPT, max_tokens=0, echo=True)
    assert answer.choices[0].text == PROMPT


def test_json_of_a_schema(http: httpx2.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    asked = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "json_schema": schema}
    choice = http.post("/v1/completions", json=asked).json()["choices"][0]
    assert choice["text"].replace(" ", "").replace("\n", "") == '{"a":1}'
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 2}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": {}, "grammar": "root ::= [a]"}, "grammar"),
        ({"grammar": 5}, "grammar"),
        ({"seed": 1.5}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1e300}}, "logit_bias"),
        ({"samplers": ["nonsense"]}, "samplers"),
        ({"stop": [5]}, "stop[0]"),
    ],
)
def test_what_is_wrong_is_named(http: httpx2.Client, changes: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **changes})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert field in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": [8192]},
        {"json_schema": {"$ref": "#"}},
        {"logit_bias": {"8192": 1}},
        {"grammar": "root ::= ("},
        {"json_schema": {"type": "nonsense"}},
    ],
)
def test_what_only_the_model_can_find_wrong_is_no_failure_of_the_server(
    http: httpx2.Client, changes: dict[str, Any]
) -> None:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **changes})
    assert answer.status_code == 400


def test_a_text_and_its_tokens(http: httpx2.Client, bundled: edgemoe.Model) -> None:
    text = "Ein Märchen\U0001f409"
    ids = bundled.tokenizer.encode(text)
    assert http.post("/tokenize", json={"content": text}).json() == {"tokens": ids}
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"content": text}
    pieces = http.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    spelled = [piece["piece"] for piece in pieces]
    assert b"".join(bytes(piece) if isinstance(piece, list) else piece.encode() for piece in spelled) == text.encode()


@pytest.mark.parametrize("tokens", [[8192], [-1], ["a"], [1.5], [True], "abc"])
def test_tokens_that_are_none_are_refused(http: httpx2.Client, tokens: Any) -> None:
    answer = http.post("/detokenize", json={"tokens": tokens})
    assert answer.status_code == 400
    assert "tokens" in answer.json()["error"]["param"]


def test_the_model_is_listed_with_its_context(http: httpx2.Client, client: openai.OpenAI) -> None:
    listed = http.get("/v1/models").json()
    assert listed["data"][0]["context_length"] == 512
    assert listed["models"] == []
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("any/name").id == "any/name"
