"""`edgemoe profile` on a model that it runs itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from edgemoe.cli import main
from edgemoe.convert import convert
from edgemoe.profiling import read_trace


def test_a_model_is_run_on_texts(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    pack = tmp_path / "tiny.emoe"
    convert(tiny_qwen3_moe(num_hidden_layers=3, mlp_only_layers=[1]), pack, 8)
    for name, text in (("one", "the cat sat on the mat, " * 20), ("two", "0123456789 " * 20)):
        (tmp_path / f"{name}.txt").write_text(text)
    texts = [option for name in ("one", "two") for option in ("-f", str(tmp_path / f"{name}.txt"))]
    saved = tmp_path / "trace"
    run = CliRunner().invoke(main, ["profile", str(pack), *texts, "-n", "100", "--save", str(saved), "--json"])
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    assert [part["name"] for part in found["parts"]] == ["one", "two"]
    assert found["experts"] == [6, 6]
    trace = read_trace(saved)
    assert trace.tokens == found["tokens"] <= 200
    assert trace.weights is not None
    assert found["layers"][0]["predicted"] is None
    assert 0 <= found["layers"][1]["predicted"] <= 1


def test_a_model_without_a_text_is_refused(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_qwen3_moe()
    (tmp_path / "pack.emoe").write_bytes(b"EMOE" + bytes(100))
    for model in (folder, tmp_path / "pack.emoe"):
        run = CliRunner().invoke(main, ["profile", str(model)])
        assert run.exit_code == 1
        assert "--text" in run.stderr
