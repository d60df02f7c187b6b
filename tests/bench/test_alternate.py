"""Two checkouts measured in turns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import alternate


def test_the_interval_of_a_median() -> None:
    assert alternate.interval([1.0] * 15) == (1.0, 1.0, 1.0)
    ratios = [0.9, 0.95, 1.0, 1.05, 1.1] * 3
    median, low, high = alternate.interval(ratios)
    assert median == 1.0
    assert 0.9 < low < 1.0 < high < 1.1
    # One wild round moves the ends of the range, not the median.
    assert alternate.interval([*[1.0] * 14, 9.0]) == (1.0, 1.0, 1.0)


def test_a_folder_without_a_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="alternate"):
        alternate.side(tmp_path, {"job": "start", "path": "", "threads": 1, "context": 8, "repeats": 1})


def test_both_checkouts_are_run_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def side(checkout: Path, job: dict[str, object]) -> dict[str, object]:
        asked.append(checkout.name)
        return {
            "rate": 2.0 if checkout.name == "new" else 1.0,
            "result": "" if job["job"] == "start" else checkout.name,
        }

    pack = next((Path(__file__).resolve().parents[2] / "models").glob("*.emoe"))
    monkeypatch.setattr(alternate, "side", side)
    monkeypatch.setattr(alternate.psutil, "cpu_percent", lambda interval: 0.0)
    monkeypatch.setattr(alternate, "make_models", lambda *_: alternate.Models(pack, pack, pack, pack))
    command = [str(tmp_path / "old"), str(tmp_path / "new"), "--models", str(tmp_path), "--rounds", "3"]
    alternate.main([*command, "--only", "import", "--markdown", str(tmp_path / "report.md")])
    assert asked == ["old", "new", "new", "old", "old", "new"]
    assert "**2.000** | 2.000 to 2.000" in (tmp_path / "report.md").read_text()
    with pytest.raises(SystemExit, match="do not compute the same"):
        alternate.main([*command, "--only", "nested pack"])
