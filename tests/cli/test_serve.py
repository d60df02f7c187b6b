"""The command: what it refuses before a model is loaded, what it says, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner, Result

from edgemoe.cli import main


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["serve", *arguments])


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """(the process, its URL, what it has said) of a server of the bundled model on a free port."""
    command = [sys.executable, "-m", "edgemoe", "serve", "--port", "0", "-c", "512", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("listening at "):
                break
        yield process, said[-1].split()[-1], said
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_the_answers_and_the_process(number: signal.Signals, status: int) -> None:
    with served("--api-key", "k", "-np", "2") as (process, url, said):
        text = "".join(said)
        for word in ("mini-qwen3moe", "512 tokens", "2 in parallel"):
            assert word in text
        asked = {"prompt": "The sea", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx2.stream(
            "POST", f"{url}/v1/completions", json=asked, headers={"x-api-key": "k"}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert rest[-1]["error"]["code"] == "shutting_down"
        assert process.wait(30) == status


def test_a_port_that_is_taken_is_an_error_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = invoke("no-such-model.emoe", "--port", str(port))
    assert result.exit_code == 1
    assert f"127.0.0.1:{port}" in result.stderr
    assert "--port" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("host", "url"), [("localhost", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_addresses_of_both_kinds(host: str, url: str) -> None:
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with served("--host", host) as (_, address, _):
        assert address.startswith(url)
        assert httpx2.get(f"{address}/health", timeout=60).status_code == 200
        # The size of requests follows the context's.
        for size, status in ((4 << 20, 200), (5 << 20, 413)):
            asked = {"content": "a", "ignored": "x" * size}
            assert httpx2.post(f"{address}/tokenize", json=asked, timeout=60).status_code == status


def test_a_host_that_is_none_is_an_error() -> None:
    result = invoke("--host", "no.such.host.invalid", "--port", "0")
    assert result.exit_code == 1
    assert "no.such.host.invalid" in result.stderr


def test_an_open_address_without_a_key_is_warned_about() -> None:
    result = invoke("no-such-model.emoe", "--host", "0.0.0.0", "--port", "0")
    assert "warning: 0.0.0.0" in result.stderr
    assert "warning" not in invoke("no-such-model.emoe", "--host", "0.0.0.0", "--port", "0", "--api-key", "k").stderr
    assert "warning" not in invoke("no-such-model.emoe", "--port", "0").stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--api-key", " "], "API key"),
        (["--api-key", "schlüssel"], "API key"),
        (["-m", "a.emoe", "b.emoe"], "more than one model"),
        (["a.emoe", "b.emoe"], "more than one model"),
        (["--chat-template", "nonsense"], "--chat-template"),
        (["--port", "70000"], "--port"),
        (["-n", "-2"], "-2"),
    ],
)
def test_wrong_options_are_usage_errors(arguments: list[str], reason: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n\n")
    result = invoke("--api-key-file", str(tmp_path / "keys"))
    assert result.exit_code == 2
    assert "has no key" in result.stderr


def test_what_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("edgemoe.server", "starlette", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    result = invoke()
    assert result.exit_code == 2
    assert "pip install 'edgemoe[server]'" in result.stderr
