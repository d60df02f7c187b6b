"""Requests at random times, of random lengths and kinds, some broken off: each that ends has the tokens that it has
alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgemoe
from edgemoe.convert import convert
from edgemoe.errors import OverloadedError

GRAMMAR = 'root ::= ("the " | "fox " | "a" | "b")+'


@pytest.fixture
def pack(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tiny_qwen3_moe(num_experts=16, num_experts_per_tok=3, num_hidden_layers=3, max_position_embeddings=2048)
    convert(folder, tmp_path / "tiny.emoe", 8)
    return tmp_path / "tiny.emoe"


def requests(count: int, seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    rng = random.Random(seed)
    begins = [rng.choices(range(1, 320), k=length) for length in (5, 80, 200)]
    made = []
    for number in range(count):
        prompt = rng.choice(begins)[: rng.randrange(3, 200)] + rng.choices(range(1, 320), k=rng.randrange(1, 120))
        options: dict[str, Any] = {
            "max_tokens": rng.randrange(1, 60),
            "seed": number,
            "temperature": rng.choice((0, 1.2)),
        }
        if rng.random() < 0.2:
            options["grammar"] = GRAMMAR
        elif rng.random() < 0.2:
            options["stop"] = ["e", " t"]
        else:
            options["ignore_eos"] = True
        made.append((prompt, options))
    return made


def together(model: edgemoe.Model, made: list[tuple[list[int], dict[str, Any]]], seed: int) -> list[Any]:
    """What came of each: its tokens and why it ended, or None where its reader left."""

    async def request(number: int) -> Any:
        rng = random.Random(1000 * seed + number)
        prompt, options = made[number]
        await asyncio.sleep(rng.random() * 0.02 * len(made) ** 0.5)
        generation = model.generate(prompt, **options)
        leaves = rng.random() < 0.25
        count = 0
        async for _ in generation:
            count += 1
            if leaves and rng.random() < 0.2:
                if rng.random() < 0.5:
                    generation.close()
                return None
            if rng.random() < 0.02:
                await asyncio.sleep(rng.random() * 0.05)
        return generation.result.tokens, generation.result.finish_reason

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(request(number) for number in range(len(made))))

    return asyncio.run(asyncio.wait_for(all_of_them(), 300))


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_every_answer_is_the_one_alone(pack: Path, count: int) -> None:
    made = requests(count, count)
    with edgemoe.load(pack, threads=1, parallel=1) as model:
        alone = []
        for prompt, options in made:
            generation = model.generate(prompt, **options)
            list(generation)
            alone.append((generation.result.tokens, generation.result.finish_reason))
    # Everything in memory; a quarter of the experts, a full pool and small chunks; few sequences.
    for seed, options in enumerate(
        [
            {"threads": 2, "parallel": 8},
            {"threads": 1, "parallel": 6, "expert_slots": 12, "context": 448, "chunk": 48, "max_gap": 0.1},
            {"threads": 1, "parallel": 2, "expert_slots": 12},
        ]
    ):
        with edgemoe.load(pack, queue=count, **options) as model:
            found = together(model, made, seed)
            assert sum(one is not None for one in found) > count // 2
            for number, one in enumerate(found):
                assert one is None or one == alone[number], (options, number)


def test_the_queue_is_bounded(pack: Path) -> None:
    with edgemoe.load(pack, threads=1, parallel=1, queue=2) as model:

        async def many() -> list[str]:
            async def one(number: int) -> str:
                await asyncio.sleep(0.001 * number)
                try:
                    generation = model.generate([1, 2, number], max_tokens=300, ignore_eos=True)
                    async for _ in generation:
                        pass
                    return generation.result.finish_reason
                except OverloadedError:
                    return "overloaded"

            return await asyncio.gather(*(one(number) for number in range(8)))

        found = asyncio.run(many())
        assert set(found) == {"length", "overloaded"} and found.count("length") >= 3
        assert model.status()["waiting"] == 0
