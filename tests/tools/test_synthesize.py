"""Random models of a true shape: equal in both formats, and routing that stays nearly uniform."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from edgemoe.errors import OptionError  # noqa: E402
from edgemoe.formats.layouts import packed_size, unpack  # noqa: E402
from edgemoe.formats.pack import Pack  # noqa: E402
from tools.model_files import write_gguf, write_pack  # noqa: E402
from tools.synthesize import SyntheticModel, check_routing  # noqa: E402


def tiny(**options: Any) -> SyntheticModel:
    shape = {
        "layers": 4,
        "hidden": 128,
        "ffn": 64,
        "experts": 32,
        "top_k": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
    }
    return SyntheticModel(**{**shape, "vocabulary": 512, **options})


def dense(pack: Pack, name: str) -> np.ndarray:
    tensor = pack.index.dense[name]
    shape = (*tensor.shape, 1)[:2]
    data = pack.read_section(tensor.section)[tensor.offset :]
    return unpack(tensor.layout, data[: packed_size(tensor.layout, *shape)], *shape).reshape(tensor.shape)


def expert(pack: Pack, layer: int, number: int, part: str) -> np.ndarray:
    table = pack.index.experts[layer]
    place = table.levels[0].parts[part]
    data = pack.read_section(table.sections[number][0])[place.offset :]
    return unpack(place.layout, data[: packed_size(place.layout, *place.shape)], *place.shape)


@pytest.mark.parametrize(("bits", "dense_bits"), [(4, 4), (4, 8), (8, 8)])
def test_pack_and_gguf_hold_the_same_weights_to_the_bit(bits: int, dense_bits: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from edgemoe.formats.gguf import GgufModel

    write_pack(tiny(), tmp_path / "model.emoe", bits, dense_bits)
    write_gguf(tiny(), tmp_path / "model.gguf", bits, dense_bits)
    pack, file = Pack.open(tmp_path / "model.emoe"), GgufModel.open(tmp_path / "model.gguf")
    assert not pack.verify()
    for engine, name in (
        ("embedding", "token_embd"),
        ("head", "output"),
        ("layers.1.q", "blk.1.attn_q"),
        ("layers.3.o", "blk.3.attn_output"),
        ("layers.2.router", "blk.2.ffn_gate_inp"),
        ("layers.2.q_norm", "blk.2.attn_q_norm"),
    ):
        np.testing.assert_array_equal(dense(pack, engine), file.read(f"{name}.weight"))
    for part in ("gate", "up", "down"):
        np.testing.assert_array_equal(expert(pack, 2, 7, part), file.read(f"blk.2.ffn_{part}_exps.weight", 7))
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 512
    assert list(file.metadata["tokenizer.ggml.merges"]) == ["\u0120 t"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_centred_and_of_the_right_size(bits: int, tmp_path: Path) -> None:
    write_pack(tiny(ffn=256), tmp_path / "model.emoe", bits, bits)
    weights = np.stack([expert(Pack.open(tmp_path / "model.emoe"), 0, i, "gate") for i in range(32)])
    assert abs(weights.mean()) * np.sqrt(128) < 0.01
    assert weights.std() * np.sqrt(128) == pytest.approx(1, abs=0.02)
    # Centred within a row, too, as far as its few groups allow: no direction that all experts share.
    assert np.abs(weights.mean(axis=(0, 1))).max() * np.sqrt(128) < 0.1


def test_routing_stays_nearly_uniform(tmp_path: Path) -> None:
    write_pack(tiny(layers=6), tmp_path / "model.emoe", 4, 4)
    found, chance = check_routing(tmp_path / "model.emoe", 48, memory=None)
    assert chance == pytest.approx(32 * (1 - (30 / 32) ** 48))
    assert found > 0.8 * chance


def test_bytes_depend_on_the_seed_only(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_pack(tiny(seed=seed), tmp_path / name, 4, 4)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(OptionError, match="rows of 100 weights"):
        tiny(ffn=100)
    with pytest.raises(OptionError, match="a vocabulary of 300"):
        tiny(vocabulary=300)
