"""OpenAI's `/v1/responses`, without anything kept between requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from edgemoe.protocols.answers import DONE, Event, Gathered, Reply, token_logprob, usage_of
from edgemoe.protocols.common_fields import (
    MAX_LOGPROBS,
    MAX_TOKENS,
    named_function,
    read_content,
    read_function,
    read_quality,
    read_sampling,
    read_schema,
    read_template_kwargs,
)
from edgemoe.protocols.fields import Fields
from edgemoe.protocols.problems import Problem, openai_error
from edgemoe.protocols.requests import EFFORTS, ChatRequest, Message
from edgemoe.serving.generation import GenerationResult
from edgemoe.serving.session import TokenLogprob
from edgemoe.text.parts import Part

_LOGPROBS = "message.output_text.logprobs"
# Items of tools that only their own server can run. Their results are not ours to tell the model.
_FOREIGN_ITEMS = (
    *("web_search_call", "file_search_call", "computer_call", "computer_call_output", "code_interpreter_call"),
    *("image_generation_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "mcp_call"),
    *("compaction", "compaction_summary", "ghost_snapshot", "tool_search_call", "tool_search_output"),
    *("local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output", "apply_patch_call"),
    *("apply_patch_call_output", "configuration_update", "additional_tools", "program", "program_output"),
)


def parse(body: object) -> ChatRequest:
    """Raises FieldError. Without any input there are no messages: clients ask so whether anybody is there."""
    fields = Fields(body)
    stateless = "no response is kept; send the whole conversation as input"
    for key in ("previous_response_id", "conversation", "prompt"):
        fields.refuse(key, stateless)
    fields.refuse("background", stateless)
    fields.text("truncation", ("auto", "disabled"))
    tools, choice = _tools(fields)
    reasoning = fields.inner("reasoning")
    form = fields.inner("text")
    chosen = None if form is None else form.inner("format")
    schema: dict[str, Any] | None = None
    if chosen is not None:
        kind = chosen.need_text("type", ("text", "json_object", "json_schema"))
        if kind == "json_schema":
            schema = read_schema(chosen)
        elif kind == "json_object":
            schema = {}
    include = fields.texts("include")
    top = fields.whole("top_logprobs", 0, MAX_LOGPROBS)
    logprobs = (top or 0) if _LOGPROBS in include or top else None
    return ChatRequest(
        model=fields.text("model"),
        messages=_messages(fields),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=fields.flag("parallel_tool_calls", True),
        response_schema=schema,
        effort=None if reasoning is None else reasoning.text("effort", EFFORTS),
        template_kwargs=read_template_kwargs(fields),
        max_tokens=fields.whole("max_output_tokens", 1, MAX_TOKENS),
        sampling=read_sampling(fields),
        logprobs=logprobs,
        quality=read_quality(fields),
        stream=fields.flag("stream"),
        echo=_echo(fields, chosen, tools),
    )


def _echo(fields: Fields, form: Fields | None, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the response repeats of the request."""
    metadata = fields.inner("metadata")
    reasoning = fields.inner("reasoning")
    cap = fields.whole("max_tool_calls", 0, MAX_TOKENS)
    choice = fields.get("tool_choice")
    form_told: dict[str, Any] = {"type": "text"}
    if form is not None:
        form_told = {"type": form.get("type")}
        if form.get("type") == "json_schema":
            named = {"name": form.text("name") or "answer", "description": form.text("description")}
            form_told |= {**named, "schema": form.get("schema"), "strict": form.flag("strict")}
    return {
        "instructions": fields.text("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "max_tool_calls": cap,
        "metadata": {} if metadata is None else metadata.values,
        "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
        "reasoning": {
            "effort": None if reasoning is None else reasoning.get("effort"),
            "summary": None if reasoning is None else reasoning.text("summary"),
        },
        "text": {"format": form_told},
        "tool_choice": "auto" if choice is None else choice,
        "tools": [{"type": "function", "strict": False, **tool["function"]} for tool in tools],
        "top_logprobs": fields.get("top_logprobs") or 0,
        "truncation": fields.text("truncation") or "disabled",
        "user": fields.text("user"),
        "safety_identifier": fields.text("safety_identifier"),
        "prompt_cache_key": fields.text("prompt_cache_key"),
    }


def _tools(fields: Fields) -> tuple[tuple[dict[str, Any], ...], str | dict[str, Any]]:
    """(function tools, the choice among them). Other tools are passed over: agents offer theirs to everybody."""
    given = fields.objects("tools")
    tools = tuple(read_function(tool) for tool in given if tool.need_text("type") == "function")
    value = fields.get("tool_choice")
    if value is None:
        return tools, "auto"
    if isinstance(value, str):
        mode = fields.need_text("tool_choice", ("auto", "none", "required"))
        if mode == "required" and not tools:
            fields.fail("tool_choice", "needs function tools")
        return tools, mode
    chosen = Fields(value, fields.name("tool_choice"))
    kind = chosen.need_text("type")
    if kind == "function":
        return tools, named_function(chosen, tools)
    if kind == "allowed_tools":
        mode = chosen.text("mode", ("auto", "required")) or "auto"
        names = {tool.need_text("name") for tool in chosen.objects("tools") if tool.need_text("type") == "function"}
        allowed = tuple(tool for tool in tools if tool["function"]["name"] in names)
        if mode == "required" and not allowed:
            chosen.fail("tools", "has none of the function tools")
        return allowed, mode
    chosen.fail("type", f"= {kind[:40]!r} is not function or allowed_tools")


def _messages(fields: Fields) -> tuple[Message, ...]:
    value = fields.get("input")
    if value is None or isinstance(value, str):
        messages: list[Message] = [{"role": "user", "content": value}] if value else []
    else:
        messages = _items(fields.objects("input"))
    if not messages:
        return ()
    instructions = fields.text("instructions")
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    # Many templates take one message of the system, at the begin.
    while len(messages) > 1 and messages[0]["role"] == messages[1]["role"] == "system":
        second = messages.pop(1)
        messages[0] = {"role": "system", "content": f"{messages[0]['content']}\n\n{second['content']}"}
    return tuple(messages)


def _items(items: list[Fields]) -> list[Message]:
    messages: list[Message] = []
    thoughts: list[str] = []
    for item in items:
        kind = item.text("type") or "message"
        if kind == "reasoning":
            text = "".join(part.need_text("text") for key in ("content", "summary") for part in item.objects(key)[:64])
            thoughts += [text] if text else []
        elif kind == "message":
            role = item.need_text("role", ("system", "developer", "user", "assistant"))
            item.need("content")
            message: Message = {
                "role": "system" if role == "developer" else role,
                "content": read_content(item, "content"),
            }
            if role == "assistant" and thoughts:
                message["reasoning_content"] = "\n".join(thoughts)
            thoughts = []
            messages.append(message)
        elif kind in ("function_call", "custom_tool_call"):
            _add_call(messages, item, kind, thoughts)
            thoughts = []
        elif kind in ("function_call_output", "custom_tool_call_output"):
            item.need("output")
            call = item.text("call_id") or ""
            messages.append({"role": "tool", "tool_call_id": call, "content": read_content(item, "output")})
        elif kind == "item_reference":
            item.fail("type", "= item_reference is not supported: no item is kept", "unsupported_parameter")
        elif kind not in _FOREIGN_ITEMS:
            item.fail("type", f"= {kind[:40]!r} is not an item that is known")
    return messages


def _add_call(messages: list[Message], item: Fields, kind: str, thoughts: list[str]) -> None:
    """A call belongs to the assistant's message before it."""
    if kind == "function_call":
        arguments = item.text("arguments") or "{}"
    else:
        arguments = json.dumps({"input": item.need_text("input")}, ensure_ascii=False)
    call = {
        "id": item.text("call_id") or item.text("id") or "",
        "type": "function",
        "function": {"name": item.need_text("name"), "arguments": arguments},
    }
    last = messages[-1] if messages else None
    if last is None or last["role"] != "assistant" or thoughts:
        last = {"role": "assistant", "content": None}
        if thoughts:
            last["reasoning_content"] = "\n".join(thoughts)
        messages.append(last)
    calls = last.setdefault("tool_calls", [])
    call["id"] = call["id"] or f"call_{len(calls)}"
    last["content"] = last["content"] or None
    calls.append(call)


# -- the answer -------------------------------------------------------------------------------------------------------


class ResponseStream:
    """An answer as a response: items of reasoning, text and function calls, one after the other."""

    def __init__(self, request: ChatRequest, reply: Reply) -> None:
        self._request = request
        self._reply = reply
        self._answer = Gathered()
        self._items: list[dict[str, Any]] = []
        self._kind: tuple[str, int] | None = None  # of the item that is open, and of which call it is
        self._number = 0

    def begin(self) -> list[Event]:
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def push(self, choice: int, part: Part, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        self._answer.add(part, logprobs)
        kind = (part.kind, part.index or 0)
        events: list[Event] = []
        if kind != self._kind:
            events += self._close_item("completed")
            events += self._open_item(kind)
        item = self._items[-1]
        place = {"item_id": item["id"], "output_index": len(self._items) - 1, "delta": part.text}
        if part.kind == "tool_call":
            item["arguments"] += part.text
            if part.text:
                events.append(self._event("response.function_call_arguments.delta", **place))
            return events
        text = item["content"][0]
        text["text"] += part.text
        place["content_index"] = 0
        if part.kind == "reasoning":
            events.append(self._event("response.reasoning_text.delta", **place))
        else:
            told = self._logprobs(logprobs)
            text["logprobs"] += told
            events.append(self._event("response.output_text.delta", **place, logprobs=told))
        return events

    def end(self, choice: int, result: GenerationResult, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        self._answer.result = result
        cut = self._answer.reason == "length"
        return self._close_item("incomplete" if cut else "completed")

    def close(self) -> list[Event]:
        response = self.response()
        return [self._event(f"response.{response['status']}", response=response), DONE]

    def fail(self, problem: Problem) -> list[Event]:
        error = openai_error(problem)["error"]
        response = self._response("failed")
        response["error"] = {"code": problem.code or "server_error", "message": problem.message}
        told = {"code": error["code"], "message": error["message"], "param": error["param"]}
        return [self._event("error", **told), self._event("response.failed", response=response), DONE]

    def response(self) -> dict[str, Any]:
        """Also where there was nothing to answer."""
        cut = self._answer.result is not None and self._answer.reason == "length"
        response = self._response("incomplete" if cut else "completed")
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    def _open_item(self, kind: tuple[str, int]) -> list[Event]:
        self._kind = kind
        index = len(self._items)
        number = f"{self._reply.id}{index:02x}"
        item: dict[str, Any]
        content: dict[str, Any] | None = None
        if kind[0] == "tool_call":
            call = self._answer.calls[kind[1]]
            item = {
                "type": "function_call",
                "id": f"fc_{number}",
                "call_id": call.id,
                "name": call.name,
                "arguments": "",
            }
        elif kind[0] == "reasoning":
            item = {"type": "reasoning", "id": f"rs_{number}", "summary": [], "content": [], "encrypted_content": None}
            content = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": "message", "id": f"msg_{number}", "role": "assistant", "content": []}
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["status"] = "in_progress"
        self._items.append(item)
        events = [self._event("response.output_item.added", output_index=index, item=_copied(item))]
        if content is not None:
            place = {"item_id": item["id"], "output_index": index, "content_index": 0}
            item["content"].append(content)
            events.append(self._event("response.content_part.added", **place, part=_copied(content)))
        return events

    def _close_item(self, status: str) -> list[Event]:
        if self._kind is None:
            return []
        self._kind = None
        index, item = len(self._items) - 1, self._items[-1]
        item["status"] = status
        place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        events = []
        if item["type"] == "function_call":
            item["arguments"] = item["arguments"] or "{}"
            told = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._event("response.function_call_arguments.done", **place, **told))
        else:
            content = item["content"][0]
            place["content_index"] = 0
            if item["type"] == "reasoning":
                events.append(self._event("response.reasoning_text.done", **place, text=content["text"]))
            else:
                told = {"text": content["text"], "logprobs": list(content["logprobs"])}
                events.append(self._event("response.output_text.done", **place, **told))
            events.append(self._event("response.content_part.done", **place, part=_copied(content)))
        return [*events, self._event("response.output_item.done", output_index=index, item=_copied(item))]

    def _response(self, status: str) -> dict[str, Any]:
        reply, request = self._reply, self._request
        completed = status in ("completed", "incomplete")

        def sampling(name: str) -> Any:
            return request.sampling.get(name, reply.defaults.get(name))

        return {
            "id": f"resp_{reply.id}",
            "object": "response",
            "created_at": reply.created,
            "completed_at": reply.created if completed else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": reply.model,
            "output": [_copied(item) for item in self._items],
            "previous_response_id": None,
            "store": False,
            "service_tier": "default",
            "temperature": sampling("temperature"),
            "top_p": sampling("top_p"),
            "presence_penalty": sampling("presence_penalty"),
            "frequency_penalty": sampling("frequency_penalty"),
            "usage": self._usage() if completed else None,
            **request.echo,
        }

    def _usage(self) -> dict[str, Any]:
        usage = usage_of([self._answer], self._reply)
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return [] if self._request.logprobs is None else [token_logprob(entry) for entry in logprobs]

    def _event(self, kind: str, **data: Any) -> Event:
        event = Event({"type": kind, "sequence_number": self._number, **data}, kind)
        self._number += 1
        return event


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    """As it is now: it goes on to grow."""
    copy = dict(item)
    if "content" in copy:
        copy["content"] = [dict(part) for part in copy["content"]]
    return copy
