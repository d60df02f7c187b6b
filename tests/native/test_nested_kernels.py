"""Products with nested weights: every instruction set against the scalar reference byte by byte, and that against the
dequantized weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import nested
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import EPSILON, ISAS, VECTOR_ISAS, check_nan_bits, floats, same_bytes, seeds, sizes

from edgemoe._core import kernels
from edgemoe.formats.layouts import GROUP, NESTED, SUB_GROUP, SUPER_GROUP, pack_level, packed_size

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST_SCALE = 0.01
FAST = [(2,), (2, 3), (2, 3, 4)]
ladders = st.one_of(
    st.sampled_from([*FAST, (2, 4), (4, 8), (2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8), (3, 4), (8,), (1, 8)]),
    st.sets(st.integers(1, 8), min_size=1).map(lambda widths: tuple(sorted(widths))),
)


def steps(bits: Sequence[int]) -> list[int]:
    """Bits that each level adds."""
    return [width - below for below, width in itertools.pairwise((0, *bits))]


def random_levels(rng: np.random.Generator, bits: Sequence[int], rows: int, cols: int, wild: bool) -> list[Array]:
    """The packed levels; `wild`: any bytes, so that scales are any float16."""
    names = nested.level_names(bits)
    if wild:
        return [rng.integers(0, 256, packed_size(name, rows, cols), np.uint8) for name in names]
    groups, chunks = -(-cols // GROUP), -(-cols // SUPER_GROUP)
    scales = (rng.random((rows, chunks)) * LARGEST_SCALE).astype(np.float16)
    numbers = rng.integers(0, 4, (rows, groups * 4), np.uint8)
    offsets = rng.integers(-8, 8, (rows, groups * 4), np.int8)
    ratios, shifts = rng.integers(-8, 8, (2, len(bits) - 1, rows, chunks), np.int8)
    codes = [rng.integers(0, 1 << added, (rows, groups * GROUP), np.uint8) for added in steps(bits)]
    return packed_levels(bits, codes, (scales, numbers, offsets, ratios, shifts))


def packed_levels(bits: Sequence[int], codes: Sequence[Array], parameters: nested.Parameters) -> list[Array]:
    """codes: those that each level adds."""
    first, *later = zip(nested.level_names(bits), codes, strict=True)
    return [pack_level(*first, parameters), *(pack_level(*level) for level in later)]


def product(isa: str, bits: Sequence[int], levels: list[Array], rows: int, cols: int, x: Array, *rest: Any) -> Array:
    """levels: the first ones at least of those of `bits`."""
    pairs = list(zip(steps(bits), levels, strict=False))
    result: Array = kernels.nested_matmul(isa, pairs, len(bits) - 1, rows, cols, x, *rest)
    return result


@settings(max_examples=80, deadline=None)
@given(bits=ladders, seed=seeds, rows=st.integers(1, 90), cols=sizes, tokens=st.integers(1, 20), wild=st.booleans())
def test_matmul_is_the_same_everywhere(
    bits: tuple[int, ...], seed: int, rows: int, cols: int, tokens: int, wild: bool
) -> None:
    rng = np.random.default_rng(seed)
    levels = random_levels(rng, bits, rows, cols, wild)
    x = floats(rng, tokens, cols, wild=wild and seed % 2 == 0)
    count = int(rng.integers(1, len(bits) + 1))
    expected = product("scalar", bits, levels[:count], rows, cols, x)
    check_nan_bits(expected)
    for isa in VECTOR_ISAS:
        same_bytes(expected, product(isa, bits, levels[:count], rows, cols, x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [*FAST, (3, 8)])
def test_a_tile_equals_its_tokens_and_rows_alone(bits: tuple[int, ...], isa: str) -> None:
    rng = np.random.default_rng(7)
    rows, cols = 100, 330  # a whole chunk of 256 columns and a part of one
    levels = random_levels(rng, bits, rows, cols, False)
    x = floats(rng, 60, cols)
    whole = product(isa, bits, levels, rows, cols, x)
    for token in range(0, len(x), 7):
        same_bytes(whole[token : token + 1], product(isa, bits, levels, rows, cols, x[token : token + 1]))
    for count in (*range(2, 18), 49, 51):
        same_bytes(whole[:count], product(isa, bits, levels, rows, cols, x[:count]))
        tokens = rng.integers(0, len(x), count).astype(np.int32)
        same_bytes(whole[tokens], product(isa, bits, levels, rows, cols, x, tokens))
    for first, last in itertools.combinations(range(8), 2):
        for count in (1, 5):
            part = product(isa, bits, levels, rows, cols, x[:count], None, first, last)
            expected = np.zeros_like(part)
            expected[:, first * 16 : last * 16] = whole[:count, first * 16 : last * 16]
            same_bytes(expected, part)


@settings(max_examples=40, deadline=None)
@given(bits=ladders, seed=seeds, rows=st.integers(1, 40), cols=sizes, tokens=st.integers(1, 4))
def test_every_level_against_numpy(bits: tuple[int, ...], seed: int, rows: int, cols: int, tokens: int) -> None:
    """Against the product of the dequantized weights and the dequantized activations."""
    rng = np.random.default_rng(seed)
    levels = random_levels(rng, bits, rows, cols, False)
    x = floats(rng, tokens, cols)
    groups = -(-cols // GROUP)
    rounded = np.empty((tokens, cols))
    for token in range(tokens):
        codes, scales, _ = kernels.quantize("scalar", x[token])
        rounded[token] = (codes.reshape(-1, GROUP) * scales[:, None].astype(np.float64)).reshape(-1)[:cols]
    for count in range(1, len(bits) + 1):
        weights = nested.dequantize(bits, levels[:count], rows, cols)
        actual = product("scalar", bits, levels[:count], rows, cols, x)
        # Every level rounds scale and offset a few times; none of the three terms of a group is larger than the largest
        # step times the codes of level 0.
        largest = 6 * LARGEST_SCALE * 2.0 ** bits[0]
        terms = np.abs(rounded) @ (np.full((rows, cols), 4 * largest) + np.abs(weights)).T
        assert (np.abs(actual - rounded @ weights.T) <= (3 * groups + 8 * count) * EPSILON * terms).all()


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("offset", [-8, 7])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [*FAST, (2, 4, 6), (8,), (7, 8), (2, 3, 4, 6, 8)])
def test_largest_codes_do_not_saturate(bits: tuple[int, ...], isa: str, offset: int, number: int) -> None:
    top, later, cols = 2 ** bits[-1] - 1, len(bits) - 1, SUPER_GROUP + GROUP
    codes = [np.full((16, cols), 2**added - 1, np.uint8) for added in steps(bits)]
    parameters = (
        np.full((16, 2), 2.0 ** (bits[-1] - bits[0]), np.float16),
        np.full((16, cols // SUB_GROUP), number, np.uint8),
        np.full((16, cols // SUB_GROUP), offset, np.int8),
        *np.zeros((2, later, 16, 2), np.int8),
    )
    levels = packed_levels(bits, codes, parameters)
    x = np.array([np.full(cols, 127), np.full(cols, -127)], np.float32)
    weight = nested.dequantize(bits, levels, 16, cols)
    moved = {-8: -32, 7: 24}[offset] + ({-8: -3, 7: 3}[offset] if len(bits) == 1 else 0)
    assert (weight == (3 + number) * (top / 2 + 2.0 ** bits[-1] * moved / 128)).all()
    for tokens in (1, 8):
        expected = np.array([[1], [-1]]) * 127 * cols * np.broadcast_to(weight[0, 0], (2, 16))
        repeated, found = np.tile(x, (tokens, 1)), np.tile(expected, (tokens, 1))
        np.testing.assert_allclose(product(isa, bits, levels, 16, cols, repeated), found, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [*FAST, (3, 8)])
def test_every_part_has_its_step_and_offset(bits: tuple[int, ...], isa: str) -> None:
    """One sub-group of one row differs from all others."""
    rows, groups, later = 18, 11, len(bits) - 1  # two whole chunks and a part of one
    codes = [np.zeros((rows, groups * GROUP), np.uint8) for _ in bits]
    for row, part in ((0, 0), (7, 3), (15, 6), (16, 33), (17, 43)):
        for number in (1, 3):
            numbers, offsets = np.zeros((rows, 4 * groups), np.uint8), np.full((rows, 4 * groups), 6, np.int8)
            numbers[row, part], offsets[row, part] = number, -7
            scales = np.array([0.5, 0.25, 1])
            of_rows = np.tile(scales.astype(np.float16), (rows, 1))
            ratios, shifts = np.zeros((2, later, rows, len(scales)), np.int8)
            levels = packed_levels(bits, codes, (of_rows, numbers, offsets, ratios, shifts))
            weights = nested.dequantize(bits, levels, rows, groups * GROUP)
            lowest = (2 ** bits[0] - 2.0 ** (bits[0] - bits[-1])) / 2
            other, own = (21, -29) if len(bits) == 1 else (24, -32)
            expected = np.full((rows, 4 * groups), 3 * (2.0 ** bits[0] * other / 128 - lowest))
            expected[row, part] = (3 + number) * (2.0 ** bits[0] * own / 128 - lowest)
            expected = np.repeat(expected * np.repeat(scales, 16)[: 4 * groups], 16, axis=1)
            np.testing.assert_array_equal(weights, expected)
            x = np.random.default_rng(part).integers(-126, 127, (9, groups * GROUP)).astype(np.float32)
            x[:, ::GROUP] = 127
            for inputs in (x, x[:1]):
                found = product(isa, bits, levels, rows, groups * GROUP, inputs)
                np.testing.assert_allclose(found, inputs @ weights.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [(2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_every_level_has_its_ratio_and_shift(bits: tuple[int, ...], isa: str) -> None:
    """One chunk of one row has a ratio and a shift of one level; products with coarser levels do not notice."""
    rows, groups = 18, 6
    rng = np.random.default_rng(9)
    codes = [rng.integers(0, 1 << added, (rows, groups * GROUP), np.uint8) for added in steps(bits)]
    numbers, offsets = np.zeros((rows, 4 * groups), np.uint8), np.zeros((rows, 4 * groups), np.int8)
    scales = np.ones((rows, 2), np.float16)
    x = rng.integers(-126, 127, (9, groups * GROUP)).astype(np.float32)
    x[:, ::GROUP] = 127
    ratios, shifts = np.zeros((2, len(bits) - 1, rows, 2), np.int8)
    plain = packed_levels(bits, codes, (scales, numbers, offsets, ratios, shifts))
    for level in range(1, len(bits)):
        for row, chunk in ((3, 0), (17, 1)):
            ratios, shifts = np.zeros((2, len(bits) - 1, rows, 2), np.int8)
            ratios[level - 1, row, chunk], shifts[level - 1, row, chunk] = -3, 7
            levels = packed_levels(bits, codes, (scales, numbers, offsets, ratios, shifts))
            for count in range(1, len(bits) + 1):
                found = product(isa, bits, levels[:count], rows, groups * GROUP, x)
                same = product(isa, bits, plain[:count], rows, groups * GROUP, x)
                assert (found != same).any(axis=0).tolist() == [count > level and each == row for each in range(rows)]
                weights = nested.dequantize(bits, levels[:count], rows, groups * GROUP)
                np.testing.assert_allclose(found, x @ weights.T, rtol=1e-5, atol=1e-2)


def test_refusals() -> None:
    x = np.zeros((1, 64), np.float32)
    with pytest.raises(ValueError, match="level 0 must have 512 bytes, it has 511"):
        kernels.nested_matmul("scalar", [(2, np.zeros(511, np.uint8))], 2, 16, 64, x)
    with pytest.raises(ValueError, match="level 0 must have 576 bytes, it has 512"):
        kernels.nested_matmul("scalar", [(2, np.zeros(512, np.uint8))], 3, 16, 64, x)
    levels = [(2, np.zeros(512, np.uint8)), (1, np.zeros(127, np.uint8))]
    with pytest.raises(ValueError, match="level 1 must have 128 bytes, it has 127"):
        kernels.nested_matmul("scalar", levels, 1, 16, 64, x)
    with pytest.raises(ValueError, match="levels have 1 to 8 bits in all"):
        kernels.nested_matmul("scalar", [(9, np.zeros(384, np.uint8))], 0, 16, 64, x)
    for later in (-1, 0, 8):
        with pytest.raises(ValueError, match="later must be the number of levels after the first, 0 to 7"):
            kernels.nested_matmul("scalar", levels, later, 16, 64, x)


def test_speed_counts_every_level() -> None:
    names = nested.level_names((2, 3, 4))
    for count in (1, 2, 3):
        speed = kernels.product_speed("scalar", "+".join(names[:count]), 20, 100, 1, 1, 1, 0.0)
        assert speed["bytes"] == sum(kernels.stored_bytes(name, 20, 100) for name in names[:count])
    for layout in (
        names[1],
        f"{names[0]}+{names[0]}",
        f"{names[0]}+f32",
        f"{names[0]}+refine7",
        "base2r1+refine1+refine1",
        "f32+f32",
    ):
        with pytest.raises(ValueError, match="is neither a layout nor the levels of one"):
            kernels.product_speed("scalar", layout, 20, 100, 1, 1, 1, 0.0)
    with pytest.raises(ValueError, match="layout must not be empty"):
        kernels.product_speed("scalar", "", 20, 100, 1, 1, 1, 0.0)


def test_sizes_and_names() -> None:
    for layout in NESTED:
        for rows, cols in ((1, 1), (16, 64), (17, 257), (40, 700)):
            assert kernels.stored_bytes(layout, rows, cols) == packed_size(layout, rows, cols)
    for unknown in ("base2r7", "base9r0", "base2", "refine8", "refine1r1", "nested"):
        with pytest.raises(ValueError, match="layout"):
            kernels.stored_bytes(unknown, 16, 64)
