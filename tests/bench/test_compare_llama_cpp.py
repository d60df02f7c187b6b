"""The comparison with llama.cpp, as far as it goes without it: the measure, and the files it makes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import tiny_qwen3_moe_gguf, write
from helpers import slow_except

import edgemoe
from edgemoe.formats.gguf import GgufModel, StringArray
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.read import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

pytest.importorskip("gguf")

from bench.compare_llama_cpp import divergence, log_softmax, main, own_text, small_gguf  # noqa: E402
from tools.ggml_quantize import TYPES, quantize_gguf  # noqa: E402


def test_divergence() -> None:
    first = log_softmax(np.array([[0, np.log(3)], [100, 0]], np.float32))
    second = log_softmax(np.array([[np.log(3), 0], [100, 0]], np.float32))
    np.testing.assert_allclose(divergence(first, second), [0.5 * np.log(3), 0], atol=1e-6)
    np.testing.assert_array_equal(divergence(first, first), [0, 0])


@pytest.mark.parametrize("kind", slow_except(TYPES, "q4_k"))
def test_a_file_in_another_type(tmp_path: Path, kind: str) -> None:
    metadata, tensors = tiny_qwen3_moe_gguf(hidden=256, ffn=256, kind="f32")
    source = write(tmp_path / "source.gguf", metadata, tensors)
    quantize_gguf(source, tmp_path / "quantized.gguf", kind)
    quantize_gguf(tmp_path / "quantized.gguf", tmp_path / "exact.gguf", "f32")
    first, quantized, exact = (GgufModel.open(tmp_path / f"{name}.gguf") for name in ("source", "quantized", "exact"))
    assert first.metadata.keys() == quantized.metadata.keys()
    for key, value in first.metadata.items():
        found = quantized.metadata[key]
        assert list(found) == list(value) if isinstance(value, (StringArray, np.ndarray)) else found == value, key
    assert quantized.info("blk.1.ffn_down_exps.weight").type == kind
    assert quantized.info("blk.1.ffn_gate_inp.weight").type == quantized.info("output_norm.weight").type == "f32"
    for name in first.names():
        np.testing.assert_array_equal(quantized.read(name), exact.read(name))
    error = np.abs(quantized.read("blk.0.attn_q.weight") - first.read("blk.0.attn_q.weight")).mean()
    assert error < 0.4


def test_a_small_model_of_a_folder(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_qwen3_moe(hidden_size=64, moe_intermediate_size=32)
    small_gguf(folder, tmp_path / "small.gguf")
    spec = GgufSource.open(tmp_path / "small.gguf").spec
    assert (spec.hidden_size, spec.layers[0].ffn_dim) == (256, 256)
    tokens = own_text(tmp_path / "small.gguf", 20)
    assert len(tokens) == 20
    with edgemoe.load(tmp_path / "small.gguf") as model:
        assert model.logits(tokens).shape == (20, 320)
    assert load_tokenizer(folder).encode("The quick") == load_tokenizer(tmp_path / "small.gguf").encode("The quick")


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"compare_llama_cpp: .*gone"):
        main([str(tmp_path / "gone.gguf")])
    with pytest.raises(SystemExit) as refusal:
        main([str(tmp_path), "--types", "q9_k"])
    assert refusal.value.code == 2 and "q9_k is not one of" in capsys.readouterr().err
