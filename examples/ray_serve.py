"""A fleet with Ray Serve: one model on each machine, and each conversation on the machine that knows its beginning.

    pip install 'edgemoe[server]' 'ray[serve]'
    EDGEMOE_MODEL=model.gguf EDGEMOE_REPLICAS=4 serve run ray_serve:fleet    # in this folder, on the cluster's head

The whole server runs in every replica, loaded with the options of `edgemoe.load`; a front hands requests on as they are
and answers back as they come. Where a conversation goes follows from its beginning (the instructions, and the first
thing that the user said), so that what was computed of it is found again. When that replica has all the requests that
it may have, the next one in the conversation's own order takes them; when a replica comes or goes, only its
conversations move.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import StreamingResponse

MODEL = os.environ.get("EDGEMOE_MODEL")  # a path on every machine; none: the bundled model
# Of `edgemoe.load`, such as {"memory": "8GB", "context": 32768}.
OPTIONS: dict[str, Any] = json.loads(os.environ.get("EDGEMOE_OPTIONS", "{}"))
REPLICAS = int(os.environ.get("EDGEMOE_REPLICAS", "1"))
A_MACHINE = int(os.environ.get("EDGEMOE_REPLICAS_A_MACHINE", "1"))
WAITING = 32  # requests that a replica has at a time, before others get them

_BEGINNING = 1024  # characters of a plain text, or tokens


def beginning(body: bytes) -> str:
    """What requests of one conversation have in common and others probably have not; the same on every machine."""
    try:
        asked = json.loads(body)
        turns = asked.get("messages") or asked.get("input") or asked.get("prompt") or ""
        users = (at for at, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user")
        first = next(users, None) if isinstance(turns, list) else None
        begun = turns[:_BEGINNING] if first is None else turns[: first + 1]
        text = json.dumps([asked.get("system"), asked.get("instructions"), begun])
    except (ValueError, AttributeError, TypeError, RecursionError):  # no request at all: any replica says so
        text = ""
    return hashlib.sha256(text.encode()).hexdigest()


class ByBeginning(RequestRouter):
    """Every conversation has an order of the replicas of its own, by rendezvous hashing."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        start = pending_request.args[0] if pending_request is not None and pending_request.args else ""

        def rank(replica: RunningReplica) -> bytes:
            return hashlib.sha256(f"{start}{replica.replica_id.unique_id}".encode()).digest()

        return [[replica] for replica in sorted(candidate_replicas, key=rank)]


@serve.deployment(
    num_replicas=REPLICAS,
    max_replicas_per_node=A_MACHINE,
    max_ongoing_requests=WAITING,
    request_router_config=RequestRouterConfig(request_router_class=ByBeginning),
    health_check_timeout_s=60,
)
class Replica:
    """A server without a socket."""

    def __init__(self) -> None:
        import edgemoe
        from edgemoe.server.app import create_app
        from edgemoe.server.settings import ServerSettings
        from edgemoe.text.named_templates import NAMED_TEMPLATES

        self._model = edgemoe.load(MODEL, **OPTIONS)
        if not self._model.tokenizer.chat_template:  # as the bundled model, which knows no conversations
            self._model.tokenizer.use_chat_template(NAMED_TEMPLATES["chatml"])
        name = os.environ.get("EDGEMOE_NAME") or (Path(MODEL).stem if MODEL else "bundled")
        self._app = create_app(self._model, ServerSettings(model_name=name))

    async def answer(self, start: str, scope: dict[str, Any], body: bytes) -> AsyncIterator[Any]:
        """First the status and headers, then the body in pieces. start: for the router alone."""
        pieces: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(16)
        gone = asyncio.Event()
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if asked:
                return asked.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app({**scope, "app": self._app}, receive, pieces.put)
            finally:
                await pieces.put(None)

        work = asyncio.create_task(run())
        try:
            while (piece := await pieces.get()) is not None:
                if piece["type"] == "http.response.start":
                    yield piece["status"], piece["headers"]
                elif piece.get("body"):
                    yield piece["body"]
        finally:  # also when the client has gone: the answer ends at the next layer
            gone.set()
            work.cancel()


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
class Front:
    """Where requests come in."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        body = await request.body()
        parts = ("type", "method", "path", "raw_path", "query_string", "headers", "http_version", "scheme", "root_path")
        scope = {"asgi": {"version": "3.0"}, "client": None, "server": None}
        scope |= {name: request.scope[name] for name in parts if name in request.scope}
        pieces = self._replicas.answer.remote(beginning(body), scope, body)
        status, headers = await anext(pieces)
        response = StreamingResponse(pieces, status)
        response.raw_headers = [(bytes(name), bytes(value)) for name, value in headers]
        return response


fleet = Front.bind(Replica.bind())
