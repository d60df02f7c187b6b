"""Servers that tests talk to, and a model that says what a test wants."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import edgemoe
from edgemoe.errors import EdgemoeError
from edgemoe.server.app import create_app
from edgemoe.server.service import bind, make_server
from edgemoe.server.settings import LOOPBACK_NAMES, ServerSettings
from edgemoe.serving.generation import GenerationResult
from edgemoe.text.parts import Part

Script = Callable[[dict[str, Any]], Iterable[Any]]


def content(text: str) -> Part:
    return Part("content", text)


def reasoning(text: str) -> Part:
    return Part("reasoning", text)


def call(index: int, *pieces: str, name: str = "weather", id: str | None = "") -> list[Part]:
    """The parts of a tool call, its arguments in pieces."""
    number = f"call_{index}" if id == "" else id
    first = Part("tool_call", pieces[0], index, name, number)
    return [first, *(Part("tool_call", text, index) for text in pieces[1:])]


def make_result(**changes: Any) -> GenerationResult:
    """A result of 3 tokens after a prompt of 5, of which 2 were known."""
    counts = {"prompt_tokens": 5, "computed_prompt_tokens": 3, "computed_tokens": 6}
    counters: Any = None
    times = {"ttft_seconds": 0.1, "seconds": 0.2, "counters": counters}
    return GenerationResult(**{"text": "", "tokens": (1, 2, 3), "finish_reason": "eos", **counts, **times, **changes})


class ScriptedAnswer:
    """Parts that a script gives; close() is remembered."""

    def __init__(self, parts: Iterator[Any], finish_reason: str, more: dict[str, Any]) -> None:
        self._parts = parts
        self._reason = finish_reason
        self._more = more
        self._ended = ""
        self.closed = threading.Event()

    def __iter__(self) -> ScriptedAnswer:
        return self

    def __next__(self) -> Any:
        if self.closed.is_set():
            raise StopIteration
        try:
            return next(self._parts)
        except StopIteration:
            self._ended = self._reason
            raise

    def __aiter__(self) -> ScriptedAnswer:
        return self

    async def __anext__(self) -> Any:
        part = await asyncio.to_thread(next, self, None)
        if part is None:
            raise StopAsyncIteration
        return part

    @property
    def result(self) -> GenerationResult:
        ended = "cancelled" if self.closed.is_set() and not self._ended else self._ended
        return make_result(finish_reason=ended, **self._more)

    def close(self) -> None:
        self.closed.set()

    stop = close

    def __enter__(self) -> ScriptedAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class ScriptedModel:
    """The bundled model's tokenizer and figures, with answers from a script.

    script: called with the keyword arguments of each answer; gives its parts. asked: (messages or prompt, arguments).
    """

    real: edgemoe.Model
    script: Script = lambda arguments: [content("Hi")]
    finish_reason: str = "eos"
    more: dict[str, Any] = field(default_factory=dict)
    refusal: Exception | None = None
    asked: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    answers: list[ScriptedAnswer] = field(default_factory=list)

    def reset(self) -> None:
        for known in dataclasses.fields(self):
            if known.name != "real":
                default = known.default
                made = known.default_factory() if known.default_factory is not dataclasses.MISSING else default
                setattr(self, known.name, made)

    def chat_parts(self, messages: Any, **arguments: Any) -> ScriptedAnswer:
        self.asked.append((messages, arguments))
        if self.refusal is not None:
            raise self.refusal
        self.answers.append(ScriptedAnswer(iter(self.script(arguments)), self.finish_reason, self.more))
        return self.answers[-1]

    def generate(self, prompt: Any, **arguments: Any) -> ScriptedAnswer:
        answer = self.chat_parts(prompt, **arguments)
        answer._parts = (part.text for part in answer._parts)
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@contextmanager
def serving(model: Any, port: int = 0, **changes: Any) -> Iterator[str]:
    """The URL of a server, which runs in this process; on a free port, if none is given."""
    changes = {"model_name": "tiny", "allowed_hosts": LOOPBACK_NAMES, **changes}
    with bind("127.0.0.1", port) as bound:
        app = create_app(model, ServerSettings(**changes))
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.002)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Until it holds; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise EdgemoeError("what was waited for did not happen")
        time.sleep(0.005)
