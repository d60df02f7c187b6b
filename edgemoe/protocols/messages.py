"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgemoe.protocols.answers import Event, Gathered, Reply, usage_of
from edgemoe.protocols.common_fields import (
    MAX_TOKENS,
    named_function,
    read_quality,
    read_sampling,
    read_schema,
    read_stop,
    read_template_kwargs,
    read_thinking,
)
from edgemoe.protocols.fields import Fields
from edgemoe.protocols.problems import Problem, anthropic_error
from edgemoe.protocols.requests import EFFORTS, ChatRequest, Message
from edgemoe.serving.generation import GenerationResult
from edgemoe.serving.session import TokenLogprob
from edgemoe.text.parts import Part

# Claude Code begins its instructions with a line that differs from request to request. Nothing could be reused of what
# comes after it.
_BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*(?:\n|\Z)", re.MULTILINE)

_MEDIA = ("image", "document", "file", "container_upload")


def parse(body: object) -> ChatRequest:
    """Raises FieldError."""
    fields = Fields(body)
    fields.need("max_tokens")
    return replace(parse_prompt(body), max_tokens=fields.whole("max_tokens", 1, MAX_TOKENS))


def parse_prompt(body: object) -> ChatRequest:
    """A request whose max_tokens may be missing: what count_tokens is given."""
    fields = Fields(body)
    fields.refuse("mcp_servers", "there is no connector")
    tools = _tools(fields)
    choice, parallel = _tool_choice(fields, tools)
    thinking, budget = read_thinking(fields)
    config = fields.inner("output_config")
    form = fields.inner("output_format") or (None if config is None else config.inner("format"))
    schema = None
    if form is not None:
        form.need_text("type", ("json_schema",))
        schema = read_schema(form)
    messages = []
    system = _system(fields)
    if system:
        messages.append({"role": "system", "content": system})
    if not fields.need("messages"):
        fields.fail("messages", "is empty")
    for given in fields.objects("messages"):
        messages += _messages(given)
    return ChatRequest(
        model=fields.text("model"),
        messages=tuple(messages),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_schema=schema,
        thinking=thinking,
        thinking_budget=budget,
        effort=None if config is None else config.text("effort", EFFORTS),
        template_kwargs=read_template_kwargs(fields),
        stop=read_stop(fields, "stop_sequences"),
        sampling=read_sampling(fields),
        quality=read_quality(fields),
        stream=fields.flag("stream"),
    )


def _system(fields: Fields) -> str:
    value = fields.get("system")
    if value is None or isinstance(value, str):
        texts = [value or ""]
    else:
        texts = [_text(block) for block in fields.objects("system")]
    kept = (_BILLING.sub("", text) for text in texts)
    return "\n\n".join(text for text in kept if text)


def _text(block: Fields) -> str:
    """Of a block that must be one of text."""
    kind = block.need_text("type")
    if kind in _MEDIA:
        block.fail("type", f"= {kind}: the model reads text only", "unsupported_content")
    if kind != "text":
        block.fail("type", f"= {kind[:40]!r} is not text")
    return block.need_text("text")


def _messages(given: Fields) -> list[Message]:
    """A message of Anthropic's as OpenAI's: what tools gave is messages of its own."""
    role = given.need_text("role", ("user", "assistant", "system"))
    content = given.need("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = given.objects("content")
    return [_assistant(blocks)] if role == "assistant" else _user(role, blocks)


def _assistant(blocks: list[Fields]) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.need_text("type")
        if kind == "thinking":
            thoughts.append(block.need_text("thinking"))
        elif kind in ("redacted_thinking", "server_tool_use") or kind.endswith("_tool_result"):
            continue  # what nobody here can read, or what Anthropic's own tools did
        elif kind == "tool_use":
            block.need("input")
            given = block.inner("input")
            assert given is not None
            arguments = json.dumps(given.values, ensure_ascii=False)
            function = {"name": block.need_text("name"), "arguments": arguments}
            calls.append({"id": block.text("id") or f"call_{len(calls)}", "type": "function", "function": function})
        else:
            texts.append(_text(block))
    message: Message = {"role": "assistant", "content": "\n".join(texts) or (None if calls else "")}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(role: str, blocks: list[Fields]) -> list[Message]:
    results: list[Message] = []
    texts = []
    for block in blocks:
        if block.need_text("type") == "tool_result":
            value = block.get("content")
            plain = value is None or isinstance(value, str)
            text = value or "" if plain else "\n".join(_text(part) for part in block.objects("content"))
            if block.flag("is_error") and not text:
                text = "error"
            results.append({"role": "tool", "tool_call_id": block.text("tool_use_id") or "", "content": text})
        else:
            texts.append(_text(block))
    if texts or not results:
        results.append({"role": role, "content": "\n".join(texts)})
    return results


def _tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    """Function tools; those that Anthropic runs itself, which have a type, are passed over."""
    tools = []
    for given in fields.objects("tools"):
        if given.text("type") not in (None, "custom"):
            continue
        described: dict[str, Any] = {"name": given.need_text("name"), "description": given.text("description") or ""}
        if not described["name"]:
            given.fail("name", "is empty")
        given.need("input_schema")
        schema = given.inner("input_schema")
        assert schema is not None
        described["parameters"] = schema.values
        if given.flag("strict"):
            described["strict"] = True
        tools.append({"type": "function", "function": described})
    return tuple(tools)


def _tool_choice(fields: Fields, tools: Sequence[dict[str, Any]]) -> tuple[str | dict[str, Any], bool]:
    """(the choice, whether several calls may come at once)."""
    chosen = fields.inner("tool_choice")
    if chosen is None:
        return "auto", True
    kind = chosen.need_text("type", ("auto", "any", "tool", "none"))
    parallel = not chosen.flag("disable_parallel_tool_use")
    if kind in ("any", "tool") and not tools:
        fields.fail("tool_choice", "needs tools")
    choice: str | dict[str, Any] = {"any": "required", "auto": "auto", "none": "none"}.get(kind, "")
    return choice or named_function(chosen, tools), parallel


# -- the answer -------------------------------------------------------------------------------------------------------

_SIGNATURE = "edgemoe"
"""Nothing is signed; but clients forget thoughts that have no signature, and the model is to be told them again."""


class MessageStream:
    """An answer as a message: blocks of thinking, text and tool use, one after the other, each of one kind."""

    def __init__(self, request: ChatRequest, reply: Reply) -> None:
        self._reply = reply
        self._answer = Gathered()
        self._blocks: list[dict[str, Any]] = []  # as far as they have come
        self._kind: tuple[str, int] | None = None  # of the block that is open, and of which call it is

    def begin(self) -> list[Event]:
        stop = {"stop_reason": None, "stop_sequence": None, "stop_details": None}
        return [_event("message_start", message={**self._head(), "content": [], **stop, "usage": self._usage()})]

    def push(self, choice: int, part: Part, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        self._answer.add(part, logprobs)
        kind = (part.kind, part.index or 0)
        events = []
        if kind != self._kind:
            events += self._close_block()
            events.append(self._open_block(kind))
        block = self._blocks[-1]
        if part.kind == "tool_call":
            delta = {"type": "input_json_delta", "partial_json": part.text}
        elif part.kind == "reasoning":
            block["thinking"] += part.text
            delta = {"type": "thinking_delta", "thinking": part.text}
        else:
            block["text"] += part.text
            delta = {"type": "text_delta", "text": part.text}
        if part.text:
            events.append(_event("content_block_delta", index=len(self._blocks) - 1, delta=delta))
        return events

    def end(self, choice: int, result: GenerationResult, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        self._answer.result = result
        events = self._close_block()
        return [*events, _event("message_delta", delta=self._stop(), usage=self._usage())]

    def close(self) -> list[Event]:
        return [_event("message_stop")]

    def fail(self, problem: Problem) -> list[Event]:
        return [Event(anthropic_error(problem), "error")]

    def response(self) -> dict[str, Any]:
        return {**self._head(), "content": self._blocks, **self._stop(), "usage": self._usage()}

    def _open_block(self, kind: tuple[str, int]) -> Event:
        self._kind = kind
        block: dict[str, Any]
        if kind[0] == "tool_call":
            call = self._answer.calls[kind[1]]
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}, "caller": {"type": "direct"}}
        elif kind[0] == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": "", "citations": None}
        self._blocks.append(block)
        return _event("content_block_start", index=len(self._blocks) - 1, content_block=dict(block))

    def _close_block(self) -> list[Event]:
        if self._kind is None:
            return []
        block, index = self._blocks[-1], len(self._blocks) - 1
        events = []
        if block["type"] == "thinking":
            block["signature"] = _SIGNATURE
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            events.append(_event("content_block_delta", index=index, delta=delta))
        elif block["type"] == "tool_use":
            block["input"] = _input(self._answer.calls[self._kind[1]].arguments)
        self._kind = None
        return [*events, _event("content_block_stop", index=index)]

    def _head(self) -> dict[str, Any]:
        head = {"id": f"msg_{self._reply.id}", "type": "message", "role": "assistant", "model": self._reply.model}
        return {**head, "container": None}

    def _stop(self) -> dict[str, Any]:
        return {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence(), "stop_details": None}

    def _stop_reason(self) -> str:
        result = self._answer.result
        assert result is not None
        if result.finish_reason == "stop" and not self._answer.calls:
            return "stop_sequence"
        return {"tool_calls": "tool_use", "length": "max_tokens", "stop": "end_turn"}[self._answer.reason]

    def _stop_sequence(self) -> str | None:
        result = self._answer.result
        return result.stop_string if result is not None and self._stop_reason() == "stop_sequence" else None

    def _usage(self) -> dict[str, Any]:
        usage = usage_of([self._answer], self._reply)
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.completion,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
            # Required by Anthropic's schema, and meaningless here.
            "cache_creation": None,
            "inference_geo": None,
            "server_tool_use": None,
            "service_tier": None,
        }


def _event(kind: str, **data: Any) -> Event:
    return Event({"type": kind, **data}, kind)


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call as what they mean; where the end is missing or they are no object, what there is."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {"_partial_json": arguments}
    return value if isinstance(value, dict) else {"_value": value}
