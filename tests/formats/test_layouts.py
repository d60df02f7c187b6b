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
    STEPS,
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
    bits, later = level_bits(layout)
    codes = rng.integers(0, 1 << bits, (rows, groups * GROUP), np.uint8)
    if later is None:
        return codes, ()
    chunks = -(-groups // 4)
    scales = rng.random((rows, chunks)).astype(np.float16)
    steps = rng.integers(0, 4, (rows, 4 * groups), np.uint8)
    offsets = rng.integers(-8, 8, (rows, 4 * groups), np.int8)
    return codes, (scales, steps, offsets, *rng.integers(-8, 8, (2, later, rows, chunks), np.int8))


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


@pytest.mark.parametrize("layout", ["base1r0", "base3r1", "base2r2", "base5r3", "base2r6", "base1r7"])
@pytest.mark.parametrize("groups", [1, 5, 6, 8, 9])
def test_base_level_bytes(layout: str, groups: int) -> None:
    """Byte by byte from the words of docs/format.md."""
    rows = 19
    codes, parameters = random_level(layout, rows, groups, 3)
    scales, steps, offsets, ratios, shifts = parameters
    bits, later = level_bits(layout)
    assert later is not None
    data = pack_level(layout, codes, parameters).reshape(2, -1)
    header = {0: 256, 1: 256, 2: 256, 3: 320, 6: 320, 7: 384}[later]
    whole = header + 4 * 128 * bits
    assert data.shape[1] == -(-groups // 4) * header + groups * 128 * bits
    for row in range(rows):
        block, lane = data[row // 16], row % 16
        for group in range(groups):
            chunk = block[group // 4 * whole :]
            record = chunk[header + group % 4 * 128 * bits :]
            for column in range(GROUP):
                assert stored_code(record, bits, lane, column) == codes[row, group * GROUP + column]
            for k in range(4):
                step, offset = STEPS[steps[row, 4 * group + k]], int(offsets[row, 4 * group + k])
                stored = chunk[group % 4 * 64 + 4 * lane + k] & 63
                assert stored == step - 3 | offset % 2 << 2 | offset // 2 % 8 << 3
        for number in range(-(-groups // 4)):
            chunk = block[number * whole :]
            of_levels = [
                int(ratios[level, row, number]) % 16 << 4 | int(shifts[level, row, number]) % 16
                for level in range(later)
            ] + [0] * 10
            expected = [*scales[row, number : number + 1].tobytes(), of_levels[1], of_levels[0]]
            for k in range(4):
                fields = [int(chunk[64 * j + 4 * lane + k]) >> 6 for j in range(4)]
                assert sum(field << 2 * j for j, field in enumerate(fields)) == expected[k]
            for line in range((header - 256) // 64):
                further = chunk[256 + 64 * line + 4 * lane :][:4]
                assert further[::-1].tolist() == of_levels[2 + 4 * line : 6 + 4 * line]
    # The 13 rows that do not exist.
    assert not data[1].reshape(-1, 16, 4)[:, 3:].any()


@pytest.mark.parametrize("layout", ["refine1", "refine2", "refine5"])
@pytest.mark.parametrize("groups", [1, 6])
def test_later_level_bytes(layout: str, groups: int) -> None:
    rows = 19
    codes, nothing = random_level(layout, rows, groups, 3)
    bits, _ = level_bits(layout)
    data = pack_level(layout, codes, nothing).reshape(2, groups, 128 * bits)
    for row in range(rows):
        for group in range(groups):
            for column in range(GROUP):
                stored = stored_code(data[row // 16, group], bits, row % 16, column)
                assert stored == codes[row, group * GROUP + column]
    assert not data[1].reshape(-1, 16, 4)[:, 3:].any()


def test_parameters_of_no_group_mean_nothing_but_the_top_two_bits() -> None:
    codes, parameters = random_level("base2r3", 20, 5, 4)
    data = pack_level("base2r3", codes, parameters)
    of_chunk = data.reshape(2, -1)[:, 320 + 4 * 256 :]  # the second one's, of one group
    of_chunk[:, 64:256] ^= np.random.default_rng(0).integers(0, 64, (2, 192), np.uint8)
    found = unpack_level("base2r3", data, 20, 5 * GROUP)
    for got, want in zip((found[0], *found[1]), (codes, *parameters), strict=True):
        np.testing.assert_array_equal(got, want)
    of_chunk[:, 64:256] ^= 64
    assert (unpack_level("base2r3", data, 20, 5 * GROUP)[1][0] != parameters[0]).tolist() == [[False, True]] * 20


@pytest.mark.parametrize("layout", NESTED)
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 50), st.integers(1, 900), st.integers(0, 2**32))
def test_level_round_trip(layout: str, rows: int, columns: int, seed: int) -> None:
    level = random_level(layout, rows, -(-columns // GROUP), seed)
    data = pack_level(layout, *level)
    assert data.dtype == np.uint8 and data.nbytes == packed_size(layout, rows, columns)
    assert data.nbytes % (-(-rows // BLOCK) * 64) == 0  # rows begin at cache lines
    codes, parameters = unpack_level(layout, data.tobytes(), rows, columns)
    for got, want in zip((codes, *parameters), (level[0], *level[1]), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_names_of_levels() -> None:
    assert len(set(NESTED)) == 36 + 7  # 1 to 8 bits with the later levels that there is room for; 1 to 7 more
    assert level_bits("base2r6") == (2, 6) and level_bits("base8r0") == (8, 0)
    assert level_bits("refine7") == (7, None)
    for unknown in ("base2r7", "base8r1", "base9r0", "base0r1", "refine8", "refine0", "base2", "refine1r1", "q4g64"):
        with pytest.raises(ValueError, match=f"layout '{unknown}' is not a level of a nested matrix"):
            level_bits(unknown)


def test_sizes_of_levels() -> None:
    """Bits per weight, where columns fill whole chunks."""
    levels = [packed_size(layout, 768, 2048) for layout in ("base2r2", "refine1", "refine1")]
    assert [8 * sum(levels[:count]) / (768 * 2048) for count in (1, 2, 3)] == [2.5, 3.5, 4.5]
    assert [8 * packed_size(f"base1r{later}", 768, 2048) / (768 * 2048) for later in (0, 3, 7)] == [1.5, 1.625, 1.75]


def test_level_refusals() -> None:
    codes, base = random_level("base2r2", 3, 5, 0)
    scales, steps, offsets, ratios, shifts = base
    single, nothing = random_level("refine1", 3, 5, 0)
    for layout, parameters in (("base1r2", base), ("refine1", nothing)):
        with pytest.raises(ValueError, match=f"layout {layout}: a code of 2 has more than 1 bits"):
            pack_level(layout, np.full_like(codes, 2), parameters)
    with pytest.raises(TypeError, match="layout refine2 takes no parameters, not 5 arrays"):
        pack_level("refine2", codes, base)
    with pytest.raises(TypeError, match="layout base2r2 takes scales, steps, offsets, ratios, shifts, not 3 arrays"):
        pack_level("base2r2", codes, base[:3])
    with pytest.raises(TypeError, match="layout base2r2 takes scales, steps, offsets, ratios, shifts, not 0 arrays"):
        pack_level("base2r2", codes)
    with pytest.raises(TypeError, match="in whole groups of 64"):
        pack_level("base2r2", codes[:, :63], base)
    with pytest.raises(TypeError, match="takes uint8 codes"):
        pack_level("refine1", single.astype(np.int16))
    with pytest.raises(ValueError, match="'q4g64' is not a level of a nested matrix"):
        pack_level("q4g64", codes, base)

    def replaced(**changed: np.ndarray) -> tuple[np.ndarray, ...]:
        named = {"scales": scales, "steps": steps, "offsets": offsets, "ratios": ratios, "shifts": shifts}
        return tuple((named | changed).values())

    for wrong, expected in (
        (replaced(scales=scales.astype(np.float32)), r"scales float16 \[3, 2\], not float32 \[3, 2\]"),
        (replaced(scales=np.repeat(scales, 4, axis=1)[:, :5]), r"scales float16 \[3, 2\], not float16 \[3, 5\]"),
        (replaced(steps=steps[:, :5]), r"steps uint8 \[3, 20\], not uint8 \[3, 5\]"),
        (replaced(offsets=offsets.astype(np.int16)), r"offsets int8 \[3, 20\], not int16 \[3, 20\]"),
        (replaced(ratios=ratios[:1]), r"ratios int8 \[2, 3, 2\], not int8 \[1, 3, 2\]"),
        (replaced(ratios=ratios[0]), r"ratios int8 \[2, 3, 2\], not int8 \[3, 2\]"),
        (replaced(shifts=shifts.view(np.uint8)), r"shifts int8 \[2, 3, 2\], not uint8 \[2, 3, 2\]"),
    ):
        with pytest.raises(TypeError, match=f"layout base2r2 takes {expected}"):
            pack_level("base2r2", codes, wrong)
    for wrong, expected in (
        (replaced(steps=np.full_like(steps, 4)), "steps within 4 to 4, not 0 to 3"),
        (replaced(offsets=np.full_like(offsets, 8)), "offsets within 8 to 8, not -8 to 7"),
        (replaced(offsets=np.full_like(offsets, -9)), "offsets within -9 to -9, not -8 to 7"),
        (replaced(ratios=np.full_like(ratios, 8)), "ratios within 8 to 8, not -8 to 7"),
        (replaced(shifts=np.full_like(shifts, -9)), "shifts within -9 to -9, not -8 to 7"),
    ):
        with pytest.raises(ValueError, match=f"layout base2r2: {expected}"):
            pack_level("base2r2", codes, wrong)
    with pytest.raises(ValueError, match="takes 512 bytes, not 511"):
        unpack_level("base2r2", bytes(511), 3, 64)
    with pytest.raises(ValueError, match="takes 256 bytes, not 255"):
        unpack_level("refine2", bytes(255), 3, 64)


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
