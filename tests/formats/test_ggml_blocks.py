"""The block formats: values worked out by hand, and the gguf package's dequantizers as the oracle."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from gguf_writer import BLOCKS, random_blocks

from edgemoe.errors import SourceError
from edgemoe.formats.ggml_blocks import READABLE, TYPES, dequantize


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def values(kind: str, block: bytes) -> list[float]:
    return list(map(float, dequantize(kind, np.frombuffer(block, np.uint8))))


def test_the_sizes_are_those_the_writer_knows() -> None:
    assert set(READABLE) == set(BLOCKS)
    for name, (code, weights, nbytes, _) in BLOCKS.items():
        assert TYPES[name] == (name, code, weights, nbytes)


def test_q4_0_by_hand() -> None:
    block = half(0.5) + bytes([0xF0 + i for i in range(16)])
    assert values("q4_0", block) == [0.5 * (i - 8) for i in range(16)] + [3.5] * 16


def test_q5_1_by_hand() -> None:
    block = half(2.0) + half(-1.0) + struct.pack("<I", 1 << 0 | 1 << 31) + bytes([0x21] * 16)
    assert values("q5_1", block) == [2.0 * 17 - 1] + [1.0] * 15 + [3.0] * 15 + [2.0 * 18 - 1]


def test_q4_k_by_hand() -> None:
    scales = bytes([1, 2, 3, 4, 5, 6, 7, 8, 0x91, 0, 0, 0])  # the fifth scale is 1, the fifth minimum 9
    block = half(1.0) + half(0.5) + scales + bytes([0x31]) * 128
    expected = [1.0 * 1 - 2.5] * 32 + [2.0 * 3 - 3.0] * 32 + [3.0 * 1 - 3.5] * 32 + [4.0 * 3 - 4.0] * 32
    assert values("q4_k", block) == expected + [1.0 - 4.5] * 32 + [0.0] * 96


def test_mxfp4_by_hand() -> None:
    block = bytes([127]) + bytes([i | i << 4 for i in range(16)])
    expected = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert values("mxfp4", block) == expected * 2
    assert values("mxfp4", bytes([0]) + bytes([7] * 16))[0] == 6 * 2.0**-127


@pytest.mark.parametrize("kind", READABLE)
def test_like_the_gguf_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    data = np.frombuffer(random_blocks(kind, 256 * 300, seed=3), np.uint8)
    expected = gguf.quants.dequantize(data.reshape(1, -1), gguf.GGMLQuantizationType[kind.upper()]).reshape(-1)
    np.testing.assert_array_equal(dequantize(kind, data), expected.astype(np.float32))


def test_sizes_like_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for kind in TYPES.values():
        if kind.code in gguf.GGML_QUANT_SIZES:  # an older package knows fewer
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.code)] == (kind.weights, kind.nbytes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", READABLE)
def test_any_bytes_have_values(kind: str) -> None:
    data = np.full(TYPES[kind].nbytes * 3, 0xFF, np.uint8)
    assert dequantize(kind, data).shape == (TYPES[kind].weights * 3,)
    assert dequantize(kind, data[:0]).shape == (0,)


def test_other_types_are_refused_by_name() -> None:
    with pytest.raises(SourceError, match="iq1_s cannot be read"):
        dequantize("iq1_s", np.zeros(50, np.uint8))
