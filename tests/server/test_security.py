"""Who is served, and what is refused before anything is computed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx2
import pytest
from scripted import ScriptedModel, content, serving

import edgemoe
from edgemoe.errors import ContextLengthError, EdgemoeError, OverloadedError, ReadError

ASKED = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def locked(script_servers: tuple[ScriptedModel, str, str]) -> Iterator[httpx2.Client]:
    model = script_servers[0]
    with serving(model, api_keys=("secret", "other")) as url, httpx2.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/models", "/engine", "/metrics", "/openapi.json", "/nothing"])
def test_nothing_is_told_without_a_key(locked: httpx2.Client, path: str) -> None:
    answer = locked.get(path)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_no_answer_without_a_key(locked: httpx2.Client, scripted: ScriptedModel) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"x-api-key": "secre"}):
        assert locked.post("/v1/chat/completions", json=ASKED, headers=headers).status_code == 401
    assert not scripted.asked


@pytest.mark.parametrize("key", ["secret", "other"])
def test_each_key_opens_both_ways(locked: httpx2.Client, key: str) -> None:
    for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
        assert locked.post("/v1/chat/completions", json=ASKED, headers=headers).status_code == 200


def test_a_wrong_key_is_told_in_anthropics_shape_to_its_clients(locked: httpx2.Client) -> None:
    answer = locked.post("/v1/messages", json=ASKED, headers={"x-api-key": "wrong"})
    assert answer.status_code == 401
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "authentication_error"


def test_health_and_the_page_are_open(locked: httpx2.Client) -> None:
    assert locked.get("/health").json() == {"status": "ok"}
    page = locked.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1.evil"])
def test_a_host_that_is_not_ours_is_refused(http: httpx2.Client, host: str) -> None:
    answer = http.get("/health", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]", "[::1]:8080", "localhost."])
def test_names_of_this_machine_are_ours(http: httpx2.Client, host: str) -> None:
    assert http.get("/health", headers={"host": host}).status_code == 200


def test_a_request_without_a_host_is_refused(url: str) -> None:
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 403")


def test_other_pages_may_not_read_answers(http: httpx2.Client) -> None:
    answer = http.get("/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_pages_that_are_allowed_may(scripted: ScriptedModel) -> None:
    with serving(scripted, cors_origins=("https://app.example",), api_keys=("k",)) as url:
        asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization, content-type"
        before = httpx2.options(f"{url}/v1/chat/completions", headers=asked)
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == "https://app.example"
        after = httpx2.get(f"{url}/v1/models", headers={"origin": "https://app.example", "authorization": "Bearer k"})
        assert after.headers["access-control-allow-origin"] == "https://app.example"
        refused = httpx2.options(f"{url}/v1/models", headers={**asked, "origin": "https://evil.example"})
        assert refused.headers.get("access-control-allow-origin") != "https://evil.example"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_page_may_send_anywhere_is_no_request(
    scripted_http: httpx2.Client, scripted: ScriptedModel, kind: str
) -> None:
    headers = {"content-type": kind} if kind else {}
    answer = scripted_http.post("/v1/chat/completions", content=json.dumps(ASKED), headers=headers)
    assert answer.status_code == 415
    assert not scripted.asked


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "nested"),
        (b'{"messages": NaN}', "NaN"),
        (b"\xff\xfe", "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "Unicode"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_bodies_that_are_none_are_refused(http: httpx2.Client, body: bytes, reason: str) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions", "/tokenize"):
        answer = http.post(path, content=body, headers=headers)
        assert answer.status_code == 400
        assert reason in answer.json()["error"]["message"]


def test_a_body_has_a_limit(scripted: ScriptedModel) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    with serving(scripted, max_body=1000) as url:
        headers = {"content-type": "application/json"}
        for body in (b" " * 1001, pieces()):
            answer = httpx2.post(f"{url}/v1/messages", content=body, headers=headers)
            assert answer.status_code == 413
            assert answer.json()["error"]["type"] == "request_too_large"
        assert httpx2.post(f"{url}/v1/messages", content=b" " * 1000, headers=headers).status_code == 400


def test_a_body_that_does_not_come_is_given_up(scripted: ScriptedModel) -> None:
    with serving(scripted, body_seconds=0.05) as url:
        host = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(host, timeout=20) as client:
            head = "POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_paths_and_methods_that_are_none_are_told_as_json(http: httpx2.Client) -> None:
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    wrong = http.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert "GET" in wrong.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("the queue is full"), 503, "overloaded"),
        (ContextLengthError("too long", 900, 512), 400, "context_length_exceeded"),
        (ContextLengthError("too long"), 400, "context_length_exceeded"),
        (ReadError("expert 3 has a wrong checksum"), 500, "read_error"),
        (EdgemoeError("the model is closed"), 500, "server_error"),
        (ZeroDivisionError("a secret"), 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_what_the_model_raises_is_a_status(
    scripted: ScriptedModel, patient_url: str, error: Exception, status: int, code: str, stream: bool, late: bool
) -> None:
    """late: not when the answer begins but when its first token is asked for."""

    def script(_: object) -> Iterator[object]:
        raise error
        yield

    if late:
        scripted.script = script
    else:
        scripted.refusal = error
    answer = httpx2.post(f"{patient_url}/v1/chat/completions", json={**ASKED, "stream": stream}, timeout=60)
    asked = {**ASKED, "max_tokens": 4, "stream": stream}
    anthropic = httpx2.post(f"{patient_url}/v1/messages", json=asked, timeout=60)
    assert answer.status_code == anthropic.status_code == status
    told = answer.json()["error"]
    assert told["code"] == code
    assert "secret" not in answer.text
    assert anthropic.json()["error"]["message"] == told["message"]
    assert (answer.headers.get("retry-after") is not None) == (status == 503)
    if isinstance(error, ContextLengthError) and error.context:
        for shape in (told, anthropic.json()["error"]):
            assert shape["n_prompt_tokens"] == 900
            assert shape["n_ctx"] == 512
            assert "context_length_exceeded" in shape["message"]


def test_what_happens_within_a_stream_is_its_last_event(scripted_http: httpx2.Client, scripted: ScriptedModel) -> None:
    def script(_: object) -> Iterator[object]:
        yield content("one")
        raise ReadError("expert 3 has a wrong checksum")

    scripted.script = script
    chat = scripted_http.post("/v1/chat/completions", json={**ASKED, "stream": True}).text
    messages = scripted_http.post("/v1/messages", json={**ASKED, "stream": True, "max_tokens": 4}).text
    responses = scripted_http.post("/v1/responses", json={"input": "Hi", "stream": True}).text
    last = json.loads(chat.split("data: ")[-2])
    assert last["error"]["code"] == "read_error"
    assert messages.split("event: ")[-1].startswith("error\n")
    assert "event: response.failed\n" in responses
    assert all(answer.closed.is_set() for answer in scripted.answers)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"])
def test_a_prompt_that_does_not_fit_says_so_with_numbers(
    http: httpx2.Client, bundled: edgemoe.Model, path: str
) -> None:
    text = "sea " * 1000
    messages = [{"role": "user", "content": text}]
    asked = {"messages": messages, "max_tokens": 5}
    answer = http.post(path, json={**asked, "prompt" if path == "/v1/completions" else "input": text})
    assert answer.status_code == 400
    told = answer.json()["error"]
    assert told["n_ctx"] == 512
    prompt = text if path == "/v1/completions" else bundled.tokenizer.apply_chat_template(messages)
    assert told["n_prompt_tokens"] == len(bundled.tokenizer.encode(prompt))
    assert "context_length_exceeded" in told["message"]
    # Tokens are counted all the same.
    counted = http.post("/v1/messages/count_tokens", json=asked).json()
    assert counted["input_tokens"] == len(bundled.tokenizer.encode(bundled.tokenizer.apply_chat_template(messages)))
