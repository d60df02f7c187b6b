"""The engine as a whole, on tiny random models: exactness, sequence state, failures, threads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import finished, slow_except
from reference import ReferenceModel

import edgemoe
from edgemoe import _core
from edgemoe.convert import convert
from edgemoe.formats.pack import Pack
from edgemoe.formats.read import read_index
from edgemoe.loading import load_engine
from edgemoe.options import LoadOptions

TOKENS = np.random.default_rng(5).integers(0, 320, 130).astype(np.int32)
F32_STATE = {"cache_type_k": "f32", "cache_type_v": "f32"}

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_pack(tiny_qwen3_moe: MakeFolder, tmp_path: Path) -> Callable[..., Path]:
    def make(bits: int = 8, **options: Any) -> Path:
        pack = tmp_path / f"model-{bits}.emoe"
        convert(tiny_qwen3_moe(**options), pack, bits, dense_bits=bits)
        return pack

    return make


def load_divided(path: Path, chunk: int = 512, slots: int | None = None, **options: Any) -> edgemoe.Model:
    """Loads with a given chunk size or number of expert slots instead of those that the budget gives."""
    return edgemoe.load(path, chunk=chunk, expert_slots=slots, **options)


# -- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_logits_equal_the_numpy_reference(make_pack: Callable[..., Path], bits: int) -> None:
    pack = make_pack(bits)
    expected = ReferenceModel(Pack.open(pack)).logits(TOKENS[:40])
    with edgemoe.load(pack, **F32_STATE) as model:
        difference = np.abs(model.logits(TOKENS[:40]) - expected) / (expected.max() - expected.min())
    # Where activations become int8 codes, a last-bit difference before the rounding is now and then a code after it.
    assert difference.max() < (2e-5 if bits >= 16 else 2e-2)
    assert difference.mean() < (2e-6 if bits >= 16 else 5e-4)


def test_the_last_layer_computes_only_wanted_tokens(make_pack: Callable[..., Path]) -> None:
    pack = make_pack(4)
    count, layers, top_k = 30, len(Pack.open(pack).index.experts), Pack.open(pack).index.spec.layers[0].top_k
    positions, ids = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
    with edgemoe.load(pack) as model:
        engine = model.engine
        every = engine.forward(TOKENS[:count], positions, ids, positions)
        for wanted in ([], [count - 1], [0, 3, 17]):
            engine.truncate(0, 0)
            before = engine.counters().expert_uses
            some = engine.forward(TOKENS[:count], positions, ids, np.array(wanted, np.int32))
            uses = engine.counters().expert_uses - before
            np.testing.assert_array_equal(some, every[wanted])
            assert uses == ((layers - 1) * count + len(wanted)) * top_k
        engine.truncate(0, 0)
        engine.record_routing(True)
        np.testing.assert_array_equal(engine.forward(TOKENS[:count], positions, ids, [4]), every[[4]])
        assert engine.take_routing().picks.shape == (count, layers * top_k)


@pytest.mark.parametrize("bits", [8, 4])
def test_int8_activations_cost_little(make_pack: Callable[..., Path], bits: int) -> None:
    pack = make_pack(bits)
    exact = ReferenceModel(Pack.open(pack), activations="exact").logits(TOKENS[:40])
    with edgemoe.load(pack, **F32_STATE) as model:
        difference = np.abs(model.logits(TOKENS[:40]) - exact) / (exact.max() - exact.min())
    assert difference.mean() < 2e-2  # a router that is nearly undecided may choose otherwise for it


@pytest.mark.parametrize("state", slow_except(["f32", "f16", "q8_0"], "f16"))
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_logits_are_bit_identical_however_they_are_computed(
    make_pack: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    state: str,
) -> None:
    pack = make_pack(bits, head_dim=32, norm_topk_prob=state == "f16")
    types = {"cache_type_k": state, "cache_type_v": state}
    with load_divided(pack, threads=1, **types) as model:
        expected = model.logits(TOKENS).tobytes()
    variants: list[dict[str, Any]] = [{"threads": n} for n in (2, 3)]
    variants += [{"chunk": n, "threads": 2} for n in (1, 7, 64)]
    variants += [{"slots": n, "threads": 2, "chunk": 64} for n in (2, 3, 7)]
    for variant in variants:
        with load_divided(pack, **variant, **types) as model:
            assert model.logits(TOKENS).tobytes() == expected, variant
    for isa in _core.kernels.available_isas():
        monkeypatch.setenv("EDGEMOE_ISA", isa)
        with load_divided(pack, **types) as model:
            assert model.isa == isa
            assert model.logits(TOKENS).tobytes() == expected, isa


def test_an_unknown_instruction_set_is_an_error(
    make_pack: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEMOE_ISA", "mmx")
    with pytest.raises(edgemoe.OptionError, match=r"mmx.*scalar"):
        edgemoe.load(make_pack())


# -- sequence state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["f32", "f16", "q8_0"])
def test_prefix_reuse_and_restored_state_change_nothing(make_pack: Callable[..., Path], state: str) -> None:
    with edgemoe.load(make_pack(8, head_dim=32), cache_type_k=state, cache_type_v=state, parallel=1) as model:
        expected = model.logits(TOKENS)

        def last(tokens: Any) -> tuple[bytes, int]:
            before = model.engine.counters().tokens
            logits = model.next_logits(list(tokens))
            return logits.tobytes(), int(model.engine.counters().tokens - before)

        other = [*TOKENS[:70], 1, 2, 3]
        last(other)
        assert last(TOKENS[:100]) == (expected[99].tobytes(), 30)
        saved = model.snapshot()
        assert last(TOKENS[:50]) == (expected[49].tobytes(), 1)
        model.restore(saved)
        assert last(TOKENS) == (expected[129].tobytes(), 30)
        assert saved[0] == tuple(TOKENS[:100])


def test_several_sequences_in_one_pass(make_pack: Callable[..., Path]) -> None:
    with edgemoe.load(make_pack(), parallel=2) as model:
        first, second = model.logits(TOKENS[:20]), model.logits(TOKENS[50:67])
        model.logits(TOKENS[:1])
        other = 1
        model.engine.truncate(other, 0)
        # Sequence 0 holds one token; the rest of it and all of the other one come mixed.
        tokens = [*TOKENS[1:20], *TOKENS[50:67]]
        positions = [*range(1, 20), *range(17)]
        order = np.argsort([*range(19), *(p + 0.5 for p in range(17))], kind="stable")
        ids = np.array([0] * 19 + [other] * 17)
        logits = model.forward(np.array(tokens)[order], np.array(positions)[order], ids[order], np.arange(36))
        assert logits[ids[order] == 0].tobytes() == first[1:].tobytes()
        assert logits[ids[order] == other].tobytes() == second.tobytes()


def test_sequences_come_and_go(make_pack: Callable[..., Path]) -> None:
    path = make_pack()
    with edgemoe.load(path, parallel=1) as model:
        expected = model.logits(TOKENS[:20])
        one, blocks = model.budget.state, -(-model.context // 64)
        with pytest.raises(edgemoe.errors.StateError, match="room for 1 sequence,"):
            model.engine.add_sequence()
    loaded = load_engine(read_index(path), LoadOptions(parallel=3))
    assert loaded.budget.state * blocks == one * (blocks + 2)  # the last ones of two more are not full
    with closing(loaded.engine) as engine:
        ids = [engine.add_sequence(), engine.add_sequence()]
        with pytest.raises(edgemoe.errors.StateError, match="room for 3 sequences,"):
            engine.add_sequence()
        for id in (0, *ids):
            again = engine.forward(TOKENS[:20], np.arange(20), np.full(20, id), np.arange(20))
            assert again.tobytes() == expected.tobytes()
        engine.remove_sequence(ids[0])
        for use in (engine.length, engine.remove_sequence, engine.mark, engine.snapshot):
            with pytest.raises(ValueError, match=f"no sequence {ids[0]}"):
                use(ids[0])
        with pytest.raises(ValueError, match=f"no sequence {ids[0]}"):
            engine.forward([5], [0], [ids[0]], [0])
        assert engine.add_sequence() == ids[0] and engine.length(ids[0]) == 0
        assert (engine.length(0), engine.length(ids[1])) == (20, 20)


def test_residency_is_what_was_read_and_not_evicted(make_pack: Callable[..., Path]) -> None:
    with load_divided(make_pack(), slots=5, prefetch=False) as model:
        engine = model.engine
        spec = Pack.open(model.path).index.spec
        levels, reads = engine.residency()
        assert levels.shape == reads.shape == (len(spec.layers), spec.layers[0].experts)
        assert (levels.dtype, reads.dtype) == (np.uint8, np.uint64)
        assert not levels.any() and not reads.any()
        seen: list[tuple[int, bool]] = []

        def watch() -> None:
            while not stop.is_set():
                some = engine.residency()[0]
                seen.append((int(some.sum()), engine.running))
                time.sleep(0.0002)

        stop, watcher = threading.Event(), threading.Thread(target=watch)
        stop.clear()
        watcher.start()
        engine.record_routing(True)
        model.logits(TOKENS)
        stop.set()
        watcher.join()
        assert max(count for count, _ in seen) <= 5
        assert any(running and count for count, running in seen)  # it does not wait for the end of a pass
        levels, reads = engine.residency()
        counters = engine.counters()
        assert levels.max() == 1 and levels.sum() == 5 == counters.sections_read - counters.evictions
        assert reads.sum() == counters.sections_read
        picks = engine.take_routing().picks.reshape(len(TOKENS), len(spec.layers), -1)
        for layer in range(len(spec.layers)):
            assert set(np.flatnonzero(reads[layer])) == set(picks[:, layer].reshape(-1).tolist())
            assert not levels[layer][reads[layer] == 0].any()
    with pytest.raises(edgemoe.EdgemoeError, match="closed"):
        engine.residency()


def test_snapshots_of_another_model_are_refused(make_pack: Callable[..., Path]) -> None:
    with edgemoe.load(make_pack(), **F32_STATE) as model:
        model.logits(TOKENS[:70])
        tokens, data = model.snapshot()
        for broken in (data[:-1], data[:10], np.zeros_like(data)):
            with pytest.raises(ValueError, match="snapshot"):
                model.restore((tokens, broken))
    with edgemoe.load(model.path) as model, pytest.raises(ValueError, match="snapshot"):
        model.restore((tokens, data))


# -- limits and failures ----------------------------------------------------------------------------------------------


def test_the_context_is_honoured(make_pack: Callable[..., Path]) -> None:
    with edgemoe.load(make_pack(), context=32) as model:
        with pytest.raises(edgemoe.ContextLengthError, match="33 tokens does not fit"):
            model.generate([5] * 33)
        with pytest.raises(edgemoe.ContextLengthError, match="context of 32"):
            model.logits([5] * 33)
        result = finished(model.generate([5] * 30, temperature=0, ignore_eos=True))
        assert (result.finish_reason, result.generated_tokens) == ("length", 3)
    with pytest.raises(edgemoe.OptionError, match="1 to 512"):
        edgemoe.load(model.path, context=513)


@pytest.mark.parametrize("tokens", [[320], [-1]])
def test_tokens_outside_the_vocabulary_are_refused(make_pack: Callable[..., Path], tokens: list[int]) -> None:
    with edgemoe.load(make_pack()) as model:
        with pytest.raises(edgemoe.OptionError, match="not in the vocabulary of 320"):
            model.logits(tokens)
        with pytest.raises(ValueError, match="not in the vocabulary of 320"):
            model.engine.forward(tokens, [0], [0], [0])


def test_too_small_a_budget_names_one_that_works(make_pack: Callable[..., Path]) -> None:
    pack = make_pack()
    with pytest.raises(edgemoe.MemoryBudgetError) as refusal:
        edgemoe.load(pack, memory="10MB")
    least = re.search(r"the least that works is (\d+)MB", str(refusal.value))
    assert least
    edgemoe.load(pack, memory=f"{int(least[1]) + 20}MB").close()  # the process itself may have grown meanwhile


@pytest.mark.parametrize("memory", ["8XB", "-1GB", "", "nan", 0, -5])
def test_senseless_budgets_are_refused(make_pack: Callable[..., Path], memory: Any) -> None:
    with pytest.raises(edgemoe.OptionError):
        edgemoe.load(make_pack(), memory=memory)


def damage(pack: Path, section: int) -> Callable[[], None]:
    """Flips a bit in the middle of a section; the result undoes it."""
    extent = Pack.open(pack).index.sections[section].extents[0]

    def flip() -> None:
        with pack.open("r+b") as file:
            file.seek(extent.offset + extent.length // 3)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))

    flip()
    return flip


def test_a_damaged_expert_ends_the_generation_and_the_model_stays_usable(make_pack: Callable[..., Path]) -> None:
    pack = make_pack()
    with edgemoe.load(pack) as model:
        expected = model.logits(TOKENS).tobytes()
    with edgemoe.load(pack) as model:
        repair = damage(pack, Pack.open(pack).index.experts[1].sections[2][0])
        with pytest.raises(edgemoe.ReadError, match=r"model-8.emoe: layer 1 expert 2 at offset \d+ is damaged"):
            model.logits(TOKENS)
        repair()
        assert model.logits(TOKENS).tobytes() == expected


def test_damaged_dense_weights_are_found_at_loading(make_pack: Callable[..., Path]) -> None:
    pack = make_pack()
    damage(pack, Pack.open(pack).index.dense["layers.1.q"].section)
    with pytest.raises(edgemoe.ReadError, match="damaged"):
        edgemoe.load(pack)


def test_a_file_cut_off_while_running(make_pack: Callable[..., Path]) -> None:
    pack = make_pack()
    with edgemoe.load(pack) as model:
        os.truncate(
            pack, Pack.open(pack).index.sections[Pack.open(pack).index.experts[0].sections[0][0]].extents[0].offset
        )
        with pytest.raises(edgemoe.ReadError, match="short of what its index promises"):
            model.logits(TOKENS)


# -- the embedding API ----------------------------------------------------------------------------------------------


def test_generation_is_deterministic_and_streams(make_pack: Callable[..., Path]) -> None:
    with edgemoe.load(make_pack()) as model:
        pieces = list(model.generate("The quick", max_tokens=12, seed=3, ignore_eos=True))
        assert len(pieces) > 1
        again = finished(model.generate("The quick", max_tokens=12, seed=3, ignore_eos=True))
        assert again.text == "".join(pieces)
        assert again.generated_tokens == 12
        assert again.computed_prompt_tokens == 1  # all but the last token were known
        assert again.counters.experts_requested >= again.counters.experts_hit > 0
        figures = {"generated_tokens": 12, "computed_prompt_tokens": 1}
        assert figures.items() <= model.stats().items()
        assert model.last_result.tokens == again.tokens and model.stats(again)["hit_rate"] == model.stats()["hit_rate"]


def test_stop_strings_end_the_text(make_pack: Callable[..., Path]) -> None:
    with edgemoe.load(make_pack()) as model:
        text = "".join(model.generate("The", max_tokens=20, temperature=0, ignore_eos=True))
        stop = text[4:6]
        result = finished(model.generate("The", max_tokens=20, temperature=0, ignore_eos=True, stop=stop))
        assert (result.text, result.finish_reason) == (text[: text.index(stop)], "stop")
        assert model.last_stop_reason == "stop"


def test_wrong_options_are_refused_before_the_first_token(make_pack: Callable[..., Path]) -> None:
    with edgemoe.load(make_pack()) as model:
        for options in ({"max_tokens": -1}, {"temperature": float("nan")}, {"top_p": -1.0}):
            with pytest.raises(edgemoe.OptionError):
                model.generate("The", **options)


def test_a_closed_model_says_so(make_pack: Callable[..., Path]) -> None:
    model = edgemoe.load(make_pack())
    model.close()
    with pytest.raises(edgemoe.EdgemoeError, match="closed"):
        model.logits([1])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_stops_within_a_token(make_pack: Callable[..., Path]) -> None:
    code = (
        "import signal, sys, edgemoe\n"
        # Where tests run in the background, processes begin with interrupts ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "model = edgemoe.load(sys.argv[1])\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    while True: list(model.generate('The', max_tokens=400, ignore_eos=True))\n"
        "except KeyboardInterrupt:\n"
        "    text = ''.join(model.generate('The', max_tokens=3, temperature=0))\n"
        "    print('interrupted', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(make_pack())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert process.wait(30) == 0
