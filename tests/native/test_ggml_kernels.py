"""Products with GGUF's formats: blocks against the `gguf` package, instruction sets against the scalar reference byte
by byte, and the reference against numpy with forward error bounds (see test_kernels.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe._core import kernels

gguf = pytest.importorskip("gguf")

Array = np.ndarray[Any, np.dtype[Any]]

ISAS = kernels.available_isas()
EPSILON = float(np.finfo(np.float32).eps)
# Name: columns of a block, its bytes, where its float16 numbers are.
FORMATS = {
    "q4_0": (32, 18, (0,)),
    "q4_1": (32, 20, (0, 2)),
    "q5_0": (32, 22, (0,)),
    "q5_1": (32, 24, (0, 2)),
    "q8_0": (32, 34, (0,)),
    "q2_k": (256, 84, (80, 82)),
    "q3_k": (256, 110, (108,)),
    "q4_k": (256, 144, (0, 2)),
    "q5_k": (256, 176, (0, 2)),
    "q6_k": (256, 210, (208,)),
    "iq4_nl": (32, 18, (0,)),
    "iq4_xs": (256, 136, (0,)),
    "mxfp4": (32, 17, ()),
}
PLAIN: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}
SPECIAL_HALVES = np.array(
    [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF],
    np.uint16,
)

names = st.sampled_from(list(FORMATS))
seeds = st.integers(0, 2**32 - 1)


def random_blocks(rng: np.random.Generator, name: str, rows: int, blocks: int, wild: bool = False) -> Array:
    """uint8 [rows, blocks * bytes]: any codes and integer scales; float16 numbers near 0.01, or `wild`."""
    _, size, halves = FORMATS[name]
    data = rng.integers(0, 256, (rows, blocks, size), np.uint8)
    if wild and rng.integers(0, 2):  # extreme codes and scales
        data = rng.choice(np.array([0, 255, 0x80, 0x7F, 0x0F, 0xF0], np.uint8), data.shape)
    if not wild:
        for at in halves:
            numbers = (rng.standard_normal((rows, blocks, 1)) * 0.01).astype(np.float16)
            data[..., at : at + 2] = numbers.view(np.uint8)
        if name == "mxfp4":
            data[..., 0] = rng.integers(115, 125, (rows, blocks))
    else:
        for at in halves:
            special = rng.choice(SPECIAL_HALVES, (rows, blocks, 1))
            chosen = rng.integers(0, 4, (rows, blocks)) == 0
            data[chosen, at : at + 2] = special.view(np.uint8)[chosen]
        if name == "mxfp4":
            chosen = rng.integers(0, 2, (rows, blocks)) == 0
            data[chosen, 0] = rng.choice(np.array([0, 1, 2, 3, 253, 254, 255], np.uint8), chosen.sum())
    return data.reshape(rows, blocks * size)


def dequantized(name: str, blocks: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()]))


def interleaved(name: str, blocks: Array, cols: int, shift: int | None = None) -> Array:
    return np.asarray(kernels.interleave(f"ggml.{name}", blocks.reshape(-1), len(blocks), cols, shift))


def activations(rng: np.random.Generator, tokens: int, cols: int, wild: bool = False) -> Array:
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    if wild:
        with np.errstate(over="ignore", under="ignore"):
            x *= np.float32(2.0) ** rng.integers(-140, 127, (tokens, cols // 32, 1)).astype(np.float32).repeat(
                32, 1
            ).reshape(1, -1)[:, : tokens * cols].reshape(tokens, cols)
        places = rng.integers(0, x.size, 2)
        x.reshape(-1)[places] = rng.choice(np.array([np.nan, np.inf, 3.4e38, 1e-45, 0], np.float32), 2)
    if rng.integers(0, 3) == 0:  # all codes at their largest
        x = np.copysign(np.float32(1), x)
    return x


def same_bytes(expected: Array, actual: Array, what: str) -> None:
    assert expected.shape == actual.shape and expected.dtype == actual.dtype
    different = np.flatnonzero(expected.view(np.uint32) != actual.view(np.uint32))
    assert not len(different), (
        f"{what}: {len(different)} of {expected.size} differ, the first at {different[0]}: "
        f"{expected.reshape(-1)[different[0]]!r} and {actual.reshape(-1)[different[0]]!r}"
    )


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None)
@given(seed=seeds, rows=st.integers(1, 40), blocks=st.integers(1, 5), wild=st.booleans())
def test_rows_equal_ggml(name: str, seed: int, rows: int, blocks: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    cols = blocks * FORMATS[name][0]
    stored = random_blocks(rng, name, rows, blocks, wild)
    data = interleaved(name, stored, cols)
    assert data.size == kernels.matrix_bytes(f"ggml.{name}", rows, cols)
    assert stored.size == kernels.stored_bytes(f"ggml.{name}", rows, cols)
    if rows % 16 == 0:
        assert data.size == stored.size
    expected = dequantized(name, stored)
    for row in range(rows):
        np.testing.assert_array_equal(kernels.dequantize_row(f"ggml.{name}", data, rows, cols, row), expected[row])


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("cols", [1, 3, 4, 8, 21, 64])
def test_plain_rows(name: str, rows: int, cols: int) -> None:
    rng = np.random.default_rng(rows * 100 + cols)
    values = rng.standard_normal((rows, cols)).astype(np.float32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16) if name == "bf16" else values.astype(PLAIN[name])
    data = interleaved(name, stored.view(np.uint8), cols)
    assert data.size == kernels.matrix_bytes(name, rows, cols)
    padded = np.zeros((-(-rows // 16) * 16, cols), stored.dtype)
    padded[:rows] = stored
    np.testing.assert_array_equal(data.view(stored.dtype), padded.reshape(-1, 16, cols).transpose(0, 2, 1).reshape(-1))


@pytest.mark.parametrize("name", [*FORMATS, *PLAIN])
def test_source_and_target_may_overlap(name: str) -> None:
    rng = np.random.default_rng(3)
    for rows in (48, 50):
        if name in PLAIN:
            cols = 24
            stored = rng.integers(0, 256, (rows, cols * PLAIN[name].itemsize), np.uint8)
        else:
            cols = 2 * FORMATS[name][0]
            stored = random_blocks(rng, name, rows, 2)
        expected = interleaved(name, stored, cols)
        size = expected.size // (-(-rows // 16))
        for distance in (0, 1, 32, 512, size - 1, size, size + 7, 2 * size + 100):
            for shift in (distance, -distance):
                np.testing.assert_array_equal(interleaved(name, stored, cols, shift), expected)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"ggml.q4_k has 128 columns, not a multiple of 256"):
        kernels.matrix_bytes("ggml.q4_k", 16, 128)
    with pytest.raises(ValueError, match=r"ggml.q8_0 has 40 columns, not a multiple of 32"):
        kernels.stored_bytes("ggml.q8_0", 16, 40)
    with pytest.raises(ValueError, match=r"unknown weight layout 'ggml.q9_9'"):
        kernels.stored_bytes("ggml.q9_9", 16, 32)
    with pytest.raises(ValueError, match=r"unknown weight layout 'ggml.f32'"):
        kernels.matrix_bytes("ggml.f32", 16, 32)
    with pytest.raises(ValueError, match="interleaved as it is stored"):
        kernels.interleave("q8g64", np.zeros(1088, np.uint8), 16, 64)


# --- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(seed=seeds, rows=st.integers(1, 90), blocks=st.integers(1, 5), tokens=st.integers(1, 27), wild=st.booleans())
def test_products_are_the_same_everywhere(
    name: str, seed: int, rows: int, blocks: int, tokens: int, wild: bool
) -> None:
    rng = np.random.default_rng(seed)
    cols = blocks * FORMATS[name][0]
    data = interleaved(name, random_blocks(rng, name, rows, blocks, wild), cols)
    x = activations(rng, tokens, cols, wild and seed % 2 == 0)
    expected = kernels.matmul("scalar", f"ggml.{name}", data, rows, cols, x)
    bits = expected.view(np.uint32)[np.isnan(expected)]
    assert (bits == 0x7FC00000).all()
    for isa in ISAS[1:]:
        actual = kernels.matmul(isa, f"ggml.{name}", data, rows, cols, x)
        same_bytes(expected, actual, f"{name} on {isa}")


@pytest.mark.parametrize("name", FORMATS)
def test_extreme_codes_do_not_overflow(name: str) -> None:
    """Every code and integer scale at one end of its range, and all activations at +-127."""
    width, size, halves = FORMATS[name]
    cols = 2 * width
    for fill in (0, 255, 0x80, 0x7F, 0xF0, 0x0F):
        stored = np.full((32, 2, size), fill, np.uint8)
        for at in halves:
            stored[..., at : at + 2] = np.array([0x3C00], np.uint16).view(np.uint8)
        if name == "mxfp4":
            stored[..., 0] = 127
        data = interleaved(name, stored.reshape(32, -1), cols)
        x = np.stack([np.ones(cols), -np.ones(cols), np.resize([1, -1], cols)]).astype(np.float32)
        expected = kernels.matmul("scalar", f"ggml.{name}", data, 32, cols, x)
        weights = dequantized(name, stored.reshape(32, -1)).astype(np.float64)
        bound = 64 * EPSILON * (np.abs(x) @ np.abs(weights).T + cols * 64)
        assert (np.abs(expected - x @ weights.T) <= bound).all()
        for isa in ISAS[1:]:
            same_bytes(expected, kernels.matmul(isa, f"ggml.{name}", data, 32, cols, x), f"{name} {fill} on {isa}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_tile_equals_its_tokens_and_rows_alone(name: str, isa: str) -> None:
    rng = np.random.default_rng(7)
    rows, blocks, tokens = 100, 3, 9
    cols = blocks * FORMATS[name][0]
    data = interleaved(name, random_blocks(rng, name, rows, blocks), cols)
    x = activations(rng, tokens, cols)
    layout = f"ggml.{name}"
    whole = kernels.matmul(isa, layout, data, rows, cols, x)
    for token in range(tokens):
        same_bytes(whole[token : token + 1], kernels.matmul(isa, layout, data, rows, cols, x[token : token + 1]), name)
    order = rng.integers(0, tokens, 20).astype(np.int32)
    gathered = kernels.matmul(isa, layout, data, rows, cols, x, order)
    same_bytes(np.ascontiguousarray(whole[order]), gathered, name)
    for first, last in ((0, 1), (1, 4), (3, 7), (6, 7), (2, 2)):
        part = kernels.matmul(isa, layout, data, rows, cols, x, None, first, last)
        expected = np.zeros_like(whole)
        expected[:, first * 16 : last * 16] = whole[:, first * 16 : last * 16]
        same_bytes(expected, part, name)


@pytest.mark.parametrize("isa", ISAS)
def test_more_tokens_than_are_packed_at_a_time(isa: str) -> None:
    rng = np.random.default_rng(9)
    data = interleaved("q4_k", random_blocks(rng, "q4_k", 16, 1), 256)
    x = activations(rng, 130, 256)
    expected = np.concatenate([kernels.matmul(isa, "ggml.q4_k", data, 16, 256, token[None]) for token in x])
    same_bytes(expected, kernels.matmul(isa, "ggml.q4_k", data, 16, 256, x), "all")
    order = rng.permutation(130).astype(np.int32)
    gathered = kernels.matmul(isa, "ggml.q4_k", data, 16, 256, x, order)
    same_bytes(np.ascontiguousarray(expected[order]), gathered, "gathered")


@pytest.mark.parametrize("name", FORMATS)
def test_products_against_numpy(name: str) -> None:
    rng = np.random.default_rng(11)
    width = FORMATS[name][0]
    rows, blocks, tokens = 37, 5, 3
    cols = blocks * width
    stored = random_blocks(rng, name, rows, blocks)
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    actual = kernels.matmul("scalar", f"ggml.{name}", interleaved(name, stored, cols), rows, cols, x)
    weights = dequantized(name, stored).astype(np.float64)
    rounded = np.zeros((tokens, cols))
    for token in range(tokens):
        codes, scales, _ = kernels.quantize("scalar", x[token])
        rounded[token] = (codes.reshape(-1, 64) * scales[:, None].astype(np.float64)).reshape(-1)[:cols]
    exact = rounded @ weights.T
    # Magnitudes before minimums or offsets are taken off: a code times its scale is at most 2 max|w| of its block.
    largest = np.abs(weights).reshape(rows, -1, width).max(-1).repeat(width, 1)
    steps = cols // min(width, 64) * 2 + 8
    bound = steps * EPSILON * 8 * (np.abs(rounded) @ largest.T)
    assert (np.abs(actual - exact) <= bound).all()
    assert np.abs(actual - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_nan_stays_visible(name: str, isa: str) -> None:
    rng = np.random.default_rng(13)
    cols = 512
    data = interleaved(name, random_blocks(rng, name, 20, cols // FORMATS[name][0]), cols)
    x = rng.standard_normal((2, cols)).astype(np.float32)
    x[1, 300] = np.nan
    out = kernels.matmul(isa, f"ggml.{name}", data, 20, cols, x)
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()
