"""edgemoe convert: exit status, what it prints, what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import edgemoe.convert.sections
from edgemoe.cli import main
from edgemoe.formats.pack import Pack

Make = Callable[..., Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_converts(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"
    result = run("convert", source, target)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr.startswith(f"{target}: ")
    assert "\x1b" not in result.stderr  # a progress bar is for terminals
    pack = Pack.open(target)
    assert (pack.provenance["bits"], pack.provenance["dense_bits"]) == (4, 8)
    assert run("convert", source, tmp_path / "b.emoe", "--bits", "16", "--dense-bits", "32").exit_code == 0
    assert Pack.open(tmp_path / "b.emoe").index.dense["embedding"].layout == "f32"


@pytest.mark.slow
def test_levels(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source, target, text = tiny_qwen3_moe(), tmp_path / "a.emoe", tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    arguments = ["--calibration", text, "--quality-text", text, "--quality-tokens", 512, "-M", "4GB", "-t", 1]
    result = run("convert", source, target, "--levels", "3,5", *arguments)
    assert result.exit_code == 0, result.stderr
    pack = Pack.open(target)
    assert [level.bits for level in pack.index.experts[0].levels] == [3, 5]
    assert pack.provenance["calibration"] == "text.txt"
    assert pack.index.quality is not None and pack.index.quality.tokens == 255
    shown = run("show", target).stdout
    assert "3 bits (base3r1); 5 bits (refine2)" in shown
    assert "on text.txt, 255 tokens: perplexity" in shown
    for name in ("3 bits  ", "5 bits  ", "exact (5.00 bits)", "high (", "balanced (", "fast ("):
        assert name in shown
    facts = json.loads(run("show", target, "--json").stdout)
    assert facts["quality"] == pack.index.quality.to_dict()
    assert json.loads(run("show", source, "--json").stdout).get("quality") is None


def test_levels_without_texts(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"
    result = run("convert", source, target, "-l", "2,4", "--calibration", "none", "--quality-text", "none")
    assert result.exit_code == 0, result.stderr
    assert not Pack.open(target).index.quality
    assert "quality" not in run("show", target).stdout


def test_does_not_overwrite(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"
    target.write_bytes(b"mine")
    result = run("convert", source, target)
    assert result.exit_code == 1
    assert result.stderr == f"edgemoe: error: {target}: exists already (--force replaces it)\n"
    assert target.read_bytes() == b"mine"
    assert run("convert", "--force", source, target).exit_code == 0
    Pack.open(target)


def test_interrupt_says_how_to_continue(tiny_qwen3_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(edgemoe.convert.sections, "pack", interrupt)
        result = run("convert", source, target)
    assert result.exit_code == 130
    assert f"the same command continues with {target}.partial" in result.stderr
    assert not target.exists()
    assert run("convert", source, target).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["gone", "a.emoe"], 1, "gone: no such folder"),
        (["{source}", "gone/a.emoe"], 1, "gone: no such folder"),
        (["{source}", "."], 1, "is a folder"),
        (["{source}", "a.emoe", "--bits", "5"], 2, "'5' is not one of"),
        (["{source}", "a.emoe", "--levels", "4,x"], 2, "'4,x' is not a list of widths"),
        (["{source}", "a.emoe", "--levels", "4,2"], 1, "levels 4,2 do not ascend within 1 to 8"),
        (["{source}", "a.emoe", "--levels", "2,9"], 1, "levels 2,9 do not ascend within 1 to 8"),
        (["{source}", "a.emoe", "--levels", "2,4", "--bits", "4"], 2, "--bits and --levels exclude each other"),
        (["{source}", "a.emoe", "--calibration", "none"], 2, "--calibration is for --levels"),
        (["{source}", "a.emoe", "--quality-tokens", "9"], 2, "--quality-tokens is for --levels"),
        (["{source}", "a.emoe", "--target-bpw", "3", "--calibration", "none"], 1, "without calibration"),
        (["{source}", "a.emoe", "--levels", "2,4", "--calibration", "gone.txt"], 1, "gone.txt: No such file"),
        (["{source}"], 2, "Missing argument"),
        (["{source}/config.json", "a.emoe"], 1, "not a model folder"),
    ],
)
def test_errors_are_one_line(
    tiny_qwen3_moe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tiny_qwen3_moe()
    result = run("convert", *(argument.format(source=source) for argument in arguments))
    assert result.exit_code == status
    assert result.stderr.startswith("edgemoe: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
