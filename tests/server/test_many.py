"""Many clients at once."""

from __future__ import annotations

import contextlib
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
from scripted import serving, wait_for
from test_disconnect import PATHS, send

import edgemoe
from edgemoe.text.named_templates import NAMED_TEMPLATES

WORDS = ("the sea", "a whale", "an old man", "the night")


def request(number: int) -> dict[str, Any]:
    """A completion like no other, but for the beginnings that some share."""
    draw = random.Random(number)
    prompt = " ".join(draw.choices(WORDS, k=draw.randrange(1, 12)))
    return {"prompt": prompt, "max_tokens": draw.randrange(1, 20), "seed": number, "temperature": 1.2}


def test_everybody_gets_the_answer_that_they_get_alone(http: httpx2.Client) -> None:
    def ask(number: int) -> str:
        text: str = http.post("/v1/completions", json=request(number)).json()["choices"][0]["text"]
        return text

    def leave(number: int) -> str:
        """Asks for something long, and is gone."""
        client: socket.socket
        path = list(PATHS)[number % len(PATHS)]
        with send(str(http.base_url).rstrip("/"), path, {**PATHS[path], "stream": number % 3 == 0}) as client:
            client.settimeout(0.02 * (number % 5) + 0.001)
            with contextlib.suppress(TimeoutError):
                client.recv(100)
        return ""

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(24) as threads:
        left = [threads.submit(leave, number) for number in range(12)]
        together = list(threads.map(ask, range(12)))
        for future in left:
            future.result()
    assert together == alone
    wait_for(lambda: http.get("/engine").json()["status"]["answers"] == 0)
    status = http.get("/engine").json()["status"]
    assert status["running"] == status["waiting"] == 0


def test_a_full_queue_is_told_with_a_time_to_come_again() -> None:
    asked = {**PATHS["/v1/completions"], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with edgemoe.load(context=0, parallel=1, queue=0) as model, serving(model, prompt_seconds=0) as url:
        model.tokenizer.use_chat_template(NAMED_TEMPLATES["chatml"])
        with send(url, "/v1/completions", asked) as first:
            wait_for(lambda: model.status()["running"] == 1)
            with send(url, "/v1/completions", asked) as second:
                wait_for(lambda: model.status()["waiting"] == 1)
                for path, body in PATHS.items():
                    answer = httpx2.post(f"{url}{path}", json=body, timeout=60)
                    assert answer.status_code == 503
                    assert int(answer.headers["retry-after"]) > 0
                assert first.recv(12) == second.recv(12) == b"HTTP/1.1 200"
        wait_for(lambda: model.status()["waiting"] == model.status()["running"] == 0)
        assert httpx2.post(f"{url}/v1/completions", json=PATHS["/v1/completions"], timeout=60).status_code == 200
