"""Widening a model: the same function, the same routing, in a pack and in a GGUF."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import ReferenceModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

import edgemoe  # noqa: E402
from edgemoe.convert import convert  # noqa: E402
from edgemoe.errors import OptionError  # noqa: E402
from edgemoe.formats.layouts import packed_size, unpack, unpack_level  # noqa: E402
from edgemoe.formats.pack import Pack  # noqa: E402
from edgemoe.quantize.nested_experts import NestedOptions  # noqa: E402
from tools.inflate import InflatedModel, main  # noqa: E402
from tools.model_files import write_gguf, write_pack  # noqa: E402

TOKENS = np.random.default_rng(1).integers(0, 320, 24).astype(np.int32)


class TracedModel(ReferenceModel):
    """The reference model, which also notes every layer's choice of experts."""

    def __init__(self, pack: Pack) -> None:
        super().__init__(pack)
        self.picks: list[np.ndarray] = []

    def _experts(self, number: int, h: Any) -> Any:
        scores = h @ self._dense(f"layers.{number}.router")[1].T
        self.picks.append(np.argsort(-scores, kind="stable")[:, : self.spec.layers[number].top_k])
        return super()._experts(number, h)


def logits(path: Path) -> np.ndarray:
    with edgemoe.load(path, threads=1, context=64, cache_type_k="f32", cache_type_v="f32") as model:
        return model.logits(TOKENS)


def expert(pack: Pack, layer: int, number: int, part: str) -> np.ndarray:
    table = pack.index.experts[layer]
    place = table.levels[0].parts[part]
    data = pack.read_section(table.sections[number][0])[place.offset :]
    return unpack(place.layout, data[: packed_size(place.layout, *place.shape)], *place.shape)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", [{"hidden_size": 64, "moe_intermediate_size": 64}, {}])  # whole blocks, and not
def test_widened_model_computes_the_same_and_routes_the_same(
    tied: bool, sizes: dict[str, int], tiny_qwen3_moe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_qwen3_moe(dtype="F32", tie_word_embeddings=tied, decoder_sparse_step=1, **sizes)
    small, wide = tmp_path / "small.emoe", tmp_path / "wide.emoe"
    convert(folder, small, 32)
    model = InflatedModel(folder, 4, 2)
    write_pack(model, wide, 32, 32)
    pack = Pack.open(wide)
    assert pack.index.spec.hidden_size == 4 * Pack.open(small).index.spec.hidden_size
    assert not pack.verify()
    expected, found = logits(small), logits(wide)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    references = [TracedModel(Pack.open(path)) for path in (small, wide)]
    for reference in references:
        reference.logits(TOKENS)
    for before, after in zip(references[0].picks, references[1].picks, strict=True):
        np.testing.assert_array_equal(before, after)


def test_dense_layers_are_widened_too(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_qwen3_moe(dtype="F32", mlp_only_layers=[0], intermediate_size=48)
    convert(folder, tmp_path / "small.emoe", 32)
    write_pack(InflatedModel(folder, 2, 3), tmp_path / "wide.emoe", 32, 32)
    expected = logits(tmp_path / "small.emoe")
    np.testing.assert_allclose(logits(tmp_path / "wide.emoe"), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_small_model(bits: int, tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_qwen3_moe(hidden_size=64, moe_intermediate_size=64, head_dim=16)
    convert(folder, tmp_path / "small.emoe", bits)
    write_pack(InflatedModel(folder, 2, 4), tmp_path / "wide.emoe", bits, max(bits, 8))
    small, wide = Pack.open(tmp_path / "small.emoe"), Pack.open(tmp_path / "wide.emoe")
    for part, times, divisor in (("gate", (4, 2), 1), ("up", (4, 2), 1), ("down", (2, 4), 4)):
        expected = np.tile(expert(small, 1, 3, part), times) / divisor
        # Scales divided by a power of two are the same numbers unless they become too small for a float16.
        np.testing.assert_allclose(expert(wide, 1, 3, part), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("ffn", "ffn_times"), [(64, 8), (512, 2)])  # several copies in 256 columns, and one in several
def test_levels_are_those_of_a_nested_pack(
    ffn: int, ffn_times: int, tiny_qwen3_moe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_qwen3_moe(hidden_size=64, moe_intermediate_size=ffn, head_dim=16)
    small, wide = tmp_path / "small.emoe", tmp_path / "wide.emoe"
    convert(folder, small, nested=NestedOptions(levels=(2, 3, 4), calibrate=False))
    model = InflatedModel(folder, 2, ffn_times, small)
    write_pack(model, wide, 4, 8)
    packs = [Pack.open(path) for path in (small, wide)]
    assert [level.bits for level in packs[1].index.experts[1].levels] == [2, 3, 4]
    for part, times, width in (
        ("gate", (ffn_times, 2), 64),
        ("up", (ffn_times, 2), 64),
        ("down", (2, ffn_times), ffn),
    ):
        stored = []
        for pack in packs:
            table = pack.index.experts[1]
            levels = []
            for level, section in zip(table.levels, table.sections[3], strict=True):
                place = level.parts[part]
                data = pack.read_section(section)[place.offset :][: packed_size(place.layout, *place.shape)]
                levels.append(unpack_level(place.layout, data, *place.shape))
            stored.append(levels)
        for number, (before, after) in enumerate(zip(*stored, strict=True)):
            np.testing.assert_array_equal(after[0], np.tile(before[0], times))
            if number:
                assert before[1] == after[1] == ()
                continue
            # Scales, and ratios and shifts of later levels, are those of 256 columns.
            copies = times[0], max(times[1] * width // 256, 1) // max(width // 256, 1)
            scales = np.tile(before[1][0] / np.float16(ffn_times if part == "down" else 1), copies)
            np.testing.assert_allclose(after[1][0], scales, atol=1e-6)
            for one, other in zip(before[1][1:3], after[1][1:3], strict=True):
                np.testing.assert_array_equal(other, np.tile(one, times))
            for one, other in zip(before[1][3:], after[1][3:], strict=True):
                assert one.any()
                np.testing.assert_array_equal(other, np.tile(one, copies))
    for cap in (0, 2):
        found = []
        for path in (small, wide):
            with edgemoe.load(path, threads=1, context=64, level_cap=cap) as engine:
                found.append(engine.logits(TOKENS))
        # Not the same bits: sums are longer, and activations of the repeated units are rounded alike but added up anew.
        np.testing.assert_allclose(found[1], found[0], atol=2e-3 * np.ptp(found[0]))
    with pytest.raises(OptionError, match="copies of the feed-forward units"):
        InflatedModel(folder, 2, 3, small)
    with pytest.raises(OptionError, match="not this model"):
        InflatedModel(tiny_qwen3_moe(hidden_size=64), 2, 4, small)
    with pytest.raises(SystemExit, match="a GGUF file holds one width"):
        main([str(folder), str(tmp_path / "x.gguf"), "--levels-of", str(small)])


@pytest.mark.parametrize(("bits", "sizes"), [(4, (64, 64)), (8, (64, 32)), (32, (40, 24))])
def test_gguf_holds_the_same_weights(
    bits: int, sizes: tuple[int, int], tiny_qwen3_moe: Callable[..., Path], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    from edgemoe.formats.gguf import GgufModel

    hidden, ffn = sizes
    folder = tiny_qwen3_moe(dtype="F32", hidden_size=hidden, moe_intermediate_size=ffn)
    model = InflatedModel(folder, 2, 4)
    write_gguf(model, tmp_path / "wide.gguf", bits, max(bits, 8))
    file = GgufModel.open(tmp_path / "wide.gguf")
    metadata = file.metadata
    assert metadata["general.architecture"] == "qwen3moe"
    assert metadata["qwen3moe.embedding_length"] == 2 * hidden
    assert metadata["qwen3moe.expert_feed_forward_length"] == 4 * ffn
    assert metadata["qwen3moe.attention.key_length"] == 16
    assert len(metadata["tokenizer.ggml.tokens"]) == 320
    source = model._small
    for name, engine, times, divisor in (
        ("token_embd.weight", "embedding", (1, 2), 1),
        ("output.weight", "head", (1, 2), 1),
        ("blk.0.attn_k.weight", "layers.0.k", (1, 2), 1),
        ("blk.1.attn_output.weight", "layers.1.o", (2, 1), 1),
        ("blk.1.ffn_gate_inp.weight", "layers.1.router", (1, 2), 1),
        ("blk.0.ffn_up_exps.weight", "layers.0.experts.5.up", (4, 2), 1),
        ("blk.0.ffn_down_exps.weight", "layers.0.experts.5.down", (2, 4), 4),
    ):
        weights = np.tile(source.folder.read(source.sources[engine].name), times) / np.float32(divisor)
        kind = file.info(name).type
        assert kind == (
            "f32" if "inp" in name else {32: "f32", 8: "q8_0", 4: "q4_0" if "_exps" in name else "q8_0"}[bits]
        )
        if kind != "f32":
            number = gguf.GGMLQuantizationType[kind.upper()]
            weights = gguf.dequantize(gguf.quantize(weights, number), number)
        np.testing.assert_allclose(file.read(name, 5 if "_exps" in name else None), weights, atol=1e-7)
    np.testing.assert_array_equal(
        file.read("output_norm.weight"), np.tile(source.folder.read("model.norm.weight") / np.float32(2), 2)
    )


def test_what_cannot_be_done_is_refused(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_qwen3_moe()
    with pytest.raises(OptionError, match="3 copies of the stream are not a power of two"):
        InflatedModel(folder, 3, 1)
    target = tmp_path / "wide.emoe"
    with pytest.raises(OptionError, match="5 bits"):
        write_pack(InflatedModel(folder, 1, 1), target, 5, 8)
    target.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"wide\.emoe: exists already"):
        main([str(folder), str(target)])
