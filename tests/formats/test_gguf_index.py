"""A GGUF file as a model: families by their GGUF names, the index that lets it run where it lies."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import STRING, Tensor, Value, random_tensor, tiny_qwen3_moe_gguf, write

from edgemoe.errors import EdgemoeError, SourceError, UnsupportedModelError
from edgemoe.families import family_for, family_names, gguf_family_for
from edgemoe.formats.ggml_blocks import dequantize
from edgemoe.formats.gguf_index import GgufSource, build_index
from edgemoe.formats.index import ModelIndex


def tiny(tmp_path: Path, *, without: tuple[str, ...] = (), tensors: Any = None, **changes: Any) -> GgufSource:
    """changes: metadata with "_" for ".", and without the architecture in front; None removes a key."""
    metadata, all_tensors = tiny_qwen3_moe_gguf()
    for key, value in changes.items():
        metadata.pop(f"qwen3moe.{key}", None)
        if value is not None:
            metadata[f"qwen3moe.{key}"] = value
    all_tensors = {name: tensor for name, tensor in all_tensors.items() if name not in without} | (tensors or {})
    return GgufSource.open(write(tmp_path / "tiny.gguf", metadata, all_tensors))


def bytes_at(index: ModelIndex, extent: Any) -> bytes:
    with Path(index.files[extent.file]).open("rb") as stream:
        stream.seek(extent.offset)
        return stream.read(extent.length)


def test_the_spec_is_that_of_the_configuration(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": 267,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
    source = tiny(tmp_path)
    assert source.spec == family_for(config).spec(config)
    assert source.unused == []
    tied = tiny(tmp_path, without=("output.weight",))
    assert (
        tied.spec.tied_embeddings
        and tied.spec.dense_tensors().keys() == tied.sources.keys() & tied.spec.dense_tensors()
    )
    same = tiny(tmp_path, **{"attention.head_count_kv": [2, 2], "rope.scaling.type": "none", "expert_gating_func": 1})
    assert same.spec == source.spec


def test_every_family_says_whether_it_has_gguf_files() -> None:
    for name in family_names():
        family = family_for({"model_type": name})
        if family.GGUF_ARCHITECTURE is not None:
            assert gguf_family_for({"general.architecture": family.GGUF_ARCHITECTURE}) is family


def test_the_tensors_are_where_the_index_says(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    index, spec = build_index(source), source.spec
    _, tensors = tiny_qwen3_moe_gguf()
    assert index.dense.keys() == spec.dense_tensors().keys() and index.experts.keys() == {0, 1}
    for name, tensor in index.dense.items():
        (extent,) = index.sections[tensor.section].extents
        assert bytes_at(index, extent) == tensors[source.sources[name].name].data
        assert tensor.shape == spec.dense_tensors()[name] and tensor.offset == 0
    assert index.dense["final_norm"].layout == "vector"
    assert index.dense["layers.1.router"].layout == "ggml.f32" and index.dense["embedding"].layout == "ggml.q8_0"
    for number, layer in index.experts.items():
        (level,) = layer.levels
        assert level.bits == 8 and len(layer.sections) == 4
        for expert, (section,) in enumerate(layer.sections):
            for part, name in (("gate", "ffn_gate_exps"), ("up", "ffn_up_exps"), ("down", "ffn_down_exps")):
                place = level.parts[part]
                data = bytes_at(index, index.sections[section].extents[place.extent])
                whole = source.model.read(f"blk.{number}.{name}.weight", index=expert)
                assert place.layout == "ggml.q8_0" and place.offset == 0 and place.shape == whole.shape
                np.testing.assert_array_equal(dequantize("q8_0", np.frombuffer(data, np.uint8)), whole.reshape(-1))
    spans = sorted((extent.offset, extent.offset + extent.length) for s in index.sections for extent in s.extents)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_types_may_differ_within_an_expert(tmp_path: Path) -> None:
    downs = {f"blk.{layer}.ffn_down_exps.weight": random_tensor("q4_1", (4, 64, 32)) for layer in range(2)}
    parts = build_index(tiny(tmp_path, tensors=downs)).experts[0].levels[0].parts
    assert [parts[part].layout for part in ("gate", "up", "down")] == ["ggml.q8_0", "ggml.q8_0", "ggml.q4_1"]


def test_generation(tmp_path: Path) -> None:
    metadata, tensors = tiny_qwen3_moe_gguf()
    metadata |= {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": float("nan")}
    source = GgufSource.open(write(tmp_path / "tiny.gguf", metadata, tensors))
    tokens = metadata["tokenizer.ggml.tokens"]
    assert source.generation == {
        "bos_token_ids": [tokens.index("<|im_start|>")],
        "eos_token_ids": [tokens.index("<|im_end|>")],
        "temperature": 0.6,
        "top_k": 20,
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rope.scaling.type": "longrope"}, UnsupportedModelError, "qwen3moe.rope.scaling.type = 'longrope'"),
        ({"rope.dimension_count": 8}, UnsupportedModelError, "qwen3moe.rope.dimension_count = 8"),
        ({"attention.value_length": 8}, UnsupportedModelError, "qwen3moe.attention.value_length = 8"),
        ({"attention.sliding_window": 128}, UnsupportedModelError, "qwen3moe.attention.sliding_window = 128"),
        ({"expert_shared_count": 1}, UnsupportedModelError, "qwen3moe.expert_shared_count = 1"),
        ({"expert_gating_func": 2}, UnsupportedModelError, "qwen3moe.expert_gating_func = 2"),
        ({"expert_gating_func": [1, 1]}, UnsupportedModelError, r"qwen3moe.expert_gating_func = \[1, 1\]"),
        ({"attention.head_count_kv": [2, 1]}, UnsupportedModelError, r"head_count_kv = \[2, 1\]: layers that differ"),
        ({"attention.head_count_kv": [1] * 2000}, UnsupportedModelError, "has 2000 entries"),
        ({"attention.head_count": "four"}, UnsupportedModelError, "num_attention_heads = 'four'"),
        ({"attention.head_count": Value(9, ["4"], STRING)}, UnsupportedModelError, "num_attention_heads"),
        ({"embedding_length": None}, SourceError, "hidden_size is missing"),
        ({"block_count": 3}, SourceError, "tensor blk.2.attn_norm.weight is missing"),
        ({"expert_count": 5}, SourceError, r"blk.0.ffn_gate_inp.weight: shape \[4, 64\] does not give layers.0.router"),
        ({"expert_count": 1 << 16, "block_count": 900}, SourceError, "58982400 experts in all layers"),
        ({"expert_count": 0}, UnsupportedModelError, "tensor 'blk.0.ffn_gate_inp.weight' is not part of qwen3moe"),
        ({"expert_feed_forward_length": 64}, SourceError, r"ffn_gate_exps.weight: shape \[4, 32, 64\] does not give"),
    ],
)
def test_metadata_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], error: type[EdgemoeError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        tiny(tmp_path, **changes)
    assert "tiny.gguf: " in str(caught.value)


def test_further_layers_are_left_over(tmp_path: Path) -> None:
    """As those of predictors of several tokens are, in real files."""
    source = tiny(tmp_path, block_count=1)
    assert len(source.unused) == 12 and all(name.startswith("blk.1.") for name in source.unused)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": random_tensor("f32", (64,))}
    with pytest.raises(UnsupportedModelError, match=r"tensor 'blk.0.attn_q.bias' is not part of qwen3moe"):
        tiny(tmp_path, tensors=bias)
    with pytest.raises(UnsupportedModelError, match=r"tensor 'rope_freqs.weight' is not part of qwen3moe"):
        tiny(tmp_path, tensors={"rope_freqs.weight": random_tensor("f32", (8,))})
    assert tiny(tmp_path, tensors={"extra": random_tensor("f32", (8,))}).unused == ["extra"]
    with pytest.raises(SourceError, match=r"tensor token_embd.weight is missing"):
        tiny(tmp_path, without=("token_embd.weight",))
    with pytest.raises(SourceError, match=r"tensor blk.1.attn_v.weight is missing"):
        tiny(tmp_path, without=("blk.1.attn_v.weight",))
    half = tiny(tmp_path, tensors={"output_norm.weight": random_tensor("f16", (64,))})
    with pytest.raises(UnsupportedModelError, match=r"output_norm.weight: a vector of type f16"):
        build_index(half)
    odd = tiny(tmp_path, tensors={"output.weight": Tensor((267, 64), 28, bytes(267 * 64 * 8))})
    with pytest.raises(UnsupportedModelError, match=r"tensor output.weight: a tensor of type f64"):
        build_index(odd)


def test_other_architectures(tmp_path: Path) -> None:
    metadata, tensors = tiny_qwen3_moe_gguf()
    for architecture in ("clip", 7, None):
        metadata["general.architecture"] = architecture
        if architecture is None:
            del metadata["general.architecture"]
        with pytest.raises(UnsupportedModelError, match=r"tiny.gguf: general.architecture = .* \(known: .*qwen3moe"):
            GgufSource.open(write(tmp_path / "tiny.gguf", metadata, tensors))
