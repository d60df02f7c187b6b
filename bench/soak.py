"""Does the server stay whole under clients that come, go, break off and send rubbish?

    python -m bench.soak [--model MODEL] [--minutes 45] [--clients 50] [--memory SIZE] [--json FILE] [--markdown FILE]

A server (`edgemoe serve`, 4 sequences, a queue that is shorter than its clients are many, states on disk) is asked by
CLIENTS clients at once: streams and whole answers of every protocol, with common beginnings, grammars and tools; some
close their connection at any moment, some send bodies that are no requests. Every second the resident memory of the
server's process is read.

* No answer may be a status 500, no connection may be refused, in the end nothing may be running or waiting.
* The slope of the memory over time is a line by least squares through the medians of each minute after the first fifth
  of the time; its 95 % interval by the bootstrap of these minutes. It should have zero within, or be small.
* Some requests whose answers were taken at the beginning are asked again all the time: they must not have changed.
* In the end the server is killed (SIGKILL) under load and started again on the same states: the same answers must come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench._command import parser as command_line
from bench._command import publish
from bench._machine import machine, say

PATIENCE = 300.0
"""Seconds after which a request hangs."""
WORDS = ["the", "old", "man", "sea", "whale", "ship", "night", "and", "then", "looked", "at", "far", "away", "never"]
RUBBISH = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'{"messages": 5}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    b'{"messages": [{"role": "user"}], "max_tokens": -4}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": 7}}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b"\xff\xfe\x00" * 100,
    b'{"a":' * 5000,
]


class Server:
    """`edgemoe serve` in a process of its own."""

    def __init__(self, model: str | None, folder: Path, memory: str | None, threads: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "edgemoe", "serve", *([model] if model else []), "--port", str(port)]
        command += ["-np", "4", "--queue", "24", "-t", str(threads), "--prompt-cache-dir", str(folder / "states")]
        command += ["--prompt-cache-size", "200MB"]
        command += ["-M", memory] if memory else []
        self._log = (folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(self.url + "/health").status_code == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server does not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.2)

    def resident(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def status(self) -> dict[str, int]:
        return dict(httpx2.get(self.url + "/engine").json()["status"])


def body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request of any kind: its path and body."""
    begin = " ".join(WORDS[: rng.randrange(2, len(WORDS))]) * rng.choice((1, 1, 3, 30))
    text = begin + " " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 40)))
    options: dict[str, Any] = {"temperature": 1.2, "seed": rng.randrange(100), "stream": rng.random() < 0.6}
    length = rng.choice((1, 8, 40, 40, 120))
    kind = rng.randrange(5)
    messages = [{"role": "user", "content": text}]
    if kind == 0:
        return "/v1/completions", {"prompt": text, "max_tokens": length, **options}
    if kind == 1:
        return "/v1/messages", {"messages": messages, "max_tokens": length, **options}
    if kind == 2:
        return "/v1/responses", {"input": text, "max_output_tokens": length, **options}
    if kind == 3:
        options["response_format"] = {"type": "json_object"}
    return "/v1/chat/completions", {"messages": messages, "max_tokens": length, **options}


class Load:
    """Clients and what they have seen. known: requests and their right answers."""

    def __init__(self, url: str, known: Sequence[tuple[str, dict[str, Any], str]]) -> None:
        self._url = url
        self._known = known
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        self.end = 0.0

    async def run(self, clients: int, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx2.AsyncClient(base_url=self._url, timeout=PATIENCE, limits=limits) as http:
            await asyncio.gather(*(self._client(http, number) for number in range(clients)))

    async def _client(self, http: httpx2.AsyncClient, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < self.end:
            what = rng.random()
            try:
                if what < 0.1:
                    await self._rubbish(http, rng)
                elif what < 0.2:
                    await self._repeat(http, rng)
                else:
                    await self._ask(http, rng, leaves=what < 0.5)
            except httpx2.HTTPError as error:
                self._fault(f"{type(error).__name__}: {error}")
            await asyncio.sleep(rng.random() * 0.5)

    async def _rubbish(self, http: httpx2.AsyncClient, rng: random.Random) -> None:
        path = rng.choice(
            ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions", "/tokenize", "/x"]
        )
        kind = rng.choice(["application/json", "application/json", "text/plain"])
        answer = await http.post(path, content=rng.choice(RUBBISH), headers={"Content-Type": kind})
        self._status(answer.status_code, "rubbish")
        if answer.status_code < 400 and path not in ("/tokenize", "/v1/responses"):  # where every field may be missing
            self._fault(f"rubbish was answered with {answer.status_code}")

    async def _repeat(self, http: httpx2.AsyncClient, rng: random.Random) -> None:
        path, request, expected = rng.choice(self._known)
        answer = await http.post(path, json=request)
        self._status(answer.status_code, "repeated")
        if answer.status_code == 200 and text_of(answer.json()) != expected:
            self._fault("an answer has changed")

    async def _ask(self, http: httpx2.AsyncClient, rng: random.Random, leaves: bool) -> None:
        path, request = body(rng)
        if not leaves:
            answer = await http.post(path, json=request)
            self._status(answer.status_code, "read")
            return
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(self._read_some(http, path, request, rng), rng.random() * 3)
        self.seen["left"] += 1

    async def _read_some(
        self, http: httpx2.AsyncClient, path: str, request: dict[str, Any], rng: random.Random
    ) -> None:
        async with http.stream("POST", path, json=request) as answer:
            async for _ in answer.aiter_bytes():
                if rng.random() < 0.1:
                    return

    def _status(self, status: int, what: str) -> None:
        self.seen[f"{what} {status}"] += 1
        if status == 500 or (status > 500 and status != 503):
            self._fault(f"{what}: status {status}")

    def _fault(self, text: str) -> None:
        self.seen["faults"] += 1
        if len(self.faults) < 20:
            self.faults.append(text)


def text_of(answer: dict[str, Any]) -> str:
    return json.dumps(answer["choices"])


def known_answers(url: str) -> list[tuple[str, dict[str, Any], str]]:
    """Requests that are always answered the same way."""
    rng, made = random.Random(0), []
    for number in range(6):
        text = " ".join(WORDS) * 30 + " ".join(rng.choices(WORDS, k=30 * number + 5))
        request = {"prompt": text, "max_tokens": 24, "temperature": 0.9, "seed": number}
        answer = httpx2.post(url + "/v1/completions", json=request, timeout=PATIENCE)
        answer.raise_for_status()
        made.append(("/v1/completions", request, text_of(answer.json())))
    return made


def slope(samples: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """Bytes per hour and their 95 % interval."""
    begin = samples[0][0] + 0.2 * (samples[-1][0] - samples[0][0])
    minutes: dict[int, list[int]] = {}
    for at, size in samples:
        if at >= begin:
            minutes.setdefault(int((at - begin) // 60), []).append(size)
    points = np.array([(minute / 60, statistics.median(sizes)) for minute, sizes in minutes.items()])
    if len(points) < 3:
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(0)
    slopes = []
    for _ in range(2000):
        chosen = points[rng.integers(0, len(points), len(points))]
        if len(set(chosen[:, 0])) > 1:
            slopes.append(np.polyfit(chosen[:, 0], chosen[:, 1], 1)[0])
    low, high = np.percentile(slopes, [2.5, 97.5])
    return float(np.polyfit(points[:, 0], points[:, 1], 1)[0]), float(low), float(high)


async def sampled(server: Server, load: Load, clients: int, seconds: float) -> list[tuple[float, int]]:
    samples: list[tuple[float, int]] = []

    async def sample() -> None:
        while True:
            samples.append((time.monotonic(), server.resident()))
            if len(samples) % 60 == 0:
                say(f"{len(samples)} s: {samples[-1][1] / 1e6:.0f} MB, {dict(load.seen)}")
            await asyncio.sleep(1)

    sampler = asyncio.create_task(sample())
    try:
        await load.run(clients, seconds)
    finally:
        sampler.cancel()
    return samples


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = command_line("soak", __doc__)
    options.add_argument("--model", help="default: the bundled one")
    options.add_argument("--minutes", type=float, default=45.0)
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--memory", help="of the server, as `edgemoe serve -M`")
    chosen = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(chosen.model, folder, chosen.memory, chosen.threads)
        try:
            known = known_answers(server.url)
            load = Load(server.url, known)
            samples = asyncio.run(sampled(server, load, chosen.clients, 60 * chosen.minutes))
            deadline = time.monotonic() + 60
            while (left := server.status())["running"] + left["waiting"] and time.monotonic() < deadline:
                time.sleep(0.5)
            # Killed while it works, and started again on what it has written.
            under = Load(server.url, known)
            with contextlib.suppress(Exception):
                killer = asyncio.run(_killed(server, under))
                say(f"killed after {killer:.1f} s")
            server.process.wait()
            server = Server(chosen.model, folder, chosen.memory, chosen.threads)
            again = [
                text_of(httpx2.post(server.url + path, json=request, timeout=PATIENCE).json())
                for path, request, _ in known
            ]
            right = sum(text == expected for text, (_, _, expected) in zip(again, known, strict=True))
            reused = httpx2.get(server.url + "/metrics").text
        finally:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        errors = [line for line in (folder / "log").read_text(errors="replace").splitlines() if "Traceback" in line]
    found, low, high = slope(samples)
    results = {
        "machine": machine(),
        "minutes": chosen.minutes,
        "clients": chosen.clients,
        "seen": dict(load.seen),
        "faults": load.faults,
        "tracebacks": len(errors),
        "left_running": left["running"],
        "left_waiting": left["waiting"],
        "right_after_kill": [right, len(known)],
        "resident": [samples[0][1], samples[-1][1], max(size for _, size in samples)],
        "slope_mb_per_hour": [found / 1e6, low / 1e6, high / 1e6],
        "metrics": reused[:20000],
    }
    lines = [
        "# A server under load",
        "",
        f"{machine()['date']}, {machine()['processor']}, {machine()['processors']} processors. `python -m bench.soak "
        f"--minutes {chosen.minutes:g} --clients {chosen.clients}`; its first lines say what is done.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(load.seen.items())),
        f"| still running, waiting | {left['running']}, {left['waiting']} |",
        f"| tracebacks in the log | {len(errors)} |",
        f"| right answers after SIGKILL and restart | {right} of {len(known)} |",
        f"| resident memory: first, last, most | {', '.join(f'{size / 1e6:.0f} MB' for size in results['resident'])} |",
        f"| its slope, per hour | {found / 1e6:.1f} MB ({low / 1e6:.1f} to {high / 1e6:.1f}) |",
        "",
        *(f"- {fault}" for fault in load.faults),
    ]
    publish(chosen, "\n".join(lines), results)
    if load.faults or left["running"] or left["waiting"] or right < len(known) or errors:
        sys.exit(1)


async def _killed(server: Server, load: Load) -> float:
    """Seconds after which the server was killed, while clients asked it."""
    begin = time.monotonic()
    work = asyncio.create_task(load.run(20, 30))
    await asyncio.sleep(5)
    os.kill(server.process.pid, signal.SIGKILL)
    seconds = time.monotonic() - begin
    load.end = 0.0
    await asyncio.wait([work], timeout=30)
    work.cancel()
    return seconds


if __name__ == "__main__":
    main()
