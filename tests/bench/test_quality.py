"""bench.quality: the mixtures of llama.cpp's file types, and a GGUF rewritten with them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import tiny_qwen3_moe_gguf, write

from edgemoe.formats.gguf import GgufModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

pytest.importorskip("gguf")

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
