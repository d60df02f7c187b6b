"""Whoever else is served, and whenever: a generation's tokens are those that it draws alone. With every kind of state,
on too few sequences and on enough."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import slow_except

import edgemoe
from edgemoe.convert import convert
from edgemoe.profiling.trace import read_trace

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

import mixer_table
from family_table import CASES as FAMILY_CASES
from family_table import VOCABULARY, write_folder

CASES = {**FAMILY_CASES, **mixer_table.CASES}
# Keys and values of all positions, of a window, latents, a recurrence, a convolution.
KINDS = ("olmoe", "gpt_oss", "mixtral, with a window", "deepseek_v3", "qwen3_next", "lfm2_moe")
SAMPLING: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.5, "top_k": 0, "seed": 7}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def pack(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("kind")
            write_folder(folder / "hf", CASES[name])
            convert(folder / "hf", folder / "model.emoe", 8)
            made[name] = folder / "model.emoe"
        return made[name]

    return pack


def prompts() -> list[list[int]]:
    """Some with a common beginning, one that is the beginning of another, one longer than windows and chunks."""
    numbers = np.random.default_rng(2).integers(1, VOCABULARY, 400).tolist()
    return [numbers[:70], [*numbers[:50], *numbers[100:120]], numbers[:30], numbers[150:330], numbers[390:]]


def load(path: Path, **options: Any) -> edgemoe.Model:
    return edgemoe.load(path, memory="2GB", context=256, threads=1, **options)


@pytest.mark.parametrize("name", slow_except(KINDS, "gpt_oss", "qwen3_next"))
def test_tokens_do_not_depend_on_others(packs: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    with load(packs(name)) as model:
        alone = []
        for prompt in prompts():
            model.logits(prompt[:1])
            generation = model.generate(prompt, **SAMPLING)
            list(generation)
            alone.append(generation.result.tokens)
    assert len(set(alone)) == len(alone)
    for parallel in (1, 2, 4):
        with load(packs(name), parallel=parallel) as model, model.trace(tmp_path / "trace"):
            order = random.Random(parallel)
            running = {number: model.generate(prompt, **SAMPLING) for number, prompt in enumerate(prompts())}
            finished, computed, other = {}, 0, 0
            saved = model.snapshot()
            while running:
                number = order.choice(list(running))
                for _ in range(order.randrange(1, 9)):
                    if next(running[number], None) is None:
                        finished[number] = running.pop(number).result
                        break
                event = order.randrange(12)
                if event == 0:
                    saved = model.snapshot()
                elif event == 1:
                    model.restore(saved)
                elif event == 2:
                    other += len(model.logits(prompts()[2]))
                elif event == 3:
                    dropped = model.generate(prompts()[order.randrange(5)], **SAMPLING)
                    next(dropped)
                    computed += dropped.result.computed_tokens
        assert [finished[number].tokens for number in range(len(alone))] == alone
        computed += sum(result.computed_tokens for result in finished.values())
        assert read_trace(tmp_path / "trace").tokens == computed + other


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("name", ["olmoe", "qwen3_next", "gpt_oss"])
def test_a_read_error_ends_the_generation_that_met_it(packs: Callable[[str], Path], name: str, parallel: int) -> None:
    path = packs(name)
    with load(path) as model:
        alone = ["".join(model.generate(prompt, **SAMPLING)) for prompt in prompts()[:3]]

    with load(path, parallel=parallel, expert_slots=4, prefetch=False) as model:
        running = [model.generate(prompt, **SAMPLING) for prompt in prompts()[:3]]
        for generation in running:
            next(generation)
        links = {int(link.name): os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
        descriptor = next(number for number, target in links.items() if target == str(path.resolve()))
        saved, directory = os.dup(descriptor), os.open(path.parent, os.O_RDONLY)
        os.dup2(directory, descriptor)  # reading a directory fails
        try:
            with pytest.raises(edgemoe.ReadError):
                list(running[1])
        finally:
            os.dup2(saved, descriptor)
            os.close(saved)
            os.close(directory)
        assert running[1].result.finish_reason == "error" and list(running[1]) == []
        for number in (0, 2):
            list(running[number])
            assert running[number].result.text == alone[number]
        assert "".join(model.generate(prompts()[1], **SAMPLING)) == alone[1]
