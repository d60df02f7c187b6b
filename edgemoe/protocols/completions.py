"""OpenAI's older `/v1/completions`: texts that are continued as they are, without a template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgemoe.errors import quote
from edgemoe.protocols.answers import DONE, LEAST_LOGPROB, Event, Gathered, Reply, usage_of
from edgemoe.protocols.common_fields import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_TOKENS,
    read_json_schema,
    read_quality,
    read_sampling,
    read_stop,
)
from edgemoe.protocols.fields import FieldError, Fields
from edgemoe.protocols.problems import Problem, openai_error
from edgemoe.protocols.requests import TextRequest
from edgemoe.serving.generation import GenerationResult
from edgemoe.serving.session import TokenLogprob
from edgemoe.text.parts import Part

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, where a request says nothing."""


def parse(body: object) -> TextRequest:
    """Raises FieldError."""
    fields = Fields(body)
    fields.refuse("suffix", "the model continues texts, it fills no gaps")
    prompts = _prompts(fields)
    n = fields.whole("n", 1, MAX_CHOICES) or 1
    if len(prompts) * n > MAX_CHOICES:
        fields.fail("prompt", f"and n ask for {len(prompts) * n} answers, more than {MAX_CHOICES}")
    best_of = fields.whole("best_of", 1, MAX_CHOICES)
    if best_of is not None and best_of != n:
        fields.fail("best_of", f"= {best_of} is not supported beside n = {n}: leave it out", "unsupported_parameter")
    echo = fields.flag("echo")
    logprobs = fields.whole("logprobs", 0, MAX_LOGPROBS)
    if echo and logprobs is not None:
        fields.fail(
            "echo", "is not supported beside logprobs: a prompt's own are not computed", "unsupported_parameter"
        )
    sampling = read_sampling(fields)
    schema = read_json_schema(fields)
    if schema is not None:
        if "grammar" in sampling:
            fields.fail("grammar", "and a JSON schema exclude each other")
        sampling["json_schema"] = schema
    limit = fields.whole("max_tokens", -1, MAX_TOKENS)
    options = fields.inner("stream_options")
    return TextRequest(
        model=fields.text("model"),
        prompts=prompts,
        echo=echo,
        max_tokens=DEFAULT_MAX_TOKENS if limit is None else None if limit == -1 else limit,
        stop=read_stop(fields),
        sampling=sampling,
        n=n,
        logprobs=logprobs,
        quality=read_quality(fields),
        stream=fields.flag("stream"),
        include_usage=options is not None and options.flag("include_usage"),
    )


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    """A text, token ids, or a list of either."""
    value = fields.need("prompt")
    if isinstance(value, str):
        return (value,)
    items = fields.items("prompt", 1 << 22)
    if items and all(isinstance(item, str) for item in items):
        return tuple(items)
    if items and all(_is_id(item) for item in items):
        return (tuple(items),)
    if items and all(isinstance(item, list) and item and all(_is_id(token) for token in item) for item in items):
        return tuple(tuple(item) for item in items)
    raise FieldError(fields.name("prompt"), f"= {quote(value)} is neither text nor token ids, nor a list of either")


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 31


class TextStream:
    """Continuations as completions. decode: token ids -> text, for prompts that are echoed."""

    def __init__(self, request: TextRequest, reply: Reply, decode: Callable[[Sequence[int]], str]) -> None:
        self._request = request
        self._reply = reply
        self._answers = [Gathered() for _ in range(request.choices)]
        self._offsets = [0] * request.choices  # characters before the next token with logprobs
        texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in request.prompts if request.echo]
        self._echoes = [text for text in texts for _ in range(request.n)]

    def begin(self) -> list[Event]:
        return [self._chunk(choice, text) for choice, text in enumerate(self._echoes)]

    def push(self, choice: int, part: Part, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        self._answers[choice].add(part, logprobs)
        return [self._chunk(choice, part.text, logprobs)]

    def end(self, choice: int, result: GenerationResult, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        answer = self._answers[choice]
        answer.result = result
        answer.logprobs += logprobs
        return [self._chunk(choice, "", logprobs, answer.reason)]

    def close(self) -> list[Event]:
        if not self._request.include_usage:
            return [DONE]
        return [Event({**self._head(), "choices": [], "usage": self._usage()}), DONE]

    def fail(self, problem: Problem) -> list[Event]:
        return [Event(openai_error(problem)), DONE]

    def response(self) -> dict[str, Any]:
        self._offsets = [0] * len(self._offsets)
        choices = []
        for number, answer in enumerate(self._answers):
            text = (self._echoes[number] if self._echoes else "") + answer.content
            choices.append(self._choice(number, text, answer.logprobs, answer.reason))
        return {**self._head(), "choices": choices, "usage": self._usage()}

    def _head(self) -> dict[str, Any]:
        reply = self._reply
        return {"id": f"cmpl-{reply.id}", "object": "text_completion", "created": reply.created, "model": reply.model}

    def _chunk(self, choice: int, text: str, logprobs: Sequence[TokenLogprob] = (), reason: str | None = None) -> Event:
        chunk = {**self._head(), "choices": [self._choice(choice, text, logprobs, reason)]}
        return Event({**chunk, "usage": None} if self._request.include_usage else chunk)

    def _choice(self, choice: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        return {"index": choice, "text": text, "logprobs": self._logprobs(choice, logprobs), "finish_reason": reason}

    def _logprobs(self, choice: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        tokens = [entry.text.decode(errors="replace") for entry in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, LEAST_LOGPROB) for entry in logprobs],
            "top_logprobs": [
                {text.decode(errors="replace"): max(logprob, LEAST_LOGPROB) for _, text, logprob in entry.top}
                for entry in logprobs
            ],
            "text_offset": offsets,
        }

    def _usage(self) -> dict[str, Any]:
        usage = usage_of(self._answers, self._reply, len(self._request.prompts))
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
        }
