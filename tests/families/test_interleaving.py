"""Whoever else is served, and whenever: a generation's tokens are those that it draws alone. With every kind of state,
on too few sequences and on enough."""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import slow_except
from numpy.typing import NDArray

import edgemoe
from edgemoe.engine import Engine
from edgemoe.errors import StateError
from edgemoe.formats.pack import Pack
from edgemoe.formats.read import read_index
from edgemoe.profiling.trace import read_trace

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

import mixer_table
from family_table import CASES as FAMILY_CASES
from family_table import VOCABULARY, pack_maker

CASES = {**FAMILY_CASES, **mixer_table.CASES}
# Keys and values of all positions, of a window, latents, a recurrence, a convolution.
KINDS = ("olmoe", "gpt_oss", "mixtral, with a window", "deepseek_v3", "qwen3_next", "lfm2_moe")
SAMPLING: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.5, "top_k": 0, "seed": 7}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return pack_maker(CASES, 8, tmp_path_factory)


def prompts() -> list[list[int]]:
    """Some with a common beginning, one that is the beginning of another, one longer than windows and chunks."""
    numbers = np.random.default_rng(2).integers(1, VOCABULARY, 400).tolist()
    return [numbers[:70], [*numbers[:50], *numbers[100:120]], numbers[:30], numbers[150:330], numbers[390:]]


def load(path: Path, **options: Any) -> edgemoe.Model:
    return edgemoe.load(path, context=256, threads=1, **options)


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
                    del dropped  # otherwise it may be drawn ahead
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


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("state", slow_except(["f32", "f16", "q8_0"], "f16"))
def test_forked_sequences_are_as_if_alone(packs: Callable[[str], Path], name: str, state: str) -> None:
    """Sequences that fork, grow in common passes, go back and end, in a pool without room for all of them."""
    options = {"cache_type_k": state, "cache_type_v": state}
    try:
        loaded = load(packs(name), **options)
    except edgemoe.OptionError as error:
        pytest.skip(str(error))  # heads that are no multiple of 32
    with loaded as model:
        some = replace(model.options, sequences=4, positions=256, chunk=48, threads=2)
        engine, alone = Engine(read_index(model.path), some), model.engine
        random = np.random.default_rng(4)
        texts: dict[int, list[int]] = {0: []}
        room, seen = engine.free_positions(), {"full": 0, "forks": 0, "refused": 0}

        def check(logits: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
            for id in set(ids.tolist()):
                tokens, count = texts[id], int((ids == id).sum())
                alone.truncate(0, 0)
                wanted = np.arange(len(tokens) - count, len(tokens))
                expected = alone.forward(tokens, np.arange(len(tokens)), np.zeros(len(tokens)), wanted)
                assert expected.tobytes() == logits[ids == id].tobytes()

        for _ in range(80):
            id = int(random.choice(list(texts)))
            length, action = engine.length(id), random.random()
            assert length == len(texts[id])
            if action < 0.5:
                ids = random.choice(list(texts), random.integers(1, 90)).astype(np.int32)
                new = random.integers(1, VOCABULARY, len(ids)).astype(np.int32)
                positions = np.empty_like(ids)
                for other in texts:
                    mine = ids == other
                    positions[mine] = len(texts[other]) + np.arange(mine.sum())
                keep = positions < 256
                ids, new, positions = ids[keep], new[keep], positions[keep]
                free = engine.free_positions()
                try:
                    logits = engine.forward(new, positions, ids, np.arange(len(ids)))
                except StateError as error:
                    assert re.search(r"room for \d+ more positions .* plan for more than 256 positions", str(error))
                    assert engine.free_positions() == free
                    seen["full"] += 1
                    continue
                for other in texts:
                    texts[other].extend(new[ids == other].tolist())
                check(logits, ids)
            elif action < 0.75:
                at = int(random.choice([length, engine.marked(id), random.integers(0, length + 1)]))
                try:
                    texts[engine.fork(id, at)] = texts[id][:at]
                    seen["forks"] += 1
                except StateError:
                    seen["refused"] += 1
            elif action < 0.85:
                engine.mark(id)
            elif len(texts) > 1:
                held, free = engine.held_positions(id), engine.free_positions()
                engine.remove_sequence(id)
                assert engine.free_positions() == free + held
                del texts[id]
        for id in texts:
            engine.remove_sequence(id)
        assert engine.free_positions() == room and min(seen.values()) > 0, seen
        engine.close()


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2_moe"])
def test_a_failed_pass_of_several_sequences_changes_none(
    packs: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """An expert of the last layer cannot be read when the recurrences before it have gone on."""
    whole = packs(name).read_bytes()
    path = tmp_path / "model.emoe"
    path.write_bytes(whole)
    pack = Pack.open(path)
    numbers = np.random.default_rng(2).integers(1, VOCABULARY, 60).astype(np.int32)
    with load(path, parallel=2, expert_slots=3, prefetch=False) as model:
        engine = model.engine
        expected = [model.logits(numbers[part]) for part in (slice(0, 30), slice(30, 60))]
        ids, positions = np.repeat(np.arange(2), 30), np.tile(np.arange(30), 2)
        for id in (0, 1):
            engine.truncate(id, 0)
        first = positions < 20
        engine.forward(numbers[first], positions[first], ids[first], [])
        with path.open("r+b") as file:
            for sections in pack.index.experts[max(pack.index.experts)].sections:
                file.seek(pack.index.sections[sections[0]].extents[0].offset)
                file.write(bytes(64))
        for _ in range(2):
            with pytest.raises(edgemoe.ReadError, match="damaged"):
                engine.forward(numbers[~first], positions[~first], ids[~first], np.arange(20))
            assert [engine.length(id) for id in (0, 1)] == [20, 20]
        path.write_bytes(whole)
        rest = engine.forward(numbers[~first], positions[~first], ids[~first], np.arange(20))
        for id in (0, 1):
            assert rest[10 * id : 10 * id + 10].tobytes() == expected[id][20:].tobytes()
