"""Answers over HTTP: one place starts them, sends what comes, and sees when nobody reads any more."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import anyio
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from edgemoe.protocols.answers import AnswerStream, Event, LogprobReader
from edgemoe.protocols.problems import Problem, problem_of
from edgemoe.server.metrics import Metrics
from edgemoe.server.security import problem_response
from edgemoe.server.settings import ServerSettings
from edgemoe.serving.answer import Answer
from edgemoe.serving.generation import Generation
from edgemoe.text.parts import Part

LOG = logging.getLogger("edgemoe.server")

# Where texts become tokens, beside the event loop.
_THREADS = 16
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
_KEEPALIVE = b": keep-alive\n\n"


class Answers:
    """The answers of a server that are under way."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.threads = anyio.CapacityLimiter(_THREADS)
        self.running: set[AnswerResponse] = set()
        self.stopping = False

    def under_way(self) -> list[Answer | Generation]:
        """Those that the metrics do not count yet. To be called on the event loop."""
        return [answer for response in self.running for answer in response.uncounted()]

    def stop(self) -> None:
        """Ends them all, and every one that comes: the server is going down. To be called on its event loop."""
        self.stopping = True
        for response in tuple(self.running):
            response.abort(_GOING_DOWN)


_GOING_DOWN = Problem(503, "the server is shutting down", "shutting_down", retry_after=5)
_STOPPED = Problem(503, "the answer was stopped", "stopped")
_OUT_OF_TIME = Problem(504, "the answer took longer than the server allows (--timeout)", "timeout")


class AnswerResponse:
    """The response to a request for one or more answers.

    starts: each begins an answer; they run on a thread, and what they raise before anything was sent is the response's
    status. tell: a stream of the protocol, given the number of tokens of the prompts.
    """

    def __init__(
        self,
        answers: Answers,
        path: str,
        starts: Sequence[Callable[[], Answer | Generation]],
        tell: Callable[[int], AnswerStream],
        stream: bool,
        logprobs: bool,
        hidden: Collection[int],
    ) -> None:
        self._answers = answers
        self._path = path
        self._starts = starts
        self._tell = tell
        self._stream = stream
        self._logprobs = logprobs
        self._hidden = hidden
        self._begun: list[Answer | Generation] = []
        self._counted: set[int] = set()
        self._told: AnswerStream | None = None
        self._work = anyio.CancelScope()
        self._problem: Problem | None = None
        self._streaming = False  # the response has begun, with status 200
        self._order = anyio.Lock(fast_acquire=True)  # of what is sent
        self._sent_at = 0.0
        self._sending_since: float | None = None

    def uncounted(self) -> list[Answer | Generation]:
        """Its answers that have not ended."""
        return [answer for choice, answer in enumerate(self._begun) if choice not in self._counted]

    def abort(self, problem: Problem) -> None:
        """Ends it with this problem. To be called on the event loop."""
        self._problem = problem
        self._work.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._client = scope, receive, send
        self._answers.running.add(self)
        try:
            async with anyio.create_task_group() as group:
                self._all = group.cancel_scope
                group.start_soon(self._watch)
                await self._serve()
                self._all.cancel()
        finally:
            self._answers.running.discard(self)

    async def _watch(self) -> None:
        """Ends everything when the client has gone: also while nothing is sent, since a prompt is being computed."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._all.cancel()

    async def _serve(self) -> None:
        limit = self._answers.settings.request_seconds
        if self._answers.stopping:
            self._problem = _GOING_DOWN
        else:
            try:
                with self._work as work:
                    if limit is not None:
                        work.deadline = anyio.current_time() + limit
                    await self._answer()
                if work.cancelled_caught and self._problem is None:
                    self._problem = _OUT_OF_TIME
            except Exception as error:
                self._problem = self._failure(error)
            finally:
                for answer in self._begun:
                    answer.close()
        if self._problem is None:
            return
        if not self._streaming:
            await problem_response(self._path, self._problem)(self._scope, self._receive, self._send)
        elif self._told is not None:
            await self._send_events(self._told.fail(self._problem))
            await self._send_body(b"", more=False)

    def _failure(self, error: Exception) -> Problem:
        problem = problem_of(error)
        if problem.status == 500:
            LOG.error("%s: %s", self._path, problem.message, exc_info=error)
        return problem

    async def _answer(self) -> None:
        await anyio.to_thread.run_sync(self._begin, limiter=self._answers.threads)
        told = self._told = self._tell(sum(answer.result.prompt_tokens for answer in self._begun))
        self._answers.metrics.running += len(self._begun)
        try:
            async with anyio.create_task_group() as beside:
                if self._stream:
                    beside.start_soon(self._tend)
                async with anyio.create_task_group() as readers:
                    for choice, answer in enumerate(self._begun):
                        readers.start_soon(self._read, told, choice, answer)
                beside.cancel_scope.cancel()
        finally:
            self._answers.metrics.running -= len(self._begun)
        if self._problem is not None:
            return
        await self._begin_stream()
        if self._stream:
            await self._send_events(told.close())
            await self._send_body(b"", more=False)
        else:
            await JSONResponse(told.response())(self._scope, self._receive, self._send)

    def _begin(self) -> None:
        # One by one into the list: those that have begun are closed when another one is refused.
        for start in self._starts:
            self._begun.append(start())

    async def _read(self, told: AnswerStream, choice: int, answer: Answer | Generation) -> None:
        """Tells one of the answers, as it comes. What ends it ends the others, too."""
        news = LogprobReader(self._hidden)
        try:
            async for piece in answer:
                part = Part("content", piece) if isinstance(piece, str) else piece
                await self._begin_stream()
                await self._send_events(told.push(choice, part, news.read(answer.result) if self._logprobs else ()))
            result = answer.result
            if result.finish_reason == "cancelled":
                self.abort(_STOPPED)
                return
            await self._begin_stream()
            await self._send_events(told.end(choice, result, news.read(result) if self._logprobs else ()))
        except Exception as error:
            self.abort(self._failure(error))
        finally:
            self._answers.metrics.count_answer(answer.result)
            self._counted.add(choice)

    # -- what is sent -------------------------------------------------------------------------------------------

    async def _begin_stream(self) -> None:
        if self._streaming or not self._stream:
            return
        assert self._told is not None
        async with self._order:
            if not self._streaming:
                self._streaming = True
                await self._send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
                data = b"".join(map(encode_event, self._told.begin()))
                await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _tend(self) -> None:
        """Begins the stream when nothing has failed for a moment, says something where nothing comes for long, and
        ends everything when the client takes nothing."""
        settings = self._answers.settings
        await anyio.sleep(settings.prompt_seconds)
        await self._begin_stream()
        while True:
            if self._sending_since is not None:
                await anyio.sleep_until(self._sending_since + settings.send_seconds)
                gone = self._sending_since is not None and self._waited(self._sending_since, settings.send_seconds)
            else:
                await anyio.sleep_until(self._sent_at + settings.keepalive_seconds)
                gone = False
                if self._sending_since is None and self._waited(self._sent_at, settings.keepalive_seconds):
                    with anyio.move_on_after(settings.send_seconds) as waiting:
                        await self._send_body(_KEEPALIVE)
                    gone = waiting.cancelled_caught
            if gone:
                LOG.warning("%s: the client does not read its answer", self._path)
                self._all.cancel()

    def _waited(self, since: float, seconds: float) -> bool:
        return anyio.current_time() >= since + seconds

    async def _send_events(self, events: Iterable[Event]) -> None:
        if not self._stream:
            return  # all of it is told at the end
        data = b"".join(map(encode_event, events))
        if data:
            await self._send_body(data)

    async def _send_body(self, data: bytes, more: bool = True) -> None:
        async with self._order:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _send(self, message: Message) -> None:
        self._sending_since = anyio.current_time()
        try:
            await self._client(message)
        finally:
            self._sending_since = None
        self._sent_at = anyio.current_time()


def encode_event(event: Event) -> bytes:
    """As a stream of server-sent events has it."""
    data = event.data if isinstance(event.data, str) else encode_json(event.data)
    name = "" if event.name is None else f"event: {event.name}\n"
    return f"{name}data: {data}\n\n".encode()


def encode_json(value: Any) -> str:
    """On one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
