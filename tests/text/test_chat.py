"""Conversations with a model: what a turn computes, what ends it, thoughts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import finished
from tokenizers import Tokenizer as Backend

import edgemoe
from edgemoe.errors import OptionError, TokenizerError
from edgemoe.text.named_templates import NAMED_TEMPLATES

Message = dict[str, str]
CHATML = NAMED_TEMPLATES["chatml"]
NEXT = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: str) -> Message:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def model(
    tiny_qwen3_moe: Callable[..., Path], tiny_tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[edgemoe.Model]:
    """A tiny model that does not say that <|im_end|> ends its turns."""
    monkeypatch.setenv("EDGEMOE_CACHE", str(tmp_path / "cache"))
    backend = Backend.from_buffer(tiny_tokenizer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    folder = tiny_qwen3_moe(tokenizer=backend.to_str().encode(), vocab_size=336, chat_template=CHATML)
    with edgemoe.load(folder) as opened:
        yield opened


def token(model: edgemoe.Model, text: str) -> int:
    (number,) = model.tokenizer.encode(text)
    return number


def letters(model: edgemoe.Model, text: str, ending: float = 0) -> dict[str, Any]:
    """Options with which the model says `text`, a letter at a time, and then ends its turn."""
    bias = {token(model, letter): 50.0 for letter in text}
    bias[token(model, "<|im_end|>")] = ending
    return {"grammar": f'root ::= "{text}" [!]*' if ending else f'root ::= "{text}"', "logit_bias": bias}


def test_a_turn_computes_its_new_tokens_only(model: edgemoe.Model) -> None:
    messages = [user("The quick brown fox")]
    assert len(model.tokenizer.encode("lazy")) < 4  # so its letters are not the tokens that the text becomes
    for number, line in enumerate(("jumps over", "the lazy dog", "again"), start=2):
        answer = finished(model.chat(messages, **letters(model, "lazy", ending=200)))
        assert (answer.text, answer.finish_reason) == ("lazy", "eos")
        messages += [assistant(answer.text), user(line)]
        result = finished(model.chat(messages, max_tokens=1))
        new = model.tokenizer.encode(NEXT.format(line))
        assert result.computed_prompt_tokens == len(new), number
        assert result.prompt_tokens > number * len(new) - 20


def test_a_turn_that_the_limit_ended_goes_on_too(model: edgemoe.Model) -> None:
    messages = [user("The quick brown fox")]
    answer = finished(model.chat(messages, max_tokens=9, seed=3, ignore_eos=True, temperature=2.0))
    assert answer.finish_reason == "length"
    messages += [assistant(answer.text), user("jumps")]
    result = finished(model.chat(messages, max_tokens=1))
    # The last token of the answer was drawn, but nothing has been computed from it yet.
    assert result.computed_prompt_tokens == len(model.tokenizer.encode(NEXT.format("jumps"))) + 1


def test_the_conversation_is_the_one_that_was_told(model: edgemoe.Model) -> None:
    """What is remembered is used only for its own continuation, and changes no probability."""
    messages = [user("The quick brown fox")]
    answer = "".join(model.chat(messages, **letters(model, "lazy", ending=200)))
    longer = [*messages, assistant(answer), user("jumps")]
    with_memory = list(model.chat(longer, max_tokens=8, temperature=0))
    model._conversations.clear()
    fresh = list(model.chat(longer, max_tokens=8, temperature=0))
    told = model.tokenizer.apply_chat_template(longer)
    assert list(model.generate(told, add_special=False, max_tokens=8, temperature=0)) == fresh
    # The letters are another way to read the same text: both are answers, each the same again.
    answer = "".join(model.chat(messages, **letters(model, "lazy", ending=200)))
    assert list(model.chat(longer, max_tokens=8, temperature=0)) == with_memory
    changed = [user("The slow brown fox"), assistant("lazy"), user("jumps")]
    assert list(model.chat(changed, max_tokens=8, temperature=0)) == list(
        model.generate(model.tokenizer.apply_chat_template(changed), add_special=False, max_tokens=8, temperature=0)
    )


def test_a_stop_string_is_no_part_of_the_conversation(model: edgemoe.Model) -> None:
    messages = [user("The quick")]
    result = finished(model.chat(messages, stop="zy", **letters(model, "lazy")))
    answer = result.text
    assert (answer, result.finish_reason) == ("la", "stop")
    assert model._conversations.recall(model.tokenizer.apply_chat_template([*messages, assistant(answer)])) == ("", [])
    result = finished(model.chat([*messages, assistant(answer), user("fox")], max_tokens=1))
    assert result.computed_prompt_tokens < result.prompt_tokens


def test_an_end_of_turn_ends_it(model: edgemoe.Model) -> None:
    end = token(model, "<|im_end|>")
    assert end not in model.tokenizer.eos_ids and end in model.tokenizer.end_ids
    result = finished(model.chat([user("The")], logit_bias={end: 100}))
    assert (result.text, result.finish_reason, result.tokens) == ("", "eos", (end,))
    result = finished(model.chat([user("The")], logit_bias={end: 100}, ignore_eos=True, max_tokens=5))
    assert result.finish_reason == "length" and "<|im_end|>" not in result.text
    assert list(model.generate("The", logit_bias={end: 100})) == []


def test_thoughts(model: edgemoe.Model) -> None:
    close = token(model, "</think>")
    options: dict[str, Any] = {"grammar": 'root ::= "yes"', "seed": 1}
    model.tokenizer.use_chat_template(CHATML + "{{ '<think>\\n' if thinking else '' }}")
    asked = [user("The quick")]
    thinking = {"thinking": True}
    # The thoughts that the prompt opens are free, the grammar is for what follows.
    parts = list(model.chat_parts(asked, chat_template_kwargs=thinking, logit_bias={close: 100}, **options))
    assert "".join(text for kind, text, *_ in parts if kind == "content") == "yes"
    raw = "".join(model.chat(asked, chat_template_kwargs=thinking, logit_bias={close: 100}, **options))
    assert raw.startswith("</think>") and raw.split() in (["</think>", "yes"], ["</think>yes"])
    parts = list(model.chat_parts(asked, chat_template_kwargs=thinking, max_tokens=4, seed=1, ignore_eos=True))
    assert parts[0].kind == "reasoning"
    unparsed = model.chat_parts(
        asked, reasoning_format="none", chat_template_kwargs=thinking, logit_bias={close: 100}, **options
    )
    assert "".join(part.text for part in unparsed) == raw
    begin = {token(model, "<think>"): -100.0}
    assert "".join(part.text for part in model.chat_parts(asked, logit_bias=begin, **options)) == "yes"
    # Thoughts that the model itself begins are free, too.
    bias = {token(model, "<think>"): 200.0, close: 100.0}
    raw = "".join(model.chat(asked, logit_bias=bias, **options))
    assert raw.startswith("<think></think>") and raw.endswith("yes")
    assert "".join(part.text for part in model.chat_parts(asked, logit_bias=bias, **options)) == "yes"
    with model.chat_parts(asked, max_tokens=50, seed=1, ignore_eos=True) as answer:
        next(answer)
    assert answer.result.finish_reason == "cancelled" and len(list(answer)) <= 1
    answer = model.chat_parts(asked, chat_template_kwargs=thinking, logit_bias={close: 100}, **options)
    assert {part.kind for part in answer} == {"content"} and answer.result.text.startswith("</think>")
    with pytest.raises(OptionError, match="reasoning_format"):
        model.chat_parts(asked, reasoning_format="magic")


def test_templates(model: edgemoe.Model) -> None:
    tokenizer = model.tokenizer
    asked = [{"role": "system", "content": "Be brief."}, user("Hi")]
    model.tokenizer.use_chat_template("{{ name }}")
    assert (
        tokenizer.chat_template == "{{ name }}" and tokenizer.apply_chat_template(asked, variables={"name": "x"}) == "x"
    )
    with pytest.raises(OptionError, match="'messages' is not a variable"):
        model.chat(asked, chat_template_kwargs={"messages": []})
    with pytest.raises(TokenizerError, match="chat template failed"):
        model.tokenizer.use_chat_template("{% if %}")
    expected = {
        "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "llama3": "<|endoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "gemma": "<|endoftext|><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
        "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n",
    }
    assert expected.keys() == NAMED_TEMPLATES.keys()
    for name, text in expected.items():
        tokenizer.use_chat_template(NAMED_TEMPLATES[name])
        assert tokenizer.apply_chat_template(asked) == text, name


def test_schema_by_keyword(model: edgemoe.Model) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    for seed in range(5):
        result = finished(model.chat([user("x")], json_schema=schema, seed=seed))
        assert json.loads(result.text)["a"] in (1, 2) and result.finish_reason == "eos"
    for wrong in ({"json_schema": "{"}, {"grammar": "x"}, {"logit_bias": {336: 1}}, {"stop": [""]}, {"mirostat": 7}):
        with pytest.raises(OptionError):
            model.generate("x", **wrong)
