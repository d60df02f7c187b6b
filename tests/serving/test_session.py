"""Who gets which sequence, and when."""

from __future__ import annotations

import asyncio
import linecache
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nested
import pytest

import edgemoe
from edgemoe.convert import convert
from edgemoe.errors import EdgemoeError
from edgemoe.options import Quality
from edgemoe.profiling.trace import read_trace
from edgemoe.serving import scheduler
from edgemoe.serving.session import LogitsDrawer, Session

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
    with edgemoe.load(pack, parallel=1) as model:
        assert [computed_prompt(model, prompt) for prompt in (FIRST, [*FIRST, 5], SECOND, FIRST)] == [31, 1, 31, 31]


def test_running_generations_keep_their_sequences_where_there_are_enough(pack: Path) -> None:
    with edgemoe.load(pack, parallel=3) as model:
        running = [model.generate(prompt, **GREEDY) for prompt in (FIRST, SECOND, THIRD)]
        for _ in range(50):
            for generation in running:
                next(generation, None)
        assert [generation.result.computed_tokens for generation in running] == [31 + 39] * 3


def test_a_dropped_generation_has_no_sequence(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PAUSE", 3600)  # nobody seems to pause
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


def test_who_has_a_sequence_keeps_it_while_it_is_read(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that want the only sequence do not take it from each other."""
    monkeypatch.setattr(scheduler, "PAUSE", 3600)
    with edgemoe.load(pack, threads=1) as model:
        running = [model.generate(prompt, **GREEDY) for prompt in (FIRST, SECOND)]
        threads = [threading.Thread(target=list, args=(generation,)) for generation in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert [generation.result.computed_tokens for generation in running] == [31 + 39] * 2


def test_those_who_read_at_once_share_passes(pack: Path) -> None:
    with edgemoe.load(pack, threads=1, parallel=3) as model:
        expected = ["".join(model.generate(prompt, **GREEDY)) for prompt in (FIRST, SECOND, THIRD)]
        rows: list[int] = []
        engine: Any = model.engine
        core = engine._core

        class Noted(Calls):
            def forward(self, tokens: Any, *arguments: Any) -> Any:
                rows.append(len(tokens))
                time.sleep(0.002)  # the others come meanwhile
                return self._core.forward(tokens, *arguments)

        engine._core = Noted(core)
        running = [model.generate(prompt, **GREEDY) for prompt in (FIRST, SECOND, THIRD)]
        threads = [threading.Thread(target=list, args=(generation,)) for generation in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [generation.result.text for generation in running] == expected
        assert [generation.result.computed_tokens for generation in running] == [1 + 39] * 3
        assert rows.count(3) > 20


def test_a_beginning_is_shared(pack: Path) -> None:
    """Also with one that runs; what follows it in the other's text stays."""
    begin = [*FIRST, *SECOND]
    with edgemoe.load(pack, parallel=2) as model:
        running = model.generate([*begin, 7], **GREEDY)
        next(running)
        assert computed_prompt(model, [*begin, 8, 9]) == 2
        list(running)
        assert running.result.computed_tokens == 63 + 39
        # Two conversations by turns cost their new tokens only.
        one, other = [*begin, 10, 11], [*begin, 20, 21]
        assert [computed_prompt(model, one), computed_prompt(model, other)] == [2, 2]
        for word in range(3):
            one.append(word), other.append(word)
            assert [computed_prompt(model, one), computed_prompt(model, other)] == [1, 1]


def test_a_full_pool_pauses_the_text_that_began_last(pack: Path) -> None:
    """Nothing is cut off, and the tokens are the same."""
    options: dict[str, Any] = {**GREEDY, "max_tokens": 90}
    with edgemoe.load(pack, context=128) as model:
        expected = ["".join(model.generate(prompt, **options)) for prompt in (FIRST, SECOND, THIRD)]
    with edgemoe.load(pack, context=128, parallel=3) as model:
        running = [model.generate(prompt, **options) for prompt in (FIRST, SECOND, THIRD)]
        threads = [threading.Thread(target=list, args=(generation,)) for generation in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert [generation.result.text for generation in running] == expected
        assert [generation.result.finish_reason for generation in running] == ["length"] * 3


def test_memory_is_planned_for_all_sequences(pack: Path) -> None:
    budgets = []
    for parallel in (1, 3):
        with edgemoe.load(pack, parallel=parallel, context=256) as model:
            assert model.status()["sequences"] == parallel and model.status()["positions"] == 256
            budgets.append(model.budget)
    # The same positions, and a block that is not full for each further sequence.
    assert budgets[1].state == budgets[0].state * (4 + 2) // 4 > 0
    with pytest.raises(edgemoe.MemoryBudgetError, match="state for 512 positions in 200 sequences"):
        edgemoe.load(pack, parallel=200, memory=budgets[0].base + 4 * budgets[0].state)


class Calls:
    """An engine's core that notes what is called."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.names.append(name)
        return getattr(self._core, name)


def test_a_session_that_goes_on_calls_the_engine_once_a_token(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "COUNTED", 3600)
    with edgemoe.load(pack) as model:
        generation = model.generate(FIRST, **GREEDY)
        next(generation)
        engine: Any = model.engine
        engine._core = calls = Calls(engine._core)
        begin = generation.result.generated_tokens
        calls.names.clear()
        list(generation)
        assert calls.names == ["forward"] * (40 - begin)


def test_counts_are_whole_after_close_and_of_no_other_pass(pack: Path) -> None:
    with edgemoe.load(pack) as model:
        generation = model.generate(FIRST, **GREEDY)
        list(generation)
    assert generation.result.counters.tokens == generation.result.computed_tokens == 31 + 39
    with edgemoe.load(pack) as model:
        generation = model.generate(FIRST, **GREEDY)
        list(generation)
        model.forward(SECOND[:5], range(70, 75), [0] * 5, [4])
        assert generation.result.counters.tokens == 31 + 39
        assert "".join(model.generate(FIRST, **GREEDY)) == generation.result.text


def test_counts_are_whole_while_another_step_begins(pack: Path) -> None:
    with edgemoe.load(pack) as model:
        generation = model.generate(FIRST, **GREEDY)
        list(generation)
        locked = threading.Event()

        def begin() -> None:
            with model.engine.lock:
                locked.set()
                time.sleep(0.05)

        thread = threading.Thread(target=begin)
        thread.start()
        locked.wait()
        assert generation.result.counters.tokens == 31 + 39
        thread.join()


def test_a_pass_of_the_user_is_traced(pack: Path, tmp_path: Path) -> None:
    with edgemoe.load(pack) as model, model.trace(tmp_path / "both.trace"):
        model.forward(SECOND, range(31), [0] * 31, [])
        list(model.generate(FIRST, max_tokens=2, ignore_eos=True))
    assert list(read_trace(tmp_path / "both.trace").position) == [*range(31), *range(32)]


def test_one_trace_at_a_time(pack: Path, tmp_path: Path) -> None:
    with edgemoe.load(pack) as model:
        with model.trace(tmp_path / "first.trace"):
            with pytest.raises(EdgemoeError, match="a trace is being recorded already"):
                model.trace(tmp_path / "second.trace").__enter__()
            list(model.generate(FIRST, max_tokens=2, ignore_eos=True))
        with model.trace(tmp_path / "third.trace"):
            list(model.generate(SECOND, max_tokens=2, ignore_eos=True))
    assert not (tmp_path / "second.trace").exists()
    assert len(read_trace(tmp_path / "first.trace").position) == len(FIRST) + 1


def test_what_a_failed_pass_left_is_known(pack: Path) -> None:
    with edgemoe.load(pack) as model:
        expected = "".join(model.generate(FIRST, **GREEDY))
        generation = model.generate(FIRST, **GREEDY)
        next(generation)
        for other in ([*FIRST[:20], *SECOND], FIRST):  # ended in the middle of the pass, or before it
            engine: Any = model.engine
            core = engine._core

            class Interrupted(Calls):
                def forward(self, *arguments: Any) -> Any:
                    self._core.forward(*arguments)
                    raise KeyboardInterrupt

            engine._core = Interrupted(core)
            with pytest.raises(KeyboardInterrupt):
                list(model.generate(other, **GREEDY))
            engine._core = core
            assert "".join(model.generate(FIRST, **GREEDY)) == expected
        list(generation)
        assert generation.result.text == expected


@pytest.mark.parametrize("parallel", [0, -1, 257])
def test_senseless_numbers_of_sequences_are_refused(pack: Path, parallel: int) -> None:
    with pytest.raises(edgemoe.OptionError, match="parallel"):
        edgemoe.load(pack, parallel=parallel)


def test_a_session_goes_on_after_others_changed_its_sequence(pack: Path) -> None:
    with edgemoe.load(pack) as model:
        expected = "".join(model.generate(FIRST, **GREEDY))
        list(model.generate(SECOND, max_tokens=1))
        saved = model.snapshot()
        for change in (lambda: model.restore(saved), lambda: model.forward([5], [len(model.snapshot()[0])], [0], [])):
            generation = model.generate(FIRST, **GREEDY)
            next(generation)
            change()
            list(generation)
            assert generation.result.text == expected


def test_a_session_goes_on_after_its_pass_failed(pack: Path) -> None:
    with edgemoe.load(pack) as model:
        expected = model.next_logits([*FIRST, 5]).tobytes()
        kept = Session(list(FIRST), LogitsDrawer())
        model._scheduler.next(kept)
        kept.done = False
        kept.tokens.append(5)
        engine: Any = model.engine
        core = engine._core

        class Interrupted(Calls):
            def forward(self, *arguments: Any) -> Any:
                self._core.forward(*arguments)
                raise KeyboardInterrupt

        engine._core = Interrupted(core)
        with pytest.raises(KeyboardInterrupt):
            model._scheduler.next(kept)
        engine._core = core
        drawn = model._scheduler.next(kept)
        assert drawn is not None and drawn.logits is not None and drawn.logits.tobytes() == expected


def test_snapshots_are_of_the_last_sequence_and_go_to_an_idle_one(pack: Path) -> None:
    with edgemoe.load(pack, parallel=2) as model:
        running = model.generate(FIRST, **GREEDY)
        next(running)
        list(model.generate(SECOND, max_tokens=1))
        saved = model.snapshot()
        assert list(saved[0]) == SECOND
        assert computed_prompt(model, THIRD) == 31
        next(running)  # the sequence of the one that is done was used least recently by now, too
        list(model.generate(THIRD, max_tokens=1))
        model.restore(saved)
        assert computed_prompt(model, [*SECOND, 5]) == 1
        list(running)
        assert running.result.computed_tokens == 31 + 39


def test_more_streams_than_rows_take_turns(pack: Path) -> None:
    with edgemoe.load(pack, parallel=12, chunk=4) as model:
        prompts = [[number, *FIRST[:5]] for number in range(1, 13)]
        expected = ["".join(model.generate(prompt, **GREEDY)) for prompt in prompts]

        async def read(prompt: list[int]) -> str:
            return "".join([piece async for piece in model.generate(prompt, **GREEDY)])

        async def all_of_them() -> list[str]:
            return await asyncio.gather(*map(read, prompts))

        assert asyncio.run(all_of_them()) == expected


def test_a_fault_of_the_scheduler_reaches_those_who_wait(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edgemoe.load(pack) as model:
        expected = "".join(model.generate(FIRST, **GREEDY))

        async def read() -> str:
            return "".join([piece async for piece in model.generate(FIRST, **GREEDY)])

        with monkeypatch.context() as patched:
            patched.setattr(model._scheduler, "_plan", lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                asyncio.run(asyncio.wait_for(read(), 30))
        assert asyncio.run(asyncio.wait_for(read(), 30)) == expected


def test_closing_the_model_wakes_those_who_wait_on_a_loop(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    convert(tiny_qwen3_moe(max_position_embeddings=30_000), tmp_path / "long.emoe", 8)
    model = edgemoe.load(tmp_path / "long.emoe", threads=1, context=30_000)

    async def read(close: bool) -> None:
        generation = model.generate([7] * 300, ignore_eos=True)
        async for _ in generation:
            if close:
                await asyncio.to_thread(model.close)

    async def both() -> list[Any]:
        return await asyncio.gather(read(False), read(True), return_exceptions=True)

    errors = asyncio.run(asyncio.wait_for(both(), 60))
    assert all(isinstance(error, EdgemoeError) and "closed" in str(error) for error in errors)


def test_who_wants_the_engine_itself_gets_it_beside_others(pack: Path) -> None:
    with edgemoe.load(pack, threads=1, context=512) as model:
        expected = model.logits(FIRST).tobytes()
        ended = threading.Event()

        async def endless() -> None:
            while not ended.is_set():
                async for _ in model.generate(SECOND, max_tokens=400, ignore_eos=True):
                    if ended.is_set():
                        break

        thread = threading.Thread(target=lambda: asyncio.run(endless()))
        thread.start()
        try:
            for _ in range(20):
                assert model.logits(FIRST).tobytes() == expected
                model.restore(model.snapshot())
        finally:
            ended.set()
            thread.join(30)
        assert not thread.is_alive()


def test_a_program_may_end_while_the_scheduler_works(pack: Path) -> None:
    code = f"""
        import asyncio, edgemoe
        model = edgemoe.load({str(pack)!r}, threads=2)

        async def main():
            async for _ in model.generate([1, 2, 3], ignore_eos=True, seed=1):
                break
            print("left", flush=True)

        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


@pytest.mark.slow
def test_interrupts_leave_the_model_usable(pack: Path) -> None:
    """Ctrl-C after any line of the scheduler."""
    with edgemoe.load(pack, threads=1) as model:
        expected = "".join(model.generate(FIRST, **GREEDY))
        files = ("scheduler.py", "sequences.py", "session.py")

        for target in range(1, 400, 3):
            seen = 0

            def trace(frame: Any, event: str, _: Any) -> Any:
                nonlocal seen
                if not frame.f_code.co_filename.endswith(files):
                    return None if event == "call" and "generation" not in frame.f_code.co_filename else trace
                line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
                # Signals are handled at calls, though not before a `with` block's lock is released.
                if event == "line" and "(" in line and not line.startswith("with "):
                    seen += 1
                    if seen == target:  # noqa: B023
                        raise KeyboardInterrupt
                return trace

            generation = model.generate(FIRST, **GREEDY)
            sys.settrace(trace)
            try:
                next(generation)
                next(generation)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            del generation
            text: list[str] = []
            thread = threading.Thread(target=lambda: text.append("".join(model.generate(FIRST, **GREEDY))))  # noqa: B023
            thread.start()
            thread.join(30)
            assert text == [expected], target


def test_room_is_found_after_a_pass_of_the_user(pack: Path) -> None:
    with edgemoe.load(pack, parallel=4, context=256) as model:
        list(model.generate(FIRST, max_tokens=1))
        model.forward([5] * 200, range(31, 231), [0] * 200, [])
        generation = model.generate([*SECOND * 7][:200], max_tokens=3, ignore_eos=True)
        assert len(list(generation)) and generation.result.finish_reason == "length"


def test_a_restored_state_is_of_nobody_else(pack: Path) -> None:
    with edgemoe.load(pack, parallel=1) as model:
        expected = "".join(model.generate(FIRST, **GREEDY))
        list(model.generate(SECOND, max_tokens=2))
        saved = model.snapshot()
        generation = model.generate(FIRST, **GREEDY)
        text = next(generation)
        model.restore(saved)
        assert text + "".join(generation) == expected


def test_texts_of_different_quality_share_nothing(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    """What the same tokens leave behind is not the same."""
    lossy = Quality(level_cap=0)
    convert(tiny_qwen3_moe(), tmp_path / "floats.emoe", 32)
    path = nested.write_nested_pack(tmp_path / "floats.emoe", tmp_path / "nested.emoe")
    with edgemoe.load(path, parallel=1, threads=1) as model:

        def logits(quality: Quality | None) -> bytes:
            session = Session(list(FIRST), LogitsDrawer(), quality)
            drawn = model._scheduler.next(session)
            assert drawn is not None and drawn.logits is not None
            return drawn.logits.tobytes()

        alone = {None: model.logits(FIRST, len(FIRST) - 1).tobytes()}
        positions = range(len(FIRST))
        alone[lossy] = model.forward(FIRST, positions, [0] * len(FIRST), [len(FIRST) - 1], qualities=[lossy]).tobytes()
        assert alone[lossy] != alone[None]
        for quality in (None, lossy, None, None, lossy, lossy, None):
            assert logits(quality) == alone[quality]


def test_a_first_token_waits_for_no_turn(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where streams take turns, a text that has nothing yet is in the next pass."""
    with edgemoe.load(pack, parallel=3, threads=1, expert_slots=8, chunk=32) as model:
        paced: list[int] = []
        choose = model._scheduler._pace.choose

        def noted(streams: Any) -> Any:
            paced.extend(len(session.tokens) - session.prompt for session in streams)
            return choose(streams)

        monkeypatch.setattr(model._scheduler._pace, "choose", noted)

        async def read(generation: edgemoe.Generation) -> None:
            async for _ in generation:
                pass

        async def one_after_two() -> None:
            options: dict[str, Any] = {"ignore_eos": True, "max_tokens": 480, "seed": 1}
            running = [model.generate(prompt[:9], **options) for prompt in (FIRST, SECOND)]
            tasks = [asyncio.create_task(read(generation)) for generation in running]
            while not all(generation.result.tokens for generation in running):
                await asyncio.sleep(0.001)
            # Beside two streams there are 30 rows for 31 tokens, beside one there are 31 for 32.
            for number in range(16):
                prompt = [number + 200, *THIRD][: 31 + number % 2]
                await read(model.generate(prompt, ignore_eos=True, max_tokens=1))
            for generation in running:
                generation.close()
            await asyncio.gather(*tasks)

        asyncio.run(one_after_two())
        assert paced and min(paced) > 0


def test_a_text_that_shares_its_beginning_needs_room_for_the_rest_only(pack: Path) -> None:
    begin = [*FIRST, *SECOND, *THIRD, *FIRST, *SECOND]  # with room to grow, two of these do not fit side by side
    with edgemoe.load(pack, parallel=2, context=512) as model:
        list(model.generate(begin, max_tokens=1))
        engine: Any = model.engine
        core = engine._core
        together: list[int] = []

        class Noted(Calls):
            def forward(self, tokens: Any, positions: Any, ids: Any, *arguments: Any) -> Any:
                together.append(len(set(ids.tolist())))
                return self._core.forward(tokens, positions, ids, *arguments)

        engine._core = Noted(core)

        async def read(last: int) -> None:
            async for _ in model.generate([*begin, last], **GREEDY):
                pass

        async def both() -> None:
            await asyncio.gather(read(7), read(8))

        asyncio.run(both())
        assert max(together) == 2
