"""The benchmark of streams, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import streams
from edgemoe.convert import convert


def test_figures_of_streams(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    convert(tiny_qwen3_moe(), tmp_path / "tiny.emoe", 8)
    places = {"--json": tmp_path / "figures.json", "--markdown": tmp_path / "figures.md"}
    options = ["--model", str(tmp_path / "tiny.emoe"), "--streams", "1,3", "--percents", "50,100", "--tokens", "4"]
    options += ["--warm", "2", "--rounds", "2", "--no-prefetch"]
    streams.main([*options, *(str(part) for pair in places.items() for part in pair)])
    results = json.loads(places["--json"].read_text())["results"]
    assert [(entry["percent"], entry["streams"]) for entry in results] == [(p, n) for p in (50, 100) for n in (0, 1, 3)]
    for entry in results:
        assert entry["rate"] > 0 and len(entry["ratios"]) == 2
        assert (entry["reads"] == 0) == (entry["percent"] == 100) == (entry["hit_rate"] == 1)
    assert places["--markdown"].read_text().count("\n| 50 %") == 3


@pytest.mark.parametrize("wrong", ["--streams=0,1", "--streams=a", "--tokens=0", "--percents=0"])
def test_options_that_make_no_sense_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        streams.main([wrong])
    assert wrong.split("=")[0] in capsys.readouterr().err
