"""Answers over HTTP: one place starts them, sends what comes, and sees when nobody reads any more."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
from anyio.abc import ObjectReceiveStream, ObjectSendStream
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from edgemoe.protocols.answers import AnswerStream, Event, LogprobReader
from edgemoe.protocols.problems import Problem, problem_of
from edgemoe.server.metrics import Metrics
from edgemoe.server.security import problem_response
from edgemoe.server.settings import ServerSettings
from edgemoe.serving.answer import Answer
from edgemoe.serving.generation import Generation, GenerationResult
from edgemoe.serving.session import TokenLogprob
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


class _News(NamedTuple):
    """Of one of the answers: a part, its result at the end, or what ended it."""

    choice: int
    what: Part | GenerationResult | Problem
    logprobs: Sequence[TokenLogprob] = ()


class _ProblemError(Exception):
    """Ends all answers of a request."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


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
        self._sending = False
        self._work = anyio.CancelScope()
        self._problem = _OUT_OF_TIME

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

    async def _send(self, message: Message) -> None:
        """To the client, who has gone if it takes nothing for long."""
        with anyio.move_on_after(self._answers.settings.send_seconds) as waiting:
            await self._client(message)
        if waiting.cancelled_caught:
            LOG.warning("%s: the client does not read its answer", self._path)
            self._all.cancel()
            await anyio.lowlevel.checkpoint()

    async def _serve(self) -> None:
        problem: Problem | None = None
        limit = self._answers.settings.request_seconds
        if self._answers.stopping:
            await self._fail(_GOING_DOWN)
            return
        try:
            with self._work as work:
                if limit is not None:
                    work.deadline = anyio.current_time() + limit
                await self._answer()
            if work.cancelled_caught:
                problem = self._problem
        except _ProblemError as error:
            problem = error.problem
        except Exception as error:
            problem = problem_of(error)
            if problem.status == 500:
                LOG.error("%s: %s", self._path, problem.message, exc_info=error)
        finally:
            self._close()
        if problem is not None:
            await self._fail(problem)

    def _close(self) -> None:
        for answer in self._begun:
            answer.close()

    async def _answer(self) -> None:
        await anyio.to_thread.run_sync(self._begin, limiter=self._answers.threads)
        self._told = self._tell(sum(answer.result.prompt_tokens for answer in self._begun))
        sender, receiver = anyio.create_memory_object_stream[_News](16)
        self._answers.metrics.running += len(self._begun)
        try:
            async with anyio.create_task_group() as group, receiver:
                for choice, answer in enumerate(self._begun):
                    group.start_soon(self._pump, choice, answer, sender.clone())
                sender.close()
                failed = await (
                    self._send_events(self._told, receiver) if self._stream else self._gather(self._told, receiver)
                )
                if failed is not None:
                    group.cancel_scope.cancel()
        finally:
            self._answers.metrics.running -= len(self._begun)
        if failed is not None:
            raise _ProblemError(failed)
        if not self._stream:
            await JSONResponse(self._told.response())(self._scope, self._receive, self._send)

    def _begin(self) -> None:
        # One by one into the list: those that have begun are closed when another one is refused.
        for start in self._starts:
            self._begun.append(start())

    async def _pump(self, choice: int, answer: Answer | Generation, out: ObjectSendStream[_News]) -> None:
        """Hands on what comes of an answer."""
        news = LogprobReader(self._hidden)
        async with out:
            try:
                async for piece in answer:
                    part = Part("content", piece) if isinstance(piece, str) else piece
                    await out.send(_News(choice, part, news.read(answer.result) if self._logprobs else ()))
                result = answer.result
                if result.finish_reason == "cancelled":
                    await out.send(_News(choice, _STOPPED))
                else:
                    await out.send(_News(choice, result, news.read(result) if self._logprobs else ()))
            except Exception as error:
                problem = problem_of(error)
                if problem.status == 500:
                    LOG.error("%s: %s", self._path, problem.message, exc_info=error)
                await out.send(_News(choice, problem))
            finally:
                self._answers.metrics.count_answer(answer.result)
                self._counted.add(choice)

    async def _gather(self, told: AnswerStream, news: ObjectReceiveStream[_News]) -> Problem | None:
        async for item in news:
            if isinstance(item.what, Problem):
                return item.what
            _tell(told, item)
        return None

    async def _send_events(self, told: AnswerStream, news: ObjectReceiveStream[_News]) -> Problem | None:
        """Sends events as they come, and something every few seconds where none does. What fails at once is not
        sent but returned, to become the response's status."""
        settings = self._answers.settings
        first: _News | None = None
        ended = False
        with anyio.move_on_after(settings.prompt_seconds):
            try:
                first = await news.receive()
            except anyio.EndOfStream:
                ended = True
        if first is not None and isinstance(first.what, Problem):
            return first.what
        self._sending = True
        await self._send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        await self._send_all(told.begin())
        if first is not None:
            await self._send_all(_tell(told, first))
        while not ended:
            item: _News | None = None
            with anyio.move_on_after(settings.keepalive_seconds):
                try:
                    item = await news.receive()
                except anyio.EndOfStream:
                    ended = True
            if item is not None:
                if isinstance(item.what, Problem):
                    return item.what
                await self._send_all(_tell(told, item))
            elif not ended:
                await self._send_bytes(_KEEPALIVE)
        await self._send_all(told.close())
        await self._send_bytes(b"", more=False)
        return None

    async def _fail(self, problem: Problem) -> None:
        if not self._sending:
            await problem_response(self._path, problem)(self._scope, self._receive, self._send)
            return
        assert self._told is not None
        await self._send_all(self._told.fail(problem))
        await self._send_bytes(b"", more=False)

    async def _send_all(self, events: Iterable[Event]) -> None:
        data = b"".join(encode_event(event) for event in events)
        if data:
            await self._send_bytes(data)

    async def _send_bytes(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _tell(told: AnswerStream, item: _News) -> list[Event]:
    assert not isinstance(item.what, Problem)
    if isinstance(item.what, GenerationResult):
        return told.end(item.choice, item.what, item.logprobs)
    return told.push(item.choice, item.what, item.logprobs)


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
