"""Who may ask: checks that come before anything else of a request is looked at."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from edgemoe.protocols.problems import Problem, anthropic_error, openai_error

ANTHROPIC_PATHS = "/v1/messages"
# Nothing of the model, and the page that asks for the key.
OPEN_PATHS = ("/health", "/")


def problem_response(path: str, problem: Problem) -> JSONResponse:
    """In the shape of the protocol that is spoken at this path."""
    told = anthropic_error if path.startswith(ANTHROPIC_PATHS) else openai_error
    headers = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(told(problem), problem.status, headers)


class HostCheck:
    """Refuses requests for a name that is not the server's. A page of another site whose name has come to mean this
    machine (DNS rebinding) says so in the Host header."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            names = Headers(scope=scope).getlist("host")
            if len(names) != 1 or _without_port(names[0]) not in self._allowed:
                message = "the Host header names another server; --allowed-host NAME allows it"
                await problem_response(scope["path"], Problem(403, message, "host_not_allowed"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    name, colon, port = host.strip().lower().rpartition(":")
    return (name if colon and port.isdigit() else host.strip().lower()).rstrip(".")


class KeyCheck:
    """Refuses requests without one of the keys: `Authorization: Bearer KEY`, or Anthropic's `x-api-key`."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._known(HTTPConnection(scope)):
            problem = Problem(401, "the API key is missing or wrong", "invalid_api_key")
            await problem_response(scope["path"], problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, request: HTTPConnection) -> bool:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        given = [request.headers.get("x-api-key", "")]
        if kind.lower() == "bearer":
            given.append(token.strip())
        found = False
        for text in given:
            for key in self._keys:  # all of them, so that the time says nothing
                found |= hmac.compare_digest(text.encode("latin-1"), key)
        return found
