"""What every protocol's request becomes, and what is gathered of its answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from edgemoe.errors import OptionError
from edgemoe.options import QUALITIES
from edgemoe.protocols.fields import Fields
from edgemoe.serving.generation import GenerationResult
from edgemoe.serving.session import TokenLogprob
from edgemoe.text.parts import Part
from edgemoe.text.sampling import SamplingOptions

MAX_CHOICES = 32
"""Answers to one request."""
MAX_STOPS = 64
MAX_LOGPROBS = 20
_SEEDS = 1 << 64

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What requests of all protocols have.

    model: the name in the request; whatever it is, the loaded model answers. max_tokens: None for no limit.
    sampling: fields of SamplingOptions. n: answers; those after the first get the seeds that follow. logprobs: how many
    of the likeliest tokens are told with each token; None for no logprobs. include_usage: a stream ends with its usage.
    """

    model: str | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    logprobs: int | None = None
    quality: str | None = None
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(Request):
    """A conversation to be answered.

    messages: in OpenAI's shapes. tools: OpenAI's function tools. tool_choice: "auto", "none", "required" or a function
    to be called. response_schema: the answer is JSON of it. thinking, effort, thinking_budget: None where nothing is
    said; they become variables of a template that knows such ones (`template_variables`). template_kwargs: variables
    by name. reasoning_format: as `Model.chat_parts`. echo: fields of the request that its response repeats.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    response_schema: dict[str, Any] | None = None
    thinking: bool | None = None
    effort: str | None = None
    thinking_budget: int | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_format: str = "auto"
    echo: Mapping[str, Any] = field(default_factory=dict)

    @property
    def choices(self) -> int:
        return self.n

    def arguments(self, choice: int, template: str) -> dict[str, Any]:
        """Keyword arguments of `Model.chat_parts` for an answer; template: the source of the model's."""
        given: dict[str, Any] = {**shared_arguments(self, choice)}
        if self.tools:
            given |= {"tools": self.tools, "tool_choice": self.tool_choice}
            if not self.parallel_tool_calls:
                given["parallel_tool_calls"] = False
        if self.response_schema is not None:
            given["response_schema"] = self.response_schema
        if self.reasoning_format != "auto":
            given["reasoning_format"] = self.reasoning_format
        variables = template_variables(self, template)
        if variables:
            given["chat_template_kwargs"] = variables
        return given


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest(Request):
    """Texts to be continued. prompts: texts or token ids; each gets n answers. echo: the prompt comes first."""

    prompts: tuple[str | tuple[int, ...], ...] = ()
    echo: bool = False

    @property
    def choices(self) -> int:
        return self.n * len(self.prompts)

    def arguments(self, choice: int) -> dict[str, Any]:
        """Keyword arguments of `Model.generate` for an answer."""
        return shared_arguments(self, choice % self.n)


def shared_arguments(request: Request, choice: int) -> dict[str, Any]:
    """What both kinds of requests hand on; a limit that is not set is not named."""
    given: dict[str, Any] = {**request.sampling, "max_tokens": request.max_tokens, "stop": request.stop}
    seed = given.get("seed", -1)
    if seed >= 0:
        given["seed"] = (seed + choice) % _SEEDS
    if request.logprobs is not None:
        given["logprobs"] = request.logprobs
    if request.quality is not None:
        given["quality"] = request.quality
    return given


# What requests call an effort, and the nearest that templates know.
_EFFORTS = {"none": "low", "minimal": "low", "low": "low", "medium": "medium", "high": "high"}
_EFFORTS |= {"xhigh": "high", "max": "high"}
EFFORTS = tuple(_EFFORTS)


def template_variables(request: ChatRequest, template: str) -> dict[str, Any]:
    """The variables that the request sets: those it names, and hints as far as the template's text mentions them."""

    def known(name: str) -> bool:
        return re.search(rf"\b{name}\b", template) is not None

    hints: dict[str, Any] = {}
    thinking = request.thinking
    if thinking is None and request.effort is not None:
        thinking = request.effort != "none"
    if thinking is not None:
        hints |= {name: thinking for name in ("enable_thinking", "thinking") if known(name)}
    if request.effort is not None and known("reasoning_effort"):
        hints["reasoning_effort"] = _EFFORTS[request.effort]
    if request.thinking_budget is not None and known("thinking_budget"):
        hints["thinking_budget"] = request.thinking_budget
    return {**hints, **request.template_kwargs}


# -- fields that several protocols have -------------------------------------------------------------------------------

_OPTIONS = SamplingOptions.__dataclass_fields__


def read_sampling(fields: Fields) -> dict[str, Any]:
    """Those of SamplingOptions' fields that are given, each checked by itself so that what is wrong has a name. A JSON
    schema is not among them (`read_json_schema`)."""
    given: dict[str, Any] = {}
    for name, option in _OPTIONS.items():
        value = fields.get(name)
        if value is None or name == "json_schema":
            continue
        if isinstance(value, float) and value.is_integer() and isinstance(option.default, int):
            value = int(value)  # 1.0 is a whole number in JSON
        try:
            SamplingOptions(**{name: value})
        except OptionError as error:
            reason = str(error).removeprefix(name).lstrip()
            fields.fail(name, reason)
        except (OverflowError, ValueError, TypeError, RecursionError) as error:
            fields.fail(name, f"cannot be used: {error}")
        given[name] = value
    return given


def read_json_schema(fields: Fields) -> dict[str, Any] | None:
    """llama.cpp's field for a schema, as an object or as its text."""
    value = fields.get("json_schema")
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            fields.fail("json_schema", "is not JSON")
    return Fields(value, fields.name("json_schema")).values


def read_quality(fields: Fields) -> str | None:
    return fields.text("quality", QUALITIES)


def read_stop(fields: Fields, key: str = "stop") -> tuple[str, ...]:
    stops = fields.texts(key, MAX_STOPS)
    if not all(stops):
        fields.fail(key, "has an empty string")
    return stops


# -- what came of an answer -------------------------------------------------------------------------------------------


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
