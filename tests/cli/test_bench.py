"""`edgemoe bench`: what is measured and how it is told."""

from __future__ import annotations

import csv
import io
import json

import pytest
from click.testing import CliRunner, Result

from edgemoe.cli import main
from edgemoe.cli.bench import _markdown


def bench(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_forms(folder: str) -> None:
    arguments = ("-m", folder, "-p", "8,5,8", "-n", "4", "-r", "3", "-t", "1")
    result = bench(*arguments, "-o", "json")
    assert result.exit_code == 0, result.stderr
    assert "pp8: one run that does not count, then 3" in result.stderr
    rows = json.loads(result.stdout)
    assert [row["test"] for row in rows] == ["pp8", "pp5", "tg4"]
    for row in rows:
        assert len(row["samples_ts"]) == row["repetitions"] == 3 and row["threads"] == 1
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 3) and row["stddev_ts"] >= 0
        assert row["model_n_params"] > 0 and row["model_size"] > 0 and row["memory"] > 0
        assert 0 <= row["hit_rate"] <= 1 and row["mib_per_token"] >= 0

    found = list(csv.DictReader(io.StringIO(bench(folder, *arguments[2:], "-o", "csv").stdout)))
    assert [row["test"] for row in found] == ["pp8", "pp5", "tg4"]
    assert set(found[0]) == set(rows[0]) - {"samples_ts"}

    lines = bench(folder, *arguments[2:]).stdout.splitlines()
    assert lines[0].startswith("| model | size | params | isa | threads | memory | test | t/s |")
    assert [line.count("|") for line in lines] == [lines[0].count("|")] * 5
    assert [line.split("|")[7].strip() for line in lines[2:]] == ["pp8", "pp5", "tg4"]


def test_streaming_is_told() -> None:
    """Two more columns where something was read."""
    facts = {"model": "m", "model_size": 1 << 30, "model_n_params": 2e9, "isa": "scalar", "threads": 2, "memory": 3e9}
    facts["quality"] = "exact"
    row = facts | {"test": "tg8", "avg_ts": 4.0, "stddev_ts": 0.5, "hit_rate": 0.75, "mib_per_token": 12.5}
    lines = _markdown([row, row | {"hit_rate": None}]).splitlines()
    assert lines[0].endswith("| t/s | experts in memory | MiB/token |")
    assert lines[2] == "| m | 1.00 GiB | 2.00 B | scalar | 2 | 3.00 GB | tg8 | 4.00 ± 0.50 | 75.0 % | 12.5 |"
    assert lines[3].endswith("| - | 12.5 |")
    assert [line.count("|") for line in lines] == [11] * 4
    lines = _markdown([row | {"quality": "fast"}]).splitlines()
    assert "| memory | quality | test |" in lines[0] and "| 3.00 GB | fast | tg8 |" in lines[2]
    assert [line.count("|") for line in lines] == [12] * 3
    lines = _markdown([row | {"device": "A GPU", "gpu_layers": 3, "gpu_experts": 20}]).splitlines()
    assert "| memory | device | ngl | experts on it | test |" in lines[0] and "| A GPU | 3 | 20 | tg8 |" in lines[2]
    assert [line.count("|") for line in lines] == [14] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-p", "many"), "'many' is not a number of tokens"),
        (("-n", "-3"), "'-3' is not a number of tokens"),
        (("-r", "0"), "-r"),
        (("-o", "xml"), "xml"),
        (("a", "-m", "b"), "given twice"),
    ],
)
def test_nonsense_is_refused(arguments: tuple[str, ...], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
