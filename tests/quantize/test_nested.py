"""Slice-refit beside a slow reference, and the order of schemes it was chosen for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgemoe.formats.layouts import GROUP
from edgemoe.quantize import nested
from edgemoe.quantize.nested import Hessian, Nested, quantize

Floats = npt.NDArray[np.float64]
BITS = (2, 3, 4)


def layer(seed: int, rows: int, columns: int, tokens: int = 2048) -> tuple[npt.NDArray[np.float32], Floats, Floats]:
    """(weights, Hessian, held-out inputs): Gaussian weights, correlated inputs with outlier channels."""
    rng = np.random.default_rng(seed)
    weights = (0.02 * rng.standard_normal((rows, columns))).astype(np.float32)
    mix = rng.standard_normal((columns, columns)) * 0.25 / np.sqrt(columns) + np.eye(columns)
    scale = np.exp(0.3 * rng.standard_normal(columns))
    scale[rng.integers(0, columns, max(1, columns // 64))] *= 6
    inputs = rng.standard_normal((tokens + 512, columns)) @ mix * scale
    return weights, inputs[:tokens].T @ inputs[:tokens] / tokens, inputs[tokens:]


def output_error(weights: npt.NDArray[np.float32], found: npt.NDArray[np.float32], inputs: Floats) -> float:
    lost, exact = inputs @ (found - weights).T, inputs @ weights.T
    return float((lost * lost).sum() / (exact * exact).sum())


# -- a slow reference -----------------------------------------------------------------------------------------------


def best_range(values: Floats, bits: tuple[int, ...]) -> tuple[float, float]:
    """(scale, low) of one row's group: least squares at every level for every candidate."""
    top = 2 ** bits[-1] - 1
    low, high = values.min(), values.max()
    best = (np.inf, 0.0, 0.0)
    for ratio in np.linspace(1.0, 0.4, 25):
        scale = (high - low) * ratio / top
        start = (low + high) / 2 - scale * top / 2
        codes = np.clip(np.rint((values - start) / scale), 0, top)
        total = 0.0
        for width, weight in zip(bits, nested.level_weights(bits), strict=True):
            u = np.floor(codes / 2 ** (bits[-1] - width))
            basis = np.stack([u, np.ones_like(u)], axis=1)
            fit = basis @ np.linalg.lstsq(basis, values, rcond=None)[0]
            total += weight * ((values - fit) ** 2).sum()
        if total < best[0] - 1e-15:
            best = (total, scale, start)
    return best[1], best[2]


def reference_codes(weights: npt.NDArray[np.float32], hessian: Floats, bits: tuple[int, ...]) -> Floats:
    """GPTQ as its paper has it: row by row, column by column, with the Cholesky factor of the inverse Hessian."""
    columns = weights.shape[1]
    damped = hessian / np.mean(np.diag(hessian)) + nested.DAMPING * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T  # upper, inverse = factor^T factor
    top = 2 ** bits[-1] - 1
    codes = np.zeros(weights.shape)
    for row, values in enumerate(weights.astype(np.float64)):
        for column in range(columns):
            if column % GROUP == 0:
                scale, low = best_range(values[column : column + GROUP], bits)
            code = np.clip(np.rint((values[column] - low) / scale), 0, top)
            codes[row, column] = code
            error = (values[column] - (scale * code + low)) / factor[column, column]
            values[column + 1 :] -= error * factor[column, column + 1 :]
    return codes


def joint_fit_error(weights: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8], hessian: Floats) -> float:
    """The least squared error that any scales and offsets of all groups can have, sum over rows."""
    columns = weights.shape[1]
    root = np.linalg.cholesky(hessian / np.mean(np.diag(hessian)) + nested.DAMPING * np.eye(columns)).T
    total = 0.0
    for row in range(len(weights)):
        basis = np.zeros((columns, 2 * -(-columns // GROUP)))
        for group in range(basis.shape[1] // 2):
            part = slice(group * GROUP, min((group + 1) * GROUP, columns))
            basis[part, 2 * group] = codes[row, part]
            basis[part, 2 * group + 1] = 1
        target = root @ weights[row].astype(np.float64)
        solution = np.linalg.lstsq(root @ basis, target, rcond=None)[0]
        total += float(((target - root @ basis @ solution) ** 2).sum())
    return total


def squared_error(weights: npt.NDArray[np.float32], found: npt.NDArray[np.float32], hessian: Floats) -> float:
    lost = (found - weights).astype(np.float64)
    damped = hessian / np.mean(np.diag(hessian)) + nested.DAMPING * np.eye(len(hessian))
    return float(np.einsum("ij,ij->", lost @ damped, lost))


# -- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "bits"), [(6, 192, BITS), (5, 150, (3, 5)), (4, 40, (4,)), (3, 128, (1, 8))]
)
def test_codes_and_fit_are_the_reference_s(rows: int, columns: int, bits: tuple[int, ...]) -> None:
    weights, hessian, _ = layer(columns, rows, columns)
    found = quantize(weights, Hessian(hessian.astype(np.float32), columns), bits)
    expected = reference_codes(weights, hessian, bits)
    # A code at the edge between two may fall on either side in float32, and then moves some of those after it.
    assert (found.codes[:, :columns] == expected).mean() > 0.95
    assert not found.codes[:, columns:].any()
    for level, width in enumerate(bits):
        least = joint_fit_error(weights, found.codes >> (bits[-1] - width), hessian)
        error = squared_error(weights, found.weights(level, columns), hessian)
        # What is lost: two sweeps instead of a solution, parameters in few bits. A level that adds 7 bits has shifts in
        # steps of 4 of its own scale.
        assert error < (1.06 if bits != (1, 8) else 40) * least + 1e-9 * squared_error(
            weights, np.zeros_like(weights), hessian
        )


def test_order_of_the_schemes() -> None:
    weights, hessian, inputs = layer(1, 128, 512)
    shared = Hessian(hessian.astype(np.float32), 512)
    one = quantize(weights, shared, BITS)
    unfitted = quantize(weights, Hessian(None, 512), BITS)
    scale, offset = one.parameters(2)
    for level, width in enumerate(BITS):
        ours = output_error(weights, one.weights(level, 512), inputs)
        separate = output_error(weights, quantize(weights, shared, (width,)).weights(0, 512), inputs)
        assert separate * 0.9 < ours < separate * (1.35, 1.2, 1.08)[level]
        assert ours < (0.97, 0.97, 0.98)[level] * output_error(weights, unfitted.weights(level, 512), inputs)
        if level < 2:
            dropped = 2 - level
            sliced = (one.codes >> dropped << dropped).reshape(*scale.shape, GROUP)
            naive = (sliced * scale[:, :, None] + offset[:, :, None]).reshape(128, -1)
            assert ours < 0.55 * output_error(weights, naive.astype(np.float32), inputs)


@pytest.mark.parametrize(("below", "width"), [(2, 3), (3, 4), (2, 4), (4, 8)])
def test_a_coarser_level_is_the_best_from_which_the_next_can_be_stored(below: int, width: int) -> None:
    rng = np.random.default_rng(width)
    rows, added = 50, width - below
    codes = rng.integers(0, 2**below, (GROUP, rows)).astype(np.float32)
    root = rng.standard_normal((GROUP, GROUP))
    hessian = Hessian((root.T @ root / GROUP).astype(np.float32), GROUP)
    scales = 0.01 * (1 + rng.random((1, rows)))
    start = (scales, 0.01 * rng.standard_normal((1, rows)) - scales * (2**below - 1) / 2)
    target = (codes * start[0] + start[1] + 0.005 * rng.standard_normal((GROUP, rows))).astype(np.float32)
    coarse, fine = (
        nested._Fit(target, codes, (scale.astype(np.float32), offset.astype(np.float32)), hessian)
        for scale, offset in (start, (start[0] / 2**added, start[1] - start[0] * (0.5 - 0.5 / 2**added)))
    )
    coarse.sweep(nested._Coarser(fine, (below, width), 0), 1)
    ratio, shift = (values.astype(np.float64) for values in np.meshgrid(range(-8, 8), range(-7, 7)))

    def error(scale: Floats, offset: Floats, row: int) -> Floats:
        lost = target[:, row].astype(np.float64) - codes[:, row] * scale[..., None] - offset[..., None]
        return np.asarray(np.einsum("...i,ij,...j->...", lost, hessian.matrix.astype(np.float64), lost))

    for row in range(rows):
        scales = float(fine.scale[0, row]) * 2**added / (1 + ratio / 2 ** (below + 3))
        steps = 2**added * (shift / 32 - ratio / 16 - 0.5) + 0.5
        offsets = float(fine.offset[0, row]) - float(fine.scale[0, row]) * steps
        found = error(coarse.scale[:, row], coarse.offset[:, row], row)[0]
        assert found <= error(scales, offsets, row).min() * (1 + 1e-3)
        # It is one of the pairs, so what is stored of the next level leads back to it.
        near = np.hypot(scales - coarse.scale[0, row], offsets - coarse.offset[0, row]).min()
        assert near < 1e-5 * coarse.scale[0, row]
    finer = nested._Finer(coarse, fine.scale.copy(), below, width)
    fine.sweep(finer, 1)
    np.testing.assert_allclose(fine.scale * 2**added / (1 + finer.first / 2.0 ** (below + 3)), coarse.scale, rtol=1e-5)


def test_rows_are_independent_and_stackable() -> None:
    weights, hessian, _ = layer(2, 700, 130)
    shared = Hessian(hessian.astype(np.float32), 130)
    whole = quantize(weights, shared, BITS)
    assert whole.codes.shape == (700, 192)
    part = quantize(weights[512:], shared, BITS)
    again = whole.rows(512, 700)
    np.testing.assert_array_equal(part.codes, again.codes)
    for level in range(3):
        np.testing.assert_array_equal(part.first[level], again.first[level])
        np.testing.assert_array_equal(part.second[level], again.second[level])


def test_parameters_are_the_format_s() -> None:
    made = Nested(
        (2, 3, 5),
        np.array([[0b11010] * GROUP], np.uint8),
        (np.array([[0.5]], np.float16), np.array([[8 - 1]], np.int8), np.array([[-8]], np.int8)),
        (np.array([[16]], np.int8), np.array([[-8]], np.int8), np.array([[4]], np.int8)),
    )
    a, b = made.parameters(0)
    assert (a[0, 0], b[0, 0]) == (0.5, 0.5 * (16 / 32 - 1.5))
    a1 = 0.25 * (1 + 7 / 32)
    b1 = 0.5 * (16 / 32 - 1.5) + a1 * (2 * (-8 / 32 - 7 / 16) - 0.5)
    assert (made.parameters(1)[0][0, 0], made.parameters(1)[1][0, 0]) == (a1, b1)
    a2 = a1 / 4 * (1 - 8 / 64)
    b2 = b1 + a2 * (4 * (4 / 32 + 8 / 16) - 1.5)
    assert (made.parameters(2)[0][0, 0], made.parameters(2)[1][0, 0]) == (a2, b2)
    assert made.weights(2, 10)[0, 0] == np.float32(a2 * 0b11010 + b2)
    assert made.weights(0, 10)[0, 0] == np.float32(0.5 * 0b11 + b[0, 0])
    assert [made.level_codes(level)[0, 0] for level in range(3)] == [0b11, 0, 0b10]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 3e4])
def test_equal_weights_stay_close(value: float) -> None:
    weights = np.full((3, 100), value, np.float32)
    for hessian in (Hessian(None, 100), Hessian(np.eye(100, dtype=np.float32), 100)):
        made = quantize(weights, hessian, BITS)
        for level in range(3):
            np.testing.assert_allclose(made.weights(level, 100), weights, rtol=0.04)


def test_a_range_far_from_zero_is_within_reach_of_the_offset() -> None:
    rng = np.random.default_rng(3)
    weights = (1 + 0.01 * rng.standard_normal((4, 128))).astype(np.float32)
    made = quantize(weights, Hessian(None, 128), BITS)
    for level in range(3):
        assert np.abs(made.weights(level, 128) - weights).max() < 0.2


@pytest.mark.parametrize("broken", [np.zeros((64, 64)), np.full((64, 64), np.nan), np.full((64, 64), 1.0)])
def test_a_hessian_without_rank_does_no_harm(broken: Floats) -> None:
    weights, _, _ = layer(4, 8, 64)
    made = quantize(weights, Hessian(broken.astype(np.float32), 64), BITS)
    assert np.abs(made.weights(2, 64) - weights).max() < np.abs(weights).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_refuses_weights_without_a_scale(value: float) -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[1, 3] = value
    with pytest.raises(ValueError, match="does not fit float16"):
        quantize(weights, Hessian(None, 64), BITS)


@pytest.mark.parametrize("bits", [(), (0, 2), (2, 2), (3, 2), (4, 9)])
def test_refuses_other_levels(bits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not ascend"):
        nested.check_bits(bits)
