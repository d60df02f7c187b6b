"""edgemoe show: the facts of a pack, of a folder, and of a pack that wants to steer the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nested
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgemoe.cli import main
from edgemoe.convert import convert

Make = Callable[..., Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_pack(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source, target = tiny_qwen3_moe(mlp_only_layers=[0], chat_template="{{ messages }}"), tmp_path / "a.emoe"
    convert(source, target, 4)
    facts = json.loads(run("show", target, "--json").stdout)
    expected = {
        "format": "pack",
        "family": "qwen3_moe",
        "layers": 2,
        "dense_layers": 1,
        "hidden_size": 72,
        "experts": 6,
        "top_k": 2,
        "expert_dim": 40,
        "context": 512,
        "tokenizer": {"vocab_size": facts["tokenizer"]["vocab_size"], "chat_template": True},
        "levels": [{"bits": 4, "layouts": ["q4g64"]}],
        "unused": [],
    }
    assert {name: facts[name] for name in expected} == expected
    experts = 6 * 3 * 40 * 72
    assert facts["parameters"] - facts["active_parameters"] == experts * 4 // 6 + 320 * 72
    # rows padded to 16 and columns to 64, 4.5 bits each
    assert facts["bytes"]["experts"] == 6 * (2 * 48 * 128 + 80 * 64) * 9 // 16
    assert facts["bytes"]["total"] == target.stat().st_size
    assert facts["bits_per_weight"]["experts"] == round(8 * facts["bytes"]["experts"] / experts, 3)
    assert facts["provenance"]["source"] == source.name
    text = run("show", target)
    assert text.exit_code == 0
    for part in (
        "qwen3_moe",
        "2, 1 of them dense",
        "6 per layer, top 2",
        "4 bits (q4g64)",
        "with chat template",
        "nothing",
    ):
        assert part in text.stdout


def test_experts_of_several_widths_are_counted(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    convert(tiny_qwen3_moe(), tmp_path / "f.emoe", 32)
    target = nested.write_nested_pack(tmp_path / "f.emoe", tmp_path / "n.emoe", (2, 3, 4), lambda _, n: 3 if n else 1)
    facts = json.loads(run("show", target, "--json").stdout)
    assert [level["bits"] for level in facts["levels"]] == [2, 3, 4]
    assert facts["experts_by_bits"] == {"2": 2, "4": 10}
    assert "2 experts have up to 2 bits; 10 experts have up to 4 bits" in run("show", target).stdout


@pytest.mark.parametrize("stacked", [False, True])
def test_folder(tiny_qwen3_moe: Make, stacked: bool) -> None:
    source = tiny_qwen3_moe(
        dtype="F16", dtypes={"lm_head.weight": "F32"}, stacked=stacked, extra={"odd\x1b[2J": np.zeros(3, np.float32)}
    )
    facts = json.loads(run("show", source, "--json").stdout)
    assert facts["format"] == "safetensors"
    assert facts["levels"] == []
    assert facts["bytes"]["experts"] == 2 * 2 * 6 * 3 * 40 * 72
    assert facts["bits_per_weight"]["experts"] == 16
    assert set(facts["dense_layouts"]) == {"f16", "f32"}
    assert facts["unused"] == ["odd\x1b[2J"]
    text = run("show", source).stdout
    assert "\x1b" not in text
    assert "odd\ufffd[2J" in text


def test_without_a_model_the_bundled_one(tiny_qwen3_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(tiny_qwen3_moe(tokenizer=None), tmp_path / "a.emoe", 8)
    monkeypatch.setenv("EDGEMOE_MODEL", str(tmp_path / "a.emoe"))
    facts = json.loads(run("show", "--json").stdout)
    assert facts["path"] == str(tmp_path / "a.emoe")
    assert facts["tokenizer"] is None


def test_errors(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "gone", "No such file"), (tmp_path, "config.json: no such file")):
        result = run("show", path)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
