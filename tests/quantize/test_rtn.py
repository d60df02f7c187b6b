"""Round-to-nearest quantization: error bounds, exact cases, values at the edge of float16, determinism."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.formats.layouts import GROUP
from edgemoe.quantize.rtn import LARGEST, quantize


def dequantized(weights: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    codes, scales, offsets = quantize(weights, bits)
    rows, columns = weights.shape
    groups = codes.reshape(rows, -1, GROUP) * scales[..., None].astype(np.float32)
    return (groups + offsets[..., None].astype(np.float32)).reshape(rows, -1)[:, :columns]


def test_shapes_and_padding() -> None:
    weights = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    codes, scales, offsets = quantize(weights, 4)
    assert (codes.dtype, codes.shape) == (np.uint8, (3, 128))
    assert (scales.dtype, scales.shape, offsets.dtype, offsets.shape) == (np.float16, (3, 2), np.float16, (3, 2))
    assert not codes[:, 70:].any()
    assert codes.max() == 15


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.floats(1e-3, 1e3), st.floats(-3, 3), st.integers(1, 200))
def test_8_bits_are_within_half_a_step(seed: int, size: float, centre: float, columns: int) -> None:
    weights = (np.random.default_rng(seed).standard_normal((2, columns)) * size + centre * size).astype(np.float32)
    _, scales, _ = quantize(weights, 8)
    step = np.repeat(scales.astype(np.float32), GROUP, axis=1)[:, :columns]
    assert np.all(np.abs(dequantized(weights, 8) - weights) <= step * 0.501 + np.abs(weights) * 1e-6 + 6e-8)


def test_4_bits_beat_the_plain_range() -> None:
    """Relative squared error on normal weights: the plain range gives 0.0101, the search and fit 0.0072."""
    weights = np.random.default_rng(3).standard_normal((64, 1024)).astype(np.float32)
    error = np.mean((dequantized(weights, 4) - weights) ** 2) / np.mean(weights**2)
    assert error < 0.0075
    error = np.mean((dequantized(weights, 8) - weights) ** 2) / np.mean(weights**2)
    assert error < 3e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_exact_cases(bits: int) -> None:
    top = (1 << bits) - 1
    grid = np.arange(GROUP) % (top + 1)
    cases = {
        "zeros": np.zeros(GROUP),
        "one value": np.full(GROUP, -0.4375),
        "two values": np.where(np.arange(GROUP) % 2, 0.5, -0.5),
        "largest": np.where(np.arange(GROUP) % 2, LARGEST, 0),
        "constant largest": np.full(GROUP, -LARGEST),
    }
    if bits == 4:
        cases["the codes themselves"] = grid * 0.125 - 1
    for name, values in cases.items():
        weights = values.astype(np.float32)[None]
        np.testing.assert_allclose(
            dequantized(weights, bits), weights, rtol=2e-3, atol=np.abs(values).max() * 2**-11, err_msg=name
        )
        if len(np.unique(values)) == 1:
            np.testing.assert_array_equal(dequantized(weights, bits), weights, err_msg=name)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_constant_that_float16_cannot_hold(bits: int) -> None:
    weights = np.full((1, GROUP), 0.1, np.float32)
    np.testing.assert_allclose(dequantized(weights, bits), weights, rtol=2**-20)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("size", "centre"), [(1e-38, 0), (1e-9, 0), (1e-6, 0), (3e4, 0), (1e-4, 1.0), (1e-3, 5e4), (0.5, -3e4)]
)
def test_extreme_groups_stay_finite_and_near(bits: int, size: float, centre: float) -> None:
    rng = np.random.default_rng(4)
    weights = (rng.uniform(-size, size, (8, 128)) + centre).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        got = dequantized(weights, bits)
    rounding = max(abs(centre) * 2**-10, 6e-8)
    assert np.all(np.abs(got - weights) <= (2 * size + rounding) / ((1 << bits) - 1) + rounding * 1e-2 + 6e-8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6, -65600.0])
def test_weights_that_do_not_fit_are_refused(bits: int, bad: float) -> None:
    weights = np.zeros((2, 2000), np.float32)
    weights[1, 1500] = bad
    with pytest.raises(ValueError, match=r"does not fit float16 scales"):
        quantize(weights, bits)


def test_deterministic_and_independent_of_neighbours() -> None:
    """A row's codes do not depend on the rows it is quantized with, so chunks can be cut anywhere."""
    weights = np.random.default_rng(5).standard_normal((40, 64 * 30)).astype(np.float32)
    whole = quantize(weights, 4)
    for part, piece in ((slice(0, 3), quantize(weights[:3], 4)), (slice(17, 40), quantize(weights[17:], 4))):
        for a, b in zip(whole, piece, strict=True):
            np.testing.assert_array_equal(a[part], b)


def test_unknown_bits() -> None:
    with pytest.raises(ValueError, match="bits = 3"):
        quantize(np.zeros((1, 64), np.float32), 3)
