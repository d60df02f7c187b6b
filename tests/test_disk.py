"""How many reads at a time: measured once, kept, and never trusted blindly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemoe import disk
from edgemoe.errors import ReadError, ThreadError


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    with path.open("wb") as stream:
        stream.truncate(disk._SMALLEST_FILE)
    return path


def test_the_fewest_reads_that_are_enough(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: 50.0, 2: 96.0, 4: 100.0, 8: 90.0}
    asked = []
    monkeypatch.setattr(disk, "_rate", lambda path, block, depth: asked.append((block, depth)) or rates[depth])
    cache = tmp_path / "cache"
    assert disk.reading_threads(file, 3_000_000, cache) == 2
    assert asked == [(1 << 22, depth) for depth in disk.DEPTHS]
    # Known from now on, for this size.
    assert disk.reading_threads(file, 4_000_000, cache) == 2
    assert len(asked) == 4
    rates[8] = 200.0
    assert disk.reading_threads(file, 100_000, cache) == 8
    assert asked[-1] == (1 << 17, 8)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"x": ', '{"%s": 7}', '{"%s": {"readers": 3, "measured": 0}}', "[" * 99999]
)
def test_what_is_kept_is_not_trusted(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(disk, "_rate", lambda path, block, depth: 1.0)
    disk.reading_threads(file, 65536, tmp_path)
    (key,) = json.loads((tmp_path / "disk.json").read_text())
    (tmp_path / "disk.json").write_text(text.replace("%s", key))
    monkeypatch.setattr(disk, "_rate", lambda path, block, depth: float(depth))
    assert disk.reading_threads(file, 65536, tmp_path) == 8


def test_a_measurement_grows_old(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_rate", lambda path, block, depth: 1.0)
    assert disk.reading_threads(file, 65536, tmp_path) == 1
    kept = json.loads((tmp_path / "disk.json").read_text())
    for entry in kept.values():
        entry["measured"] -= disk._MOST_AGE + 1
    (tmp_path / "disk.json").write_text(json.dumps(kept))
    monkeypatch.setattr(disk, "_rate", lambda path, block, depth: float(depth))
    assert disk.reading_threads(file, 65536, tmp_path) == 8


@pytest.mark.parametrize("error", [OSError, ReadError, ThreadError])
def test_where_nothing_can_be_measured(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    assert disk.reading_threads(tmp_path / "none", 65536, tmp_path) == disk.DEFAULT_READERS
    (tmp_path / "small").write_bytes(bytes(1000))
    assert disk.reading_threads(tmp_path / "small", 65536, tmp_path) == disk.DEFAULT_READERS

    def fails(path: Path, block: int, depth: int) -> float:
        raise error("no")

    monkeypatch.setattr(disk, "_rate", fails)
    assert disk.reading_threads(file, 65536, tmp_path) == disk.DEFAULT_READERS
    assert not (tmp_path / "disk.json").exists()


def test_a_real_measurement(file: Path, tmp_path: Path) -> None:
    assert disk.reading_threads(file, 1 << 20, tmp_path / "a" / "b") in disk.DEPTHS
    (entry,) = json.loads((tmp_path / "a" / "b" / "disk.json").read_text()).values()
    assert entry["bytes_per_second"] > 0
