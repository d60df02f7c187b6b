"""The comparison of the families with llama.cpp, as far as it goes without it: every family has a case that llama.cpp
computes as the models' authors do, and those that are made for it alone agree with `transformers`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe.families import describe, family_names

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from bench import compare_families  # noqa: E402
from bench.compare_families import ADAPTED, CASES, VOCABULARY, main, rows  # noqa: E402
from bench.compare_llama_cpp import log_softmax  # noqa: E402


def test_every_architecture_has_a_case_without_a_reason_to_differ() -> None:
    known = {describe(name)["gguf_architecture"] for name in family_names()} - {None}
    assert {case.architecture for _, case, reason in rows() if not reason} == known
    assert all(CASES[name].architecture for name in ADAPTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", *ADAPTED])
def test_adapted_cases_equal_transformers(name: str, tmp_path: Path) -> None:
    case = ADAPTED[name].case(CASES[name]) if name in ADAPTED else CASES[name]
    reference = compare_families.write_folder(tmp_path / "hf", case)
    if case.oracle:
        reference = compare_families.with_options(tmp_path / "hf", case.oracle)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, case.positions).astype(np.int32)
    expected = compare_families.expected_logits(reference, tokens)
    path = compare_families.write_gguf(tmp_path / "model.gguf", tmp_path / "hf", case)
    with edgemoe.load(path, context=case.context, cache_type_k="f32", cache_type_v="f32") as model:
        assert np.abs(model.logits(tokens) - expected).max() <= 2e-3 * np.ptp(expected)


def peer(mistake: float) -> Any:
    """edgemoe in llama.cpp's place, with a mistake in one logit."""

    def theirs(path: Path, tokens: list[int], vocabulary: int, options: Any, **more: Any) -> Any:
        with edgemoe.load(path, context=more["context"], cache_type_k="f32", cache_type_v="f32") as model:
            logits = model.logits(tokens)
        logits[5, 7] += mistake
        return log_softmax(logits)

    return theirs


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "status", "verdict"), [(0, 0, "<= 0.001 |"), (20, 1, "> 0.001 |")])
def test_table(
    mistake: float,
    status: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(compare_families, "theirs", peer(mistake))
    with pytest.raises(SystemExit) as end:
        main(["--only", "granitemoe, plain", "--markdown", str(tmp_path / "table.md")])
    assert end.value.code == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| granitemoe, plain |")
    assert lines[2].endswith(verdict)
    assert (tmp_path / "table.md").read_text().splitlines() == lines


@pytest.mark.slow
def test_what_is_refused_fails_only_without_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*arguments: Any, **more: Any) -> Any:
        raise SystemExit("llama.cpp failed: tensor 'output.weight' not found")

    monkeypatch.setattr(compare_families, "theirs", refuses)
    with pytest.raises(SystemExit) as end:
        main(["--only", "lfm2_moe, four taps"])
    _, _, case, changed = capsys.readouterr().out.splitlines()
    assert "not loaded (tensor 'output.weight' not found): llama.cpp needs a bias for the choice" in case
    assert changed.endswith("not loaded (tensor 'output.weight' not found) |")
    assert end.value.code == 1
    monkeypatch.setattr(compare_families, "rows", lambda: [row for row in rows() if row[2]])
    with pytest.raises(SystemExit) as end:
        main(["--only", "lfm2_moe, four taps"])
    assert end.value.code == 0
