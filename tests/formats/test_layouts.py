"""Tensor layouts: the exact bytes of small matrices, round trips, sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.formats.layouts import (
    BLOCK,
    GROUP,
    LAYOUTS,
    NESTED,
    QUANTIZED,
    level_bits,
    pack,
    pack_level,
    packed_size,
    unpack,
    unpack_codes,
    unpack_level,
)


def test_ggml_layouts_are_rows_of_blocks() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (5, 3 * 34), np.uint8)
    blocks.reshape(-1, 34)[:, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    assert packed_size("ggml.q8_0", 5, 96) == blocks.size and packed_size("ggml.q6_k", 3, 512) == 3 * 2 * 210
    expected = blocks.reshape(5, 3, 34)[:, :, 2:].view(np.int8).reshape(5, 96) * np.float32(0.5)
    np.testing.assert_array_equal(unpack("ggml.q8_0", blocks.tobytes(), 5, 96), expected)
    with pytest.raises(ValueError, match="rows of 80 are not whole blocks of 32"):
        packed_size("ggml.q8_0", 5, 80)
    with pytest.raises(ValueError, match=r"unknown layout 'ggml.iq1_s'"):
        packed_size("ggml.iq1_s", 5, 256)


def test_vector_bytes() -> None:
    assert pack("vector", np.array([1.0, -2.0], np.float32)).tobytes() == bytes.fromhex("0000803f000000c0")


@pytest.mark.parametrize(
    ("layout", "values", "width"),
    [
        ("f32", np.array([[1, 2], [3, 4], [5, 6]], np.float32), 4),
        ("f16", np.array([[1, 2], [3, 4], [5, 6]], np.float16), 2),
        ("bf16", np.array([[0x3F80, 0x4000], [0x4040, 0x4080], [0x40A0, 0x40C0]], np.uint16), 2),
    ],
)
def test_plain_bytes(layout: str, values: np.ndarray, width: int) -> None:
    """Column 0 of 16 rows, then column 1 of 16 rows; the rows that do not exist are zero."""
    data = pack(layout, values)
    expected = b""
    for column in range(2):
        expected += values[:, column].tobytes() + bytes(13 * width)
    assert data.tobytes() == expected
    assert len(data) == packed_size(layout, 3, 2) == 2 * 16 * width
    np.testing.assert_array_equal(unpack(layout, data, 3, 2), [[1, 2], [3, 4], [5, 6]])


def test_q8_bytes() -> None:
    """Byte by byte from the words of docs/format.md."""
    rng = np.random.default_rng(1)
    rows, groups = 17, 2
    codes = rng.integers(0, 256, (rows, groups * GROUP), np.uint8)
    scales = rng.random((rows, groups)).astype(np.float16)
    offsets = rng.random((rows, groups)).astype(np.float16)
    data = pack("q8g64", codes, scales, offsets).reshape(2, groups, 1088)
    for row in range(rows):
        for group in range(groups):
            record = data[row // 16, group]
            lane = row % 16
            for column in range(GROUP):
                quad, k = divmod(column, 4)
                assert record[64 * quad + 4 * lane + k] == codes[row, group * GROUP + column]
            assert record[1024:1056].view("<f2")[lane] == scales[row, group]
            assert record[1056:1088].view("<f2")[lane] == offsets[row, group]
    assert not data[1].reshape(groups, 17, 16, 4)[:, :16, 1:].any()  # the missing 15 rows


def test_q4_bytes() -> None:
    rng = np.random.default_rng(2)
    rows, groups = 5, 3
    codes = rng.integers(0, 16, (rows, groups * GROUP), np.uint8)
    scales = rng.random((rows, groups)).astype(np.float16)
    offsets = rng.random((rows, groups)).astype(np.float16)
    data = pack("q4g64", codes, scales, offsets).reshape(groups, 576)
    for row in range(rows):
        for group in range(groups):
            for octet in range(8):
                for k in range(4):
                    low = codes[row, group * GROUP + 8 * octet + k]
                    high = codes[row, group * GROUP + 8 * octet + 4 + k]
                    assert data[group, 64 * octet + 4 * row + k] == low | high << 4
            assert data[group, 512:544].view("<f2")[row] == scales[row, group]
            assert data[group, 544:576].view("<f2")[row] == offsets[row, group]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 200), st.sampled_from(LAYOUTS), st.integers(0, 2**32))
def test_round_trip(rows: int, columns: int, layout: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    if layout in QUANTIZED:
        groups = -(-columns // GROUP)
        codes = rng.integers(0, 1 << QUANTIZED[layout], (rows, groups * GROUP), np.uint8)
        scales = rng.random((rows, groups)).astype(np.float16)
        offsets = rng.standard_normal((rows, groups)).astype(np.float16)
        data = pack(layout, codes, scales, offsets)
        for got, want in zip(unpack_codes(layout, data, rows, columns), (codes, scales, offsets), strict=True):
            np.testing.assert_array_equal(got, want)
        decoded = codes.reshape(rows, groups, GROUP) * scales[..., None].astype(np.float32) + offsets[..., None].astype(
            np.float32
        )
        expected = decoded.reshape(rows, -1)[:, :columns]
    else:
        expected = rng.standard_normal((rows, columns)).astype(np.float32)
        if layout == "bf16":
            bits = (expected.view(np.uint32) >> 16).astype(np.uint16)
            expected = (bits.astype(np.uint32) << 16).view(np.float32)
            data = pack(layout, bits)
        elif layout == "f16":
            expected = expected.astype(np.float16)
            data = pack(layout, expected)
        else:
            data = pack(layout, expected)
    assert data.dtype == np.uint8
    assert data.nbytes == packed_size(layout, rows, columns)
    np.testing.assert_array_equal(unpack(layout, data.tobytes(), rows, columns), expected)


def random_level(layout: str, rows: int, groups: int, seed: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    bits, base = level_bits(layout)
    codes = rng.integers(0, 1 << bits, (rows, groups * GROUP), np.uint8)
    if not base:
        return codes, tuple(rng.integers(-8, 8, (2, rows, groups), np.int8))
    scales = rng.random((rows, -(-groups // 4))).astype(np.float16)
    steps = rng.integers(0, 8, (rows, 4 * groups), np.uint8)
    return codes, (scales, steps, rng.integers(-16, 16, (rows, 4 * groups), np.int8))


def stored_code(record: np.ndarray, bits: int, lane: int, column: int) -> int:
    """The bits of one code out of the planes that `record` begins with."""
    quad, k = divmod(column, 4)
    code, plane = 0, record
    for _ in range(bits // 2):
        code = code << 2 | int(plane[quad // 4 * 64 + 4 * lane + k]) >> 2 * (quad % 4) & 3
        plane = plane[256:]
    if bits % 2:
        code = code << 1 | int(plane[quad // 8 * 64 + 4 * lane + k]) >> 2 * (quad % 4) + quad // 4 % 2 & 1
    return code


@pytest.mark.parametrize("layout", ["base1g16", "base2g16", "base3g16"])
@pytest.mark.parametrize("groups", [6, 8, 9])
def test_base_level_bytes(layout: str, groups: int) -> None:
    """Byte by byte from the words of docs/format.md."""
    rows = 19
    codes, (scales, steps, offsets) = random_level(layout, rows, groups, 3)
    bits, _ = level_bits(layout)
    data = pack_level(layout, codes, (scales, steps, offsets)).reshape(2, -1)
    header = {6: 64, 8: 64, 9: 128}[groups]
    assert data.shape[1] == header + groups * (128 * bits + 64)
    for row in range(rows):
        block, lane = data[row // 16], row % 16
        for scale in range(-(-groups // 4)):
            place = 32 * scale + 2 * lane
            assert block[place : place + 2].tobytes() == scales[row, scale].tobytes()
        for group in range(groups):
            record = block[header + group * (128 * bits + 64) :]
            for column in range(GROUP):
                assert stored_code(record, bits, lane, column) == codes[row, group * GROUP + column]
            for k in range(4):
                place = 4 * group + k
                assert record[128 * bits + 4 * lane + k] == steps[row, place] + 8 * (int(offsets[row, place]) % 32)
    if groups == 9:
        assert not data[:, 96:128].any()


@pytest.mark.parametrize("layout", ["refine1n64", "refine2n64", "refine5n64"])
def test_later_level_bytes(layout: str) -> None:
    rows, groups = 19, 6
    codes, (ratios, shifts) = random_level(layout, rows, groups, 3)
    bits, _ = level_bits(layout)
    data = pack_level(layout, codes, (ratios, shifts)).reshape(2, -1)
    whole = 4 * 128 * bits + 64
    assert data.shape[1] == whole + 2 * 128 * bits + 64
    for row in range(rows):
        block, lane = data[row // 16], row % 16
        for group in range(groups):
            together = 4 if group < 4 else 2
            chunk = block[group // 4 * whole :]
            record = chunk[group % 4 * 128 * bits :]
            for column in range(GROUP):
                assert stored_code(record, bits, lane, column) == codes[row, group * GROUP + column]
            parameter = chunk[together * 128 * bits + group % 4 * 16 + lane]
            assert parameter == int(ratios[row, group]) % 16 * 16 + int(shifts[row, group]) % 16


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 900), st.sampled_from(NESTED), st.integers(0, 2**32))
def test_level_round_trip(rows: int, columns: int, layout: str, seed: int) -> None:
    level = random_level(layout, rows, -(-columns // GROUP), seed)
    data = pack_level(layout, *level)
    assert data.dtype == np.uint8 and data.nbytes == packed_size(layout, rows, columns)
    assert data.nbytes % (-(-rows // BLOCK) * 64) == 0  # rows begin at cache lines
    codes, parameters = unpack_level(layout, data.tobytes(), rows, columns)
    for got, want in zip((codes, *parameters), (level[0], *level[1]), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_sizes_of_levels() -> None:
    """Bits per weight, where columns fill whole lines with scales."""
    levels = [packed_size(layout, 768, 2048) for layout in ("base2g16", "refine1n64", "refine1n64")]
    assert [8 * sum(levels[:count]) / (768 * 2048) for count in (1, 2, 3)] == [2.5625, 3.6875, 4.8125]


def test_level_refusals() -> None:
    codes, base = random_level("base2g16", 3, 5, 0)
    scales, steps, offsets = base
    single, refining = random_level("refine1n64", 3, 5, 0)
    with pytest.raises(ValueError, match="a code of 2 has more than 1 bits"):
        pack_level("base1g16", np.full_like(codes, 2), base)
    with pytest.raises(TypeError, match="layout refine2n64 takes ratios, shifts, not 3 arrays"):
        pack_level("refine2n64", codes, base)
    with pytest.raises(TypeError, match="layout base2g16 takes scales, steps, offsets, not 2 arrays"):
        pack_level("base2g16", codes, refining)
    with pytest.raises(TypeError, match="in whole groups of 64"):
        pack_level("base2g16", codes[:, :63], base)
    with pytest.raises(TypeError, match="takes uint8 codes"):
        pack_level("base2g16", codes.astype(np.int16), base)
    with pytest.raises(ValueError, match="'q4g64' is not a level of a nested matrix"):
        pack_level("q4g64", codes, base)
    for wrong, expected in (
        ((scales.astype(np.float32), steps, offsets), r"scales float16 \[3, 2\], not float32 \[3, 2\]"),
        ((np.repeat(scales, 4, axis=1)[:, :5], steps, offsets), r"scales float16 \[3, 2\], not float16 \[3, 5\]"),
        ((scales, steps[:, :5], offsets), r"steps uint8 \[3, 20\], not uint8 \[3, 5\]"),
        ((scales, steps, offsets.astype(np.int16)), r"offsets int8 \[3, 20\], not int16 \[3, 20\]"),
    ):
        with pytest.raises(TypeError, match=f"layout base2g16 takes {expected}"):
            pack_level("base2g16", codes, wrong)
    for wrong, expected in (
        ((scales, np.full_like(steps, 8), offsets), "steps within 8 to 8, not 0 to 7"),
        ((scales, steps, np.full_like(offsets, 16)), "offsets within 16 to 16, not -16 to 15"),
        ((scales, steps, np.full_like(offsets, -17)), "offsets within -17 to -17, not -16 to 15"),
    ):
        with pytest.raises(ValueError, match=f"layout base2g16: {expected}"):
            pack_level("base2g16", codes, wrong)
    for ratio, shift, expected in ((8, 0, "ratios within 8 to 8"), (0, -9, "shifts within -9 to -9")):
        with pytest.raises(ValueError, match=f"layout refine1n64: {expected}, not -8 to 7"):
            pack_level("refine1n64", single, tuple(np.full((3, 5), x, np.int8) for x in (ratio, shift)))
    with pytest.raises(ValueError, match="takes 384 bytes, not 383"):
        unpack_level("base2g16", bytes(383), 3, 64)


def test_records_are_whole_cache_lines() -> None:
    for layout in QUANTIZED:
        assert packed_size(layout, BLOCK, GROUP) % 64 == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="q5g64"):
        packed_size("q5g64", 16, 64)
    with pytest.raises(ValueError, match="takes 64 bytes, not 63"):
        unpack("f32", bytes(63), 1, 1)
    with pytest.raises(TypeError, match="float64"):
        pack("f32", np.zeros((2, 2)))
    with pytest.raises(TypeError, match="whole groups"):
        pack("q8g64", np.zeros((2, 65), np.uint8), np.zeros((2, 1), np.float16), np.zeros((2, 1), np.float16))
