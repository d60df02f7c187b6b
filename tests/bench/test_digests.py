"""What is said of logits that changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import digests

ALL, FEW = "bundled, fast, all experts in memory", "bundled, fast, few experts in memory"


def test_changes_are_named_with_the_largest_difference() -> None:
    old = {"a": np.array([[0, 1, 2]], np.float32), "b": np.zeros((2, 2), np.float32)}
    new = {"a": np.array([[0, 1.5, 2]], np.float32), "b": np.zeros((1, 2), np.float32)}
    before = {"a": "1", "b": "1", "same": "1", "gone": "1", "text": "1"}
    after = {"a": "2", "b": "2", "same": "1", "new": "1", "text": "2"}
    assert digests.compare(before, after, old, new) == [
        "gone: gone",
        "new: new",
        "changed: a: largest difference 0.5 (0.25 of the logits' range)",
        "changed: b: (1, 2) where (2, 2) were",
        "changed: text",
    ]


@pytest.mark.slow
def test_a_change_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / digests.LIST).write_text("[]")
    command = ["--models", str(tmp_path), "--only", "bundled, fast"]
    digests.main([*command, "--write", str(tmp_path / "old.json")])
    found = json.loads((tmp_path / "old.json").read_text())
    assert found[ALL] == found[FEW]
    digests.main([*command, "--compare", str(tmp_path / "old.json")])
    assert capsys.readouterr().out.endswith("4 are the same\n")
    (tmp_path / "old.json").write_text(json.dumps(found | {FEW: "0"}))
    with pytest.raises(SystemExit) as failure:
        digests.main([*command, "--compare", str(tmp_path / "old.json")])
    assert failure.value.code == 1
    changed = f"changed: {FEW}: largest difference 0 (0 of the logits' range)"
    assert changed in capsys.readouterr().out


def test_a_folder_without_a_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / digests.LIST).write_text("[]")
    with pytest.raises(SystemExit) as failure:
        digests.main(["--models", str(tmp_path), "--package", str(tmp_path)])
    assert failure.value.code == 1
