"""Generations that share a model: on any thread, in any order, left at any point."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe.convert import convert
from edgemoe.serving import scheduler

PROMPTS = ["The quick", "Pack my box with", "0123", "jugs", "The quick brown fox jumps"]
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def model(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> Iterator[edgemoe.Model]:
    convert(tiny_qwen3_moe(), tmp_path / "tiny.emoe", 8)
    with edgemoe.load(tmp_path / "tiny.emoe", threads=1) as opened:
        yield opened


@pytest.fixture
def expected(model: edgemoe.Model) -> dict[str, str]:
    return {prompt: "".join(model.generate(prompt, **GREEDY)) for prompt in PROMPTS}


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns, on a thread of its own; fails where it takes longer."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits"
    assert results, "it failed"
    return results[0]


def test_streaming_from_a_pool_of_threads(model: edgemoe.Model, expected: dict[str, str]) -> None:
    async def client(prompt: str) -> str:
        pieces, generation = [], model.generate(prompt, **GREEDY)
        while (piece := await asyncio.to_thread(next, generation, None)) is not None:
            pieces.append(piece)
        assert generation.result.text == "".join(pieces)
        return generation.result.text

    async def clients() -> list[str]:
        return await asyncio.gather(*(client(prompt) for prompt in PROMPTS))

    assert within(60, lambda: asyncio.run(clients())) == list(expected.values())


def test_one_thread_each(model: edgemoe.Model, expected: dict[str, str]) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        texts = pool.map(lambda prompt: "".join(model.generate(prompt, **GREEDY)), PROMPTS)
        assert list(texts) == list(expected.values())


def test_any_order_of_steps_gives_the_same_texts(model: edgemoe.Model, expected: dict[str, str]) -> None:
    order = random.Random(1)
    generations = {prompt: model.generate(prompt, **GREEDY) for prompt in PROMPTS[:3]}
    running = dict(generations)
    while running:
        prompt = order.choice(list(running))
        for _ in range(order.randrange(1, 4)):
            if next(running[prompt], None) is None:
                del running[prompt]
                break
    assert {prompt: generation.result.text for prompt, generation in generations.items()} == {
        prompt: expected[prompt] for prompt in generations
    }


def test_a_generation_that_is_not_read_on_keeps_nobody_waiting(model: edgemoe.Model, expected: dict[str, str]) -> None:
    half = model.generate(PROMPTS[0], **GREEDY)
    text = within(30, lambda: next(half))
    assert within(30, lambda: "".join(model.generate(PROMPTS[1], **GREEDY))) == expected[PROMPTS[1]]
    assert text + within(30, lambda: "".join(half)) == expected[PROMPTS[0]]


def test_close_waits_for_no_generation(model: edgemoe.Model) -> None:
    half, new = model.generate(PROMPTS[0], **GREEDY), model.generate(PROMPTS[1], **GREEDY)
    within(30, lambda: next(half))
    within(30, lambda: model.close() is None)
    for generation in (half, new, half):
        with pytest.raises(edgemoe.EdgemoeError, match="the model is closed"):
            next(generation)


def test_close_ends_a_pass_that_is_under_way(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    convert(tiny_qwen3_moe(num_hidden_layers=8, max_position_embeddings=30_000), tmp_path / "deep.emoe", 8)
    model = edgemoe.load(tmp_path / "deep.emoe", threads=1, context=30_000)
    begun, failures = threading.Event(), []

    def read() -> None:
        generation = model.generate([1] * 29_000, **GREEDY)
        begun.set()
        try:
            next(generation)
        except edgemoe.EdgemoeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    begun.wait()
    time.sleep(0.2)
    model.close()  # long before the prompt could have been computed
    thread.join(10)
    assert failures == ["the model is closed"]


def test_a_generation_ends_when_it_is_told(model: edgemoe.Model, expected: dict[str, str]) -> None:
    generation = model.generate(PROMPTS[0], **GREEDY)
    text = next(generation)
    generation.stop()
    assert text + "".join(generation) == generation.result.text
    assert expected[PROMPTS[0]].startswith(generation.result.text)
    assert generation.result.finish_reason == "cancelled"
    for begun in (True, False):
        with model.generate(PROMPTS[0], **GREEDY) as generation:
            if begun:
                next(generation)
        generation.close()
        assert list(generation) == [] and generation.result.finish_reason == "cancelled"
    finished = model.generate(PROMPTS[0], **GREEDY)
    assert "".join(finished) == expected[PROMPTS[0]]
    finished.close()
    assert finished.result.finish_reason == "length"


def test_stop_ends_a_long_prompt_on_another_thread(model: edgemoe.Model, expected: dict[str, str]) -> None:
    for _ in range(20):
        generation = model.generate([7] * 500, **GREEDY)
        thread = threading.Thread(target=list, args=(generation,))
        thread.start()
        generation.close()
        thread.join(30)
        assert not thread.is_alive() and generation.result.finish_reason in ("cancelled", "length")
    assert "".join(model.generate(PROMPTS[0], **GREEDY)) == expected[PROMPTS[0]]


@pytest.mark.slow
def test_two_threads_in_one_generation_are_refused(model: edgemoe.Model) -> None:
    generation = model.generate([7] * 400, max_tokens=100, temperature=0, ignore_eos=True)
    failures: list[Exception] = []

    def read() -> None:
        with contextlib.suppress(StopIteration):
            while True:
                try:
                    next(generation)
                except edgemoe.EdgemoeError as error:
                    failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures and all("another thread" in str(error) for error in failures)
    alone = "".join(model.generate([7] * 400, max_tokens=100, temperature=0, ignore_eos=True))
    assert generation.result.text == alone


@pytest.mark.slow
def test_generations_may_be_dropped_anywhere(model: edgemoe.Model, expected: dict[str, str]) -> None:
    """By the garbage collector, an error in the reader, on other threads, while others run."""
    stop = threading.Event()

    def drop(seed: int) -> int:
        order, dropped = random.Random(seed), 0
        while not stop.is_set():
            generation: Any = model.generate(order.choice(PROMPTS), **GREEDY)
            for _ in range(order.randrange(4)):
                next(generation)
            kind = order.randrange(4)
            if kind == 0:
                cycle: list[Any] = [generation]
                cycle.append(cycle)
                del cycle
            elif kind == 1:
                with contextlib.suppress(ZeroDivisionError):
                    for _ in generation:
                        raise ZeroDivisionError
            elif kind == 2:
                wrapped = (piece for piece in generation)
                next(wrapped)
                wrapped.close()
            del generation
            if order.randrange(8) == 0:
                gc.collect()
            dropped += 1
        return dropped

    with ThreadPoolExecutor(4) as pool:
        droppers = [pool.submit(drop, seed) for seed in range(3)]
        try:
            for prompt in PROMPTS * 2:
                text = pool.submit(lambda prompt=prompt: "".join(model.generate(prompt, **GREEDY))).result(60)
                assert text == expected[prompt]
        finally:
            stop.set()
        assert all(dropper.result(60) > 0 for dropper in droppers)


def test_results_are_of_their_own_generation(model: edgemoe.Model, expected: dict[str, str]) -> None:
    time.sleep(2 * scheduler.PAUSE)  # so that none is drawn ahead beside the other: their passes are their own
    before = model.engine.counters()
    first = model.generate(PROMPTS[0], **GREEDY)
    second = model.generate(PROMPTS[1], stop=expected[PROMPTS[1]][2:4], **GREEDY)
    assert first.result.finish_reason == "" and first.result.ttft_seconds is None
    next(first)
    assert model.last_stop_reason == "" and model.stats()["generated_tokens"] == first.result.generated_tokens
    time.sleep(2 * scheduler.PAUSE)
    list(second)
    assert model.last_stop_reason == "stop" and model.stats()["generated_tokens"] == second.result.generated_tokens
    assert first.result.finish_reason == "" and first.result.generated_tokens < 12
    list(first)
    results = (first.result, second.result)
    assert [result.finish_reason for result in results] == ["length", "stop"]
    assert results[0].generated_tokens == 12 > results[1].generated_tokens > 0
    counters = [*(result.counters for result in results), model.engine.counters() - before]
    for name in ("tokens", "experts_requested", "experts_hit"):
        one, other, both = (getattr(found, name) for found in counters)
        assert one > 0 < other and one + other == both
    assert results[0].computed_tokens == results[0].counters.tokens
    assert results[0].computed_tokens == results[0].computed_prompt_tokens + 11
    assert model.last_stop_reason == "length" and model.stats()["prompt_tokens"] == results[0].prompt_tokens


@pytest.mark.parametrize(
    "prompt",
    [
        b"Hi",
        bytearray(b"Hi"),
        memoryview(b"Hi"),
        array.array("f", [1.0]),
        np.array([1.0, 2.0]),
        np.array([True, False]),
        np.array([[1, 2]]),
        [True, 2],
        [1.0],
        ["The"],
        [None],
        {1: 2},
        {1, 2},
        None,
        7,
    ],
)
def test_what_is_no_token_ids_is_refused(model: edgemoe.Model, prompt: Any) -> None:
    with pytest.raises(edgemoe.OptionError, match="token id"):
        model.generate(prompt)
    with pytest.raises(edgemoe.OptionError, match="token id"):
        model.logits(prompt)
    with pytest.raises(edgemoe.OptionError, match="token id"):
        model.forward(prompt, [0], [0], [0])


@pytest.mark.parametrize(
    "prompt",
    [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.uint16), array.array("i", [1, 2, 3]), range(1, 4), iter([1, 2, 3])],
)
def test_token_ids_come_in_many_shapes(model: edgemoe.Model, prompt: Any) -> None:
    assert "".join(model.generate(prompt, **GREEDY)) == "".join(model.generate([1, 2, 3], **GREEDY))


@pytest.mark.parametrize("prompt", [[320], [-1], np.array([1, 2**40])])
def test_tokens_outside_the_vocabulary_are_refused_at_once(model: edgemoe.Model, prompt: Any) -> None:
    with pytest.raises(edgemoe.OptionError, match="vocabulary of 320"):
        model.generate(prompt)


@pytest.mark.parametrize("stop", [b"x", [b"x"], 5, ["x", None], [""]])
def test_wrong_stop_strings_are_refused(model: edgemoe.Model, stop: Any) -> None:
    with pytest.raises(edgemoe.OptionError, match="stop"):
        model.generate("The", stop=stop)


def test_all_texts_end_when_the_model_is_told(model: edgemoe.Model, expected: dict[str, str]) -> None:
    running = [model.generate(prompt, ignore_eos=True) for prompt in PROMPTS[:3]]
    pieces = [next(generation) for generation in running]
    assert repr(model).endswith("3 of 4 texts running, 0 waiting>") and "tiny.emoe (qwen3_moe)" in repr(model)
    assert "running>" in repr(running[0])
    model.stop()
    for piece, generation in zip(pieces, running, strict=True):
        assert piece + "".join(generation) == generation.result.text
        assert generation.result.finish_reason == "cancelled"
    assert "".join(model.generate(PROMPTS[0], **GREEDY)) == expected[PROMPTS[0]]
    model.close()
    assert repr(model) == "<edgemoe.Model tiny.emoe, closed>"
