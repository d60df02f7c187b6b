"""Five clients at once, of the kinds that servers have, for a while: every text that comes to its end is the one that
comes alone, and nothing hangs."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import edgemoe
from edgemoe.convert import convert

CLIENTS = 5
PATIENCE = 120  # seconds after which something hangs

Text = Callable[[int], str]


class Requests:
    """Prompts with common beginnings, and what a model says to each when it is alone."""

    def __init__(self, path: Path) -> None:
        rng = random.Random(3)
        begin = [rng.randrange(1, 320) for _ in range(60)]
        self.prompts = [
            [*begin[: rng.randrange(1, 60)], *(rng.randrange(1, 320) for _ in range(rng.randrange(1, 90)))]
            for _ in range(24)
        ]
        with edgemoe.load(path, threads=1) as model:
            self.texts = ["".join(self.start(model, number)) for number in range(len(self.prompts))]

    def start(self, model: edgemoe.Model, number: int) -> Any:
        options: dict[str, Any] = {"max_tokens": 3 + number, "seed": number, "temperature": 1.3, "ignore_eos": True}
        return model.generate(self.prompts[number], **options)


class Clients:
    """What clients do until the time is over: most read to the end, some leave. done: texts read to their end."""

    def __init__(self, model: edgemoe.Model, requests: Requests, seconds: float) -> None:
        self.model = model
        self.requests = requests
        self.end = time.monotonic() + seconds
        self.done = 0

    def pick(self, order: random.Random) -> tuple[int, Any, str]:
        number = order.randrange(len(self.requests.prompts))
        how = order.choice(["read"] * 5 + ["stop", "close", "drop", "pause"])
        return number, self.requests.start(self.model, number), how

    def check(self, number: int, text: str) -> None:
        assert text == self.requests.texts[number]
        self.done += 1

    def on_a_thread(self, seed: int) -> None:
        order = random.Random(seed)
        while time.monotonic() < self.end:
            number, generation, how = self.pick(order)
            pieces = []
            for piece in generation:
                pieces.append(piece)
                if how != "read" and order.randrange(4) == 0:
                    if how == "stop":
                        generation.stop()
                    elif how == "close":
                        threading.Thread(target=generation.close).start()
                    elif how == "pause":
                        time.sleep(order.random() * 0.05)
                    else:
                        break
            text = "".join(pieces)
            if how in ("read", "pause"):
                self.check(number, text)
            else:
                assert self.requests.texts[number].startswith(text.rstrip("\ufffd"))

    async def on_a_loop(self, seed: int) -> None:
        order = random.Random(seed)
        while time.monotonic() < self.end:
            number, generation, how = self.pick(order)
            pieces: list[str] = []
            if how == "close":  # as a server does whose client has gone
                try:
                    await asyncio.wait_for(asyncio.to_thread(list, generation), order.random() * 0.05)
                except asyncio.TimeoutError:
                    generation.close()
                continue
            while (piece := await asyncio.to_thread(next, generation, None)) is not None:
                pieces.append(piece)
                if how in ("stop", "drop") and order.randrange(4) == 0:
                    break
            else:
                self.check(number, "".join(pieces))

    def run(self) -> None:
        async def loop() -> None:
            await asyncio.gather(*(self.on_a_loop(100 + seed) for seed in range(CLIENTS)))

        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            work = [pool.submit(self.on_a_thread, seed) for seed in range(CLIENTS)]
            work.append(pool.submit(lambda: asyncio.run(loop())))
            for future in work:
                future.result(max(self.end - time.monotonic(), 0) + PATIENCE)
        assert self.done


@pytest.fixture
def pack(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    convert(tiny_qwen3_moe(num_experts=16, num_hidden_layers=3), tmp_path / "tiny.emoe", 8)
    yield tmp_path / "tiny.emoe"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 3])
def test_five_clients_on_threads_and_five_on_a_loop(pack: Path, parallel: int) -> None:
    requests = Requests(pack)
    with edgemoe.load(pack, threads=2, parallel=parallel) as model:
        Clients(model, requests, 1.5).run()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 3])
def test_the_same_for_a_minute(pack: Path, parallel: int) -> None:
    requests = Requests(pack)
    with edgemoe.load(pack, threads=2, parallel=parallel) as model:
        Clients(model, requests, 60).run()
        assert "".join(requests.start(model, 0)) == requests.texts[0]
