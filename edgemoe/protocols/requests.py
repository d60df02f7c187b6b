"""What every protocol's request becomes: the arguments of `Model.chat_parts` and `Model.generate`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
