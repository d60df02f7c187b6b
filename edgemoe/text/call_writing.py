"""Tool calls as a model writes them: for templates that do not, and as examples for models that have learnt none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edgemoe.families import ToolFormat


class Call(NamedTuple):
    """A call of a tool. arguments: by name. id: of the call."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


def written(form: ToolFormat, calls: Sequence[Call]) -> str:
    """These calls in this form."""
    if form.syntax == "harmony":
        return "".join(
            f"<|start|>assistant<|channel|>commentary to=functions.{call.name} <|constrain|>json<|message|>"
            f"{_json(call.arguments)}<|call|>"
            for call in calls
        )
    bodies = [_call(form, call) for call in calls]
    line = "\n" if form.lines else ""
    if form.syntax == "json" and form.together:
        return f"{form.begin}[{', '.join(bodies)}]{form.end}"
    if form.syntax == "python":
        return f"{form.begin}[{', '.join(bodies)}]{form.end}"
    if form.together:
        return form.begin + line + line.join(bodies) + line + form.end
    return "\n".join(form.begin + line + body + line + form.end for body in bodies)


def _call(form: ToolFormat, call: Call) -> str:
    if form.syntax == "json":
        found: dict[str, Any] = {"name": call.name, "arguments": call.arguments}
        return _json(found | ({"id": call.id} if form.id_length and call.id else {}))
    if form.syntax == "named":
        name = (call.id or f"{form.name_prefix}{call.name}:0") if form.numbered else form.name_prefix + call.name
        return form.name_begin + name + form.separator + _json(call.arguments) + form.call_end
    if form.syntax == "python":
        return f"{call.name}({', '.join(f'{key}={_python(value)}' for key, value in call.arguments.items())})"
    if form.syntax == "gemma":
        return f"call:{call.name}{_gemma(call.arguments)}"
    pieces = [form.name_begin + call.name + form.name_end]
    for key, value in call.arguments.items():
        text = value if isinstance(value, str) else _json(value)
        between = "\n" if form.own_lines else ""
        lead = "\n" if form.value_begin else ""
        pieces.append(
            form.key_begin + key + form.key_end + lead + form.value_begin + between + text + between + form.value_end
        )
    return "\n".join([*pieces, *filter(None, (form.call_end,))]) + ("" if form.call_end else "\n")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _python(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    return _json(value)


def _gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_gemma(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_gemma, value)) + "]"
    return _json(value)
