"""Who gets which sequence, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgemoe
from edgemoe.convert import convert
from edgemoe.serving import session

GREEDY: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
FIRST, SECOND, THIRD = ([start, *range(start, start + 30)] for start in (1, 100, 200))


@pytest.fixture
def pack(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> Path:
    convert(tiny_qwen3_moe(), tmp_path / "tiny.emoe", 8)
    return tmp_path / "tiny.emoe"


def computed_prompt(model: edgemoe.Model, prompt: list[int]) -> int:
    generation = model.generate(prompt, max_tokens=1)
    list(generation)
    return generation.result.computed_prompt_tokens


def test_a_request_takes_the_sequence_with_its_beginning(pack: Path) -> None:
    with edgemoe.load(pack, parallel=2) as model:
        assert computed_prompt(model, FIRST) == 31
        assert computed_prompt(model, SECOND) == 31
        assert computed_prompt(model, [*FIRST, 5]) == 1
        assert computed_prompt(model, [*SECOND, 5]) == 1
        # Nobody has its beginning: the sequence that was used last stays.
        assert computed_prompt(model, THIRD) == 31
        assert computed_prompt(model, [*SECOND, 6]) == 1
        assert computed_prompt(model, [*THIRD, 6]) == 1
        assert computed_prompt(model, FIRST) == 31
    with edgemoe.load(pack) as model:
        assert [computed_prompt(model, prompt) for prompt in (FIRST, [*FIRST, 5], SECOND, FIRST)] == [31, 1, 31, 31]


def test_running_generations_keep_their_sequences_where_there_are_enough(pack: Path) -> None:
    with edgemoe.load(pack, parallel=3) as model:
        running = [model.generate(prompt, **GREEDY) for prompt in (FIRST, SECOND, THIRD)]
        for _ in range(50):
            for generation in running:
                next(generation, None)
        assert [generation.result.computed_tokens for generation in running] == [31 + 39] * 3


def test_a_dropped_generation_has_no_sequence(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PAUSE", 3600)  # nobody seems to pause
    with edgemoe.load(pack, parallel=2) as model:
        kept, dropped = model.generate(FIRST, **GREEDY), model.generate(SECOND, **GREEDY)
        next(kept), next(dropped)
        text = dropped.result.text
        del dropped
        again = model.generate(SECOND, **GREEDY)
        assert next(again).startswith(text[:1]) and again.result.computed_prompt_tokens == 1
        again.close()
        assert computed_prompt(model, [*SECOND, 5]) == 1
        list(kept)
        assert kept.result.computed_tokens == 31 + 39


def test_turns_are_slices(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that want the only sequence do not take it from each other at every token."""
    monkeypatch.setattr(session, "PAUSE", 3600)
    monkeypatch.setattr(session, "SLICE", 8)
    with edgemoe.load(pack, threads=1) as model:
        running = [model.generate(prompt, **GREEDY) for prompt in (FIRST, SECOND)]
        begin = threading.Barrier(2)

        def read(generation: Any) -> None:
            begin.wait()
            list(generation)

        threads = [threading.Thread(target=read, args=(generation,)) for generation in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        for generation in running:
            assert generation.result.generated_tokens == 40
            # 40 tokens in slices of at least 8: computed anew 4 times at most, after 8, 16, ... tokens.
            assert 70 <= generation.result.computed_tokens <= 70 + sum(30 + 8 * turn for turn in range(1, 5))


def test_memory_is_planned_for_all_sequences(pack: Path) -> None:
    budgets = []
    for parallel in (1, 3):
        with edgemoe.load(pack, parallel=parallel, context=256) as model:
            budgets.append(model.budget)
    assert budgets[1].state == 3 * budgets[0].state > 0
    with pytest.raises(edgemoe.MemoryBudgetError, match="state for 200 sequences of 512 positions"):
        edgemoe.load(pack, parallel=200, memory=budgets[0].base + 20_000_000)


@pytest.mark.parametrize("parallel", [0, -1, 257])
def test_senseless_numbers_of_sequences_are_refused(pack: Path, parallel: int) -> None:
    with pytest.raises(edgemoe.OptionError, match="parallel"):
        edgemoe.load(pack, parallel=parallel)
