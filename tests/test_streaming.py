"""Experts that do not all fit: what leaves, what is read ahead, what goes wrong, and that no bit depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import edgemoe
from edgemoe.convert import convert
from edgemoe.model_files import bundled_model
from edgemoe.options import EVICTION_POLICIES

TOKENS = np.random.default_rng(8).integers(0, 320, 40).tolist()
READS = ("sections_read", "bytes_read")


@pytest.fixture
def pack(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tiny_qwen3_moe(num_hidden_layers=4, num_experts=16, num_experts_per_tok=3)
    convert(folder, tmp_path / "tiny.emoe", 8)
    return tmp_path / "tiny.emoe"


def load_with_slots(path: Path, slots: int, **options: Any) -> edgemoe.Model:
    return edgemoe.load(path, expert_slots=slots, **options)


def step_by_step(model: edgemoe.Model) -> bytes:
    """Logits after each token, computed one by one from an empty state."""
    model.logits(TOKENS[:1])
    return b"".join(model.next_logits(TOKENS[: n + 1]).tobytes() for n in range(len(TOKENS)))


@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_no_bit_depends_on_what_is_in_memory(pack: Path, eviction: str) -> None:
    with edgemoe.load(pack, prefetch=False) as model:
        expected = step_by_step(model)
    for slots in (3, 16, 40):
        for prefetch in (False, True):
            with load_with_slots(pack, slots, eviction=eviction, prefetch=prefetch) as model:
                assert step_by_step(model) == expected, (slots, prefetch)
                counters = model.engine.counters()
                assert counters.evictions > 0
                assert (counters.prefetch_issued > 0) == (prefetch and slots > 3)


def test_counters_add_up(pack: Path) -> None:
    with load_with_slots(pack, 20) as model:
        step_by_step(model)
        deadline = time.monotonic() + 30
        while True:
            c = model.engine.counters()
            misses = c.experts_requested - c.experts_hit
            # A miss is read on demand, or was being read ahead already.
            reads = misses - c.prefetch_late + c.prefetch_issued
            if c.sections_read == reads or time.monotonic() > deadline:
                break  # else a prediction is still being read
    layers, tokens, top_k = 4, len(TOKENS) + 1, 3
    assert c.experts_requested == layers * tokens * top_k
    assert c.sections_read == reads
    # A prediction is used, late, wasted or still there.
    unused = c.prefetch_issued - c.prefetch_used - c.prefetch_late - c.prefetch_wasted
    assert 0 <= unused <= 20
    assert c.bytes_read == c.sections_read * model.budget.slot_bytes
    assert c.sections_read - c.evictions <= 20


def test_the_last_layer_is_not_read_for_tokens_without_logits(
    tiny_qwen3_moe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_qwen3_moe(num_hidden_layers=2, num_experts=16, num_experts_per_tok=3)
    convert(folder, tmp_path / "tiny.emoe", 8)
    with load_with_slots(tmp_path / "tiny.emoe", 28) as model:
        engine = model.engine
        for position in range(0, 400, 2):  # now and then one is read ahead whether it pays or not
            engine.forward(TOKENS[:2], [position, position + 1], [0, 0], [])
        counters = engine.counters()
        assert counters.sections_read <= 16 and counters.prefetch_issued == 0
        model.logits(TOKENS[:1])
        assert engine.counters().sections_read > counters.sections_read


def test_without_prediction_lru_reads_what_a_simulation_says(pack: Path, tmp_path: Path) -> None:
    from edgemoe.profiling.trace import read_trace

    with load_with_slots(pack, 14, eviction="lru", prefetch=False) as model:
        with model.trace(tmp_path / "steps.trace"):
            step_by_step(model)
        hits = model.engine.counters().experts_hit
    trace = read_trace(tmp_path / "steps.trace")
    held: list[tuple[int, int]] = []  # least recently used first
    expected = 0
    for row in trace.ids.reshape(-1, 4, 3).tolist():
        for layer, picks in enumerate(row):
            wanted = [(layer, expert) for expert in picks]
            present = [key for key in wanted if key in held]
            expected += len(present)
            for key in wanted:
                if key in held:
                    held.remove(key)
                held.append(key)
            del held[: max(len(held) - 14, 0)]
    assert hits == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_read_error_ends_the_pass_and_the_model_stays_usable(pack: Path) -> None:
    with load_with_slots(pack, 6, prefetch=False) as model:
        expected = model.logits(TOKENS).tobytes()
        before = model.engine.counters()
        links = {int(link.name): os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
        descriptor = next(number for number, target in links.items() if target == str(pack.resolve()))
        saved, directory = os.dup(descriptor), os.open(pack.parent, os.O_RDONLY)
        os.dup2(directory, descriptor)  # reading a directory fails
        try:
            with pytest.raises(edgemoe.ReadError, match=r"tiny.emoe: read of \d+ bytes at offset \d+ failed"):
                model.logits(TOKENS)
        finally:
            os.dup2(saved, descriptor)
            os.close(saved)
            os.close(directory)
        after = model.engine.counters()
        assert [getattr(after, name) for name in READS] == [getattr(before, name) for name in READS]
        assert model.logits(TOKENS).tobytes() == expected


def test_a_replaced_file_does_not_matter(pack: Path) -> None:
    with load_with_slots(pack, 6) as model:
        expected = model.logits(TOKENS).tobytes()
        other = pack.with_name("other")
        other.write_bytes(bytes(1000))
        other.replace(pack)
        assert model.logits(TOKENS).tobytes() == expected


def test_two_models_at_once(pack: Path) -> None:
    with load_with_slots(pack, 5) as first, load_with_slots(pack, 30) as second:
        assert first.logits(TOKENS).tobytes() == second.logits(TOKENS).tobytes()
        texts = [list(m.generate(TOKENS, max_tokens=5, temperature=0, ignore_eos=True)) for m in (first, second)]
        assert texts[0] == texts[1]


@pytest.mark.slow
def test_long_generations_do_not_grow() -> None:
    process = psutil.Process()
    with load_with_slots(bundled_model(), 76, threads=1) as model:

        def generate(tokens: int) -> int:
            list(model.generate([0], max_tokens=tokens, ignore_eos=True, seed=1))
            return int(process.memory_info().rss)

        before = generate(900)
        for _ in range(3):
            after = generate(900)
    assert after - before < 4e6


CAGED = """
import os, re, sys
import edgemoe

options = {"context": 512, "threads": 2}
try:
    edgemoe.load(memory="20MB", **options)
except edgemoe.MemoryBudgetError as refusal:
    limit = (int(re.search(r"the least that works is (\\d+)MB", str(refusal))[1]) + 2) * 10**6
group = sys.argv[1]
open(group + "/memory.limit_in_bytes", "w").write(str(limit))
open(group + "/cgroup.procs", "w").write(str(os.getpid()))
with edgemoe.load(memory=limit, **options) as model:
    text = "".join(model.generate("It was", max_tokens=300, ignore_eos=True, seed=1))
    experts = sum(layer.experts for layer in model.spec.layers)
    print(limit, model.budget.expert_slots < experts, int(model.stats()["evictions"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="cgroups")
def test_the_budget_holds_under_a_hard_limit_of_that_size() -> None:
    group = Path("/sys/fs/cgroup/memory") / f"edgemoe-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup (version 1) can be made here: {error}")
    try:
        if not (group / "memory.limit_in_bytes").exists():
            pytest.skip("no memory cgroup (version 1) here")
        command = [sys.executable, "-c", CAGED, str(group)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        peak = int((group / "memory.max_usage_in_bytes").read_text())
        failures = int((group / "memory.failcnt").read_text())
    finally:
        group.rmdir()
    assert run.returncode == 0, run.stderr
    limit, streams, evictions = run.stdout.split()
    assert streams == "True"
    assert int(evictions) > 0
    assert failures == 0
    assert 0 < peak <= int(limit)
