"""GGUF files where they lie: the engine against other programs' reading of the same bytes, and against itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import BLOCKS, Tensor, byte_level_metadata, write
from helpers import finished, slow_except
from reference import Array, ReferenceModel
from tiny_gguf import tiny, tiny_tensors

import edgemoe
from edgemoe import _core
from edgemoe.convert import convert
from edgemoe.errors import UnsupportedModelError
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.pack import Pack
from edgemoe.spec import ModelSpec

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tools.ggml_quantize import quantize
from tools.model_files import gguf_name

F32_STATE = {"cache_type_k": "f32", "cache_type_v": "f32"}
TYPES = tuple(BLOCKS)
QUANTIZED = tuple(name for name in TYPES if name not in ("f32", "f16", "bf16"))

Load = Callable[..., edgemoe.Model]


def some_tokens(count: int) -> np.ndarray:
    vocabulary = len(byte_level_metadata()["tokenizer.ggml.tokens"])
    return np.random.default_rng(5).integers(0, vocabulary, count).astype(np.int32)


def logits(path: Path, tokens: np.ndarray, **options: Any) -> np.ndarray:
    with edgemoe.load(path, **{"threads": 2, **options}) as model:
        return model.logits(tokens)


class GgufPackageWeights:
    """A GGUF file as the `gguf` package reads and dequantizes it; only the names and the specification are ours."""

    def __init__(self, path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        self._dequantize = gguf.quants.dequantize
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        source = GgufSource.open(path)
        self.spec: ModelSpec = source.spec
        self._sources = source.sources

    def tensor(self, name: str) -> tuple[str, Array]:
        source = self._sources[name]
        tensor = self._tensors[source.name]
        values = self._dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        return tensor.tensor_type.name.lower(), values if source.index is None else values[source.index]


def check_difference(found: np.ndarray, expected: Array, plain: bool = False) -> None:
    """plain: no activation becomes an int8 code. Where they do, a last-bit difference before the rounding is now and
    then a code after it, and it spreads to the tokens that follow; those before it are exact."""
    difference = np.abs(found - expected) / (expected.max() - expected.min())
    assert difference.max() < (2e-5 if plain else 2e-2)
    assert difference.mean() < (2e-6 if plain else 2e-3)
    assert np.quantile(difference.max(1), 0.1) < 1e-5


# -- other programs' reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_except(TYPES, "f16", "q4_k"))
def test_logits_equal_the_dequantized_weights(tmp_path: Path, kind: str) -> None:
    path, tokens = tiny(tmp_path, kind, hidden=256, ffn=256), some_tokens(40)
    weights = GgufPackageWeights(path)
    found = logits(path, tokens, **F32_STATE)
    expected = ReferenceModel(weights).logits(tokens)
    plain = kind not in QUANTIZED
    check_difference(found, expected, plain)
    exact = ReferenceModel(weights, activations="exact").logits(tokens)
    assert (np.abs(found - exact) / (exact.max() - exact.min())).mean() < (2e-6 if plain else 2e-2)


@pytest.mark.parametrize("writer", ["ours", "gguf"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_gives_the_logits_of_the_folder_with_its_weights(
    tiny_qwen3_moe: Callable[..., Path], tmp_path: Path, writer: str, tied: bool
) -> None:
    folder = tiny_qwen3_moe(dtype="F32", tie_word_embeddings=tied)
    convert(folder, tmp_path / "folder.emoe", 32)
    path = write_like_folder(Pack.open(tmp_path / "folder.emoe"), folder, tmp_path / "same.gguf", writer)
    tokens = np.random.default_rng(1).integers(0, 320, 48).astype(np.int32)
    expected = logits(tmp_path / "folder.emoe", tokens, **F32_STATE)
    found = logits(path, tokens, **F32_STATE)
    assert np.abs(found - expected).max() <= 2e-3 * (expected.max() - expected.min())
    # More than was asked for: the engine computes the same with the same numbers, wherever they lie.
    assert found.tobytes() == expected.tobytes()


def test_a_file_gives_the_logits_of_transformers(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny_qwen3_moe(dtype="F32")
    convert(folder, tmp_path / "folder.emoe", 32)
    path = write_like_folder(Pack.open(tmp_path / "folder.emoe"), folder, tmp_path / "same.gguf", "ours")
    tokens = np.random.default_rng(1).integers(0, 320, 48).astype(np.int32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    found = logits(path, tokens, **F32_STATE)
    assert np.abs(found - expected).max() <= 2e-3 * (expected.max() - expected.min())


def write_like_folder(pack: Pack, folder: Path, path: Path, writer: str) -> Path:
    """The same float32 weights as a GGUF file, by our own writer or by the `gguf` package's."""
    reference, spec = ReferenceModel(pack), pack.index.spec
    arrays: dict[str, np.ndarray] = {}
    for name in spec.dense_tensors():
        arrays[gguf_name(name)] = reference.source.tensor(name)[1].astype(np.float32)
    for number, layer_spec in enumerate(spec.layers):
        for part in ("gate", "up", "down"):
            stack = [
                reference.source.tensor(f"layers.{number}.experts.{expert}.{part}")[1]
                for expert in range(layer_spec.experts)
            ]
            arrays[f"blk.{number}.ffn_{part}_exps.weight"] = np.stack(stack).astype(np.float32)
    layer_spec = spec.layers[0]
    integers = {
        "block_count": len(spec.layers),
        "context_length": spec.context,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": layer_spec.ffn_dim,
        "attention.head_count": layer_spec.attention.heads,
        "attention.head_count_kv": layer_spec.attention.kv_heads,
        "attention.key_length": layer_spec.attention.head_dim,
        "attention.value_length": layer_spec.attention.head_dim,
        "expert_count": layer_spec.experts,
        "expert_used_count": layer_spec.top_k,
        "expert_feed_forward_length": layer_spec.ffn_dim,
    }
    floats = {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": spec.norm_epsilon}
    words = byte_level_metadata(words=("the",) * 1)
    tokens = words["tokenizer.ggml.tokens"]
    padding = [f"[PAD{i}]" for i in range(spec.vocab_size - len(tokens))]
    words["tokenizer.ggml.tokens"] = tokens + padding
    words["tokenizer.ggml.token_type"] = words["tokenizer.ggml.token_type"] + [5] * len(padding)
    if writer == "ours":
        metadata = words | {f"qwen3moe.{key}": value for key, value in (integers | floats).items()}
        tensors = {name: Tensor(values.shape, 0, values.tobytes()) for name, values in arrays.items()}
        return write(path, metadata, tensors)
    gguf = pytest.importorskip("gguf")
    out = gguf.GGUFWriter(path, "qwen3moe")
    for key, number in integers.items():
        out.add_uint32(f"qwen3moe.{key}", number)
    for key, value in floats.items():
        out.add_float32(f"qwen3moe.{key}", value)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list(words["tokenizer.ggml.tokens"])
    out.add_token_types(words["tokenizer.ggml.token_type"])
    out.add_token_merges(words["tokenizer.ggml.merges"])
    out.add_eos_token_id(words["tokenizer.ggml.eos_token_id"])
    for name, values in arrays.items():
        out.add_tensor(name, values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


# -- exactness ------------------------------------------------------------------------------------------------------


def load_divided(path: Path, chunk: int = 512, slots: int | None = None, **options: Any) -> edgemoe.Model:
    """Loads with a given chunk size or number of expert slots instead of those that the budget gives."""
    return edgemoe.load(path, chunk=chunk, expert_slots=slots, **options)


# Kinds by tensor and sizes. The vocabulary has 267 entries, never a multiple of 16; 40 units are none either, and what
# has rows of 40 weights cannot be quantized.
SHAPES: dict[str, tuple[dict[str, str], dict[str, int]]] = {
    "mixed 256": (
        {"": "q4_k", "ffn_down_exps": "q6_k", "attn_v": "q6_k", "output": "q6_k", "token_embd": "q4_k"},
        {"hidden": 256, "ffn": 256, "experts": 6},
    ),
    "mixed 32": (
        {"": "iq4_nl", "ffn_down_exps": "q8_0", "attn_output": "q5_0", "token_embd": "q4_0", "output": "q5_1"},
        {"hidden": 96, "ffn": 32, "experts": 6},
    ),
    "padded": (
        {"": "q8_0", "ffn_down_exps": "f16", "ffn_up_exps": "bf16", "token_embd": "f32"},
        {"hidden": 96, "ffn": 40, "experts": 6},
    ),
    "small blocks": ({"": "q4_1", "ffn_down_exps": "mxfp4"}, {"hidden": 64, "ffn": 32, "experts": 6}),
    "low bits": ({"": "q3_k", "ffn_down_exps": "iq4_xs", "ffn_up_exps": "q2_k"}, {"hidden": 256, "ffn": 256}),
}


@pytest.mark.parametrize("shape", slow_except(SHAPES))
def test_logits_are_bit_identical_however_they_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    kinds, sizes = SHAPES[shape]
    path, tokens = tiny(tmp_path, kinds, **sizes), some_tokens(90)
    with load_divided(path, threads=1) as model:
        expected = model.logits(tokens).tobytes()
    variants: list[dict[str, Any]] = [{"threads": n} for n in (2, 3)]
    variants += [{"chunk": n, "threads": 2} for n in (1, 7, 64)]
    variants += [{"slots": n, "threads": 2, "chunk": 64} for n in (2, 3, 7)]
    variants += [{"slots": 3, "chunk": 1, "prefetch": False}]
    for variant in variants:
        with load_divided(path, **variant) as model:
            assert model.logits(tokens).tobytes() == expected, variant
            if "slots" in variant:
                assert model.engine.counters().evictions > 0
    for isa in _core.kernels.available_isas():
        monkeypatch.setenv("EDGEMOE_ISA", isa)
        with load_divided(path) as model:
            assert model.isa == isa
            assert model.logits(tokens).tobytes() == expected, isa


@pytest.mark.parametrize("kind", slow_except([name for name in TYPES if name != "f32"], "f16", "q4_k"))
def test_a_router_of_any_type(tmp_path: Path, kind: str) -> None:
    path, tokens = tiny(tmp_path, {"ffn_gate_inp": kind}, hidden=256, ffn=64), some_tokens(40)
    found = logits(path, tokens, **F32_STATE)
    check_difference(found, ReferenceModel(GgufPackageWeights(path)).logits(tokens), kind not in QUANTIZED)
    convert(path, tmp_path / "router.emoe")
    assert logits(tmp_path / "router.emoe", tokens, **F32_STATE).tobytes() == found.tobytes()
    with load_divided(path, slots=3, **F32_STATE) as model:  # the next layer's router is asked ahead, too
        assert model.logits(tokens).tobytes() == found.tobytes()


@pytest.mark.parametrize("shape", slow_except(SHAPES))
def test_shapes_equal_the_dequantized_weights(tmp_path: Path, shape: str) -> None:
    kinds, sizes = SHAPES[shape]
    path, tokens = tiny(tmp_path, kinds, **sizes), some_tokens(30)
    check_difference(logits(path, tokens, **F32_STATE), ReferenceModel(GgufPackageWeights(path)).logits(tokens))


def test_a_split_file_gives_the_same_logits(tmp_path: Path) -> None:
    metadata, tensors = tiny_tensors({"": "q4_k", "ffn_down_exps": "q6_k"}, hidden=256, ffn=256)
    whole = write(tmp_path / "whole.gguf", metadata, tensors)
    names = list(tensors)
    for number in range(3):
        more = {"split.no": number, "split.count": 3, "split.tensors.count": len(tensors)}
        part = {name: tensors[name] for name in names[number::3]}
        write(tmp_path / f"split-{number + 1:05}-of-00003.gguf", (metadata if number == 0 else {}) | more, part)
    expected = logits(whole, some_tokens(20)).tobytes()
    assert logits(tmp_path / "split-00001-of-00003.gguf", some_tokens(20)).tobytes() == expected


# -- packs with the same blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_except(TYPES, "f16", "q4_k"))
def test_a_converted_file_keeps_its_blocks_and_its_logits(tmp_path: Path, kind: str) -> None:
    path, pack_path, tokens = tiny(tmp_path, kind, hidden=256, ffn=256), tmp_path / "tiny.emoe", some_tokens(40)
    convert(path, pack_path)
    pack, source = Pack.open(pack_path), GgufSource.open(path)
    assert not pack.verify() and "bits" not in pack.provenance
    layout = kind if kind not in QUANTIZED else f"ggml.{kind}"
    if kind in QUANTIZED:
        file = pack_path.read_bytes()
        for number, layer in pack.index.experts.items():
            for expert, (section,) in enumerate(layer.sections):
                (extent,) = pack.index.sections[section].extents
                assert extent.offset % 4096 == 0
                for part, place in layer.levels[0].parts.items():
                    tensor = source.sources[f"layers.{number}.experts.{expert}.{part}"]
                    blocks = bytes(source.model.read_bytes(tensor.name, tensor.index))
                    assert (place.layout, place.extent, place.offset % 64) == (layout, 0, 0)
                    assert file[extent.offset + place.offset :][: len(blocks)] == blocks
        for name, dense in pack.index.dense.items():
            if dense.layout == layout:
                blocks = bytes(source.model.read_bytes(source.sources[name].name))
                begin = pack.index.sections[dense.section].extents[0].offset + dense.offset
                assert file[begin : begin + len(blocks)] == blocks
    assert {dense.layout for dense in pack.index.dense.values()} == {"vector", "f32", layout}
    assert logits(pack_path, tokens).tobytes() == logits(path, tokens).tobytes()


@pytest.mark.parametrize("shape", slow_except(shape for shape in SHAPES if shape != "padded"))
def test_converted_shapes_keep_their_logits(tmp_path: Path, shape: str) -> None:
    kinds, sizes = SHAPES[shape]
    path, pack_path = tiny(tmp_path, kinds, **sizes), tmp_path / "tiny.emoe"
    convert(path, pack_path)
    expected = ReferenceModel(GgufPackageWeights(path), "exact")
    converted = ReferenceModel(Pack.open(pack_path), "exact")
    for name in ("embedding", "layers.1.q", "layers.1.experts.3.down", "layers.0.ffn_norm"):
        np.testing.assert_array_equal(converted.source.tensor(name)[1], expected.source.tensor(name)[1])
    assert logits(pack_path, some_tokens(40)).tobytes() == logits(path, some_tokens(40)).tobytes()


def test_experts_that_need_padding_are_refused_by_name(tmp_path: Path) -> None:
    kinds, sizes = SHAPES["padded"]
    path = tiny(tmp_path, kinds, **sizes)
    with pytest.raises(UnsupportedModelError, match=r"tiny.gguf: tensor blk.0.ffn_gate_exps.weight: 40 rows of an"):
        convert(path, tmp_path / "tiny.emoe")
    convert(path, tmp_path / "tiny.emoe", 8)


def test_dense_matrices_that_need_padding_lie_alone(tmp_path: Path) -> None:
    """Keys and values of one head of 24: beside the layer's other tensors there would be no room for rows 25 to 32."""
    metadata, tensors = tiny_tensors("q8_0")
    rng = np.random.default_rng(9)
    sizes = {"key_length": 24, "value_length": 24, "head_count": 4, "head_count_kv": 1}
    metadata |= {f"qwen3moe.attention.{key}": value for key, value in sizes.items()}
    for layer in range(2):
        shapes = {"attn_q": (96, 64), "attn_k": (24, 64), "attn_v": (24, 64), "attn_output": (64, 96)}
        for name, shape in shapes.items():
            values = (rng.standard_normal(shape) / 8).astype(np.float32)
            tensors[f"blk.{layer}.{name}.weight"] = Tensor(shape, 8, quantize("q8_0", values).tobytes())
        for name in ("attn_q_norm", "attn_k_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = Tensor((24,), 0, np.ones(24, np.float32).tobytes())
    path = write(tmp_path / "tiny.gguf", metadata, tensors)
    convert(path, tmp_path / "tiny.emoe")
    pack = Pack.open(tmp_path / "tiny.emoe")
    assert pack.index.dense["layers.0.k"].section != pack.index.dense["layers.0.q"].section
    assert pack.index.dense["layers.0.o"].section == pack.index.dense["layers.0.q"].section
    assert logits(tmp_path / "tiny.emoe", some_tokens(30)).tobytes() == logits(path, some_tokens(30)).tobytes()
    expected = ReferenceModel(GgufPackageWeights(path)).logits(some_tokens(30))
    check_difference(logits(path, some_tokens(30), **F32_STATE), expected)


def test_generates_text(tmp_path: Path) -> None:
    path = tiny(tmp_path, {"": "q4_k", "ffn_down_exps": "q6_k"}, hidden=256, ffn=256)
    with edgemoe.load(path, threads=1) as model:
        first = list(model.generate("the hello", max_tokens=12, temperature=0, ignore_eos=True))
        again = finished(model.generate("the hello", max_tokens=12, temperature=0, ignore_eos=True))
        assert "".join(first) == again.text and again.generated_tokens == 12


def test_the_quantizers_are_right() -> None:
    """Those that the tests above have made their weights with: what comes back is near what went in."""
    values = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    values[3], values[5, :300] = 0, 0
    blocks = importlib.import_module("edgemoe.formats.ggml_blocks")
    errors = {"q2_k": 0.36, "q3_k": 0.2, "q4_k": 0.09, "q5_k": 0.045, "q6_k": 0.025, "iq4_nl": 0.1, "iq4_xs": 0.1}
    for kind, most in errors.items():
        found = blocks.dequantize(kind, quantize(kind, values).reshape(-1)).reshape(values.shape)
        assert np.sqrt(np.mean((found - values)[6:] ** 2)) < most, kind
        assert not found[3].any()
