"""A request's body as JSON."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import anyio
from starlette.requests import ClientDisconnect, Request

from edgemoe.protocols.problems import Problem
from edgemoe.server.settings import ServerSettings

# Half of a character that has two in UTF-16: text with one alone is not Unicode.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Refused(Exception):
    """A request that cannot be served."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


async def read_json(request: Request, settings: ServerSettings) -> Any:
    """Raises Refused for a body of another type, one that is too large or comes too slowly, and what is no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        # Web pages may send other types to any server without asking it.
        raise Refused(Problem(415, "the content type is not application/json", "unsupported_media_type"))
    data = bytearray()
    too_large = Problem(413, f"the request has more than {settings.max_body} bytes", "request_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > settings.max_body:
        raise Refused(too_large)
    try:
        with anyio.fail_after(settings.body_seconds):
            async for piece in request.stream():
                data += piece
                if len(data) > settings.max_body:
                    raise Refused(too_large)
    except TimeoutError:
        raise Refused(Problem(408, "the request did not come in time", "timeout")) from None
    except ClientDisconnect:
        raise Refused(Problem(400, "the client has gone")) from None
    return parse_json(bytes(data))


def parse_json(data: bytes) -> Any:
    try:
        value = json.loads(data.decode(), parse_constant=_no_constant)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused(Problem(400, "the request has text that is not valid Unicode", "invalid_json")) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise Refused(Problem(400, f"the request is not JSON: {reason}", "invalid_json")) from None
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
