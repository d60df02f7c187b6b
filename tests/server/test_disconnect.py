"""Clients that leave, wait long, or meet a server that goes down."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from scripted import Script, ScriptedModel, content, serving, wait_for

PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9},
}


def send(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """A request whose answer nobody has read yet."""
    data = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    client.sendall(f"{head}\r\n\r\n".encode() + data)
    return client


class Held:
    """A script that waits before a part until it is let go on, as a model does that computes a prompt."""

    def __init__(self, before: int = 0) -> None:
        self.go = threading.Event()
        self._before = before

    def script(self, _: Any) -> Iterator[Any]:
        for _ in range(self._before):
            yield content("word ")
        self.go.wait(20)
        yield content("end")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [0, 2])
def test_who_leaves_ends_the_answer(
    scripted: ScriptedModel, scripted_url: str, path: str, stream: bool, before: int
) -> None:
    held = Held(before)
    scripted.script = held.script
    try:
        with send(scripted_url, path, {**PATHS[path], "stream": stream}):
            wait_for(lambda: len(scripted.answers) == 1)
            assert not scripted.answers[0].closed.is_set()
        assert scripted.answers[0].closed.wait(20)
    finally:
        held.go.set()
    with httpx2.Client(base_url=scripted_url) as client:
        wait_for(lambda: client.get("/engine").json()["status"]["answers"] == 0)


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_is_not_silent_while_a_prompt_is_computed(
    scripted: ScriptedModel, scripted_url: str, path: str
) -> None:
    held = Held()
    scripted.script = held.script
    with send(scripted_url, path, {**PATHS[path], "stream": True}) as client:
        got = b""
        while got.count(b": keep-alive\n\n") < 2:  # the test's client gives up after 20 seconds
            got += client.recv(4096)
        assert b"200 OK" in got
        held.go.set()
        while b"end" not in got:
            got += client.recv(4096)


def test_an_answer_has_a_limit_of_time(scripted: ScriptedModel) -> None:
    held = Held()
    scripted.script = held.script
    with serving(scripted, request_seconds=0.05, prompt_seconds=0.01) as url:
        try:
            whole = httpx2.post(f"{url}/v1/chat/completions", json=PATHS["/v1/chat/completions"])
            assert whole.status_code == 504
            streamed = httpx2.post(f"{url}/v1/messages", json={**PATHS["/v1/messages"], "stream": True})
            assert "timeout_error" in streamed.text
            assert all(answer.closed.is_set() for answer in scripted.answers)
        finally:
            held.go.set()


def test_when_one_of_several_answers_is_refused_the_others_are_closed(scripted: ScriptedModel) -> None:
    real: Script = scripted.script

    def script(arguments: dict[str, Any]) -> Any:
        if len(scripted.answers) == 2:
            raise ValueError("the third")
        return real(arguments)

    scripted.script = script
    with serving(scripted) as url:
        asked = {**PATHS["/v1/chat/completions"], "n": 4}
        assert httpx2.post(f"{url}/v1/chat/completions", json=asked).status_code == 500
    assert len(scripted.answers) == 2
    assert all(answer.closed.is_set() for answer in scripted.answers)


def test_who_reads_nothing_is_given_up(scripted: ScriptedModel, caplog: pytest.LogCaptureFixture) -> None:
    """A stream of more than the system holds for a client that does not read."""
    scripted.script = lambda _: itertools.repeat(content("word " * 10_000), 1_000)
    asked = {**PATHS["/v1/chat/completions"], "stream": True}
    with serving(scripted, send_seconds=0.1, keepalive_seconds=0.1) as url, send(url, "/v1/chat/completions", asked):
        wait_for(lambda: any("does not read its answer" in record.message for record in caplog.records))
        assert scripted.answers[0].closed.wait(20)
        wait_for(lambda: httpx2.get(f"{url}/engine").json()["status"]["answers"] == 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR" and "edgemoe" in record.name]
