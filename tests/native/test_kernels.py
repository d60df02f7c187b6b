"""The kernels: every instruction set against the scalar reference byte by byte, and the reference against numpy.

Tolerances of the second kind are forward error bounds: a chain of n fused multiply-adds in float32 is off by at most
n * eps / 2 * sum|terms| to first order, with eps = 2^-23; each bound below is a count of roundings times eps times the
sum of the terms' magnitudes (so a factor of two is to spare).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe._core import kernels
from edgemoe.formats.layouts import GROUP, QUANTIZED, pack, packed_size, unpack

Array = np.ndarray[Any, np.dtype[Any]]

ISAS = kernels.available_isas()
VECTOR_ISAS = ISAS[1:]
LAYOUTS = ["f32", "bf16", "f16", "q8g64", "q4g64"]
KV_TYPES = ["f32", "f16", "q8_0"]
EPSILON = float(np.finfo(np.float32).eps)
CANONICAL_NAN = 0x7FC00000
SPECIAL = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1e-38, 3.4e38, -3.4e38, 1e-30, 65504, 65520, 6e-8, 2.9e-8, 1],
    np.float32,
)

seeds = st.integers(0, 2**32 - 1)
sizes = st.one_of(st.integers(1, 40), st.integers(1, 400), st.sampled_from([15, 16, 17, 63, 64, 65, 127, 128, 129]))


def floats(rng: np.random.Generator, *shape: int, wild: bool = False) -> Array:
    """Normal numbers; `wild`: of all magnitudes, one in eight a special value or a random bit pattern."""
    values = rng.standard_normal(shape).astype(np.float32)
    if wild:
        with np.errstate(over="ignore", under="ignore"):
            values *= np.float32(2.0) ** rng.integers(-140, 127, shape).astype(np.float32)
        patterns = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
        kind = rng.integers(0, 16, shape)
        values = np.where(kind == 0, rng.choice(SPECIAL, shape), values)
        values = np.where(kind == 1, patterns, values)
    return np.asarray(values, np.float32)


def tame_matrix(rng: np.random.Generator, layout: str, rows: int, cols: int) -> Array:
    values = floats(rng, rows, cols)
    if layout == "f32":
        return pack(layout, values)
    if layout == "f16":
        return pack(layout, values.astype(np.float16))
    if layout == "bf16":
        return pack(layout, (values.view(np.uint32) >> 16).astype(np.uint16))
    groups = -(-cols // GROUP)
    codes = rng.integers(0, 2 ** QUANTIZED[layout], (rows, groups * GROUP), np.uint8)
    scales = (floats(rng, rows, groups) * 0.01).astype(np.float16)
    offsets = floats(rng, rows, groups).astype(np.float16)
    return pack(layout, codes, scales, offsets)


def any_matrix(rng: np.random.Generator, layout: str, rows: int, cols: int, wild: bool) -> Array:
    """`wild`: random bytes, so that scales, offsets and weights are any bit pattern."""
    if wild:
        return rng.integers(0, 256, packed_size(layout, rows, cols), np.uint8)
    return tame_matrix(rng, layout, rows, cols)


def same_bytes(expected: Any, actual: Any) -> None:
    if isinstance(expected, tuple):
        for one, other in zip(expected, actual, strict=True):
            same_bytes(one, other)
        return
    assert expected.dtype == actual.dtype and expected.shape == actual.shape
    if expected.tobytes() != actual.tobytes():
        bits = f"u{expected.dtype.itemsize}"
        different = np.flatnonzero(expected.reshape(-1).view(bits) != actual.reshape(-1).view(bits))
        first = different[0]
        raise AssertionError(
            f"{len(different)} of {expected.size} elements differ, the first at {first}: "
            f"{expected.reshape(-1)[first]!r} and {actual.reshape(-1)[first]!r}"
        )


def same_everywhere(function: str, *arguments: Any, **options: Any) -> Any:
    """Calls the function on every instruction set, compares the bytes, returns the reference's result."""
    run = getattr(kernels, function)
    expected = run("scalar", *arguments, **options)
    for isa in VECTOR_ISAS:
        same_bytes(expected, run(isa, *arguments, **options))
    return expected


def check_nan_bits(values: Array) -> None:
    bits = values.view(np.uint32)[np.isnan(values)]
    assert (bits == CANONICAL_NAN).all()


# --- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(seed=seeds, rows=st.integers(1, 90), cols=sizes, tokens=st.integers(1, 27), wild=st.booleans())
def test_matmul_is_the_same_everywhere(layout: str, seed: int, rows: int, cols: int, tokens: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    data = any_matrix(rng, layout, rows, cols, wild)
    x = floats(rng, tokens, cols, wild=wild and seed % 2 == 0)
    check_nan_bits(same_everywhere("matmul", layout, data, rows, cols, x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tile_equals_its_tokens_and_rows_alone(layout: str, isa: str) -> None:
    """A result does not depend on the tokens and rows it is computed with: any tile, cut and gathering."""
    rng = np.random.default_rng(7)
    rows, cols = 100, 150
    data = tame_matrix(rng, layout, rows, cols)
    x = floats(rng, 30, cols)
    whole = kernels.matmul(isa, layout, data, rows, cols, x)
    for token in range(len(x)):
        same_bytes(whole[token : token + 1], kernels.matmul(isa, layout, data, rows, cols, x[token : token + 1]))
    for count in range(2, 30):
        same_bytes(whole[:count], kernels.matmul(isa, layout, data, rows, cols, x[:count]))
        tokens = rng.integers(0, len(x), count).astype(np.int32)
        same_bytes(whole[tokens], kernels.matmul(isa, layout, data, rows, cols, x, tokens))
    for first in range(8):
        for last in range(first, 8):
            part = kernels.matmul(isa, layout, data, rows, cols, x[:7], None, first, last)
            expected = np.zeros_like(part)
            expected[:, first * 16 : last * 16] = whole[:7, first * 16 : last * 16]
            same_bytes(expected, part)


@pytest.mark.parametrize("layout", ["f32", "bf16", "f16"])
@settings(max_examples=25, deadline=None)
@given(seed=seeds, rows=st.integers(1, 40), cols=sizes, tokens=st.integers(1, 5))
def test_float_matmul_against_numpy(layout: str, seed: int, rows: int, cols: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    data = tame_matrix(rng, layout, rows, cols)
    x = floats(rng, tokens, cols).astype(np.float64)
    weights = unpack(layout, data, rows, cols).astype(np.float64)
    actual = kernels.matmul("scalar", layout, data, rows, cols, x)
    bound = cols * EPSILON * (np.abs(x) @ np.abs(weights).T)
    assert (np.abs(actual - x @ weights.T) <= bound).all()


@pytest.mark.parametrize("layout", ["q8g64", "q4g64"])
@settings(max_examples=25, deadline=None)
@given(seed=seeds, rows=st.integers(1, 40), cols=sizes, tokens=st.integers(1, 5))
def test_quantized_matmul_against_numpy(layout: str, seed: int, rows: int, cols: int, tokens: int) -> None:
    """Against the product of the dequantized weights and the dequantized activations."""
    rng = np.random.default_rng(seed)
    data = tame_matrix(rng, layout, rows, cols)
    x = floats(rng, tokens, cols)
    groups = -(-cols // GROUP)
    weights = unpack(layout, data, rows, cols).astype(np.float64)
    offsets = np.abs(unpack(layout, zero_codes(layout, data), rows, cols).astype(np.float64))
    rounded = np.empty((tokens, cols))
    for token in range(tokens):
        codes, scales, _ = kernels.quantize("scalar", x[token])
        rounded[token] = (codes.reshape(-1, GROUP) * scales[:, None].astype(np.float64)).reshape(-1)[:cols]
    actual = kernels.matmul("scalar", layout, data, rows, cols, x)
    terms = np.abs(rounded) @ (np.abs(weights) + 2 * offsets).T
    assert (np.abs(actual - rounded @ weights.T) <= (2 * groups + 4) * EPSILON * terms).all()


def zero_codes(layout: str, data: Array) -> Array:
    """The matrix with all codes zero: what is left are the offsets."""
    size = packed_size(layout, 1, GROUP)
    groups = data.copy().reshape(-1, size)
    groups[:, :-64] = 0
    return groups.reshape(-1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["q8g64", "q4g64"])
def test_largest_codes_do_not_saturate(layout: str, isa: str) -> None:
    """All weights and activations at their extremes: pair products that a 16-bit sum could not hold."""
    top = 2 ** QUANTIZED[layout] - 1
    codes = np.full((16, 2 * GROUP), top, np.uint8)
    data = pack(layout, codes, np.ones((16, 2), np.float16), np.zeros((16, 2), np.float16))
    x = np.array([np.full(2 * GROUP, 127), np.full(2 * GROUP, -127)], np.float32)
    expected = np.broadcast_to(np.array([[1], [-1]]) * (127 * top * 2 * GROUP), (2, 16))
    np.testing.assert_array_equal(kernels.matmul(isa, layout, data, 16, 2 * GROUP, x), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantize_row(layout: str) -> None:
    rng = np.random.default_rng(3)
    rows, cols = 37, 100
    data = tame_matrix(rng, layout, rows, cols)
    expected = unpack(layout, data, rows, cols)
    for row in range(rows):
        same_bytes(expected[row], kernels.dequantize_row(layout, data, rows, cols, row))


# --- quantization of activations ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seed=seeds, size=sizes, wild=st.booleans(), exponent=st.integers(-149, 127))
def test_quantize_is_the_same_everywhere(seed: int, size: int, wild: bool, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        x = floats(rng, size, wild=wild) * np.float32(2.0**exponent)
    codes, scales, sums = same_everywhere("quantize", x)
    check_nan_bits(scales)
    padded = np.zeros(codes.size, np.float32)
    padded[:size] = x
    for group, values in enumerate(padded.reshape(-1, GROUP)):
        part = codes[group * GROUP : (group + 1) * GROUP].astype(np.int64)
        if not np.isfinite(values).all():
            assert np.isnan(scales[group]) and np.isnan(sums[group]) and not part.any()
            continue
        largest = np.abs(values).max()
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(127) / largest
        if largest / np.float32(127) < np.finfo(np.float32).smallest_normal:
            assert scales[group] == 0 and sums[group] == 0 and not part.any()
            continue
        assert scales[group] == largest / np.float32(127)
        np.testing.assert_array_equal(part, np.rint(values * inverse))
        assert np.abs(part).max() == 127
        with np.errstate(over="ignore"):
            assert sums[group] == scales[group] * np.float32(part.sum())


def test_quantize_rounds_half_to_even() -> None:
    x = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)
    codes, scales, sums = kernels.quantize("scalar", x)
    assert codes[:7].tolist() == [127, 0, 2, 2, 0, -2, -2]
    assert scales.tolist() == [1.0] and sums.tolist() == [127.0]


# --- element-wise ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seed=seeds, size=sizes, wild=st.booleans())
def test_elementwise_is_the_same_everywhere(seed: int, size: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = floats(rng, 2, size, wild=wild)
    with np.errstate(over="ignore", invalid="ignore"):
        spread = x * np.float32(rng.choice([1, 10, 100]))
    check_nan_bits(same_everywhere("rms_norm", x, y, 1e-6))
    check_nan_bits(same_everywhere("layer_norm", spread, y, x, 1e-6))
    check_nan_bits(same_everywhere("silu_multiply", spread, y))
    check_nan_bits(same_everywhere("gelu_multiply", spread, y))
    check_nan_bits(same_everywhere("clamped_swiglu", spread, y, 1.702, 7.0))
    check_nan_bits(same_everywhere("sigmoid", spread))
    check_nan_bits(same_everywhere("softcap", 30.0, spread))
    check_nan_bits(same_everywhere("softplus_decay", x, y, spread))
    check_nan_bits(same_everywhere("sigmoid_multiply", spread, y))
    check_nan_bits(same_everywhere("softmax", spread))
    check_nan_bits(same_everywhere("add_scaled", float(rng.standard_normal()), x, y))
    head = floats(rng, 2 * size + int(rng.integers(0, 20)), wild=wild)
    rotated = same_everywhere("rope", head, x, y)
    check_nan_bits(rotated[: 2 * size])  # what lies behind the pairs stays as it is


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=sizes)
def test_elementwise_against_numpy(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = floats(rng, 2, size)
    x64, y64 = x.astype(np.float64), y.astype(np.float64)

    expected = x64 / np.sqrt(np.mean(x64**2) + 1e-6) * y64
    # A lane adds size / 16 squares, four folds; then seven roundings.
    np.testing.assert_allclose(
        kernels.rms_norm("scalar", x, y, 1e-6), expected, rtol=(size / 16 + 12) * EPSILON, atol=0
    )

    gate = x * 20
    expected = gate / (1 + np.exp(-gate.astype(np.float64))) * y64
    np.testing.assert_allclose(kernels.silu_multiply("scalar", gate, y), expected, rtol=5 * EPSILON, atol=1e-36)
    gated = kernels.sigmoid_multiply("scalar", gate, y)
    np.testing.assert_allclose(gated, y / (1 + np.exp(-gate.astype(np.float64))), rtol=5 * EPSILON, atol=1e-36)

    wide = gate.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    with np.errstate(over="ignore"):
        expected = wide / (1 + np.exp(-2 * inner)) * y64
    # exp turns a relative error of its argument into one of as many units.
    bound = (10 + 8 * np.abs(inner)) * EPSILON * np.abs(expected) + 2e-36
    assert (np.abs(kernels.gelu_multiply("scalar", gate, y) - expected) <= bound).all()

    alpha, limit = 1.702, 7.0
    low, up = np.minimum(wide, limit), np.clip(y64 * 5, -limit, limit)
    expected = low / (1 + np.exp(-alpha * low)) * (up + 1)
    bound = (8 + 3 * np.abs(low)) * EPSILON * np.abs(low) * (np.abs(up) + 1)
    actual = kernels.clamped_swiglu("scalar", gate, y * np.float32(5), alpha, limit)
    assert (np.abs(actual - expected) <= bound + 1e-36).all()

    expected = 1 / (1 + np.exp(-wide))
    np.testing.assert_allclose(kernels.sigmoid("scalar", gate), expected, rtol=4 * EPSILON, atol=1e-36)
    assert (np.abs(kernels.softcap("scalar", 30.0, gate) - 30 * np.tanh(wide / 30)) <= 30 * 4 * EPSILON).all()

    mean, deviation = x64.mean(), x64.std()
    expected = (x64 - mean) / np.sqrt(deviation**2 + 1e-5) * y64 + x64
    scale = np.abs(x64).max() / np.sqrt(deviation**2 + 1e-5)
    bound = (size / 8 + 20) * EPSILON * ((scale + 1) * (1 + scale) * np.abs(y64) + np.abs(x64))
    assert (np.abs(kernels.layer_norm("scalar", x, y, x, 1e-5) - expected) <= bound).all()

    shifted = np.exp(gate.astype(np.float64) - gate.max())
    # x - max rounds: up to 2^-24 |x - max| relative in exp.
    relative = (size / 16 + 10 + np.abs(gate - gate.max()).max()) * EPSILON
    np.testing.assert_allclose(kernels.softmax("scalar", gate), shifted / shifted.sum(), rtol=relative, atol=2e-28)

    expected = y64 + 0.7 * x64
    bound = 2 * EPSILON * (np.abs(y64) + np.abs(x64))
    assert (np.abs(kernels.add_scaled("scalar", 0.7, x, y) - expected) <= bound).all()

    angle = rng.uniform(0, 7, size)
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    head = floats(rng, 2 * size + 3)
    first, second = head[:size].astype(np.float64), head[size : 2 * size].astype(np.float64)
    actual = kernels.rope("scalar", head, cosine, sine)
    bound = 2 * EPSILON * (np.abs(first) + np.abs(second))
    assert (np.abs(actual[:size] - (first * cosine - second * sine)) <= bound).all()
    assert (np.abs(actual[size : 2 * size] - (second * cosine + first * sine)) <= bound).all()
    np.testing.assert_array_equal(actual[2 * size :], head[2 * size :])


@pytest.mark.parametrize("isa", ISAS)
def test_exponential(isa: str) -> None:
    """silu(g) = g / (1 + exp(-g)); for large negative g the denominator is exp(-g), for others between."""
    gate = np.concatenate(
        [np.linspace(-87, 87, 100_001), np.logspace(-40, 1.9, 2000), -np.logspace(-40, 1.9, 2000)]
    ).astype(np.float32)
    wide = gate.astype(np.float64)
    actual = kernels.silu_multiply(isa, gate, np.ones_like(gate))
    # exp 1.01 units, sum and quotient half a unit each, the denormal quotients one step.
    np.testing.assert_allclose(actual, wide / (1 + np.exp(-wide)), rtol=2.1 * EPSILON, atol=1.5e-45)

    # What would be subnormal is 0, and so is what would be its inverse.
    least = np.float32(-87.33654)
    limits = np.array([-np.inf, -200, -104, -90, np.nextafter(least, -100), least, 0], np.float32)
    low = kernels.sigmoid(isa, limits)
    assert not low[:5].any() and low[6] == 0.5 and np.finfo(np.float32).smallest_normal <= low[5] < 1.2e-38
    decay = kernels.softplus_decay(isa, -limits, np.zeros_like(limits), np.full_like(limits, -1))
    assert not decay[:5].any() and decay[6] == 0.5
    np.testing.assert_allclose(decay[5], np.exp(np.float64(least)), rtol=1.1 * EPSILON, atol=0)
    shares = kernels.softmax(isa, np.array([-np.inf, -90, np.nextafter(np.float32(-64), -100), -64, 0], np.float32))
    assert not shares[:3].any() and shares[4] == 1
    np.testing.assert_allclose(shares[3], np.exp(-64.0), rtol=1.1 * EPSILON, atol=0)
    result = kernels.silu_multiply(isa, np.array([-1000, 1000, np.nan], np.float32), np.ones(3, np.float32))
    assert result[0] == 0 and result[1] == 1000 and np.isnan(result[2])


@settings(max_examples=100, deadline=None)
@given(seed=seeds, size=sizes, spread=st.sampled_from([0.1, 1, 10, 60]))
def test_decay_of_a_recurrence(seed: int, size: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    x, bias = (floats(rng, size) * np.float32(spread) for _ in range(2))
    rate = -np.exp(floats(rng, size))
    actual = same_everywhere("softplus_decay", x, bias, rate)
    step = (x + bias).astype(np.float64)
    exponent = rate.astype(np.float64) * (np.maximum(step, 0) + np.log1p(np.exp(-np.abs(step))))
    expected = np.exp(exponent)
    bound = (2 + 3 * np.abs(exponent)) * EPSILON * expected
    assert (np.abs(actual - expected) <= np.where(exponent < -87, 1.2e-38, bound)).all()


def exact_turn(angle: float) -> tuple[float, float]:
    """Cosine and sine from integers, in units of 2^-200."""
    one = 1 << 200

    def arctangent_of_inverse(n: int) -> int:
        total, term, k = 0, one // n, 1
        while term:
            total += term // k if k % 4 == 1 else -(term // k)
            term, k = term // n**2, k + 2
        return total

    pi = 4 * (4 * arctangent_of_inverse(5) - arctangent_of_inverse(239))  # Machin
    numerator, denominator = angle.as_integer_ratio()
    turned = (one * numerator // denominator) % (2 * pi)
    cosine, sine, term, k = 0, 0, one, 0
    while term:
        sign = -1 if k % 4 >= 2 else 1
        cosine, sine = (cosine + sign * term, sine) if k % 2 == 0 else (cosine, sine + sign * term)
        k += 1
        term = term * turned // one // k
    return cosine / one, sine / one


def test_rotary_tables_are_the_nearest_numbers() -> None:
    """Angles as they occur, and those that come nearest to multiples of pi / 2."""
    rng = np.random.default_rng(19)
    inverse = (np.float64(10.0) ** -rng.uniform(0, 7, 40)).astype(np.float32)
    inverse[0] = 1
    positions = [0, 1, 2, 3, 1000, 2**20 - 1, 2**24, *rng.integers(0, 2**20, 20).tolist()]
    positions += [11, 22, 355, 710, 103993, 208341, 1146408, 5419351]  # numerators of convergents of pi
    for position in positions:
        cosine, sine = kernels.rotary(inverse, position)
        angles = np.float32(position) * inverse
        expected = np.array([exact_turn(float(angle)) for angle in angles], np.float32)
        np.testing.assert_array_equal(cosine, expected[:, 0])
        np.testing.assert_array_equal(sine, expected[:, 1])
    cosine, sine = kernels.rotary(inverse, 1234)
    for scaled, plain in zip(kernels.rotary(inverse, 1234, 1.25), (cosine, sine), strict=True):
        np.testing.assert_array_equal(scaled, plain * np.float32(1.25))
    for wild in (np.inf, np.nan, 1e38):
        assert np.isnan(kernels.rotary(np.array([wild], np.float32), 3)).all()
    assert np.isfinite(kernels.rotary(np.array([2.0**40], np.float32), 1)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_stays_visible(isa: str) -> None:
    rng = np.random.default_rng(5)
    for size in (1, 16, 37):
        for place in {0, size // 2, size - 1}:
            x, y = floats(rng, 2, size)
            x[place] = np.nan
            assert np.isnan(kernels.rms_norm(isa, x, y, 1e-6)).all()
            assert np.isnan(kernels.softmax(isa, x)).all()
            assert np.isnan(kernels.layer_norm(isa, x, y, y, 1e-6)).all()
            for name, options in (("silu_multiply", ()), ("gelu_multiply", ()), ("clamped_swiglu", (1.7, 7.0))):
                assert np.isnan(getattr(kernels, name)(isa, x, y, *options)[place])
            assert np.isnan(kernels.clamped_swiglu(isa, y, x, 1.7, 7.0)[place])
            assert np.isnan(kernels.sigmoid(isa, x)[place]) and np.isnan(kernels.softcap(isa, 30.0, x)[place])
            for layout in LAYOUTS:
                data = tame_matrix(rng, layout, 20, size)
                assert np.isnan(kernels.matmul(isa, layout, data, 20, size, x[None])).all()


# --- keys, values, attention ----------------------------------------------------------------------------------------


def reference_q8(vectors: Array) -> tuple[Array, Array]:
    """Codes int64 [positions, dim] and float16 scales [positions, dim / 32] by the rule in kernels.h."""
    groups = vectors.reshape(len(vectors), -1, 32)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scales = (np.abs(groups).max(-1) / np.float32(127)).astype(np.float16)
        scales[~np.isfinite(scales)] = np.nan
        codes = np.rint(np.clip(groups / scales.astype(np.float32)[..., None], -127, 127))
    codes[(scales == 0) | np.isnan(scales)] = 0
    return codes.astype(np.int64).reshape(vectors.shape), scales


@settings(max_examples=100, deadline=None)
@given(seed=seeds, positions=st.integers(1, 64), groups=st.integers(1, 4), wild=st.booleans(), odd=st.integers(0, 31))
def test_stored_keys_and_values(seed: int, positions: int, groups: int, wild: bool, odd: int) -> None:
    rng = np.random.default_rng(seed)
    for name in KV_TYPES:
        dim = groups * 32 + (odd if name != "q8_0" else 0)
        vectors = floats(rng, positions, dim, wild=wild)
        if name == "q8_0":
            with np.errstate(over="ignore", invalid="ignore"):
                vectors *= np.float32(10.0) ** rng.integers(-10, 10, (positions, 1)).astype(np.float32)
        key_block = same_everywhere("store", name, True, vectors)
        value_block = same_everywhere("store", name, False, vectors)
        assert key_block.size == value_block.size == kernels.kv_block_bytes(name, dim)
        if name == "q8_0":
            codes, scales = reference_q8(vectors)
            split = dim * 64
            keys = key_block[:split].view(np.int8).reshape(dim, 64)[:, :positions].T
            values = value_block[:split].view(np.int8).reshape(64, dim)[:positions]
            np.testing.assert_array_equal(keys, codes)
            np.testing.assert_array_equal(values, codes)
            key_scales = key_block[split:].view(np.float16).reshape(-1, 64)[:, :positions].T
            value_scales = value_block[split:].view(np.float16).reshape(64, -1)[:positions]
            np.testing.assert_array_equal(key_scales, scales)
            np.testing.assert_array_equal(value_scales, scales)
        else:
            dtype = np.float32 if name == "f32" else np.float16
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                expected = vectors.astype(dtype)
            np.testing.assert_array_equal(key_block.view(dtype).reshape(dim, 64)[:, :positions].T, expected)
            np.testing.assert_array_equal(value_block.view(dtype).reshape(64, dim)[:positions], expected)


def anywhere(rng: np.random.Generator, positions: int, start: int) -> list[int]:
    """A table: blocks in any places of a pool; entries that must not be read name places far outside of it."""
    table = rng.permutation(2 * (positions // 64 + 1))[: -(-positions // 64)].tolist()
    return [place if 64 * (number + 1) > start else -(2**31) for number, place in enumerate(table)]


@pytest.mark.parametrize("key_type", KV_TYPES)
@pytest.mark.parametrize("value_type", KV_TYPES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, heads=st.integers(1, 9), dim=st.integers(1, 100), positions=st.integers(1, 150), wild=st.booleans())
def test_attend_is_the_same_everywhere(
    key_type: str, value_type: str, seed: int, heads: int, dim: int, positions: int, wild: bool
) -> None:
    rng = np.random.default_rng(seed)
    if "q8_0" in (key_type, value_type):
        dim = (dim + 31) // 32 * 32
    queries = floats(rng, heads, dim)
    keys, values = floats(rng, 2, positions, dim)
    if wild:
        for vectors in (keys, values):
            places = rng.integers(0, vectors.size, 3)
            vectors.reshape(-1)[places] = rng.choice(SPECIAL, 3)
    start = int(rng.integers(0, positions)) if seed % 2 else 0
    expected = same_everywhere("attend", key_type, value_type, queries, keys, values, 0.3, start)
    for result in expected:
        check_nan_bits(result)
    table = anywhere(rng, positions, start)
    same_bytes(expected, same_everywhere("attend", key_type, value_type, queries, keys, values, 0.3, start, table))


@pytest.mark.parametrize("name", KV_TYPES)
@pytest.mark.parametrize("start", [0, 5, 70])
def test_attend_against_numpy(name: str, start: int) -> None:
    rng = np.random.default_rng(11)
    heads, dim, positions, scale = 5, 96, 200, 0.1
    queries = floats(rng, heads, dim)
    keys, values = floats(rng, 2, positions, dim)
    maximum, total, accumulator = kernels.attend("scalar", name, name, queries, keys, values, scale, start)
    if name == "f16":
        keys, values = keys.astype(np.float16), values.astype(np.float16)
    elif name == "q8_0":
        keys, values = (
            (codes.reshape(positions, -1, 32) * scales[..., None].astype(np.float64)).reshape(positions, dim)
            for codes, scales in (reference_q8(keys), reference_q8(values))
        )
    wide, keys, values = (array.astype(np.float64) for array in (queries, keys[start:], values[start:]))
    scores = wide @ keys.T * scale
    score_error = (dim + 2) * EPSILON * (np.abs(wide) @ np.abs(keys).T).max() * scale
    np.testing.assert_allclose(maximum, scores.max(1), rtol=0, atol=score_error)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    # A weight is off by twice the scores' error, its own exp, and one correction per block.
    relative = 2 * score_error + (positions + 20) * EPSILON
    np.testing.assert_allclose(total, weights.sum(1), rtol=relative)
    bound = relative * (weights @ np.abs(values)) / weights.sum(1, keepdims=True)
    assert (np.abs(accumulator / total[:, None] - weights @ values / weights.sum(1, keepdims=True)) <= 2 * bound).all()


@pytest.mark.parametrize("isa", ISAS)
def test_heads_do_not_depend_on_each_other(isa: str) -> None:
    rng = np.random.default_rng(13)
    queries = floats(rng, 7, 80)
    keys, values = floats(rng, 2, 100, 80)
    together = kernels.attend(isa, "f16", "f16", queries, keys, values, 0.2)
    for head in range(7):
        alone = kernels.attend(isa, "f16", "f16", queries[head : head + 1], keys, values, 0.2)
        for whole, one in zip(together, alone, strict=True):
            same_bytes(whole[head : head + 1], one)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", KV_TYPES)
def test_a_nan_key_or_value_stays_visible(name: str, isa: str) -> None:
    rng = np.random.default_rng(17)
    for broken in ("key", "value"):
        for bad in (np.nan, np.inf):
            queries = floats(rng, 3, 64)
            keys, values = floats(rng, 2, 70, 64)
            (keys if broken == "key" else values)[66, 40] = bad
            _, total, accumulator = kernels.attend(isa, name, name, queries, keys, values, 0.1)
            # A key that makes the score minus infinity excludes its position, as it should.
            result = (accumulator / total[:, None])[:, 40]
            if bad is np.nan or broken == "value":
                assert not np.isfinite(result).any()


@pytest.mark.parametrize("name", KV_TYPES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, heads=st.integers(1, 21), dim=st.integers(1, 100), positions=st.integers(1, 150), wild=st.booleans())
def test_latent_attention(name: str, seed: int, heads: int, dim: int, positions: int, wild: bool) -> None:
    """The same everywhere, and what plain attention gives whose values are the keys."""
    rng = np.random.default_rng(seed)
    if name == "q8_0":
        dim = (dim + 31) // 32 * 32
    value_dim = int(rng.integers(1, dim + 1))
    queries, keys = floats(rng, heads, dim), floats(rng, positions, dim)
    if wild:
        keys.reshape(-1)[rng.integers(0, keys.size, 3)] = rng.choice(SPECIAL, 3)
    start = int(rng.integers(0, positions)) if seed % 2 else 0
    maximum, total, accumulator = same_everywhere("attend_latent", name, queries, keys, value_dim, 0.3, start)
    check_nan_bits(accumulator)
    table = anywhere(rng, positions, start)
    moved = same_everywhere("attend_latent", name, queries, keys, value_dim, 0.3, start, table)
    same_bytes((maximum, total, accumulator), moved)
    plain = kernels.attend("scalar", name, name, queries, keys, keys, 0.3, start)
    same_bytes((plain[0], plain[1], plain[2][:, :value_dim].copy()), (maximum, total, accumulator))


# --- convolutions and recurrences -----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(seed=seeds, channels=st.integers(1, 70), taps=st.integers(1, 6), wild=st.booleans(), silu=st.booleans())
def test_convolution(seed: int, channels: int, taps: int, wild: bool, silu: bool) -> None:
    rng = np.random.default_rng(seed)
    weights, rows = floats(rng, 2, taps, channels, wild=wild)
    missing = int(rng.integers(0, taps + 1))
    actual = same_everywhere("convolve", weights, rows, missing, silu)
    check_nan_bits(actual)
    if not wild:
        wide = (weights.astype(np.float64) * rows)[missing:]
        expected, bound = wide.sum(0), (taps + 20) * EPSILON * np.abs(wide).sum(0)
        if silu:
            expected = expected / (1 + np.exp(-expected))
        assert (np.abs(actual - expected) <= 2 * bound + 1e-30).all()


@settings(max_examples=100, deadline=None)
@given(seed=seeds, key_dim=st.integers(1, 40), chunks=st.integers(1, 6), wild=st.booleans())
def test_gated_delta_rule(seed: int, key_dim: int, chunks: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    state, (query, key) = floats(rng, key_dim, 16 * chunks, wild=wild), floats(rng, 2, key_dim)
    value = floats(rng, 16 * chunks, wild=wild)
    decay, beta = float(np.float32(rng.random())), float(np.float32(rng.random()))
    after, out = same_everywhere("gated_delta", state, query, key, value, decay, beta)
    check_nan_bits(after)
    check_nan_bits(out)
    if not wild:
        key = (key / np.linalg.norm(key)).astype(np.float32)
        after, out = kernels.gated_delta("scalar", state, query, key, value, decay, beta)
        wide, long_key = state.astype(np.float64) * decay, key.astype(np.float64)
        expected = wide + np.outer(long_key, (value - long_key @ wide) * beta)
        scale = np.abs(state).max() + np.abs(value).max()
        np.testing.assert_allclose(after, expected, rtol=0, atol=(key_dim + 10) * EPSILON * scale * 4)
        bound = (key_dim + 10) * EPSILON * scale * 8 * np.abs(query).sum()
        np.testing.assert_allclose(out, query.astype(np.float64) @ expected, rtol=0, atol=bound)


# --- choice and checks ----------------------------------------------------------------------------------------------


def test_the_scalar_reference_is_always_there() -> None:
    assert ISAS[0] == "scalar"
    assert len(set(ISAS)) == len(ISAS)


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEMOE_ISA", raising=False)
    assert kernels.selected_isa() == ISAS[-1]
    for isa in ISAS:
        assert kernels.selected_isa(isa) == isa
        monkeypatch.setenv("EDGEMOE_ISA", isa)
        assert kernels.selected_isa() == isa
    monkeypatch.setenv("EDGEMOE_ISA", "mmx")
    with pytest.raises(ValueError, match=r"'mmx' is not available here; available: scalar"):
        kernels.selected_isa()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_agree_with_the_packer(layout: str) -> None:
    for rows, cols in ((1, 1), (16, 64), (17, 65), (100, 300)):
        assert kernels.matrix_bytes(layout, rows, cols) == packed_size(layout, rows, cols)


def test_wrong_sizes_are_refused() -> None:
    data = np.zeros(packed_size("f32", 16, 8), np.uint8)
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="data must have"):
        kernels.matmul("scalar", "f32", data[:-1], 16, 8, x)
    with pytest.raises(ValueError, match="8 columns"):
        kernels.matmul("scalar", "f32", data, 16, 8, x[:, :7])
    with pytest.raises(ValueError, match="token 2"):
        kernels.matmul("scalar", "f32", data, 16, 8, x, np.array([2], np.int32))
    with pytest.raises(ValueError, match="blocks must lie"):
        kernels.matmul("scalar", "f32", data, 16, 8, x, None, 0, 2)
    with pytest.raises(ValueError, match="unknown weight layout 'q3'"):
        kernels.matmul("scalar", "q3", data, 16, 8, x)
    with pytest.raises(ValueError, match="multiple of 32"):
        kernels.store("scalar", "q8_0", True, x)
