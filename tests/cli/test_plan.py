"""`edgemoe plan`: sizes from headers, and what they would mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nested
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgemoe.cli import main
from edgemoe.convert import convert
from edgemoe.formats.index import LevelQuality, MeasuredQuality, ModeQuality
from edgemoe.formats.pack import Pack
from edgemoe.planning import plan_model
from edgemoe.profiling import Trace

SPEEDS = ("--disk", "1GB", "--bandwidth", "10GB")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


@pytest.fixture(name="models")
def _models(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    folder = tiny_qwen3_moe()
    convert(folder, tmp_path / "m.emoe", 8)
    return folder, tmp_path / "m.emoe"


def test_a_folder_is_planned_as_the_pack_it_becomes(models: tuple[Path, Path]) -> None:
    found = [json.loads(run(str(path), "-M", "1GB", "--json", *SPEEDS).stdout) for path in models]
    for name in ("dense", "experts", "expert", "active", "state", "parameters", "context"):
        assert found[0][name] == found[1][name], name
    pack = Pack.open(models[1])
    layers = [number for number, layer in enumerate(pack.index.spec.layers) if layer.experts]
    assert found[1]["experts"] == sum(
        pack.index.sections[levels[0]].length for number in layers for levels in pack.index.experts[number].sections
    )
    assert found[1]["disk_speed"] == 10**9


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_configuration_alone_is_enough(models: tuple[Path, Path], bits: int) -> None:
    folder, _ = models
    whole = json.loads(run(str(folder), "-M", "1GB", "--bits", str(bits), "--json", *SPEEDS).stdout)
    alone = folder.with_name("alone")
    alone.mkdir()
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    for path in (alone, alone / "config.json"):
        found = json.loads(run(str(path), "-M", "1GB", "--bits", str(bits), "--json", *SPEEDS).stdout)
        assert (found["parameters"], found["state"]) == (whole["parameters"], whole["state"])
        # Of a tiny model much is padding, of which there is a little more or less.
        assert found["experts"] == pytest.approx(whole["experts"], rel=0.3 if bits == 16 else 0)
        assert found["dense"] == pytest.approx(whole["dense"], rel=0.5)
    (alone / "config.json").write_text('{"model_type": "unheard_of"}')
    result = run(str(alone), "-M", "1GB", *SPEEDS)
    assert result.exit_code == 1
    assert "config.json: model_type = 'unheard_of' is not supported" in result.stderr


def test_more_memory_means_more_speed(models: tuple[Path, Path]) -> None:
    plan = plan_model(models[1], memory=10**9, disk=1e9, bandwidth=1e10)
    assert plan.least <= plan.sensible <= plan.everything
    assert [speed.memory for speed in plan.speeds] == sorted(speed.memory for speed in plan.speeds)
    rates = [speed.hit_rate for speed in plan.speeds]
    assert rates == sorted(rates)
    assert rates[-1] == (1, 1)
    assert plan.speeds[-1].bytes_per_token == (0, 0)
    speeds = [speed.tokens_per_second for speed in plan.speeds]
    assert all(speed is not None and 0 < speed[0] <= speed[1] for speed in speeds)
    assert speeds[-1] is not None
    assert speeds[-1][0] == speeds[-1][1] == plan.speeds[-1].expected == pytest.approx(7.5e9 / plan.active)
    for speed in plan.speeds:
        assert speed.expected and speed.tokens_per_second
        assert speed.tokens_per_second[0] <= speed.expected <= speed.tokens_per_second[1]


def test_measured_modes_read_and_compute_less(models: tuple[Path, Path], tmp_path: Path) -> None:
    folder, one_level = models
    floats = tmp_path / "f.emoe"
    convert(folder, floats, 32)
    widths = {"exact": 4.0, "high": 3.0, "fast": 2.0}

    def quality(modes: dict[str, float]) -> MeasuredQuality:
        levels = tuple(LevelQuality(bits, 9.0, 0.1) for bits in (2, 3, 4))
        return MeasuredQuality(
            "t", 100, 9.0, levels, {name: ModeQuality((), 9.0, 0.1, bits) for name, bits in modes.items()}
        )

    # A mode of no bits, and one of more than there are, are not foretold.
    cases = (
        None,
        quality(widths),
        quality({"exact": 4.0, "high": 0.0, "fast": 5.0}),
        quality({"exact": 0.0, "high": 0}),
    )
    packs = [nested.write_nested_pack(floats, tmp_path / f"{n}.emoe", quality=case) for n, case in enumerate(cases)]
    plans = [plan_model(path, memory=10**9, disk=1e9, bandwidth=1e10) for path in packs]
    assert plans[0].qualities == plans[2].qualities == plans[3].qualities == {}
    plan = plans[1]
    assert list(plan.qualities) == ["high", "fast"]
    for name, speeds in plan.qualities.items():
        share = widths[name] / 4
        for speed, exact in zip(speeds, plan.speeds, strict=True):
            assert (speed.memory, speed.slots) == (exact.memory, exact.slots)
            assert speed.expected and exact.expected and speed.expected > exact.expected
            assert speed.hit_rate[0] >= exact.hit_rate[0]
            assert speed.bytes_per_token[1] <= share * exact.bytes_per_token[1]
        # With everything in memory only the arithmetic counts: all dense weights, and the share of the experts.
        experts = sum(layer.top_k for layer in Pack.open(packs[1]).index.spec.layers) * plan.expert
        assert speeds[-1].expected == pytest.approx(7.5e9 / (plan.active - (1 - share) * experts))
    for path, expected in ((packs[1], True), (packs[0], False), (one_level, False)):
        assert ("fast, tokens/s" in run(str(path), "-M", "1GB", *SPEEDS).stdout) == expected
    assert set(json.loads(run(str(packs[1]), "-M", "1GB", "--json", *SPEEDS).stdout)["qualities"]) == {"high", "fast"}


def test_what_does_not_fit_says_what_would(models: tuple[Path, Path]) -> None:
    result = run(str(models[1]), "-M", "1MB", *SPEEDS)
    assert result.exit_code == 1
    assert "the least that works is" in result.stderr
    assert result.stderr.count("\n") == 1


def test_hit_rates_come_from_a_trace(models: tuple[Path, Path], tmp_path: Path) -> None:
    spec = Pack.open(models[1]).index.spec
    rng = np.random.default_rng(0)
    columns = [
        np.argsort(rng.random((50, layer.experts)), axis=1)[:, : layer.top_k] for layer in spec.layers if layer.experts
    ]
    fields: dict[str, Any] = {
        "experts": tuple(layer.experts for layer in spec.layers),
        "top_k": tuple(layer.top_k for layer in spec.layers),
        "part": np.zeros(50, np.int32),
        "position": np.arange(50, dtype=np.int32),
        "ids": np.concatenate(columns, axis=1).astype(np.uint16),
    }
    Trace("t", "", parts=("a",), **fields).save(tmp_path / "trace")
    result = run(str(models[1]), "--trace", str(tmp_path / "trace"), "-M", "1GB", "--json", *SPEEDS)
    plan = json.loads(result.stdout)
    assert plan["source"] == "trace of t"
    assert all(speed["hit_rate"][0] == speed["hit_rate"][1] for speed in plan["speeds"])
    fields["experts"] = tuple(count + 1 if count else 0 for count in fields["experts"])
    Trace("t", "", parts=("a",), **fields).save(tmp_path / "trace")
    result = run(str(models[1]), "--trace", str(tmp_path / "trace"), "-M", "1GB", *SPEEDS)
    assert result.exit_code == 1
    assert "another model" in result.stderr


def test_for_people(models: tuple[Path, Path]) -> None:
    result = run(str(models[1]), "-M", "1GB", *SPEEDS)
    assert result.exit_code == 0, result.stderr
    for words in ("all of it fits", "least --memory", "tokens/s", "published range"):
        assert words in result.stdout
    assert run(str(models[1]), "-M", "1GB", "-c", "999999999", *SPEEDS).exit_code == 1
    assert run(str(models[1]), "--disk", "auto", "-M", "1GB").exit_code == 1
    assert run(str(models[1].with_name("none"))).exit_code == 1


def test_with_a_gpu_that_need_not_be_there(models: tuple[Path, Path]) -> None:
    def plan(*arguments: str) -> dict[str, Any]:
        result = run(str(models[1]), "-M", "1GB", "--json", *SPEEDS, *arguments)
        assert result.exit_code == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    alone = plan()
    assert (alone["device"], alone["device_name"], alone["layers"]) == (None, None, 2)
    placed = plan("--gpu", "cuda", "--vram", "100MB")
    assert (placed["device"]["layers"], placed["device"]["slots"], placed["device_name"]) == (3, 12, "the GPU")
    assert placed["least"] < alone["least"]
    assert placed["state"] == alone["state"]
    assert placed["speeds"][0]["expected"] is None and alone["speeds"][0]["expected"] > 0  # nobody knows
    one = plan("--gpu", "cuda", "--vram", "100MB", "-ngl", "1")
    assert (one["device"]["layers"], one["device"]["all_slots"]) == (1, 6)
    assert plan("--gpu", "cuda", "--vram", "1MB")["device"]["layers"] == 0
    assert plan("--gpu", "none", "--vram", "100MB")["device"] is None
    assert plan("--gpu", "emulated")["device_name"] == "emulated"
    result = run(str(models[1]), "-M", "1GB", *SPEEDS, "--gpu", "cuda", "--vram", "100MB", "-ngl", "99")
    assert "on the GPU, with 100 MB: 2 of 2 layers and the head (" in result.stdout
    assert "12 of 12 experts" in result.stdout and "how fast the GPU is was not measured" in result.stdout
    result = run(str(models[1]), "-M", "1GB", *SPEEDS, "--gpu", "cuda", "--vram", "1MB", "-ngl", "2")
    assert result.exit_code == 1 and "the least that works is --vram " in result.stderr
    result = run(str(models[1]), "-M", "1GB", *SPEEDS, "--gpu", "cuda", "--vram", "1MB")
    assert "nothing, not even one layer fits" in result.stdout
    assert "--gpu cuda: no NVIDIA driver" in run(str(models[1]), *SPEEDS, "--gpu", "cuda").stderr
    assert run(str(models[1]), *SPEEDS, "-ngl", "some").exit_code == 2
