"""What is gathered of answers, and what all protocols tell of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from edgemoe.serving.generation import GenerationResult
from edgemoe.serving.session import TokenLogprob
from edgemoe.text.parts import Part


@dataclass(slots=True)
class Call:
    """A tool call. arguments: its JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Gathered:
    """An answer as it comes. calls: by their index."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    result: GenerationResult | None = None

    def add(self, part: Part, logprobs: Sequence[TokenLogprob]) -> None:
        self.logprobs += logprobs
        if part.kind == "reasoning":
            self.reasoning += part.text
        elif part.kind == "content":
            self.content += part.text
        else:
            index = part.index or 0
            if index == len(self.calls):
                self.calls.append(Call(part.id or f"call_{index}", part.name or ""))
            self.calls[index].arguments += part.text

    @property
    def reason(self) -> str:
        """Why it ended: "tool_calls", "stop" or "length"; what was cut off counts as cut off whatever it is."""
        assert self.result is not None
        if self.result.finish_reason in ("length", "cancelled", "error"):
            return "length"
        return "tool_calls" if self.calls else "stop"


class LogprobReader:
    """The logprobs of an answer's tokens that have come since they were last read. hidden: tokens that are not part of
    its text, those that end it."""

    def __init__(self, hidden: Collection[int]) -> None:
        self._hidden = hidden
        self._known = 0

    def read(self, result: GenerationResult) -> list[TokenLogprob]:
        found = result.logprobs[self._known :]
        self._known += len(found)
        return [entry for entry in found if entry.token not in self._hidden]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a response says beside the answer.

    id: of the response, a number in hexadecimal that protocols put their prefix before. created: seconds since 1970.
    model: its name. prompt_tokens: of all prompts together. defaults: of sampling, by the names of SamplingOptions.
    count_tokens: of a text.
    """

    id: str
    created: int
    model: str
    prompt_tokens: int
    count_tokens: Callable[[str], int]
    defaults: Mapping[str, Any] = field(default_factory=dict)


class Event(NamedTuple):
    """An event of a stream. data: JSON, or text as it is."""

    data: dict[str, Any] | str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request's answers together. cached: of the prompts, those that were not computed again."""

    prompt: int
    cached: int
    completion: int
    reasoning: int


def usage_of(gathered: Sequence[Gathered], reply: Reply, prompts: int = 1) -> Usage:
    """prompts: how many there were; each of them is counted once, whatever number of answers it got."""
    results = [one.result for one in gathered if one.result is not None]
    firsts = results[:: max(len(gathered) // max(prompts, 1), 1)]
    prompt = sum(result.prompt_tokens for result in firsts) or reply.prompt_tokens
    cached = sum(
        max(result.prompt_tokens - result.computed_prompt_tokens, 0)
        for result in firsts
        if result.ttft_seconds is not None
    )
    thoughts = sum(reply.count_tokens(one.reasoning) for one in gathered if one.reasoning)
    completion = sum(result.generated_tokens for result in results)
    return Usage(prompt, cached, completion, min(thoughts, completion))


class AnswerStream(Protocol):
    """How a protocol tells the answers of a request: in events as they come, or in one response at the end. Both are
    made of the same parts: `push` and `end` for each choice, whoever reads the events or not."""

    def begin(self) -> list[Event]:
        """Before anything is known of the answers."""

    def push(self, choice: int, part: Part, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        """A piece of an answer; logprobs: of tokens that were drawn since the last one."""

    def end(self, choice: int, result: GenerationResult, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        """An answer is complete."""

    def close(self) -> list[Event]:
        """All answers are."""

    def fail(self, problem: Any) -> list[Event]:
        """Nothing more comes, because of this."""

    def response(self) -> dict[str, Any]:
        """All of it, after the last `end`."""


DONE = Event("[DONE]")
"""The end of a stream of OpenAI's."""


def token_logprob(entry: TokenLogprob) -> dict[str, Any]:
    """A token with its logprob, and the likeliest ones, as chat completions and responses have them."""
    top = [_logprob(text, logprob) for _, text, logprob in entry.top]
    return {**_logprob(entry.text, entry.logprob), "top_logprobs": top}


LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def _logprob(text: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": text.decode(errors="replace"),
        "bytes": list(text),
        "logprob": max(logprob, LEAST_LOGPROB),
    }
