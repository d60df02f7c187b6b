"""Slice-refit beside a slow reference, and the order of schemes it was chosen for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgemoe.formats.layouts import GROUP, OFFSET_UNIT, OWN_OFFSET, STEPS, SUB_GROUP, SUPER_GROUP
from edgemoe.quantize import nested
from edgemoe.quantize.nested import Hessian, Nested, quantize

Floats = npt.NDArray[np.float64]
BITS = (2, 3, 4)
OFFSETS = tuple(OFFSET_UNIT * number for number in range(-4, 4))


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


def lines_of(rounding: nested._Rounding, columns: int) -> tuple[Floats, Floats]:
    """(A, B) of every level and column, [levels, columns, rows]."""
    pairs = [rounding.lines.of(column // SUB_GROUP) for column in range(columns)]
    return tuple(np.stack([pair[part] for pair in pairs], axis=1).astype(np.float64) for part in range(2))


def weighed_error(
    rounding: nested._Rounding, weights: npt.NDArray[np.float32], hessian: Hessian, bits: tuple[int, ...]
) -> Floats:
    """Squared error of the product, over all levels, [rows]."""
    columns = weights.shape[1]
    total = np.zeros(len(weights))
    for level, (a, b) in enumerate(zip(*lines_of(rounding, columns), strict=True)):
        u = np.floor(rounding.codes[:columns] / 2 ** (bits[-1] - bits[level]))
        lost = weights.T - u * a - b
        matrix = hessian.matrix[:columns, :columns].astype(np.float64)
        total += nested.level_weights(bits)[level] * np.einsum("ij,ik,kj->j", lost, matrix, lost)
    return total


# -- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "bits"), [(192, BITS), (150, (3, 5)), (100, (4,))])
def test_every_level_makes_up_for_its_own_errors(columns: int, bits: tuple[int, ...]) -> None:
    weights, hessian, _ = correlated_layer(columns, 5, columns)
    rounding = nested._Rounding(weights, Hessian(hessian.astype(np.float32), columns), bits)
    damped = hessian / np.mean(np.diag(hessian)) + nested.DAMPING * np.eye(columns)
    damped += nested.DISTRUST * np.diag(np.diag(hessian)) / np.mean(np.diag(hessian))
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    tried = np.arange(2 ** bits[-1])
    rises, starts = lines_of(rounding, columns)
    for row in range(len(weights)):
        values = np.repeat(weights[row].astype(np.float64)[None], len(bits), axis=0)
        for column in range(columns):
            scale, offset = (line[:, column, row, None] for line in (rises, starts))
            stands_for = (tried >> (bits[-1] - np.array(bits)[:, None])) * scale + offset
            lost = np.array(nested.level_weights(bits)) @ (values[:, column, None] - stands_for) ** 2
            # The codes before it are those that were chosen, so that float32 does not lead elsewhere.
            code = int(rounding.codes[column, row])
            assert lost[code] <= lost.min() * 1.001 + 1e-3 * scale[-1, 0] ** 2
            error = (values[:, column] - stands_for[:, code]) / factor[column, column]
            values[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]


@pytest.mark.slow
def test_levels_are_weighed_against_each_other() -> None:
    weights, hessian, inputs = correlated_layer(1, 128, 512)
    shared = Hessian(hessian.astype(np.float32), 512)
    made = quantize(weights, shared, BITS)
    for level, (width, most) in enumerate(zip(BITS, (4.2, 2.4, 2.25), strict=True)):
        separate = output_error(weights, quantize(weights, shared, (width,)).weights(0, 512), inputs)
        assert output_error(weights, made.weights(level, 512), inputs) < most * separate


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "bits"), [(150, BITS), (64, (4,)), (70, (2, 6))])
@pytest.mark.parametrize("calibrated", [True, False])
def test_codes_are_better_than_all_that_differ_in_one(columns: int, bits: tuple[int, ...], calibrated: bool) -> None:
    weights, values, _ = layer(columns, 4, columns)
    hessian = Hessian(values.astype(np.float32) if calibrated else None, columns)
    rounding = nested._Rounding(weights, hessian, bits)

    def error() -> Floats:
        return weighed_error(rounding, weights, hessian, bits)

    before = error()
    for _ in range(20):
        for group in range(-(-columns // SUPER_GROUP)):
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


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "bits"), [(150, BITS), (64, (4,)), (40, (1, 3))])
def test_lines_are_better_than_all_that_differ_in_one(columns: int, bits: tuple[int, ...]) -> None:
    weights, values, _ = layer(columns, 4, columns)
    hessian = Hessian(values.astype(np.float32), columns)
    rounding = nested._Rounding(weights, hessian, bits)
    lines = rounding.lines
    for _ in range(20):
        for group in range(-(-columns // SUPER_GROUP)):
            rounding._fit(group, rounding._gradient(group))
    least = weighed_error(rounding, weights, hessian, bits)

    def no_worse() -> bool:
        return bool((weighed_error(rounding, weights, hessian, bits) >= least * (1 - 1e-4)).all())

    for sub in range(0, -(-columns // SUB_GROUP), 3):
        stored = lines.steps, lines.offsets, lines.nudges
        kept = [values[sub].copy() for values in stored]
        for step in STEPS:
            for offset in OFFSETS:
                lines.steps[sub], lines.offsets[sub] = step, offset
                # The nudge is chosen after the others.
                for nudge in (OWN_OFFSET, -OWN_OFFSET) if step == kept[0][0] and offset == kept[1][0] else ():
                    lines.nudges[sub] = nudge
                    assert no_worse() or (kept[0] != step).any() or (kept[1] != offset).any()
                lines.nudges[sub] = kept[2]
                assert no_worse()
        for values, before in zip(stored, kept, strict=True):
            values[sub] = before
    last = len(bits) - 1
    for group in range(-(-columns // SUPER_GROUP) if last else 0):
        kept = [lines.rises[last, group].copy(), lines.centers[last, group].copy()]
        for ratio in range(-8, 8):
            for shift in range(-8, 8):
                pair = np.float32(ratio), np.float32(shift)
                lines.rises[last, group], lines.centers[last, group] = lines.refined(last, group, *pair)
                assert no_worse()
        lines.rises[last, group], lines.centers[last, group] = kept


def test_the_first_line_of_a_sub_group_is_nearly_the_best() -> None:
    weights, _, _ = layer(3, 40, 256)
    rounding = nested._Rounding(weights, Hessian(None, 256), BITS)
    lines = rounding.lines
    for sub in range(0, 16, 5):
        values = rounding._target[sub * SUB_GROUP : (sub + 1) * SUB_GROUP]

        def error(values: npt.NDArray[np.float32] = values, sub: int = sub) -> Floats:
            nearest = nested._Nearest(*lines.of(sub), rounding._slices, np.array([0, 0, 1], np.float32), BITS[-1])
            found = np.stack([nearest(np.repeat(row[None], 3, axis=0))[1] for row in values], axis=1)
            lost = ((found - values) ** 2).sum(axis=1)
            return np.asarray(np.array(nested.level_weights(BITS)) @ lost.astype(np.float64))

        nested._choose_lines(lines, sub, values, BITS)
        chosen, least = error(), np.full(40, np.inf)
        for step in STEPS:
            for offset in OFFSETS:
                for nudge in (-OWN_OFFSET, OWN_OFFSET):
                    lines.steps[sub], lines.offsets[sub], lines.nudges[sub] = step, offset, nudge
                    least = np.minimum(least, error())
        assert (chosen >= least * (1 - 1e-5)).all()
        assert chosen.sum() < 1.25 * least.sum()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [BITS, (2,)])
def test_products_keep_their_size(bits: tuple[int, ...]) -> None:
    weights, hessian, inputs = layer(5, 96, 320)
    exact = inputs @ weights.T
    for values in (hessian.astype(np.float32), None):
        made = quantize(weights, Hessian(values, 320), bits)
        for level in range(len(bits)):
            found = inputs @ made.weights(level, 320).T
            # Least squares would leave 6 % less of it at 2 bits.
            assert abs((found * exact).sum() / (exact * exact).sum() - 1) < 0.02


@pytest.mark.parametrize(("columns", "bits"), [(300, BITS), (150, (1, 8)), (40, (3,))])
def test_errors_are_those_of_what_is_stored(columns: int, bits: tuple[int, ...]) -> None:
    weights, hessian, _ = layer(columns, 5, columns)
    rounding = nested._Rounding(weights, Hessian(hessian.astype(np.float32), columns), bits)
    for _ in range(2):
        rounding.unshrink()
        rounding.sweep()
    made = rounding.nested()
    for level in range(len(bits)):
        lost = rounding._growth[level] * weights.T - made.weights(level, columns).T
        np.testing.assert_allclose(rounding._errors[level, :columns], lost, atol=1e-6)
        for sub in range(made.steps.shape[1]):
            for line, stored in zip(rounding.lines.of(sub), made.lines(level), strict=True):
                np.testing.assert_array_equal(line[level], stored[:, sub])


def test_the_gradient_is_up_to_date_after_a_fit() -> None:
    weights, hessian, _ = layer(6, 5, 300)
    rounding = nested._Rounding(weights, Hessian(hessian.astype(np.float32), 300), BITS)
    rounding.unshrink()
    for group in range(2):
        gradient = rounding._gradient(group)
        rounding._fit(group, gradient)
        exact = rounding._gradient(group)
        np.testing.assert_allclose(gradient, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.slow
def test_order_of_the_schemes() -> None:
    weights, hessian, inputs = layer(1, 128, 512, 8192)
    shared = Hessian(hessian.astype(np.float32), 512)
    one = quantize(weights, shared, BITS)
    unfitted = quantize(weights, Hessian(None, 512), BITS)
    scale, offset = one.lines(2)
    for level, width in enumerate(BITS):
        ours = output_error(weights, one.weights(level, 512), inputs)
        separate = output_error(weights, quantize(weights, shared, (width,)).weights(0, 512), inputs)
        assert separate * 0.9 < ours < separate * (1.35, 1.2, 1.08)[level]
        assert ours < (0.97, 0.97, 1)[level] * output_error(weights, unfitted.weights(level, 512), inputs)
        if level < 2:
            dropped = 2 - level
            sliced = (one.codes >> dropped << dropped).reshape(*scale.shape, SUB_GROUP)
            naive = (sliced * scale[:, :, None] + offset[:, :, None]).reshape(128, -1)
            assert ours < 0.55 * output_error(weights, naive.astype(np.float32), inputs)


@pytest.mark.slow
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
        for one, other in zip(part.level_parameters(level), again.level_parameters(level), strict=True):
            np.testing.assert_array_equal(one, other)


def test_lines_are_the_format_s() -> None:
    made = Nested(
        (2, 3, 5),
        np.array([[0b11010] * 5 * GROUP], np.uint8),
        np.array([[0.5, 3]], np.float16),
        np.array([[0, 1, 2, 3] * 5], np.uint8),
        np.array([[3, -8, -1, 4] * 5], np.int8),
        np.array([[[7, 0]], [[-8, 0]]], np.int8),
        np.array([[[-8, 0]], [[4, 0]]], np.int8),
    )
    a, b = made.lines(0)
    unit, start = 0.5 * 4 / 128, 0.5 * -1.5
    assert a[0, :4].tolist() == [1.5, 2, 2.5, 3] and a[0, 16:].tolist() == [9, 12, 15, 18]
    assert b[0, 12:16].tolist() == [
        3 * (11 * unit + start),
        4 * (-35 * unit + start),
        5 * (-5 * unit + start),
        6 * (13 * unit + start),
    ]
    assert b[0, 16] == 3 * (11 * 6 * unit + 6 * start)
    a1 = 0.25 * (1 + 7 / 32)
    c1 = start + a1 * (2 * (-8 / 32 - 7 / 16) - 0.5)
    a, b = made.lines(1)
    assert a[0, :4].tolist() == [step * a1 for step in STEPS]
    assert b[0, :4].tolist() == [
        step * (offset * unit + c1) for step, offset in zip(STEPS, (8, -32, -8, 16), strict=True)
    ]
    assert a[0, 19] == 6 * 1.5 and b[0, 19] == 6 * (16 * 6 * unit + 6 * start - 1.5 * 0.5)
    a2 = a1 / 4 * (1 - 8 / 64)
    c2 = c1 + a2 * (4 * (4 / 32 + 8 / 16) - 1.5)
    assert made.lines(2)[0][0, :4].tolist() == [step * a2 for step in STEPS]
    assert made.weights(2, 10)[0, 0] == np.float32(3 * a2 * 0b11010 + 3 * (8 * unit + c2))
    assert made.weights(0, 20)[0, 19] == np.float32(4 * 0.5 * 0b11 + 4 * (-35 * unit + start))
    assert [made.level_codes(level)[0, 0] for level in range(3)] == [0b11, 0, 0b10]
    assert [len(made.level_parameters(level)) for level in range(3)] == [5, 0, 0]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 3e4])
def test_equal_weights_stay_close(value: float) -> None:
    weights = np.full((3, 100), value, np.float32)
    for hessian in (Hessian(None, 100), Hessian(np.eye(100, dtype=np.float32), 100)):
        made = quantize(weights, hessian, BITS)
        for level in range(3):
            np.testing.assert_allclose(made.weights(level, 100), weights, rtol=0.08)


def test_a_range_far_from_zero_is_within_reach_of_the_offset() -> None:
    rng = np.random.default_rng(3)
    weights = (1 + 0.01 * rng.standard_normal((4, 128))).astype(np.float32)
    made = quantize(weights, Hessian(None, 128), BITS)
    for level in range(3):
        # The least step of level 0 is 1 / 2.25.
        assert np.abs(made.weights(level, 128) - weights).max() < 0.3 / 2**level


def test_a_sub_group_s_line_is_fitted_in_one_step() -> None:
    rng = np.random.default_rng(7)
    # Inputs with a large mean: what the weights of a sub-group add up to matters most.
    inputs = rng.standard_normal((400, GROUP)) + 2
    weights = (0.02 * rng.standard_normal((30, GROUP))).astype(np.float32)
    hessian = Hessian((inputs.T @ inputs).astype(np.float32), GROUP)
    rounding = nested._Rounding(weights, hessian, BITS)
    lines = rounding.lines
    kept = [values[1].copy() for values in (lines.steps, lines.offsets, lines.nudges)]
    least = np.full(30, np.inf)
    for step in STEPS:
        for offset in OFFSETS:
            lines.steps[1], lines.offsets[1] = step, offset
            least = np.minimum(least, weighed_error(rounding, weights, hessian, BITS))
    # From far away, so that looking around where it begins is not enough.
    lines.steps[1], lines.offsets[1] = STEPS[0], OFFSETS[0]
    columns = slice(SUB_GROUP, 2 * SUB_GROUP)
    rises, starts = lines_of(rounding, GROUP)
    sliced = np.floor(rounding.codes[columns] * rounding._slices[:, None, None])
    rounding._errors[:, columns] = weights.T[columns] - sliced * rises[:, columns] - starts[:, columns]
    before = weighed_error(rounding, weights, hessian, BITS)
    u = np.floor(rounding.codes[:GROUP] * rounding._slices[:, None, None])
    inner = hessian.matrix[columns, columns]
    moved = rounding._fit_sub_group(1, u[:, columns], rounding._gradient(0)[:, columns], inner)
    exact = np.stack([rounding.lines.of(1)[0], rounding.lines.of(1)[1]])
    stands_for = u[:, columns] * exact[0][:, None] + exact[1][:, None]
    np.testing.assert_allclose(rounding._errors[:, columns] - moved, weights.T[columns] - stands_for, atol=1e-6)
    after = weighed_error(rounding, weights, hessian, BITS)
    turned = lines.nudges[1] != kept[2]
    np.testing.assert_allclose(after[~turned], least[~turned], rtol=1e-4)
    assert (after[turned] < least[turned]).all() and turned.any() and (least < 0.9 * before).any()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "most"), [((8,), 0.008), ((4,), 0.1), (BITS, 0.11)])
def test_error_of_rounding_gaussian_weights(bits: tuple[int, ...], most: float) -> None:
    weights, _, _ = layer(9, 64, 512)
    found = quantize(weights, Hessian(None, 512), bits).weights(len(bits) - 1, 512)
    assert np.linalg.norm(found - weights) < most * np.linalg.norm(weights)


@pytest.mark.parametrize(("deviation", "bits"), [(1e-6, (4,)), (1e-5, (8,)), (3e-7, BITS), (1e-9, BITS)])
def test_weights_near_the_least_float16_are_not_lost(deviation: float, bits: tuple[int, ...]) -> None:
    weights = (deviation * np.random.default_rng(0).standard_normal((16, 256))).astype(np.float32)
    made = quantize(weights, Hessian(None, 256), bits)
    for level in range(len(bits)):
        error = np.linalg.norm(made.weights(level, 256) - weights) / np.linalg.norm(weights)
        assert error < 0.4 if deviation > 1e-8 else error == 1


def test_an_outlier_spoils_no_other_sub_group_of_its_scale() -> None:
    weights, _, _ = layer(11, 64, 256)
    weights[:, 40] *= 10
    made = quantize(weights, Hessian(None, 256), BITS)
    others = np.r_[0:32, 48:256]
    for level, most in enumerate((0.65, 0.3, 0.15)):
        lost = (made.weights(level, 256) - weights)[:, others]
        assert np.linalg.norm(lost) < most * np.linalg.norm(weights[:, others])


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
