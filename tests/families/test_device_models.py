"""Whole models on a device have the logits that the processor computes, to the bit, wherever their parts lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import slow_except
from numpy.typing import NDArray
from tiny_gguf import tiny

from edgemoe import _core
from edgemoe.convert import convert
from edgemoe.engine import Engine, EngineCounters, plan_memory
from edgemoe.formats.index import ModelIndex
from edgemoe.formats.read import read_index
from edgemoe.model_files import bundled_model
from edgemoe.options import EngineOptions
from edgemoe.quantize.nested_experts import NestedOptions

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

import mixer_table
from family_table import CASES as FAMILY_CASES
from family_table import pack_maker

CASES = {**FAMILY_CASES, **mixer_table.CASES}
# Every kind of layer, and of router.
KINDS = ("qwen2_moe", "gpt_oss", "gemma4", "phimoe", "deepseek_v3", "lfm2_moe", "qwen3_next", "mixtral, with a window")
BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4")
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Run:
    """A prompt in chunks, two sequences at once, one of them forked, tokens one by one, a part forgotten and another
    way taken."""

    index: ModelIndex
    options: EngineOptions

    def logits(self, device: _core.Device | None = None, **options: Any) -> tuple[Logits, EngineCounters]:
        chosen = replace(self.options, **options)
        engine = Engine(self.index, chosen, device)
        tokens = np.random.default_rng(5).integers(2, self.index.spec.vocab_size, 60).tolist()
        found = [engine.forward(tokens[:19], range(19), [0] * 19, [3, 17, 18])]
        other = engine.fork(0, 19)
        for i in range(19, 23):
            both = [tokens[i], tokens[i + 20]]
            found.append(engine.forward(both, [i, i], [0, other], [0, 1]))
        engine.remove_sequence(other)
        engine.truncate(0, 0)
        kept = engine.forward(tokens[30:36], range(6), [0] * 6, [5])
        snapshot = engine.snapshot(0)
        engine.forward(tokens[:2], [6, 7], [0, 0], [])
        engine.restore(0, snapshot)
        found += [kept, engine.forward(tokens[40:42], [6, 7], [0, 0], [0, 1])]
        counters = engine.counters()
        engine.close()
        return np.concatenate(found), counters


def run_of(index: ModelIndex, **options: Any) -> Run:
    usual = EngineOptions(threads=1, context=64, sequences=2, positions=128, chunk=8, expert_slots=1000)
    return Run(replace(index, spec=index.spec.for_context(usual.context)), replace(usual, **options))


def placements(run: Run) -> Iterator[dict[str, int]]:
    layers = len(run.index.spec.layers)
    experts = plan_memory(run.index, replace(run.options, device_layers=layers)).device_experts
    yield {"device_layers": 1}
    yield {"device_layers": layers}
    for share in (0, 0.1, 0.5, 1):
        yield {"device_layers": layers + 1, "device_slots": round(share * experts)}


def check(run: Run, orders: tuple[str, ...] = ("ascending", "descending", "shuffled")) -> None:
    expected, _ = run.logits()
    assert np.isfinite(expected).all()
    for number, placement in enumerate(placements(run)):
        order: Any = orders[number % len(orders)]
        device = _core.Device("emulated", order=order, seed=number, eager=number % 2 == 1)
        found, counters = run.logits(device, **placement)
        assert found.tobytes() == expected.tobytes(), placement
        assert 0 <= counters.device_hits <= counters.expert_uses
    if placement["device_slots"]:  # room for all experts that there are
        assert counters.device_hits > 0 and counters.device_uploads > 0


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return pack_maker(CASES, 8, tmp_path_factory)


@pytest.mark.parametrize("name", slow_except(CASES, *KINDS))
def test_families(name: str, packs: Callable[[str], Path]) -> None:
    check(run_of(read_index(packs(name))))


@pytest.mark.parametrize("types", slow_except([("f32", "f16"), ("f16", "q8_0"), ("q8_0", "q8_0")], ("q8_0", "q8_0")))
def test_types_of_states(types: tuple[str, str], tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    convert(tiny_qwen3_moe(head_dim=32), tmp_path / "a.emoe", 8)
    check(run_of(read_index(tmp_path / "a.emoe"), cache_type_k=types[0], cache_type_v=types[1]))


@pytest.mark.slow
def test_the_bundled_model() -> None:
    check(run_of(read_index(bundled_model())))


@pytest.mark.parametrize("bits", slow_except([4, 8, 16, 32], 4))
def test_packs(bits: int, tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    convert(tiny_qwen3_moe(), tmp_path / "a.emoe", bits, dense_bits=bits if bits != 4 else 16)
    check(run_of(read_index(tmp_path / "a.emoe")))


@pytest.mark.parametrize("cap", [None, 0, 1])
def test_nested_packs(cap: int | None, tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    convert(tiny_qwen3_moe(), tmp_path / "a.emoe", nested=NestedOptions((2, 3, 4), calibrate=False, threads=1))
    run = run_of(read_index(tmp_path / "a.emoe"))
    quality = replace(run.options.quality, level_cap=cap, thresholds=() if cap is not None else (0.2, 0.4))
    check(Run(run.index, replace(run.options, quality=quality)))


@pytest.mark.parametrize("kind", slow_except(BLOCKS, "q4_k", "mxfp4"))
def test_blocks_of_gguf_files(kind: str, tmp_path: Path) -> None:
    check(run_of(read_index(tiny(tmp_path, kind, hidden=256, ffn=256))))


def test_experts_come_and_go(packs: Callable[[str], Path]) -> None:
    """Hits, and uploads, of a stream of single tokens with too few slots; the same text again has more of them."""
    index = read_index(packs("qwen2_moe"))
    run = run_of(index)
    layers = len(index.spec.layers)
    tokens = np.random.default_rng(3).integers(2, index.spec.vocab_size, 40).tolist()

    def generate(device: _core.Device | None, **options: int) -> tuple[bytes, EngineCounters]:
        engine = Engine(index, replace(run.options, **options), device)
        steps = [engine.forward([token], [i], [0], [0]).tobytes() for i, token in enumerate(tokens)]
        counters = engine.counters()
        engine.close()
        return b"".join(steps), counters

    expected, _ = generate(None)
    hits = []
    for slots in (1, 5, 1000):
        found, counters = generate(_core.Device("emulated"), device_layers=layers + 1, device_slots=slots)
        assert found == expected
        assert counters.device_uploads > 0 and counters.device_upload_bytes > 0
        hits.append(counters.device_hits)
    assert hits == sorted(hits) and hits[-1] > hits[0]
