"""OpenAI's `/v1/chat/completions`, with the fields that llama.cpp's server adds to it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from edgemoe.protocols.answers import DONE, Event, Gathered, LogprobReader, Reply, token_logprob, usage_of
from edgemoe.protocols.common_fields import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_TOKENS,
    named_function,
    read_content,
    read_function,
    read_json_schema,
    read_quality,
    read_sampling,
    read_schema,
    read_stop,
    read_template_kwargs,
    read_thinking,
)
from edgemoe.protocols.fields import FieldError, Fields
from edgemoe.protocols.problems import Problem, openai_error
from edgemoe.protocols.requests import EFFORTS, ChatRequest, Message
from edgemoe.serving.answer import Answer
from edgemoe.serving.generation import GenerationResult
from edgemoe.serving.session import TokenLogprob
from edgemoe.text.answer import FORMATS
from edgemoe.text.parts import Part
from edgemoe.text.sampling import SamplingOptions

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_NAMED = ("json_object", "json_schema", "text")


def parse(body: object) -> ChatRequest:
    """Raises FieldError."""
    fields = Fields(body)
    fields.refuse("functions", "use tools")
    fields.refuse("function_call", "use tool_choice")
    fields.refuse("audio", "answers are text")
    fields.refuse("web_search_options", "there is no search")
    if any(kind != "text" for kind in fields.texts("modalities")):
        fields.fail("modalities", "is not supported: answers are text", "unsupported_parameter")
    sampling = read_sampling(fields)
    schema = _response_schema(fields)
    extension = read_json_schema(fields)
    if extension is not None:
        if schema is not None:
            fields.fail("json_schema", "and response_format exclude each other")
        schema = extension
    if schema is not None and "grammar" in sampling:
        fields.fail("grammar", "and a JSON schema exclude each other")
    tools = read_tools(fields)
    logprobs = _logprobs(fields)
    thinking, budget = read_thinking(fields)
    options = fields.inner("stream_options")
    return ChatRequest(
        model=fields.text("model"),
        messages=read_messages(fields),
        tools=tools,
        tool_choice=read_tool_choice(fields, tools),
        parallel_tool_calls=fields.flag("parallel_tool_calls", True),
        response_schema=schema,
        effort=fields.text("reasoning_effort", EFFORTS),
        thinking=thinking,
        thinking_budget=budget,
        template_kwargs=read_template_kwargs(fields),
        reasoning_format=fields.text("reasoning_format", FORMATS) or "auto",
        max_tokens=read_max_tokens(fields),
        stop=read_stop(fields),
        sampling=sampling,
        n=fields.whole("n", 1, MAX_CHOICES) or 1,
        logprobs=logprobs,
        quality=read_quality(fields),
        stream=fields.flag("stream"),
        include_usage=options is not None and options.flag("include_usage"),
    )


FIELDS = (
    *("model", "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort"),
    *(
        "thinking",
        "chat_template_kwargs",
        "reasoning_format",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "n",
        "logprobs",
    ),
    *("top_logprobs", "quality", "stream", "stream_options", *SamplingOptions.__dataclass_fields__),
)


def parse_call(arguments: Mapping[str, Any]) -> ChatRequest:
    """A request made of a function's arguments, among which there must be no unknown ones. Raises FieldError."""
    unknown = sorted(set(arguments) - set(FIELDS))
    if unknown:
        raise FieldError(unknown[0], f"is not a field of chat completions (known: {', '.join(FIELDS)})")
    try:
        body = json.loads(json.dumps(arguments))
    except (TypeError, ValueError, RecursionError) as error:
        raise FieldError("", f"cannot be told as JSON: {error}") from None
    return parse(body)


def read_max_tokens(fields: Fields) -> int | None:
    """-1, as llama.cpp has it, is for no limit."""
    for key in ("max_completion_tokens", "max_tokens"):
        value = fields.whole(key, -1, MAX_TOKENS)
        if value == 0:
            fields.fail(key, "= 0 is not 1 or more (-1 for no limit)")
        if value is not None:
            return None if value == -1 else value
    return None


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        fields.fail("top_logprobs", "needs logprobs = true")
    return (top or 0) if wanted else None


def _response_schema(fields: Fields) -> dict[str, Any] | None:
    form = fields.inner("response_format")
    if form is None:
        return None
    kind = form.need_text("type", _NAMED)
    if kind == "json_schema":
        form.need("json_schema")
        described = form.inner("json_schema")
        assert described is not None
        return read_schema(described)
    if kind == "json_object":
        schema = form.inner("schema")  # as llama.cpp and llama-cpp-python have it
        return {} if schema is None else schema.values
    return None


# -- messages ---------------------------------------------------------------------------------------------------------


def read_messages(fields: Fields) -> tuple[Message, ...]:
    """The conversation, with what templates do not know brought into what they do."""
    if not fields.need("messages"):
        fields.fail("messages", "is empty")
    messages: list[Message] = []
    open_calls: list[str] = []  # whose results are still to come
    for given in fields.objects("messages"):
        message = _message(given)
        if message["role"] == "assistant":
            open_calls = [call["id"] for call in message.get("tool_calls", ())]
        elif message["role"] == "tool":
            # Clients leave ids out: results come in the order of their calls.
            known = message.get("tool_call_id")
            if known in open_calls:
                open_calls.remove(known)
            elif known is None and open_calls:
                message["tool_call_id"] = open_calls.pop(0)
        messages.append(message)
    return tuple(messages)


def _message(given: Fields) -> Message:
    role = given.need_text("role", _ROLES)
    message: Message = {"role": {"developer": "system", "function": "tool"}.get(role, role)}
    calls = _tool_calls(given) if role == "assistant" else []
    if role == "assistant":
        given.refuse("function_call", "use tool_calls")
        message["content"] = None if calls and not given.get("content") else read_content(given, "content")
    else:
        given.need("content")
        message["content"] = read_content(given, "content")
    for key in ("name", "tool_call_id"):
        value = given.text(key)
        if value:
            message[key] = value
    if role == "assistant":
        thoughts = given.text("reasoning_content") or given.text("reasoning")
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
    return message


def _tool_calls(given: Fields) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for number, call in enumerate(given.objects("tool_calls")):
        call.text("type", ("function",))
        call.need("function")
        function = call.inner("function")
        assert function is not None
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif arguments is not None and not isinstance(arguments, str):
            function.text("arguments")
        calls.append(
            {
                "id": call.text("id") or f"call_{number}",
                "type": "function",
                "function": {"name": function.need_text("name"), "arguments": arguments or "{}"},
            }
        )
    return calls


# -- tools ------------------------------------------------------------------------------------------------------------


def read_tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    tools = []
    for given in fields.objects("tools"):
        if given.need_text("type") != "function":
            given.fail("type", "is not function: the model's tools are functions", "unsupported_parameter")
        given.need("function")
        function = given.inner("function")
        assert function is not None
        tools.append(read_function(function))
    return tuple(tools)


def read_tool_choice(fields: Fields, tools: Sequence[dict[str, Any]]) -> str | dict[str, Any]:
    value = fields.get("tool_choice")
    if value is None:
        return "auto"
    if isinstance(value, str):
        choice: str | dict[str, Any] = fields.need_text("tool_choice", ("auto", "none", "required"))
    else:
        chosen = Fields(value, fields.name("tool_choice"))
        chosen.need_text("type", ("function",))
        chosen.need("function")
        function = chosen.inner("function")
        assert function is not None
        choice = named_function(function, tools)
    if choice not in ("auto", "none") and not tools:
        fields.fail("tool_choice", "needs tools")
    return choice


# -- the answer -------------------------------------------------------------------------------------------------------


class ChatStream:
    """Answers as chat completions."""

    def __init__(self, request: ChatRequest, reply: Reply) -> None:
        self._request = request
        self._reply = reply
        self._answers = [Gathered() for _ in range(request.n)]

    @property
    def wants_logprobs(self) -> bool:
        return self._request.logprobs is not None

    def begin(self) -> list[Event]:
        return [
            self._chunk(choice, {"role": "assistant", "content": "", "refusal": None})
            for choice in range(self._request.n)
        ]

    def push(self, choice: int, part: Part, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        answer = self._answers[choice]
        known = len(answer.calls)
        answer.add(part, logprobs)
        if part.kind != "tool_call":
            key = "reasoning_content" if part.kind == "reasoning" else "content"
            return [self._chunk(choice, {key: part.text}, logprobs)]
        index = part.index or 0
        call: dict[str, Any] = {"index": index}
        if len(answer.calls) > known:
            begun = answer.calls[index]
            call |= {"id": begun.id, "type": "function", "function": {"name": begun.name, "arguments": part.text}}
        else:
            call["function"] = {"arguments": part.text}
        return [self._chunk(choice, {"tool_calls": [call]}, logprobs)]

    def end(self, choice: int, result: GenerationResult, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        answer = self._answers[choice]
        answer.result = result
        answer.logprobs += logprobs
        return [self._chunk(choice, {}, logprobs, answer.reason)]

    def close(self) -> list[Event]:
        if not self._request.include_usage:
            return [DONE]
        return [Event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}), DONE]

    def fail(self, problem: Problem) -> list[Event]:
        return [Event(openai_error(problem)), DONE]

    def response(self) -> dict[str, Any]:
        choices = [
            {
                "index": number,
                "message": _message_of(answer),
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.reason,
            }
            for number, answer in enumerate(self._answers)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        reply = self._reply
        return {"id": f"chatcmpl-{reply.id}", "object": kind, "created": reply.created, "model": reply.model}

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        reason: str | None = None,
    ) -> Event:
        told = {"index": choice, "delta": delta, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [told]}
        return Event({**chunk, "usage": None} if self._request.include_usage else chunk)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        return {"content": [token_logprob(entry) for entry in logprobs], "refusal": None}

    def _usage(self) -> dict[str, Any]:
        usage = usage_of(self._answers, self._reply)
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        }


def chunks(
    request: ChatRequest, reply: Reply, answers: Sequence[Answer], hidden: Collection[int]
) -> Iterator[dict[str, Any]]:
    """The answers as chunks, as they come, one after the other. hidden: tokens without logprobs."""
    stream = ChatStream(request, reply)
    try:
        for event in _told(stream, answers, hidden):
            if isinstance(event.data, dict):
                yield event.data
    finally:
        for answer in answers:
            answer.close()


def completion(
    request: ChatRequest, reply: Reply, answers: Sequence[Answer], hidden: Collection[int]
) -> dict[str, Any]:
    """The answers as one completion, when all of them are complete."""
    stream = ChatStream(request, reply)
    try:
        for _ in _told(stream, answers, hidden):
            pass
    finally:
        for answer in answers:
            answer.close()
    return stream.response()


def _told(stream: ChatStream, answers: Sequence[Answer], hidden: Collection[int]) -> Iterator[Event]:
    yield from stream.begin()
    for choice, answer in enumerate(answers):
        news = LogprobReader(hidden)
        for part in answer:
            yield from stream.push(choice, part, news.read(answer.result) if stream.wants_logprobs else ())
        result = answer.result
        yield from stream.end(choice, result, news.read(result) if stream.wants_logprobs else ())
    yield from stream.close()


def _message_of(answer: Gathered) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.content if answer.content or not answer.calls else None,
        "refusal": None,
        "annotations": [],
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments or "{}"}}
            for call in answer.calls
        ]
    return message
