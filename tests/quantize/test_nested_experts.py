"""Conversions with levels: what lies in the pack, that it can be run, resumed and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import tiny_qwen3_moe_gguf, write

import edgemoe
from edgemoe.convert import convert
from edgemoe.convert.plan import plan_pack
from edgemoe.errors import MemoryBudgetError, OptionError, SourceError, UnsupportedModelError
from edgemoe.formats.index import PARTS
from edgemoe.formats.layouts import packed_size, unpack_level
from edgemoe.formats.pack import Pack, PackWriter
from edgemoe.formats.safetensors import SafetensorsFolder
from edgemoe.memory import used_now
from edgemoe.quantize import nested_experts
from edgemoe.quantize.calibration import Statistics
from edgemoe.quantize.layerwise import LayerwiseModel
from edgemoe.quantize.nested import Floats, Nested
from edgemoe.quantize.nested_experts import NestedExperts, NestedOptions
from edgemoe.source import SourceModel, read_matrix

Make = Callable[..., Path]
TARGET = 15.0
PLAIN = NestedOptions(calibrate=False, threads=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    words = ["whale", "the", "sea", "of", "ship", "and", "captain", "upon", "white", "storm", "0123", "a"]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choice(words, 900)))
    return path


def expert_weights(pack: Pack, layer: int, expert: int, part: str) -> Floats:
    """What the highest stored level stands for."""
    stored = pack.index.experts[layer]
    numbers = stored.sections[expert]
    bits, levels = [], []
    for level, number in zip(stored.levels, numbers, strict=False):
        place = level.parts[part]
        size = packed_size(place.layout, *place.shape)
        data = pack.read_section(number)[place.offset : place.offset + size]
        levels.append(unpack_level(place.layout, data, *place.shape))
        bits.append(level.bits)
    return Nested.of_levels(bits, levels).weights(len(bits) - 1, place.shape[1])


def relative_error(source: Path, target: Path) -> float:
    pack, model = Pack.open(target), SourceModel.open(source)
    lost = signal = 0.0
    for layer in pack.index.experts:
        for expert in range(model.spec.layers[layer].experts):
            for part in PARTS:
                name, shape = f"layers.{layer}.experts.{expert}.{part}", model.spec.expert_tensors(layer)[part]
                exact = read_matrix(model.folder, name, model.sources[name], shape)
                lost += float(((expert_weights(pack, layer, expert, part) - exact) ** 2).sum())
                signal += float((exact**2).sum())
    return lost / signal


def test_without_calibration(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source, target = tiny_qwen3_moe(mlp_only_layers=[0]), tmp_path / "a.emoe"
    convert(source, target, nested=PLAIN)
    pack = Pack.open(target)
    assert not pack.index.quality
    assert [level.bits for level in pack.index.experts[1].levels] == [2, 3, 4]
    assert [level.parts["up"].layout for level in pack.index.experts[1].levels] == ["base2r2", "refine1", "refine1"]
    assert {len(sections) for sections in pack.index.experts[1].sections} == {3}
    assert pack.provenance["levels"] == [2, 3, 4]
    assert pack.index.dense["embedding"].layout == "q8g64"
    assert relative_error(source, target) < 0.012
    with edgemoe.load(target) as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()


@pytest.mark.slow
def test_calibrated_and_measured(tiny_qwen3_moe: Make, tmp_path: Path, text: Path) -> None:
    source, target = tiny_qwen3_moe(max_position_embeddings=64, mlp_only_layers=[0]), tmp_path / "a.emoe"
    options = NestedOptions((2, 4), calibration=text, quality_text=text, quality_tokens=256, threads=2)
    convert(source, target, nested=options)
    pack = Pack.open(target)
    assert relative_error(source, target) < 0.02
    quality = pack.index.quality
    assert quality is not None
    assert quality.text == "text.txt"
    assert quality.tokens == 4 * 31
    assert [level.bits for level in quality.levels] == [2, 4]
    assert quality.levels[1].kl < quality.levels[0].kl
    assert list(quality.modes) == ["exact", "high", "balanced", "fast"]
    exact = quality.modes["exact"]
    assert exact.thresholds == () and exact.mean_bits == 4
    assert exact.kl == quality.levels[1].kl
    previous = exact.mean_bits
    for name, budget in (("high", 0.003), ("balanced", 0.01), ("fast", 0.03)):
        mode = quality.modes[name]
        assert mode.perplexity <= exact.perplexity * (1 + budget) * (1 + 1e-9)
        assert mode.mean_bits <= previous
        previous = mode.mean_bits
        with edgemoe.load(target, quality=name) as model:
            assert model.options.quality.thresholds == mode.thresholds
    # The same text through the whole engine, at once.
    with edgemoe.load(target, level_cap=0) as coarse, edgemoe.load(target) as fine:
        tokens = coarse.tokenizer.encode(text.read_text())[:64]
        assert np.abs(coarse.logits(tokens) - fine.logits(tokens)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("target_bits", [None, TARGET])
def test_progress_goes_on_while_a_text_runs_through_the_model(
    tiny_qwen3_moe: Make, tmp_path: Path, text: Path, target_bits: float | None
) -> None:
    source, target = tiny_qwen3_moe(max_position_embeddings=64), tmp_path / "a.emoe"
    options = NestedOptions((2, 4, 8), text, True, 1024, target_bits, text, 128, threads=2)
    passes: list[int] = []  # windows that went through a layer, as of each call
    calls: list[tuple[int, int]] = []
    real = LayerwiseModel.run

    def run(model: LayerwiseModel, layer: int, tokens: Any, *rest: Any) -> Any:
        before = len(calls)
        yield from real(model, layer, tokens, *rest)
        passes.append(len({done for done, _ in calls[before - 1 :]}) - 1 - len(tokens))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerwiseModel, "run", run)
        convert(source, target, nested=options, progress=lambda done, total: calls.append((done, total)))
    assert len(passes) >= 2 * 5 and set(passes) == {0}  # every window was one step
    done = [done for done, _ in calls]
    assert len({total for _, total in calls}) == 1
    assert done == sorted(done) and done[-1] == calls[-1][1]


def test_a_gguf_file(tmp_path: Path) -> None:
    source = write(tmp_path / "a.gguf", *tiny_qwen3_moe_gguf())
    convert(source, tmp_path / "a.emoe", nested=dataclasses.replace(PLAIN, levels=(3, 6)))
    assert relative_error(source, tmp_path / "a.emoe") < 1e-3


@pytest.mark.slow
def test_target_bits(tiny_qwen3_moe: Make, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"
    # Of so small an expert much is padding.
    options = NestedOptions(calibration=text, target_bits=TARGET, threads=2)
    monkeypatch.setattr(nested_experts, "super_experts", lambda peaks: {(1, 2)})
    convert(source, target, nested=options)
    pack = Pack.open(target)
    counts = [[len(sections) for sections in layer.sections] for layer in pack.index.experts.values()]
    assert counts[1][2] == 3
    assert all(1 <= count <= 3 for layer in counts for count in layer)
    weights = 6 * 3 * 40 * 72
    for layer in pack.index.experts.values():
        stored = sum(pack.index.sections[number].length for sections in layer.sections for number in sections)
        assert stored * 8 / weights <= TARGET
    assert len({count for layer in counts for count in layer}) > 1
    with edgemoe.load(target) as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()
    with pytest.raises(OptionError, match=r"1.0 bits per weight are too few for layer 0: \d+\.\d+ is the least"):
        convert(source, tmp_path / "b.emoe", nested=dataclasses.replace(options, target_bits=1.0))
    assert sorted(path.name for path in tmp_path.iterdir() if "b.emoe" in path.name) == []


def test_errors_are_those_of_all_three_matrices(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    model = SourceModel.open(tiny_qwen3_moe())
    options = NestedOptions(target_bits=3.0, threads=1)
    experts = NestedExperts(model.folder.folder, model, options, tmp_path)
    rng = np.random.default_rng(0)
    layer, tokens = model.spec.layers[1], 50
    seen = Statistics(
        rng.standard_normal((tokens, model.spec.hidden_size)).astype(np.float32),
        rng.standard_normal((tokens, layer.top_k, layer.ffn_dim)).astype(np.float32),
        np.array([rng.permutation(layer.experts)[: layer.top_k] for _ in range(tokens)], np.int32),
        *rng.random((3, tokens, layer.top_k)).astype(np.float32),
    )
    means = {part: seen.all_experts().hessian(part) for part in ("inputs", "hidden")}
    sections, errors = experts._quantize_expert(1, 2, seen, means)
    stored: dict[str, list[Floats]] = {}
    weights: dict[str, Floats] = {}
    for part, shape in model.spec.expert_tensors(1).items():
        name = f"layers.1.experts.2.{part}"
        weights[part] = read_matrix(model.folder, name, model.sources[name], shape)
        levels = []
        for level, section in zip(experts.levels(1), sections, strict=True):
            place = level.parts[part]
            levels.append(
                unpack_level(place.layout, section[place.offset :][: packed_size(place.layout, *shape)], *shape)
            )
        made = Nested.of_levels(options.levels, levels)
        stored[part] = [made.weights(level, shape[1]) for level in range(3)]
    for level, error in enumerate(errors):
        expected = 0.0
        for name, parts in (("inputs", ("gate", "up")), ("hidden", ("down",))):
            hessian = seen.expert(2).mixed_hessian(name, means[name]).astype(np.float64)
            lost = signal = 0.0
            for part in parts:
                off = stored[part][level].astype(np.float64) - weights[part]
                lost += float(np.trace(off @ hessian @ off.T))
                signal += float(np.trace(weights[part] @ hessian @ weights[part].T))
            expected += lost / signal
        assert error == pytest.approx(expected * seen.expert(2).output_energy, rel=1e-4)


def test_as_many_experts_at_a_time_as_there_is_memory_for(
    tiny_qwen3_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SourceModel.open(tiny_qwen3_moe())
    experts = NestedExperts(model.folder.folder, model, NestedOptions(threads=3), tmp_path)
    found: list[int] = []
    for free in range(0, 10**7, 10**5):
        monkeypatch.setattr(experts, "_free", lambda free=free: free)
        try:
            found.append(experts._workers(1))
        except MemoryBudgetError:
            found.append(0)
    assert found == sorted(found) and set(found) == {0, 1, 2, 3}
    each = found.count(1)
    assert abs(found.count(2) - each) <= 1


def test_other_layouts_are_another_conversion(
    tiny_qwen3_moe: Make, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = tiny_qwen3_moe(), NestedOptions(calibration=text)
    before = plan_pack(source, None, None, options).fingerprint
    assert plan_pack(source, None, None, options).fingerprint == before
    monkeypatch.setattr(nested_experts, "level_layouts", lambda bits: ["base2r3", "refine1", "refine1"])
    assert plan_pack(source, None, None, options).fingerprint != before


@pytest.mark.slow
@pytest.mark.parametrize("target_bits", [None, TARGET])
def test_resumes_where_it_was(
    tiny_qwen3_moe: Make, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, target_bits: float | None
) -> None:
    source = tiny_qwen3_moe()
    room = 10**9
    options = NestedOptions(calibration=text, target_bits=target_bits, threads=2, memory=used_now() + room)
    convert(source, tmp_path / "whole.emoe", nested=options)
    whole = (tmp_path / "whole.emoe").read_bytes()
    other = dataclasses.replace(options, threads=1, memory=used_now() + 2 * room)
    convert(source, tmp_path / "alone.emoe", nested=other)
    assert (tmp_path / "alone.emoe").read_bytes() == whole
    sections = len(Pack.open(tmp_path / "whole.emoe").index.sections)
    add, quantize = PackWriter.add, NestedExperts._quantize_expert
    made: list[int] = []

    def count(self: NestedExperts, layer: int, expert: int, *rest: Any) -> Any:
        made.append(expert)
        return quantize(self, layer, expert, *rest)

    for stop in (sections - 1, sections - 7):
        target = tmp_path / f"cut-{stop}.emoe"

        def interrupt(writer: PackWriter, chunks: Any, stop: int = stop) -> int:
            if writer.done == stop:
                raise KeyboardInterrupt
            return add(writer, chunks)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PackWriter, "add", interrupt)
            convert(source, target, nested=options)
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(NestedExperts, "_quantize_expert", count)
            convert(source, target, nested=options)
        assert 1 <= len(made) <= 4  # those that were missing, not all twelve
        assert target.read_bytes() == whole
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": (4, 2)}, OptionError, "levels 4,2 do not ascend within 1 to 8"),
        ({"calibrate": False, "target_bits": 3.0}, OptionError, "without calibration"),
        ({"calibration": Path("gone.txt")}, OptionError, "gone.txt: No such file"),
        ({"memory": 10**6}, MemoryBudgetError, "to quantize|to run"),
    ],
)
def test_refuses(
    tiny_qwen3_moe: Make, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert(tiny_qwen3_moe(), tmp_path / "a.emoe", nested=NestedOptions(**options))
    assert not (tmp_path / "a.emoe").exists()


def test_refuses_by_name(tiny_qwen3_moe: Make, tmp_path: Path, text: Path) -> None:
    source = tiny_qwen3_moe()
    with pytest.raises(OptionError, match="exclude each other"):
        convert(source, tmp_path / "a.emoe", 4, nested=PLAIN)
    with pytest.raises(UnsupportedModelError, match="no layer has experts"):
        convert(tiny_qwen3_moe(mlp_only_layers=[0, 1]), tmp_path / "a.emoe", nested=PLAIN)
    text.write_text("too short")
    with pytest.raises(OptionError, match=r"text.txt: \d+ tokens, fewer than one window of 512"):
        convert(source, tmp_path / "a.emoe", nested=NestedOptions(calibration=text))
    folder = SafetensorsFolder.open(source)
    extent = folder.extent("model.layers.1.mlp.experts.3.up_proj.weight")
    file, offset = folder.files[extent.file], extent.offset
    data = bytearray(file.read_bytes())
    data[offset + 10 : offset + 12] = b"\xff\x7f"  # no number, in any of the types
    file.write_bytes(data)
    with pytest.raises(SourceError, match="expert 3 of layer 1: the weight"):
        convert(source, tmp_path / "a.emoe", nested=PLAIN)
