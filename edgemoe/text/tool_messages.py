"""Conversations with tools, as a model's template wants them told.

Templates differ in whether they know tools, calls and results, and in the shape of a call's arguments. What one does is
found out by rendering small conversations with it; what it does not, is put into plain messages.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from edgemoe.errors import OptionError, TokenizerError, quote
from edgemoe.families import ToolFormat, family_names, tool_formats
from edgemoe.families._tools import JSON_IN_TAGS
from edgemoe.text.call_writing import Call, written
from edgemoe.text.tokenizer import Tokenizer
from edgemoe.text.tools import ToolUse

_INSTRUCTIONS = """\
# Tools

You may call functions to answer the user. They are described within <tools></tools>, each by a JSON object:
<tools>
{tools}
</tools>

To call a function, write exactly this, with its name and its arguments, and nothing after it:
{example}"""
_EXAMPLE = Call("name-of-the-function", {"name-of-an-argument": "its value"}, "functions.name-of-the-function:0")


@dataclass(frozen=True, slots=True)
class TemplateTools:
    """What a chat template does with tools.

    form: how its model writes calls. tools: it tells the model about them. system: it knows system messages.
    calls: it writes calls in an assistant's message, whose arguments it wants as "text" or as an "object"; "" where it
    does not. empty: the content of such a message must be None. both: such a message may have content.
    results: the role of messages with results that it knows, "" for none. responses: it wants results within the
    message with the calls.
    """

    form: ToolFormat
    tools: bool
    system: bool
    calls: str
    empty: bool
    both: bool
    results: str
    responses: bool


_known: weakref.WeakKeyDictionary[Tokenizer, tuple[str, TemplateTools]] = weakref.WeakKeyDictionary()


def template_tools(tokenizer: Tokenizer, family: str) -> TemplateTools:
    """What the tokenizer's chat template does with tools; family: of the model."""
    source = tokenizer.chat_template or ""
    known = _known.get(tokenizer)
    if known is None or known[0] != source:
        known = source, _explore(tokenizer, source, family)
        _known[tokenizer] = known
    return known[1]


def prepared(
    messages: Sequence[Mapping[str, Any]], use: ToolUse, tokenizer: Tokenizer, family: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages for the template, further variables for it) of a conversation in OpenAI's form and its tools.

    Raises OptionError for a message that has not this form.
    """
    source = tokenizer.chat_template or ""
    told = [_plain(message, number, source) for number, message in enumerate(messages)]
    involved = any("tool_calls" in message or message["role"] == "tool" for message in told)
    if not use.tools and not involved:
        return told, {}
    template = template_tools(tokenizer, family)
    if involved:
        told = _with_calls(told, template)
    if not use.tools:
        return told, {}
    definitions = [dict(tool.definition) for tool in use.tools]
    if template.tools:
        return told, {"tools": definitions}
    text = _INSTRUCTIONS.format(
        tools="\n".join(json.dumps(definition, ensure_ascii=False) for definition in definitions),
        example=written(template.form, [_EXAMPLE]),
    )
    return _with_system(told, text, template.system), {}


# -- what a template does ---------------------------------------------------------------------------------------------


def _explore(tokenizer: Tokenizer, source: str, family: str) -> TemplateTools:
    def render(*messages: Mapping[str, Any], **variables: Any) -> str:
        try:
            return tokenizer.apply_chat_template(messages, variables=variables)
        except TokenizerError:
            return ""

    asked = {"role": "user", "content": "needle-question"}
    schema = {"type": "object", "properties": {"needle_key": {"type": "string"}}, "required": ["needle_key"]}
    function = {"name": "needle_tool", "description": "needle", "parameters": schema}
    tools = [{"type": "function", "function": function}]
    knows_tools = "needle_tool" in render(asked, tools=tools)
    form = _form(source, family, knows_tools)
    text = '{"needle_key" : "needle_value"}'
    calls, empty, both = "", False, False
    for kind, arguments in (("text", text), ("object", json.loads(text))):
        if kind == "text" and form.syntax not in ("json", "named"):
            continue
        call = {"name": "needle_tool", "arguments": arguments}
        entry = {"id": _id("0", form, "needle_tool", 0), "type": "function", "function": call}
        for content in ("", None):
            message = {"role": "assistant", "content": content, "tool_calls": [entry]}
            made = render(asked, message, tools=tools)
            right = text in made if kind == "text" else _tells_object(made)
            if right and made.count("needle_tool") > knows_tools * render(asked, tools=tools).count("needle_tool"):
                calls, empty = kind, content is None
                both_told = render(asked, {**message, "content": "needle-content"}, tools=tools)
                both = "needle-content" in both_told and "needle_value" in both_told
                break
        if calls:
            break
    results, asking = "", message if calls else {"role": "assistant", "content": "needle-content"}
    for role in ("tool", form.result_role):
        # Where a template writes any role as it is, "tool" need not be one that its model has learnt.
        if not results and role and (calls or role != "tool" or re.search(r"['\"]tool['\"]", source)):
            result = {"role": role, "content": "needle-result", "name": "needle_tool", "tool_call_id": entry["id"]}
            made = render(asked, asking, result, tools=tools)
            results = role if "needle-result" in made and (role == "tool" or role in made) else ""
    responses = "tool_responses" in source and not re.search(r"['\"]tool['\"]", source)
    system = "needle-system" in render({"role": "system", "content": "needle-system"}, asked)
    return TemplateTools(form, knows_tools, system, calls, empty, both, results, responses)


def _tells_object(text: str) -> bool:
    """Whether arguments given as an object are written in a model's notation, not in Python's."""
    return "needle_key" in text and "needle_value" in text and "'needle_key'" not in text


def _form(source: str, family: str, knows_tools: bool) -> ToolFormat:
    """How a model with this template writes calls: as the template shows it, otherwise as its family does where the
    template knows tools; a model that has learnt no form can still be told one."""
    own = tool_formats(family)
    others = [form for name in family_names() for form in tool_formats(name)]
    fitting = [form for form in (*own, *others) if form.signs and all(sign in source for sign in form.signs)]
    if fitting:
        # The one with most signs: another form's template has some of them, too.
        return max(fitting, key=lambda form: len(form.signs))
    return own[0] if own and knows_tools else JSON_IN_TAGS


# -- messages ---------------------------------------------------------------------------------------------------------


def _plain(message: Mapping[str, Any], number: int, source: str) -> dict[str, Any]:
    """A message with what templates take for granted; its calls checked."""
    if not isinstance(message, Mapping):
        raise OptionError(f"messages[{number}] is {quote(message)}, not an object with role and content")
    plain = dict(message)
    if not isinstance(plain.get("role"), str):
        raise TokenizerError(f"message {number} has no role")
    if plain["role"] == "developer" and "developer" not in source:
        plain["role"] = "system"
    if plain.get("content") is None:
        plain["content"] = ""
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
    else:
        plain["tool_calls"] = _calls(plain["tool_calls"], f"messages[{number}]")
    thoughts = plain.get("reasoning_content")
    if isinstance(thoughts, str) and "thinking" not in plain and re.search(r"message(\.|\[['\"])thinking\b", source):
        plain["thinking"] = thoughts
    return plain


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise OptionError(f"{where}: tool_calls is not a list")
    calls = []
    for number, item in enumerate(given):
        function = item.get("function") if isinstance(item, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise OptionError(f"{where}: tool_calls[{number}] has no function with a name")
        arguments = function.get("arguments")
        if arguments is None or arguments == "":
            arguments = "{}"
        if not isinstance(arguments, (str, Mapping)):
            raise OptionError(f"{where}: the arguments of tool_calls[{number}] are {quote(arguments)}, not JSON text")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        id = item.get("id")
        calls.append(
            {
                "id": id if isinstance(id, str) else "",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
    return calls


def _with_calls(messages: list[dict[str, Any]], template: TemplateTools) -> list[dict[str, Any]]:
    """The messages with calls and results as the template wants them."""
    numbers = count()
    names: dict[str, str] = {}  # by the ids that the client knows
    ids: dict[str, str] = {}
    waiting: list[str] = []  # ids of calls without a result so far
    told: list[dict[str, Any]] = []
    for message in messages:
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                name, number = call["function"]["name"], next(numbers)
                known = call["id"] or f"call-{number}"
                names[known], ids[known] = name, _id(known, template.form, name, number)
                waiting.append(known)
                calls.append({**call, "id": ids[known], "function": _function(call["function"], template)})
            told += _assistant({**message, "tool_calls": calls}, template)
        elif message["role"] == "tool":
            known = message.get("tool_call_id")
            if not isinstance(known, str) or known not in names:
                known = waiting[0] if waiting else ""
            if known in waiting:
                waiting.remove(known)
            name = message.get("name") if isinstance(message.get("name"), str) else names.get(known, "")
            result = {**message, "name": name, "tool_call_id": ids.get(known, known)}
            _add_result(told, result, template)
        else:
            told.append(message)
    return told


def _function(function: Mapping[str, Any], template: TemplateTools) -> dict[str, Any]:
    if template.calls == "text":
        return dict(function)
    return {"name": function["name"], "arguments": _arguments(function["arguments"])}


def _arguments(text: str) -> dict[str, Any]:
    """By name; a call that was broken off, or is none, is told all the same."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


def _assistant(message: dict[str, Any], template: TemplateTools) -> list[dict[str, Any]]:
    """A message with calls, as one or several."""
    content, calls = message["content"], message["tool_calls"]
    if not template.calls:
        made = [Call(call["function"]["name"], call["function"]["arguments"], call["id"]) for call in calls]
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        return [{**plain, "content": (f"{content}\n" if content else "") + written(template.form, made)}]
    nothing = None if template.empty else ""
    pieces = []
    if content and (not template.both or template.responses or "thinking" in message):
        # gpt-oss's template refuses thoughts beside content; in others the calls would be lost, or told before it.
        pieces.append({"role": "assistant", "content": content})
        content = ""
    if template.form.parallel:
        return [*pieces, {**message, "content": content or nothing}]
    first = {**message, "content": content or nothing, "tool_calls": calls[:1]}
    more = ({"role": "assistant", "content": nothing, "tool_calls": [call]} for call in calls[1:])
    return [*pieces, first, *more]


def _add_result(told: list[dict[str, Any]], result: dict[str, Any], template: TemplateTools) -> None:
    if template.responses:
        if told and "tool_calls" in told[-1]:
            responses = [*told[-1].get("tool_responses", []), {"name": result["name"], "response": result["content"]}]
            told[-1] = {**told[-1], "tool_responses": responses}
            return
    elif template.results:
        # Where an answer has one call, its result follows it at once.
        for at in range(len(told) - 1, -1, -1):
            calls = told[at].get("tool_calls")
            if calls is None and told[at]["role"] != "tool":
                break
            if calls and not template.form.parallel and calls[0]["id"] == result["tool_call_id"]:
                told.insert(at + 1, {**result, "role": template.results})
                return
        told.append({**result, "role": template.results})
        return
    text = f"<tool_response>\n{result['content']}\n</tool_response>"
    if told and told[-1]["role"] == "user" and str(told[-1]["content"]).startswith("<tool_response>"):
        told[-1] = {**told[-1], "content": f"{told[-1]['content']}\n{text}"}
    else:
        told.append({"role": "user", "content": text})


def _with_system(messages: list[dict[str, Any]], text: str, system: bool) -> list[dict[str, Any]]:
    """With this text in the system message, or in the first message where there are none."""
    told = list(messages)
    if told and (told[0]["role"] == "system" or not system):
        told[0] = {
            **told[0],
            "content": f"{told[0]['content']}\n\n{text}" if system else f"{text}\n\n{told[0]['content']}",
        }
        return told
    return [{"role": "system", "content": text}, *told]


def _id(known: str, form: ToolFormat, name: str, number: int) -> str:
    """A call's id as the format has it: templates refuse others."""
    if form.numbered:
        return known if re.fullmatch(r"functions\.[^:]+:\d+", known) else f"functions.{name}:{number}"
    if form.id_length and not re.fullmatch(f"[A-Za-z0-9]{{{form.id_length}}}", known):
        letters = string.ascii_letters + string.digits
        return "".join(letters[byte % len(letters)] for byte in hashlib.sha256(known.encode()).digest())[
            : form.id_length
        ]
    return known
