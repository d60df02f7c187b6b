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


def correlated_layer(seed: int, rows: int, columns: int) -> tuple[npt.NDArray[np.float32], Floats, Floats]:
    """The same for inputs of which few directions matter, so that a column can make up for much of another's error."""
    rng = np.random.default_rng(seed)
    weights = (0.02 * rng.standard_normal((rows, columns))).astype(np.float32)
    strengths = np.exp(-8 * np.arange(columns) / columns)
    inputs = rng.standard_normal((2560, columns)) * strengths @ rng.standard_normal((columns, columns))
    return weights, inputs[:2048].T @ inputs[:2048] / 2048, inputs[2048:]


def output_error(weights: npt.NDArray[np.float32], found: npt.NDArray[np.float32], inputs: Floats) -> float:
    lost, exact = inputs @ (found - weights).T, inputs @ weights.T
    return float((lost * lost).sum() / (exact * exact).sum())


# -- a slow reference -----------------------------------------------------------------------------------------------


Line = tuple[float, float]


def best_lines(values: Floats, bits: tuple[int, ...]) -> list[Line]:
    """(A, B) of each level for one row's group: least squares at every level for every candidate."""
    top = 2 ** bits[-1] - 1
    low, high = values.min(), values.max()
    best: tuple[float, list[Line]] = (np.inf, [])
    for ratio in np.linspace(1.0, 0.4, 25):
        scale = (high - low) * ratio / top
        start = (low + high) / 2 - scale * top / 2
        codes = np.clip(np.rint((values - start) / scale), 0, top)
        total, lines = 0.0, []
        for width, weight in zip(bits, nested.level_weights(bits), strict=True):
            u = np.floor(codes / 2 ** (bits[-1] - width))
            basis = np.stack([u, np.ones_like(u)], axis=1)
            solution = np.linalg.lstsq(basis, values, rcond=None)[0]
            lines.append((float(solution[0]), float(solution[1])))
            total += weight * ((values - basis @ solution) ** 2).sum()
        if total < best[0] - 1e-15:
            best = (total, lines)
    return best[1]


def reference_codes(weights: npt.NDArray[np.float32], hessian: Floats, bits: tuple[int, ...]) -> Floats:
    """GPTQ as its paper has it, with the Cholesky factor of the inverse Hessian: row by row, column by column; every
    level makes up for its own errors, and all codes are tried."""
    columns = weights.shape[1]
    damped = hessian / np.mean(np.diag(hessian)) + nested.DAMPING * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T  # upper, inverse = factor^T factor
    tried = np.arange(2 ** bits[-1])
    codes = np.zeros(weights.shape)
    for row, original in enumerate(weights.astype(np.float64)):
        values = np.repeat(original[None], len(bits), axis=0)
        for column in range(columns):
            if column % GROUP == 0:
                lines = best_lines(values[-1, column : column + GROUP], bits)
            stands_for = np.array(
                [a * (tried >> (bits[-1] - width)) + b for width, (a, b) in zip(bits, lines, strict=True)]
            )
            lost = np.array(nested.level_weights(bits)) @ (values[:, column, None] - stands_for) ** 2
            codes[row, column] = code = lost.argmin()
            error = (values[:, column] - stands_for[:, code]) / factor[column, column]
            values[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
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
    shared = Hessian(hessian.astype(np.float32), columns)
    begun = nested._Rounding(weights, shared, bits)
    expected = reference_codes(weights, hessian, bits)
    # A code at the edge between two may fall on either side in float32, and then moves some of those after it.
    assert (expected == begun.codes[:columns].T).mean() > 0.95
    found = quantize(weights, shared, bits)
    assert not found.codes[:, columns:].any()
    for level, width in enumerate(bits):
        least = joint_fit_error(weights, found.codes >> (bits[-1] - width), hessian)
        error = squared_error(weights, found.weights(level, columns), hessian)
        # What is lost: two sweeps instead of a solution, parameters in few bits. A level that adds 7 bits has shifts in
        # steps of 4 of its own scale.
        assert error < (1.06 if bits != (1, 8) else 40) * least + 1e-9 * squared_error(
            weights, np.zeros_like(weights), hessian
        )


@pytest.mark.parametrize(("columns", "bits"), [(192, BITS), (150, (3, 5)), (100, (4,))])
def test_every_level_makes_up_for_its_own_errors(columns: int, bits: tuple[int, ...]) -> None:
    weights, hessian, _ = correlated_layer(columns, 5, columns)
    rounding = nested._Rounding(weights, Hessian(hessian.astype(np.float32), columns), bits)
    damped = hessian / np.mean(np.diag(hessian)) + nested.DAMPING * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    tried = np.arange(2 ** bits[-1])
    for row in range(len(weights)):
        values = np.repeat(weights[row].astype(np.float64)[None], len(bits), axis=0)
        for column in range(columns):
            lines = (line[:, column // GROUP, row, None] for line in (rounding.scale, rounding.offset))
            scale, offset = (line.astype(np.float64) for line in lines)
            stands_for = (tried >> (bits[-1] - np.array(bits)[:, None])) * scale + offset
            lost = np.array(nested.level_weights(bits)) @ (values[:, column, None] - stands_for) ** 2
            # The codes before it are those that were chosen, so that float32 does not lead elsewhere.
            code = int(rounding.codes[column, row])
            assert lost[code] <= lost.min() * 1.001 + 1e-3 * scale[-1, 0] ** 2
            error = (values[:, column] - stands_for[:, code]) / factor[column, column]
            values[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]


def test_levels_are_weighed_against_each_other() -> None:
    weights, hessian, inputs = correlated_layer(1, 128, 512)
    shared = Hessian(hessian.astype(np.float32), 512)
    made = quantize(weights, shared, BITS)
    for level, (width, most) in enumerate(zip(BITS, (6, 3.5, 1.9), strict=True)):
        separate = output_error(weights, quantize(weights, shared, (width,)).weights(0, 512), inputs)
        assert output_error(weights, made.weights(level, 512), inputs) < most * separate


@pytest.mark.parametrize(("columns", "bits"), [(150, BITS), (64, (4,)), (70, (2, 6))])
@pytest.mark.parametrize("calibrated", [True, False])
def test_codes_are_better_than_all_that_differ_in_one(columns: int, bits: tuple[int, ...], calibrated: bool) -> None:
    weights, values, _ = layer(columns, 4, columns)
    hessian = Hessian(values.astype(np.float32) if calibrated else None, columns)
    rounding = nested._Rounding(weights, hessian, bits)

    def error() -> Floats:
        """[rows], weighed over the levels."""
        total = np.zeros(len(weights))
        for level, (width, weight) in enumerate(zip(bits, nested.level_weights(bits), strict=True)):
            u = np.floor(rounding.codes[:columns] / 2 ** (bits[-1] - width))
            scale, offset = (
                np.repeat(line[level], GROUP, axis=0)[:columns].astype(np.float64)
                for line in (rounding.scale, rounding.offset)
            )
            lost = weights.T - u * scale - offset
            total += weight * np.einsum(
                "ij,ik,kj->j", lost, hessian.matrix[:columns, :columns].astype(np.float64), lost
            )
        return total

    before = error()
    for _ in range(20):
        for group in range(-(-columns // GROUP)):
            rounding._descend(group, rounding._gradient(group))
    least = error()
    assert (least <= before * (1 + 1e-6)).all()
    assert (least < 0.99 * before).any() == calibrated
    for column in range(0, columns, 7):
        kept = rounding.codes[column].copy()
        for code in range(2 ** bits[-1]):
            rounding.codes[column] = code
            assert (error() >= least * (1 - 1e-4)).all()
        rounding.codes[column] = kept


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
    scale = 0.01 * (1 + rng.random((1, rows)))
    offset = 0.01 * rng.standard_normal((1, rows)) - scale * (2**below - 1) / 2
    target = (codes * scale + offset + 0.005 * rng.standard_normal((GROUP, rows))).astype(np.float32)
    bits = (below, width)
    rounding = nested._Rounding(target.T, hessian, bits)
    u = np.floor(rounding.codes / 2**added).astype(np.float64)
    rounding.fit(0, nested._Coarser(rounding, bits, 0))
    fine_scale, fine_offset = (line[1, 0].astype(np.float64) for line in (rounding.scale, rounding.offset))
    coarse_scale, coarse_offset = (line[0, 0].astype(np.float64) for line in (rounding.scale, rounding.offset))
    ratio, shift = (values.astype(np.float64) for values in np.meshgrid(range(-8, 8), range(-7, 7)))

    def error(scale: Floats, offset: Floats, row: int) -> Floats:
        lost = target[:, row].astype(np.float64) - u[:, row] * scale[..., None] - offset[..., None]
        return np.asarray(np.einsum("...i,ij,...j->...", lost, hessian.matrix.astype(np.float64), lost))

    for row in range(rows):
        scales = fine_scale[row] * 2**added / (1 + ratio / 2 ** (below + 3))
        steps = 2**added * (shift / 32 - ratio / 16 - 0.5) + 0.5
        offsets = fine_offset[row] - fine_scale[row] * steps
        found = error(coarse_scale[row], coarse_offset[row], row)
        assert found <= error(scales, offsets, row).min() * (1 + 1e-3)
        # It is one of the pairs, so what is stored of the next level leads back to it.
        near = np.hypot(scales - coarse_scale[row], offsets - coarse_offset[row]).min()
        assert near < 1e-5 * coarse_scale[row]
    finer = nested._Finer(rounding, bits, 1)
    rounding.fit(1, finer)
    again = rounding.scale[1] * 2**added / (1 + finer.first / 2.0 ** (below + 3))
    np.testing.assert_allclose(again, rounding.scale[0], rtol=1e-5)


def test_rows_are_independent_and_stackable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested, "_ROWS", 512)
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
        # The least step of level 0 is 1 / 3.4.
        assert np.abs(made.weights(level, 128) - weights).max() < 0.3 / 2**level


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
