"""bench.quality: the mixtures of llama.cpp's file types, and a GGUF rewritten with them."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import tiny_qwen3_moe_gguf, write

from edgemoe.formats.gguf import GgufModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

pytest.importorskip("gguf")

from bench import quality  # noqa: E402
from bench.quality import expert_type  # noqa: E402
from tools.ggml_quantize import quantize, rewrite_gguf  # noqa: E402


@pytest.mark.parametrize(
    ("file_type", "name", "columns", "expected"),
    [
        ("Q2_K", "blk.0.ffn_gate_exps.weight", 2048, "q2_k"),
        ("Q2_K", "blk.9.ffn_down_exps.weight", 768, "q3_k"),
        ("Q3_K_M", "blk.0.ffn_down_exps.weight", 768, "q5_k"),
        ("Q3_K_M", "blk.3.ffn_down_exps.weight", 768, "q4_k"),
        ("Q4_K_M", "blk.0.ffn_down_exps.weight", 768, "q6_k"),
        ("Q4_K_M", "blk.7.ffn_down_exps.weight", 768, "q4_k"),
        ("Q4_K_M", "blk.8.ffn_down_exps.weight", 768, "q6_k"),
        ("Q4_K_M", "blk.47.ffn_down_exps.weight", 768, "q6_k"),
        ("Q4_K_M", "blk.47.ffn_up_exps.weight", 768, "q4_k"),
        ("Q4_K_M", "blk.0.ffn_down_exps.weight", 128, "q8_0"),
        ("Q2_K", "blk.0.ffn_gate_exps.weight", 128, "iq4_nl"),
        ("Q8_0", "blk.0.ffn_down_exps.weight", 128, "q8_0"),
    ],
)
def test_mixtures(file_type: str, name: str, columns: int, expected: str) -> None:
    assert expert_type(file_type, name, columns, 48) == expected


def test_rewritten_file_holds_what_was_chosen(tmp_path: Path) -> None:
    source = write(tmp_path / "a.gguf", *tiny_qwen3_moe_gguf(kind="f32"))
    target = tmp_path / "b.gguf"
    rewrite_gguf(source, target, lambda name, shape: "q8_0" if "_exps" in name else "f32", quantize)
    before, after = GgufModel.open(source), GgufModel.open(target)
    name = "blk.0.ffn_up_exps.weight"
    assert (after.info(name).type, after.info("output.weight").type) == ("q8_0", "f32")
    np.testing.assert_allclose(after.read(name, 1), before.read(name, 1), atol=0.05)
    np.testing.assert_array_equal(after.read("output.weight"), before.read("output.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("levels", [(2, 3, 4), (2, 3)])
def test_packs_of_the_same_bits_follow_the_types(
    levels: tuple[int, ...],
    tiny_qwen3_moe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Sections of 12288, 4096 and 4096 bytes: 4, 5.333 and 6.667 bits per weight. Rows of 64 and 128:
    # llama.cpp has fallback types for them.
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "max_position_embeddings": 64}
    folder, text = tiny_qwen3_moe(**sizes, num_experts=12, tie_word_embeddings=True), tmp_path / "text.txt"
    text.write_text("The ship went down the river, and the men sang of home. " * 40)
    monkeypatch.setattr(quality, "peer_quantizer", lambda python: contextlib.nullcontext(quantize))
    monkeypatch.setattr(quality, "HELD_OUT", text)
    options = argparse.Namespace(folder=folder, text=text, tokens=256, calibration=text, peer_python="", threads=1)
    rows = quality.run(options, levels, tmp_path)
    cells = [row.strip("| ").split(" | ") for row in rows[rows.index("|---|---|---|---|---|") + 1 :]]
    bits = {name: float(value) for name, value, *_ in cells}
    assert bits[f"nested, level of {levels[-1]} bits"] == pytest.approx(4 * len(levels) / 3 + 8 / 3, abs=1e-3)
    peers = [row[0] for row in cells[2 * len(levels) + 4 :]]
    assert peers[0] == "llama.cpp Q2_K (iq4_nl)" and bits[peers[0]] == 4.5
    ladder = ",".join(map(str, levels))
    assert peers[1] == f"nested, --levels {ladder} --target-bpw 4.500"
    assert peers[2] == "llama.cpp Q3_K_M (iq4_nl, q5_0)"
    assert peers[3].startswith(f"nested, --levels {ladder} --target-bpw ")
    # Of 2 and 3 bits all of it takes 5.333, less than Q4_K_M.
    assert peers[5] == "nested, --levels 2,3,4 --target-bpw 6.000"
    # A step of an expert is 1.333 / 12 bits per weight: as near as that, and never above.
    for peer, ours in zip(peers[:6:2], peers[1:6:2], strict=True):
        assert bits[peer] - 1.334 / 12 <= bits[ours] <= bits[peer]
    # A level more takes less than Q8_0 as well: its row has no rival.
    assert peers[6:] == ["llama.cpp Q8_0 (q8_0)"]
