"""Fields that several protocols have, or that mean the same in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from edgemoe.errors import OptionError
from edgemoe.options import QUALITIES
from edgemoe.protocols.fields import FieldError, Fields
from edgemoe.text.sampling import SamplingOptions
from edgemoe.text.template import check_variables

MAX_CHOICES = 32
"""Answers to one request."""
MAX_STOPS = 64
MAX_LOGPROBS = 20
MAX_TOKENS = (1 << 31) - 1

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


def read_template_kwargs(fields: Fields) -> dict[str, Any]:
    kwargs = fields.inner("chat_template_kwargs")
    if kwargs is None:
        return {}
    try:
        check_variables(kwargs.values)
    except OptionError as error:
        raise FieldError(kwargs.path, f"cannot be used: {error}") from None
    return kwargs.values


def read_schema(described: Fields) -> dict[str, Any]:
    described.need("schema")
    schema = described.inner("schema")
    assert schema is not None
    return schema.values


# What a content part may be called, and where its text is.
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA = ("image", "input_image", "image_url", "input_audio", "audio", "video_url", "file", "input_file", "document")


def read_content(given: Fields, key: str) -> str:
    """Text, also where it comes in parts, which then are lines; empty for null."""
    value = given.get(key)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return "\n".join(read_text_part(part) for part in given.objects(key))


def read_text_part(part: Fields) -> str:
    kind = part.need_text("type")
    if kind in _MEDIA:
        part.fail("type", f"= {kind}: the model reads text only", "unsupported_content")
    if kind not in _TEXTS:
        part.fail("type", f"= {kind[:40]!r} is not one of {', '.join(_TEXTS)}")
    return part.need_text(_TEXTS[kind])


def read_function(function: Fields) -> dict[str, Any]:
    """A function tool, from where its name, description, parameters and strict are."""
    described: dict[str, Any] = {"name": function.need_text("name")}
    if not described["name"]:
        function.fail("name", "is empty")
    described["description"] = function.text("description") or ""
    parameters = function.inner("parameters")
    described["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters.values
    if function.flag("strict"):
        described["strict"] = True
    return {"type": "function", "function": described}


def named_function(chosen: Fields, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The choice of a function by its name, which must be one of the tools'."""
    name = chosen.need_text("name")
    if name not in [tool["function"]["name"] for tool in tools]:
        chosen.fail("name", f"= {name[:80]!r} is not one of the tools")
    return {"type": "function", "function": {"name": name}}


def read_thinking(fields: Fields) -> tuple[bool | None, int | None]:
    """(whether to think, for how many tokens), each None where nothing is said."""
    thinking = fields.inner("thinking")
    if thinking is None:
        return None, None
    kind = thinking.need_text("type", ("enabled", "disabled", "adaptive", "between_tools"))
    return kind != "disabled", thinking.whole("budget_tokens", 1, MAX_TOKENS)
