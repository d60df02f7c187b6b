"""From a GGUF file to a pack: weights, tokenizer, commands. The oracle is transformers, which reads the files too."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_writer import Tensor, random_tensor, tiny_qwen3_moe_gguf, write

import edgemoe
from edgemoe._core import crc32c
from edgemoe.cli import main
from edgemoe.convert import convert
from edgemoe.errors import PackError, UnsupportedModelError
from edgemoe.formats.gguf import GgufModel
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.layouts import tensor_size, unpack
from edgemoe.formats.pack import Pack
from edgemoe.formats.read import load_tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def tiny(folder: Path, tensors: dict[str, Tensor] | None = None, **options: Any) -> Path:
    metadata, all_tensors = tiny_qwen3_moe_gguf(**options)
    metadata["tokenizer.chat_template"] = TEMPLATE
    return write(folder / "tiny.gguf", metadata, {**all_tensors, **(tensors or {})})


def unpacked(pack: Pack, section: int, offset: int, layout: str, shape: tuple[int, ...]) -> Any:
    data = memoryview(pack.read_section(section))[offset : offset + tensor_size(layout, shape)]
    rows, columns = (*shape, 1)[:2]
    return unpack(layout, data, rows, columns).reshape(shape)


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 0.0), (16, 0.0), (8, 0.006), (4, 0.15)])
def test_every_weight_arrives(tmp_path: Path, bits: int, tolerance: float) -> None:
    """A tensor of each kind that a folder has too (float32, float16, bfloat16), the others quantized."""
    others = {
        "blk.0.ffn_up_exps.weight": random_tensor("bf16", (4, 32, 64)),
        "blk.1.ffn_up_exps.weight": random_tensor("f16", (4, 32, 64)),
        "blk.1.attn_q.weight": random_tensor("q4_1", (64, 64)),
    }
    path = tiny(tmp_path, others)
    source, target = GgufSource.open(path), tmp_path / "tiny.emoe"
    convert(path, target, bits, dense_bits=bits)
    pack = Pack.open(target)
    assert pack.index.spec == source.spec and pack.verify() == []
    assert pack.provenance["source_format"] == "gguf" and pack.provenance["source"] == "tiny.gguf"
    found = {
        name: unpacked(pack, tensor.section, tensor.offset, tensor.layout, tensor.shape)
        for name, tensor in pack.index.dense.items()
    }
    for number, layer in pack.index.experts.items():
        for expert, (section,) in enumerate(layer.sections):
            for part, place in layer.levels[0].parts.items():
                name = f"layers.{number}.experts.{expert}.{part}"
                found[name] = unpacked(pack, section, place.offset, place.layout, place.shape)
    assert found.keys() == source.sources.keys()
    for name, weights in found.items():
        tensor = source.sources[name]
        expected = source.model.read(tensor.name, tensor.index)
        assert np.abs(weights - expected).max() <= tolerance * np.abs(expected).max(), name
    if bits == 16:
        layouts = pack.layout_bytes()["experts"]
        assert layouts.keys() == {"bf16", "f16", "f32"}


def test_the_tokenizer_arrives(tmp_path: Path) -> None:
    path, target = tiny(tmp_path), tmp_path / "tiny.emoe"
    convert(path, target, 8)
    of_file, of_pack = load_tokenizer(path), load_tokenizer(target)
    text = "<|im_start|>hello the 123\n \u00e9<|im_end|>"
    assert (
        of_pack.encode(text) == of_file.encode(text)
        and of_pack.decode(of_file.encode(text)) == "hello the 123\n \u00e9"
    )
    assert (of_pack.eos_ids, of_pack.begin_ids) == (of_file.eos_ids, of_file.begin_ids)
    assert of_pack.chat_template == of_file.chat_template == TEMPLATE


def test_blocks_are_kept_unless_bits_are_asked_for(tmp_path: Path) -> None:
    path = tiny(tmp_path, {"blk.0.ffn_down_exps.weight": random_tensor("q4_1", (4, 64, 32))})
    convert(path, tmp_path / "kept.emoe")
    kept = Pack.open(tmp_path / "kept.emoe")
    assert {part: place.layout for part, place in kept.index.experts[0].levels[0].parts.items()} == {
        "gate": "ggml.q8_0",
        "up": "ggml.q8_0",
        "down": "ggml.q4_1",
    }
    assert kept.index.experts[0].levels[0].bits == 8
    assert kept.index.dense["layers.1.router"].layout == "f32" and kept.index.dense["embedding"].layout == "ggml.q8_0"
    assert kept.layout_bytes()["experts"]["ggml.q4_1"] == 4 * 64 * 20
    convert(path, tmp_path / "half.emoe", None, 16)
    half = Pack.open(tmp_path / "half.emoe")
    assert (
        half.index.dense["embedding"].layout == "f32"
        and half.index.experts[0].levels[0].parts["up"].layout == "ggml.q8_0"
    )
    assert "bits" not in half.provenance and half.provenance["dense_bits"] == 16


def test_a_matrix_without_room_for_padding(tmp_path: Path) -> None:
    """Rows that are not whole blocks of 16 would be filled up over what lies behind them."""
    convert(tiny(tmp_path, hidden=96, ffn=40, kind="f16"), tmp_path / "a.emoe", 8)
    packed = (tmp_path / "a.emoe").read_bytes()
    offset, length = struct.unpack_from("<QQ", packed, 8)
    for what, message in (("expert", "up: 40 rows"), ("dense", "embedding: 267 rows")):
        index = msgpack.unpackb(packed[offset : offset + length])
        if what == "expert":
            index["experts"]["1"]["levels"][0]["parts"]["up"][0] = "ggml.q8_0"
        else:
            index["dense"]["embedding"] = [index["dense"]["head"][0], 0, "ggml.q8_0"]
        new = msgpack.packb(index)
        header = struct.pack("<4sIQQI", b"EMOE", 1, offset, len(new), crc32c(new))
        header += struct.pack("<I", crc32c(header))
        (tmp_path / "b.emoe").write_bytes(header.ljust(4096, b"\0") + packed[4096:offset] + new)
        with pytest.raises(PackError, match=message + ".*only multiples of 16 can"):
            Pack.open(tmp_path / "b.emoe")


def test_a_type_that_cannot_be_read(tmp_path: Path) -> None:
    path = tiny(tmp_path, {"output.weight": Tensor((267, 64), 28, bytes(267 * 64 * 8))})
    with pytest.raises(UnsupportedModelError, match=r"tiny.gguf: tensor output.weight: dtype f64 is not supported"):
        convert(path, tmp_path / "tiny.emoe", 8)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.slow
def test_logits_like_transformers(tmp_path: Path) -> None:
    """Names, shapes and meaning of every tensor and key, as others read them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = tiny(tmp_path, ffn=768)  # transformers goes by its default, not by the file
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        )
    except (ImportError, ValueError) as error:  # a version that does not know these files
        pytest.skip(str(error))
    for module in model.modules():  # which the file means without saying so
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = True
    tokens = np.random.default_rng(0).integers(0, 267, 40)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)[None]).logits[0].numpy()
    convert(path, tmp_path / "tiny.emoe", 32)
    with edgemoe.load(tmp_path / "tiny.emoe", threads=1, cache_type_k="f32", cache_type_v="f32") as loaded:
        found = loaded.logits(tokens)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands(tmp_path: Path) -> None:
    path, target = tiny(tmp_path), tmp_path / "tiny.emoe"
    facts = json.loads(run("show", path, "--json"))
    expected = {
        "format": "gguf",
        "family": "qwen3_moe",
        "layers": 2,
        "hidden_size": 64,
        "experts": 4,
        "top_k": 2,
        "expert_dim": 32,
        "levels": [{"bits": 8, "layouts": ["q8_0"]}],
        "tokenizer": {"vocab_size": 267, "chat_template": True},
        "unused": [],
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["expert_layouts"] == {"q8_0": 2 * 4 * 3 * 32 * 64 // 32 * 34}
    assert facts["bytes"]["dense"] + facts["bytes"]["experts"] == GgufModel.open(path).nbytes()
    assert facts["bits_per_weight"]["experts"] == 8.5
    assert "qwen3_moe" in run("show", path) and "q8_0" in run("show", path)
    run("convert", path, target)
    assert json.loads(run("show", target, "--json"))["levels"] == [{"bits": 8, "layouts": ["ggml.q8_0"]}]
    assert "ggml.q8_0" in run("show", target)
    result = CliRunner().invoke(main, ["convert", str(path), str(target), "--bits", "4", "--force"])
    assert f"{path}: quantized already (q8_0), will be requantized" in result.stderr
    assert json.loads(run("show", target, "--json"))["levels"] == [{"bits": 4, "layouts": ["q4g64"]}]
