from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import edgemoe
from edgemoe.cli import main

TEXT = "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs.\n" * 12


def ppl(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["ppl", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_perplexity_of_a_tiny_model(folder: str, text: str) -> None:
    result = ppl(folder, "-f", text, "-c", "32", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    with edgemoe.load(folder, context=32) as model:
        tokens = model.tokenizer.encode(TEXT, add_special=True)
        begin = model.tokenizer.begin_ids
        losses: list[float] = []
        for start in range(0, len(tokens) - 31, 32):
            chunk = tokens[start : start + 32]
            logits = model.logits([*begin, *chunk[len(begin) :]]).astype(np.float64)
            for position in range(16, 31):
                row = logits[position]
                losses.append(math.log(np.exp(row - row.max()).sum()) + row.max() - row[chunk[position + 1]])
    assert report["chunks"] == len(tokens) // 32 and report["tokens"] == len(losses)
    assert report["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-9)
    error = math.exp(np.mean(losses)) * np.std(losses) / math.sqrt(len(losses) - 1)
    assert report["error"] == pytest.approx(error, rel=1e-6)
    assert (report["context"], report["file"]) == (32, text)


def test_output(folder: str, text: str) -> None:
    result = ppl("-m", folder, "-f", text, "-c", "16", "--chunks", "2", "-v")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("perplexity ") and result.stdout.count("\n") == 1
    assert result.stdout.endswith("(14 tokens scored in 2 chunks of 16)\n")
    assert "[1] " in result.stderr and "[2] " in result.stderr and "experts_requested" in result.stderr


def test_the_context_is_the_models_where_it_is_small(
    tiny_qwen3_moe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("EDGEMOE_CACHE", str(tmp_path / "cache"))
    small = str(tiny_qwen3_moe(max_position_embeddings=64))
    assert json.loads(ppl(small, "-f", text, "--json").stdout)["context"] == 64


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["MODEL"], 2, "Missing option '-f'"),
        (["MODEL", "-f", "nowhere.txt"], 1, "nowhere.txt: No such file"),
        (["MODEL", "-f", "."], 1, "Is a directory"),
        (["MODEL", "-f", "empty.txt"], 1, "empty.txt: the file is empty"),
        (["MODEL", "-f", "short.txt"], 1, "fewer than one chunk of 512"),
        (["MODEL", "-f", "binary"], 1, "binary: not UTF-8 text"),
        (["MODEL", "-m", "MODEL", "-f", "short.txt"], 2, "the model is given twice"),
        (["MODEL", "-f", "short.txt", "-c", "3"], 2, "3 is not in the range"),
        (["MODEL", "-f", "short.txt", "-c", "100000"], 1, "100000"),
        (["MODEL", "-f", "short.txt", "--chunks", "0"], 2, "0 is not in the range"),
        (["nowhere", "-f", "short.txt"], 1, "nowhere: no such file"),
        (["MODEL", "-f", "short.txt", "-M", "1MB"], 1, "the least that works is"),
    ],
)
def test_bad_input_is_one_line(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_text("The quick brown fox")
    Path("binary").write_bytes(b"\xff\xfe")
    result = ppl(*(folder if word == "MODEL" else word for word in arguments))
    assert result.exit_code == status, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("converting ")]
    assert len(lines) == 1 and lines[0].startswith("edgemoe: error: ") and message in lines[0]
