"""edgemoe verify: a whole pack, a damaged one, no pack at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgemoe.cli import main
from edgemoe.convert import convert
from edgemoe.formats.pack import Pack


@pytest.fixture
def pack(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> Path:
    convert(tiny_qwen3_moe(), tmp_path / "a.emoe", 4)
    return tmp_path / "a.emoe"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def damage(path: Path, layer: int, expert: int) -> int:
    """Flips a bit in an expert; returns its section number."""
    number = Pack.open(path).index.experts[layer].sections[expert][0]
    data = bytearray(path.read_bytes())
    data[Pack.open(path).index.sections[number].extents[0].offset + 77] ^= 4
    path.write_bytes(data)
    return number


def test_whole(pack: Path) -> None:
    result = run("verify", pack)
    assert result.exit_code == 0
    assert "all checksums are right" in result.stdout
    assert result.stderr == ""
    facts = json.loads(run("verify", pack, "--json").stdout)
    assert facts["damaged"] == []
    assert facts["sections"] == len(Pack.open(pack).index.sections)
    assert facts["path"] == str(pack)


def test_damaged(pack: Path) -> None:
    first, second = damage(pack, 0, 4), damage(pack, 1, 2)
    result = run("verify", pack)
    assert result.exit_code == 1
    assert f"section {first} (layer 0, expert 4): checksum" in result.stdout
    assert f"section {second} (layer 1, expert 2): checksum" in result.stdout
    assert "2 of" in result.stdout
    assert len(json.loads(run("verify", pack, "--json").stdout)["damaged"]) == 2
    assert run("verify", pack, "--json").exit_code == 1


def test_no_pack(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    cases = {"gone": "No such file", "text": "not an .emoe pack", "model.gguf": "a GGUF file has no checksums"}
    for path, message in ((tmp_path / name, message) for name, message in cases.items()):
        result = run("verify", path)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"edgemoe: error: {path}: ")
        assert message in result.stderr
