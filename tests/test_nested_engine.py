"""Experts stored in levels: what is read, kept and computed of them, and that no bit of a result depends on it."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nested
import numpy as np
import pytest
from helpers import finished, slow_except
from reference import PackWeights, ReferenceModel

import edgemoe
from edgemoe.convert import convert
from edgemoe.errors import OptionError, ReadError
from edgemoe.formats.index import LevelQuality, MeasuredQuality, ModeQuality
from edgemoe.formats.layouts import packed_size
from edgemoe.formats.pack import Pack
from edgemoe.formats.read import read_index
from edgemoe.loading import load_engine
from edgemoe.model import Model
from edgemoe.model_files import bundled_model
from edgemoe.options import EVICTION_POLICIES, LoadOptions, Quality

TOKENS = np.random.default_rng(8).integers(0, 320, 24).tolist()
LAYERS, EXPERTS, TOP_K = 3, 12, 3
THRESHOLDS = [0.4, 0.7]
BLOCK = 4096


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with float32 experts, which the nested ones are made of."""
    from helpers import byte_level_tokenizer, write_tiny_qwen3_moe

    folder = tmp_path_factory.mktemp("nested")
    sizes = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    write_tiny_qwen3_moe(folder / "tiny", tokenizer=byte_level_tokenizer(), **sizes)
    convert(folder / "tiny", folder / "floats.emoe", 32)
    return folder / "floats.emoe"


@pytest.fixture(scope="module")
def pack(floats: Path) -> Path:
    """Levels of 2, 3 and 4 bits."""
    return nested.write_nested_pack(floats, floats.with_name("nested.emoe"))


@pytest.fixture(scope="module")
def mixed(floats: Path) -> Path:
    """Experts of 1, 2 or 3 levels."""
    return nested.write_nested_pack(
        floats, floats.with_name("mixed.emoe"), (2, 3, 4), lambda layer, expert: (layer + expert) % 3 + 1
    )


def load(path: Path, slots: int | None = None, readers: int = 2, jitter: int = 0, **options: Any) -> Model:
    """Loads with so many expert slots, threads that read, and delays of what they have read (microseconds)."""
    return edgemoe.load(path, expert_slots=slots, readers=readers, arrival_jitter_us=jitter, **options)


def passes(model: Model) -> bytes:
    """Logits of a prompt, then of single tokens after it."""
    prompt = model.logits(TOKENS).tobytes()
    return prompt + b"".join(model.next_logits(TOKENS[: n + 1]).tobytes() for n in range(6, 14))


class NestedWeights(PackWeights):
    """The weights of a nested pack at one level, or at the finest of each expert."""

    def __init__(self, pack: Pack, level: int = 99) -> None:
        super().__init__(pack)
        self.level = level

    def tensor(self, name: str) -> tuple[str, Any]:
        if ".experts." not in name:
            return super().tensor(name)
        _, layer, _, expert, part = name.split(".")
        table = self.pack.index.experts[int(layer)]
        bits = [level.bits for level in table.levels]
        sections = table.sections[int(expert)][: self.level + 1]
        data = []
        for level, section in zip(table.levels, sections, strict=False):
            place = level.parts[part]
            size = packed_size(place.layout, *place.shape)
            data.append(np.frombuffer(self.pack.read_section(section), np.uint8)[place.offset : place.offset + size])
        return "nested", nested.dequantize(bits, data, *table.levels[0].parts[part].shape)


# -- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ladder", slow_except([(2, 3, 4), (2, 4), (3, 5, 8), (1, 2, 3, 4, 5, 6, 7, 8), (4,)]))
def test_exact_logits_equal_the_numpy_reference(floats: Path, tmp_path: Path, ladder: Sequence[int]) -> None:
    path = nested.write_nested_pack(floats, tmp_path / "nested.emoe", ladder)
    expected = ReferenceModel(NestedWeights(Pack.open(path))).logits(np.asarray(TOKENS))
    with load(path, cache_type_k="f32", cache_type_v="f32") as model:
        difference = np.abs(model.logits(TOKENS) - expected) / (expected.max() - expected.min())
    # Where activations become int8 codes, a last-bit difference before the rounding is now and then a code after it.
    assert difference.max() < 2e-2
    assert difference.mean() < 5e-4


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_cap_makes_every_expert_that_coarse(mixed: Path, level: int) -> None:
    weights = NestedWeights(Pack.open(mixed), level)
    expected = ReferenceModel(weights).logits(np.asarray(TOKENS))
    with load(mixed, level_cap=level, cache_type_k="f32", cache_type_v="f32") as model:
        difference = np.abs(model.logits(TOKENS) - expected) / (expected.max() - expected.min())
        assert difference.mean() < 5e-4
        counters = model.engine.counters()
        assert 2 <= counters.expert_bits / counters.expert_uses <= 2 + level
        assert (level == 0) == (counters.expert_bits == 2 * counters.expert_uses)


@pytest.mark.parametrize("which", slow_except(["pack", "mixed"]))
@pytest.mark.parametrize("thresholds", [[], THRESHOLDS], ids=["exact", "lossy"])
def test_no_bit_depends_on_memory_threads_or_arrival(
    which: str, thresholds: list[float], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(which)
    with load(path, thresholds=thresholds, prefetch=False, threads=1) as model:
        expected = passes(model)
    randomness = random.Random(1)
    for eviction in EVICTION_POLICIES:
        for slots in (TOP_K, 8, 16):
            options = {
                "prefetch": randomness.random() < 0.7,
                "threads": randomness.randint(1, 3),
                "readers": randomness.randint(1, 6),
                "jitter": randomness.choice([0, 300]),
            }
            with load(path, slots, eviction=eviction, thresholds=thresholds, **options) as model:
                assert passes(model) == expected, (eviction, slots, options)
                assert model.engine.counters().evictions > 0


def test_the_chunks_of_a_prompt_do_not_matter(pack: Path) -> None:
    with load(pack, thresholds=THRESHOLDS) as model:
        whole = model.logits(TOKENS)
        single = [model.next_logits(TOKENS[: n + 1]).tobytes() for n in range(len(TOKENS))]
    assert [row.tobytes() for row in whole] == single


# -- which level, and what is read for it ---------------------------------------------------------------------------


def step_by_step(model: Model, trace: Path) -> tuple[dict[str, float], list[list[tuple[int, int, int]]]]:
    """Computes TOKENS one by one. Gives the counters and, for each token, the (layer, expert, level) that the rule of
    the thresholds makes of the router's choice."""
    from edgemoe.profiling.trace import read_trace

    with model.trace(trace):
        for n in range(len(TOKENS)):
            model.next_logits(TOKENS[: n + 1])
    experts = Pack.open(model.path).index.experts
    steps = []
    recorded = read_trace(trace)
    for picks, weights in zip(recorded.ids.tolist(), recorded.weights.astype(np.float64), strict=True):
        step = []
        for layer in range(LAYERS):
            columns = slice(layer * TOP_K, (layer + 1) * TOP_K)
            share = 0.0
            for expert, weight in zip(picks[columns], weights[columns] / weights[columns].sum(), strict=True):
                finest = len(experts[layer].sections[expert]) - 1
                level = finest - sum(share > threshold for threshold in model.options.quality.thresholds)
                step.append((layer, expert, max(level, 0)))
                share += weight
        steps.append(step)
    return model.engine.counters(), steps


@pytest.mark.parametrize("thresholds", [[], THRESHOLDS, [0.5]], ids=str)
@pytest.mark.parametrize("which", ["pack", "mixed"])
def test_levels_follow_the_rule_and_missing_sections_are_read_once(
    which: str, thresholds: list[float], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(which)
    opened = Pack.open(path)
    with load(path, thresholds=thresholds, prefetch=False) as model:
        counters, steps = step_by_step(model, tmp_path / "steps.trace")
    bits = sum(opened.index.experts[layer].levels[level].bits for step in steps for layer, _, level in step)
    assert (counters.expert_uses, counters.expert_bits) == (len(TOKENS) * LAYERS * TOP_K, bits)
    held: dict[tuple[int, int], int] = {}
    hits = refined = sections = size = 0
    for layer, expert, level in (use for step in steps for use in step):
        present = held.get((layer, expert), 0)
        hits += present > level
        refined += 0 < present <= level
        for missing in range(present, level + 1):
            sections += 1
            size += opened.index.sections[opened.index.experts[layer].sections[expert][missing]].length
        held[layer, expert] = max(present, level + 1)
    assert (refined > 0) == bool(thresholds)  # a base that is there is not read again
    assert counters.experts_hit == hits
    assert (counters.sections_read, counters.bytes_read) == (sections, size)


@pytest.mark.parametrize("slots", [None, 6], ids=["all in memory", "few"])
@pytest.mark.parametrize("own", [[], THRESHOLDS], ids=["exact", "lossy"])
@pytest.mark.parametrize("which", ["pack", "mixed"])
def test_rows_have_qualities_of_their_own(
    which: str, own: list[float], slots: int | None, request: pytest.FixtureRequest
) -> None:
    """Sequences of different qualities in one batch: each has the bits of a model of its quality, whatever the engine's
    own is and in whatever company."""
    path = request.getfixturevalue(which)
    qualities = [Quality(), Quality(thresholds=tuple(THRESHOLDS)), Quality(level_cap=0)]
    expected = []
    for quality in qualities:
        with load(path, thresholds=quality.thresholds, level_cap=quality.level_cap) as model:
            expected.append(model.logits(TOKENS).tobytes())
    assert len(set(expected)) == len(qualities)
    count = len(TOKENS)
    rows = np.random.default_rng(1).permutation(np.repeat(np.arange(len(qualities)), count))
    positions = np.empty(len(rows), np.int64)
    for number in range(len(qualities)):
        positions[rows == number] = np.arange(count)
    with load(path, slots, thresholds=own, parallel=len(qualities)) as model:
        tokens = np.asarray(TOKENS)[positions]
        logits = model.forward(tokens, positions, rows, np.arange(len(rows)), qualities=qualities, quality=rows)
        for number in range(len(qualities)):
            assert logits[rows == number].tobytes() == expected[number], qualities[number]
        with pytest.raises(ValueError, match="quality 3 is not one of the 3 that are given"):
            model.forward([1], [count], [0], [0], qualities=qualities, quality=[3])
    # Where only some rows are wanted, the last layer computes these alone: each keeps its own quality.
    wanted = np.arange(len(rows))[1::2]
    with load(path, slots, thresholds=own, parallel=len(qualities)) as model:
        some = model.forward(tokens, positions, rows, wanted, qualities=qualities, quality=rows)
    assert some.tobytes() == logits[wanted].tobytes()


def test_thresholds_below_everything_take_the_first_expert_too(pack: Path) -> None:
    with load(pack, thresholds=[-1.0, -1.0]) as model:
        fast = model.logits(TOKENS).tobytes()
    with load(pack, level_cap=0) as model:
        assert model.logits(TOKENS).tobytes() == fast


def test_counters_add_up(pack: Path) -> None:
    with load(pack, 10, thresholds=THRESHOLDS) as model:
        deadline = time.monotonic() + 30
        passes(model)
        # Beside a model so small reading ahead hardly pays: it is tried now and then.
        while model.engine.counters().prefetch_issued == 0 and time.monotonic() < deadline:
            passes(model)
        while True:
            c = model.engine.counters()
            unused = c.prefetch_issued - c.prefetch_used - c.prefetch_late - c.prefetch_wasted
            if unused >= 0 or time.monotonic() > deadline:
                break
    assert c.prefetch_issued > 0
    assert 0 <= unused <= 10 * 4
    assert c.experts_hit < c.experts_requested
    assert c.bytes_read % BLOCK == 0 and c.sections_read > c.evictions


def test_residency_counts_levels(mixed: Path) -> None:
    """Of experts with 1, 2 or 3 levels, read as far as they were needed."""
    most = np.add.outer(np.arange(LAYERS), np.arange(EXPERTS)) % 3 + 1
    for options, allowed in (({}, {0, 1, 2, 3}), ({"level_cap": 0}, {0, 1})):
        with edgemoe.load(mixed, expert_slots=LAYERS * EXPERTS, prefetch=False, **options) as model:
            model.logits(TOKENS)
            levels, reads = model.engine.residency()
            sections = model.engine.counters().sections_read
        assert set(np.unique(levels).tolist()) <= allowed and levels.sum() == sections
        assert np.array_equal(levels > 0, reads > 0)
        if not options:
            np.testing.assert_array_equal(levels[levels > 0], most[levels > 0])


def test_memory_holds_more_coarse_experts_than_whole_ones(pack: Path, tmp_path: Path) -> None:
    evictions = {}
    for cap in (0, 2):
        with load(pack, EXPERTS * LAYERS // 2, prefetch=False, level_cap=cap) as model:
            counters, _ = step_by_step(model, tmp_path / "steps.trace")
            evictions[cap] = counters.evictions
    assert evictions[0] == 0 < evictions[2]


def test_a_damaged_refinement_is_named(pack: Path, tmp_path: Path) -> None:
    opened = Pack.open(pack)
    damaged = tmp_path / "damaged.emoe"
    data = bytearray(pack.read_bytes())
    for sections in opened.index.experts[1].sections:
        data[opened.index.sections[sections[1]].extents[0].offset + 5] ^= 1
    damaged.write_bytes(data)
    with load(damaged) as model:
        for _ in range(2):
            with pytest.raises(ReadError, match=r"layer 1 expert \d+ level 1 at offset \d+ is damaged"):
                model.logits(TOKENS)
    with load(damaged, level_cap=0) as model, load(pack, level_cap=0) as other:
        assert model.logits(TOKENS).tobytes() == other.logits(TOKENS).tobytes()


# -- memory ---------------------------------------------------------------------------------------------------------


def test_everything_fits_into_the_slots_that_a_plan_names(mixed: Path, pack: Path) -> None:
    for path in (pack, mixed):
        with load(path, prefetch=False) as model:
            assert model.budget.expert_slots < LAYERS * EXPERTS or path == pack
            for seed in range(12):
                model.logits(np.random.default_rng(seed).integers(0, 320, 64))
            counters = model.engine.counters()
            assert counters.evictions == 0
            sections = {s for layer in Pack.open(path).index.experts.values() for row in layer.sections for s in row}
            assert counters.sections_read <= len(sections)


def test_experts_that_are_always_whole_waste_no_memory() -> None:
    opened = Pack.open(bundled_model())
    rows = [row for layer in opened.index.experts.values() for row in layer.sections]
    whole = {sum(opened.index.sections[section].length for section in row) for row in rows}
    with (
        load(opened.index.path) as exact,
        load(opened.index.path, quality="high") as high,
        load(opened.index.path, level_cap=1) as capped,
    ):
        assert {exact.budget.slot_bytes} == whole
        assert exact.budget.all_slots == len(rows)
        assert exact.budget.slot_bytes < high.budget.slot_bytes == capped.budget.slot_bytes


def test_the_least_memory_is_one_tokens_experts(pack: Path) -> None:
    with load(pack, TOP_K, prefetch=True, jitter=200, readers=4) as model:
        assert len(passes(model)) > 0


# -- names ----------------------------------------------------------------------------------------------------------


def test_refusals(pack: Path, floats: Path) -> None:
    for mode in ("high", "balanced", "fast"):
        with pytest.raises(OptionError, match=f"floats.emoe: quality '{mode}': all experts are stored at one prec"):
            edgemoe.load(floats, quality=mode)
        with pytest.raises(OptionError, match=f"nested.emoe: quality '{mode}': the pack does not say what was meas"):
            edgemoe.load(pack, quality=mode)
    with pytest.raises(OptionError, match="quality = 'best' is not one of exact, high, balanced, fast"):
        edgemoe.load(pack, quality="best")
    with pytest.raises(OptionError, match="quality 'fast' and thresholds exclude each other"):
        edgemoe.load(pack, quality="fast", thresholds=[0.5])
    for wrong in (0.5, ["a"]):
        with pytest.raises(OptionError, match="are not a list of numbers"):
            edgemoe.load(pack, thresholds=wrong)
    with pytest.raises(OptionError, match="3 thresholds for experts of 3 levels"):
        edgemoe.load(pack, thresholds=[0.1, 0.2, 0.3])
    with pytest.raises(OptionError, match="1 thresholds for experts of 1 levels"):
        edgemoe.load(floats, thresholds=[0.5])
    for wrong in ([0.5, 0.4], [float("nan")], [1.5]):
        with pytest.raises(OptionError, match="do not ascend from -1 to 1 at most"):
            edgemoe.load(pack, thresholds=wrong)
    for cap, why in ((-1, "level_cap = -1 is not at least 0"), (3, "level_cap 3: its highest level is 2")):
        with pytest.raises(OptionError, match=why):
            edgemoe.load(pack, level_cap=cap)


@pytest.mark.parametrize(
    "layouts",
    [
        ("base2r1", "refine1", "refine1"),  # parameters of one later level only
        ("base2r3", "refine1", "refine1"),
        ("base2r2", "refine1", "base1r0"),
        ("refine2", "refine1", "refine1"),
        ("base2r2", "refine1", "q4g64"),
        ("base3r2", "refine3", "refine3"),
    ],
)
def test_levels_that_do_not_go_together_are_refused(layouts: Sequence[str], pack: Path) -> None:
    index = read_index(pack)
    layer = index.experts[1]
    levels = [
        dataclasses.replace(
            level, parts={name: dataclasses.replace(part, layout=layout) for name, part in level.parts.items()}
        )
        for layout, level in zip(layouts, layer.levels, strict=True)
    ]
    changed = {**index.experts, 1: dataclasses.replace(layer, levels=tuple(levels))}
    with pytest.raises(OptionError, match="an expert of layer 1 has levels that are not nested"):
        load_engine(dataclasses.replace(index, experts=changed), LoadOptions())


def test_modes_are_the_packs_thresholds(floats: Path, tmp_path: Path) -> None:
    thresholds = {"exact": (), "high": (0.7,), "fast": (-1.0, 0.3)}
    modes = {name: ModeQuality(values, 10.0, 0.1, 4.0) for name, values in thresholds.items()}
    quality = MeasuredQuality("text", 100, 9.0, (LevelQuality(4, 10.0, 0.1),), modes)
    pack = nested.write_nested_pack(floats, tmp_path / "measured.emoe", quality=quality)
    with edgemoe.load(pack, quality="high") as model:
        assert model.quality == "high" and model.options.quality.thresholds == (0.7,)
        high = model.logits(TOKENS).tobytes()
        result = finished(model.generate(TOKENS, max_tokens=3, ignore_eos=True, seed=1))
        assert 3 < model.stats(result)["mean_bits"] < 4
    with edgemoe.load(pack, thresholds=[0.7]) as model:
        assert model.logits(TOKENS).tobytes() == high
    with pytest.raises(OptionError, match="quality 'balanced': the pack does not say"):
        edgemoe.load(pack, quality="balanced")
    with edgemoe.load(pack) as model:
        assert model.options.quality.thresholds == () and model.logits(TOKENS).tobytes() != high
        result = finished(model.generate(TOKENS, max_tokens=3, ignore_eos=True, seed=1))
        assert model.stats(result)["mean_bits"] == 4
