"""Slice-refit: one code per weight that serves several widths, and lines of its own for every width.

A level's codes are the high bits of one code. What makes them good weights is that every level has its own line, which
turns codes into weights, fitted by least squares under the Hessian and stored relative to the level before. A weight is
step (scale code + unit offset + center): a step and an offset for 16 columns; scale, unit and center for 256, which at
level 0 follow from a float16, later from a ratio and a shift (docs/format.md). A bit of the offset is level 0's own, a
nudge one way or the other: what the errors of 16 columns add up to matters most, so that level 0 would lose much by an
offset that was chosen for all levels.

GPTQ is Frantar et al. (2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"), in
the form of Chee et al. (2023, "QuIP: 2-Bit Quantization of Large Language Models With Guarantees": LDLQ, proved there
to be the same): with H = R R^T, R upper triangular, column k is rounded after adding the errors of the columns before
it times R[:k, k] / R[k, k]. So one Cholesky factorization is all that is needed of H, for all matrices of one input.
Here every level carries its own errors along, and a column gets the code whose slices together come nearest to what the
levels then want (cf. MatGPTQ, 2026, arXiv 2602.03537, which feeds back the mean of the levels' errors): what the high
bits of a code that was made for the largest width alone lose is mostly that feedback. Sweeps of coordinate descent over
lines and codes follow, by turns; what they aim at is a little more than the weights, so that products keep their size.

Everything is float32, and arrays are worked on as [columns, rows]: a column of the weights is contiguous then. Groups
are of 256 columns here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.formats.layouts import GROUP, OFFSET_UNIT, OWN_OFFSET, STEPS, SUB_GROUP, SUPER_GROUP

Floats = npt.NDArray[np.float32]

LARGEST = 65504.0
"""The largest float16: larger weights are refused."""
DAMPING = 0.01
"""Of the mean diagonal element, added to a Hessian's diagonal."""
DISTRUST = 0.1
"""Of each diagonal element, added to it as well: how columns correlate in one text is not quite how they do in others,
and the finer a level is, the more it would make of that."""
SWEEPS = 2
"""Over the groups of a row, in which lines and codes are chosen by turns."""

_SUBS = SUPER_GROUP // SUB_GROUP
_STEPS = np.array(STEPS, np.float32)
# What the largest step of a group can be, in parts of what its widest sub-group needs for all its weights: more than
# that, as steps and offsets are coarse, and less, as cutting off a few weights often loses less than larger steps for
# all of them.
_LARGEST_STEPS = 1.2 * np.float32(5 / 6) ** np.arange(9, dtype=np.float32)
# How much further down that list, continued, the other steps are, nearly.
_SMALLER_STEPS = tuple(int(x) for x in np.rint(np.log(_STEPS / _STEPS[-1]) / np.log(5 / 6)))
_TRIED_STEPS = 1.2 * np.float32(5 / 6) ** np.arange(len(_LARGEST_STEPS) + max(_SMALLER_STEPS), dtype=np.float32)
# What a ratio or a shift can be, [16, 1].
_NIBBLES = np.arange(-8, 8, dtype=np.float32)[:, None]
# Codes that are weighed against each other where several levels matter.
_CANDIDATES = 5
# How far offsets move the middle of level 0's codes at least, in parts of what the codes span.
_REACH = 3 * OFFSET_UNIT / 128
# The least float16 above zero, and the distance of the small ones.
_LEAST_HALF = np.float32(2.0**-24)
# What levels are thought to have lost of their size at most.
_MOST_SHRUNK = 0.2
# The least scale that is not none.
_POSITIVE = 1e-30
# Rows worked on together: enough that NumPy computes for most of the time, not calls.
_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Nested:
    """A matrix at several widths.

    bits: ascending. codes: uint8 [rows, groups * 64], of the largest width, 0 in the padding. scales: float16 [rows,
    groups / 4 rounded up]. steps: uint8, numbers of `STEPS`; offsets: int8 (-8 to 7, the lowest bit level 0's own),
    [rows, groups * 4]. ratios, shifts: int8 (-8 to 7) [levels - 1, rows, groups / 4 rounded up], of each level but the
    first.
    """

    bits: tuple[int, ...]
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    steps: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int8]
    ratios: npt.NDArray[np.int8]
    shifts: npt.NDArray[np.int8]

    def level_codes(self, level: int) -> npt.NDArray[np.uint8]:
        """The bits that this level adds, uint8 [rows, groups * 64] below 2^d: what `layouts.pack_level` packs."""
        below = self.bits[level - 1] if level else 0
        sliced = self.codes >> np.uint8(self.bits[-1] - self.bits[level])
        return sliced & np.uint8((1 << (self.bits[level] - below)) - 1)

    def level_parameters(self, level: int) -> tuple[npt.NDArray[Any], ...]:
        """What `layouts.pack_level` takes beside them: all of it with level 0."""
        return () if level else (self.scales, self.steps, self.offsets, self.ratios, self.shifts)

    def lines(self, level: int) -> tuple[Floats, Floats]:
        """(A, B) of a level, float32 [rows, groups * 4]: a weight is A code + B."""
        scale = self.scales.astype(np.float32)
        unit = scale * np.float32(2 ** self.bits[0] / 128)
        rise, center = scale, scale * np.float32((1 - 2 ** self.bits[0]) / 2)
        for finer in range(1, level + 1):
            ratio, shift = (each[finer - 1].astype(np.float32) for each in (self.ratios, self.shifts))
            rise, center = _refined(rise, center, ratio, shift, self.bits[finer - 1], self.bits[finer])
        subs = self.steps.shape[1]
        rise, center, unit = (np.repeat(each, _SUBS, axis=1)[:, :subs] for each in (rise, center, unit))
        steps = _STEPS[self.steps]
        offsets = OFFSET_UNIT * (self.offsets >> 1)
        if level == 0:
            offsets += OWN_OFFSET * (2 * (self.offsets & 1) - 1)
        return steps * rise, steps * (unit * offsets.astype(np.float32) + center)

    def weights(self, level: int, columns: int) -> Floats:
        """float32 [rows, columns]: what the level stands for."""
        rise, start = self.lines(level)
        sliced = (self.codes >> np.uint8(self.bits[-1] - self.bits[level])).astype(np.float32)
        values = sliced.reshape(*rise.shape, SUB_GROUP) * rise[:, :, None] + start[:, :, None]
        return np.ascontiguousarray(values.reshape(len(sliced), -1)[:, :columns])

    @classmethod
    def of_levels(
        cls, bits: Sequence[int], levels: Sequence[tuple[npt.NDArray[np.uint8], tuple[npt.NDArray[Any], ...]]]
    ) -> Nested:
        """Of what `layouts.unpack_level` gives for each level, coarse to fine, of `bits` in all, ascending."""
        codes = levels[0][0]
        for (below, width), (added, _) in zip(itertools.pairwise(bits), levels[1:], strict=True):
            codes = codes << np.uint8(width - below) | added
        return cls(tuple(bits), codes, *levels[0][1])

    @classmethod
    def stacked(cls, parts: Sequence[Nested]) -> Nested:
        """One matrix of the rows of several."""
        return cls(
            parts[0].bits,
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate([part.steps for part in parts]),
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.ratios for part in parts], axis=1),
            np.concatenate([part.shifts for part in parts], axis=1),
        )

    def rows(self, begin: int, end: int) -> Nested:
        """These rows alone."""
        rows = slice(begin, end)
        return Nested(
            self.bits,
            self.codes[rows],
            self.scales[rows],
            self.steps[rows],
            self.offsets[rows],
            self.ratios[:, rows],
            self.shifts[:, rows],
        )


def check_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """Raises ValueError unless the widths ascend within 1 to 8."""
    if not bits or bits[0] < 1 or bits[-1] > 8 or any(a >= b for a, b in itertools.pairwise(bits)):
        raise ValueError(f"levels {','.join(map(str, bits))} do not ascend within 1 to 8")
    return tuple(bits)


def level_weights(bits: Sequence[int]) -> tuple[float, ...]:
    """How much the squared error of each level counts: 1/16, 1/4, 1 for levels of 2, 3 and 4 bits.

    A bit less makes the squared error about four times larger, so this is the relative error.
    """
    return tuple((1 / 4) ** (bits[-1] - width) for width in bits)


class Hessian:
    """H = sum over inputs of c x x^T of one matrix's inputs, damped and factorized, padded to whole groups.

    values: float32 [columns, columns], of any scale; None: the identity, for which GPTQ is rounding to nearest and the
    fit ordinary least squares.
    """

    def __init__(self, values: Floats | None, columns: int) -> None:
        size = -(-columns // SUPER_GROUP) * SUPER_GROUP
        self.columns = columns
        self.matrix = np.eye(size, dtype=np.float32)
        self.feedback: Floats | None = None
        if values is None:
            return
        mean = float(np.trace(values, dtype=np.float64)) / columns
        if not (np.isfinite(mean) and mean > 0):
            return
        self.matrix[:columns, :columns] = values / np.float32(mean)
        diagonal = np.einsum("ii->i", self.matrix)
        diagonal[:columns] *= np.float32(1 + DISTRUST)
        reversed_factor = None
        damping = DAMPING
        diagonal[:columns] += np.float32(damping)
        while reversed_factor is None:
            try:
                reversed_factor = np.linalg.cholesky(self.matrix[::-1, ::-1])
            except np.linalg.LinAlgError:  # in float32 its smallest eigenvalues were rounded away
                diagonal[:columns] += np.float32(9 * damping)
                damping *= 10
        factor = reversed_factor[::-1, ::-1]  # upper, H = factor factor^T
        self.feedback = np.ascontiguousarray(factor / np.einsum("ii->i", factor))


def quantize(weights: Floats, hessian: Hessian, bits: Sequence[int]) -> Nested:
    """float32 [rows, columns] at ascending widths `bits`, which are at most 8.

    Matrices with the same inputs share a Hessian: their rows may be stacked, and taken apart with `Nested.rows`.
    Raises ValueError for weights that are not finite or beyond float16.
    """
    levels = check_bits(bits)
    rows = len(weights)
    peak = float(np.abs(weights).max(initial=0))
    if not peak <= LARGEST:  # also for NaN
        raise ValueError(f"the weight {peak:g} does not fit float16 scales (largest {LARGEST:g})")
    parts = []
    for begin in range(0, rows, _ROWS):
        rounding = _Rounding(weights[begin : begin + _ROWS], hessian, levels)
        for _ in range(SWEEPS):
            rounding.unshrink()
            rounding.sweep()
        parts.append(rounding.nested())
    return parts[0] if len(parts) == 1 else Nested.stacked(parts)


class _Lines:
    """The lines of some rows. scales: [groups, rows]; steps (their values), offsets (without level 0's own bit) and
    nudges (what that adds on level 0, one way or the other), [sub-groups, rows]; ratios and shifts [levels - 1, groups,
    rows]; what follows from them, all float32: units [groups, rows], rises (the format's scale of each level) and
    centers [levels, groups, rows]."""

    def __init__(self, bits: tuple[int, ...], scales: Floats) -> None:
        self._bits = bits
        groups, rows = scales.shape
        self.steps = np.full((groups * _SUBS, rows), _STEPS[0], np.float32)
        self.offsets = np.zeros_like(self.steps)
        self.nudges = np.full_like(self.steps, OWN_OFFSET)
        self.ratios, self.shifts = (np.zeros((len(bits) - 1, groups, rows), np.float32) for _ in range(2))
        self.rises, self.centers = (np.empty((len(bits), groups, rows), np.float32) for _ in range(2))
        self._begin(scales)
        for level in range(1, len(bits)):
            nothing = self.ratios[level - 1]
            self.rises[level], self.centers[level] = self.refined(level, slice(None), nothing, nothing)

    def refined(self, level: int, group: int | slice, ratio: Floats, shift: Floats) -> tuple[Floats, Floats]:
        """(rise, center) of a level with this ratio and shift, from those of the level before."""
        coarser = self.rises[level - 1, group], self.centers[level - 1, group]
        return _refined(*coarser, ratio, shift, self._bits[level - 1], self._bits[level])

    def grow(self, factors: Floats) -> None:
        """Makes the scales so many times larger. Later levels stay where they are until they are fitted again."""
        self._begin((self.scales * factors).astype(np.float16).astype(np.float32))

    def _begin(self, scales: Floats) -> None:
        codes = 2 ** self._bits[0]
        self.scales = scales
        self.units = scales * np.float32(codes / 128)
        self.rises[0] = scales
        self.centers[0] = scales * np.float32((1 - codes) / 2)

    def of(self, sub: int) -> tuple[Floats, Floats]:
        """(A, B) of a sub-group, [levels, rows]."""
        steps, unit = self.steps[sub], self.units[sub // _SUBS]
        start = self.centers[:, sub // _SUBS] + unit * self.offsets[sub]
        start[0] += unit * self.nudges[sub]
        start *= steps
        return steps * self.rises[:, sub // _SUBS], start


# -- codes ----------------------------------------------------------------------------------------------------------


class _Rounding:
    """Rows of a matrix on their way: codes float32 [columns, rows] of the largest width, and the lines."""

    def __init__(self, weights: Floats, hessian: Hessian, bits: tuple[int, ...]) -> None:
        rows, size = len(weights), len(hessian.matrix)
        self._hessian = hessian
        self._bits = bits
        self._weights = np.array(level_weights(bits), np.float32)
        # What the largest width's codes are multiplied by before they are cut to a level's.
        self._slices = np.array([0.5 ** (bits[-1] - width) for width in bits], np.float32)
        self._target = np.zeros((size, rows), np.float32)
        self._target[: hessian.columns] = weights.T
        real = hessian.columns
        # H times the target.
        self._along = self._target[:real]
        if hessian.feedback is not None:
            self._along = hessian.matrix[:real, :real] @ self._along
        self.codes = np.zeros_like(self._target)
        self.lines = _Lines(bits, _scales(self._target[: hessian.columns], bits))
        # What the levels' weights should be, in units of the target.
        self._growth = np.ones((len(bits), rows), np.float32)
        # growth * target - (A u + B) of each level.
        self._errors = np.zeros((len(bits), *self._target.shape), np.float32)
        # Few at a time: their lines are chosen before the errors among them are known.
        for begin in range(0, hessian.columns, GROUP):
            self._gptq(slice(begin, min(begin + GROUP, hessian.columns)))

    def nested(self) -> Nested:
        """What is stored."""
        lines = self.lines
        groups = -(-self._hessian.columns // GROUP)
        subs = groups * GROUP // SUB_GROUP

        def rows(values: npt.NDArray[Any], kind: npt.DTypeLike) -> npt.NDArray[Any]:
            return np.ascontiguousarray(np.moveaxis(values, -1, -2).astype(kind))

        return Nested(
            self._bits,
            rows(self.codes[: groups * GROUP], np.uint8),
            rows(lines.scales, np.float16),
            rows(np.searchsorted(_STEPS, lines.steps[:subs]), np.uint8),
            rows(lines.offsets[:subs] * np.float32(2 / OFFSET_UNIT) + (lines.nudges[:subs] > 0), np.int8),
            rows(lines.ratios, np.int8),
            rows(lines.shifts, np.int8),
        )

    def _columns(self, group: int) -> slice:
        """Without padding."""
        return slice(group * SUPER_GROUP, min((group + 1) * SUPER_GROUP, self._hessian.columns))

    def _block(self, group: int) -> Floats:
        """Its part of H, without padding."""
        columns = self._columns(group)
        return self._hessian.matrix[columns, columns]

    def _pieces(self, group: int) -> Iterator[tuple[slice, slice, slice]]:
        """A group's columns, some at a time: (their places in the group, those after them, the columns). What one
        sub-group changes is made up for among so many first: less to go through for each."""
        columns = self._columns(group)
        size = columns.stop - columns.start
        for begin in range(0, size, GROUP):
            end = min(begin + GROUP, size)
            yield slice(begin, end), slice(end, size), slice(columns.start + begin, columns.start + end)

    def _sub_groups(self, columns: slice) -> Iterator[tuple[int, slice]]:
        """(number, columns counted from the first) of the sub-groups of columns that begin with one."""
        size = columns.stop - columns.start
        for begin in range(0, size, SUB_GROUP):
            yield (columns.start + begin) // SUB_GROUP, slice(begin, min(begin + SUB_GROUP, size))

    def _gptq(self, columns: slice) -> None:
        """Codes and lines of some columns, from what all levels' errors before them leave to make up for."""
        feedback = self._hessian.feedback
        adjusted = self._wanted(columns)
        if feedback is None:
            factors = None
        else:
            factors = feedback[columns, columns]
            if columns.start:
                adjusted += feedback[: columns.start, columns].T @ self._errors[:, : columns.start]
        _choose_lines(self.lines, columns.start // SUB_GROUP, adjusted[-1], self._bits)
        self._round(columns, adjusted, factors)

    def sweep(self) -> None:
        """Makes lines and codes better, one group after the other with the others as they are (block coordinate
        descent); codes are chosen one column after the other.

        For codes this is Behdin et al. (2023, "QuantEase: Optimization-based Quantization for Language Models").
        """
        for group in range(len(self._target) // SUPER_GROUP):
            gradient = self._gradient(group)
            self._fit(group, gradient)
            self._descend(group, gradient)

    def _wanted(self, columns: slice) -> Floats:
        """What the levels' weights should be, [levels, columns, rows]."""
        found: Floats = self._growth[:, None] * self._target[columns]
        return found

    def unshrink(self) -> None:
        """Lets the levels aim further, and level 0 reach further, so that products with a row keep their size.

        Weights with the least squared error are too small by about its share: they are means of what is rounded to the
        same code. A few percent, but in all experts of all layers, change a model's logits more than larger errors of
        either sign do.
        """
        real = self._hessian.columns
        signal = np.einsum("ij,ij->j", self._along, self._target[:real])
        lost = np.einsum("ij,lij->lj", self._along, self._errors[:, :real])
        share = np.divide(lost, signal, out=np.zeros_like(lost), where=signal > _POSITIVE)
        share += 1 - self._growth
        growth = 1 / (1 - np.minimum(np.maximum(share, -np.float32(_MOST_SHRUNK)), np.float32(_MOST_SHRUNK)))
        self._growth *= growth
        self.lines.grow(growth[0])
        for sub in range(-(-real // SUB_GROUP)):
            columns = slice(sub * SUB_GROUP, min((sub + 1) * SUB_GROUP, real))
            rise, start = self.lines.of(sub)
            u = np.floor(self.codes[columns] * self._slices[:, None, None])
            self._errors[:, columns] = self._wanted(columns) - u * rise[:, None] - start[:, None]

    def _gradient(self, group: int) -> Floats:
        """H times the errors of all levels, for a group's columns: [levels, columns, rows]."""
        columns, real = self._columns(group), self._hessian.columns
        if self._hessian.feedback is None:
            return self._errors[:, columns].copy()
        found: Floats = self._hessian.matrix[columns, :real] @ self._errors[:, :real]
        return found

    def _descend(self, group: int, gradient: Floats) -> None:
        """Chooses the codes of a group anew, each for what the errors of all other columns leave to make up for.
        gradient: as `_fit` left it; of no use afterwards."""
        calibrated = self._hessian.feedback is not None
        for here, after, columns in self._pieces(group):
            block, errors = self._hessian.matrix[columns, columns], self._errors[:, columns]
            diagonal, before = np.einsum("ii->i", block), errors.copy()
            adjusted = gradient[:, here] / diagonal[:, None]
            adjusted += self._wanted(columns) - errors
            self._round(columns, adjusted, block / diagonal if calibrated else None)
            if calibrated:
                gradient[:, after] += self._block(group)[after, here] @ (errors - before)

    def _round(self, columns: slice, adjusted: Floats, factors: Floats | None) -> None:
        """Chooses the codes of some columns, one after the other: those whose slices come nearest to `adjusted`
        [levels, columns, rows], which changes by `factors` [columns, later columns] times what an error changes by."""
        wanted, codes, errors = self._wanted(columns), self.codes[columns], self._errors[:, columns]
        size = len(codes)
        for sub, part in self._sub_groups(columns):
            nearest = _Nearest(*self.lines.of(sub), self._slices, self._weights, self._bits[-1])
            before = errors[:, part].copy()
            for column in range(part.start, part.stop):
                codes[column], values = nearest(adjusted[:, column])
                np.subtract(wanted[:, column], values, out=errors[:, column])
                if factors is not None and column + 1 < part.stop:
                    change = errors[:, column] - before[:, column - part.start]
                    adjusted[:, column + 1 : part.stop] += (
                        factors[column, column + 1 : part.stop, None] * change[:, None]
                    )
            if factors is not None and part.stop < size:
                adjusted[:, part.stop :] += factors[part, part.stop :].T @ (errors[:, part] - before)

    def _fit(self, group: int, gradient: Floats) -> None:
        """The best lines of a group for its codes: sub-group after sub-group, then level after level. gradient:
        [levels, columns, rows], brought up to date."""
        block = self._block(group)
        u = np.floor(self.codes[self._columns(group)] * self._slices[:, None, None])
        for here, after, columns in self._pieces(group):
            moved = np.empty_like(gradient[:, here])
            inner, near = block[here, here], gradient[:, here]
            for sub, part in self._sub_groups(columns):
                moved[:, part] = self._fit_sub_group(sub, u[:, here][:, part], near[:, part], inner[part, part])
                near -= inner[:, part] @ moved[:, part]
            self._errors[:, columns] -= moved
            for rest in (slice(here.start), after):
                gradient[:, rest] -= block[rest, here] @ moved
        if len(self._bits) > 1:
            steps = self.lines.steps[group * _SUBS : (group + 1) * _SUBS]
            ones = np.repeat(steps, SUB_GROUP, axis=0)[: len(block)]
            along_ones = block @ ones
            for level in range(1, len(self._bits)):
                self._fit_level(group, level, u[level], gradient[level], ones, along_ones)

    def _fit_sub_group(self, sub: int, u: Floats, gradient: Floats, inner: Floats) -> Floats:
        """Step, offset and nudge: what the weights change by. u, gradient, result: [levels, columns, rows] of the
        sub-group; inner: its part of H. In p = step and q = step * offset * unit the error of all levels is
        quadratic."""
        group, lines, weights = sub // _SUBS, self.lines, self._weights
        step, offset, unit = lines.steps[sub], lines.offsets[sub], lines.units[group]
        p, q = step, step * offset * unit
        v = u * lines.rises[:, group, None] + lines.centers[:, group, None]
        v[0] += unit * lines.nudges[sub]
        ones = inner.sum(axis=1)
        total = ones.sum()
        qq = total * weights.sum()
        weighed = weights[:, None, None] * v
        pp = np.einsum("lij,lij->j", weighed, inner @ v)
        pq = ones @ weighed.sum(axis=0)
        pg = np.einsum("lij,lij->j", weighed, gradient)
        qg = np.einsum("l,lij->j", weights, gradient)
        new_step, new_offset, least = step.copy(), offset.copy(), np.zeros_like(step)
        for tried in _STEPS:
            dp = tried - p
            per_step = tried * unit
            tried_offset = _nearest_offset(_quotient(q + (qg - dp * pq) / qq, per_step, _POSITIVE))
            dq = tried_offset * per_step - q
            error = dp * (dp * pp + 2 * (dq * pq - pg)) + dq * (dq * qq - 2 * qg)
            better = error < least
            new_step[better] = tried
            np.copyto(new_offset, tried_offset, where=better)
            np.copyto(least, error, where=better)
        moved: Floats = v * (new_step - p) + (new_step * new_offset * unit - q)
        # Level 0 is nudged the other way where that is better.
        turn = -2 * lines.nudges[sub] * unit * new_step
        missing = gradient[0].sum(axis=0) - ones @ moved[0]
        turn[turn * (turn * total - 2 * missing) >= 0] = 0
        moved[0] += turn
        lines.nudges[sub] = np.where(turn == 0, lines.nudges[sub], -lines.nudges[sub])
        lines.steps[sub], lines.offsets[sub] = new_step, new_offset
        return moved

    def _fit_level(self, group: int, level: int, u: Floats, gradient: Floats, ones: Floats, along_ones: Floats) -> None:
        """Ratio and shift: for each of the 16 ratios the best shift, and of these pairs the best. ones: what a center
        is multiplied by, [columns, rows]; along_ones: H times that."""
        columns, lines = self._columns(group), self.lines
        turned = ones * u
        along = self._block(group) @ turned
        cc = np.einsum("ij,ij->j", ones, along_ones)
        ac = np.einsum("ij,ij->j", ones, along)
        aa = np.einsum("ij,ij->j", turned, along)
        ag = np.einsum("ij,ij->j", turned, gradient)
        cg = np.einsum("ij,ij->j", ones, gradient)
        rise, center = lines.rises[level, group], lines.centers[level, group]
        below, width = self._bits[level - 1], self._bits[level]
        coarser = lines.centers[level - 1, group]
        zero = np.zeros_like(_NIBBLES)
        rises, _ = lines.refined(level, group, _NIBBLES, zero)
        da = rises - rise
        wanted = center + _quotient(cg - da * ac, np.broadcast_to(cc, da.shape), _POSITIVE)
        shifts = _nearest_shift(_quotient(wanted - coarser, rises, _POSITIVE), _NIBBLES, width - below)
        shifts = np.minimum(np.maximum(shifts, -8), 7)
        _, centers = lines.refined(level, group, _NIBBLES, shifts)
        dc = centers - center
        error = da * (da * aa + 2 * dc * ac - 2 * ag) + dc * (dc * cc - 2 * cg)
        best = error.argmin(axis=0)[None]
        ratio, shift = _NIBBLES[best[0], 0], np.take_along_axis(shifts, best, 0)[0]
        lines.ratios[level - 1, group], lines.shifts[level - 1, group] = ratio, shift
        new_rise, new_center = lines.refined(level, group, ratio, shift)
        moved = turned * (new_rise - rise) + ones * (new_center - center)
        self._errors[level, columns] -= moved
        gradient -= (new_rise - rise) * along + (new_center - center) * along_ones
        lines.rises[level, group], lines.centers[level, group] = new_rise, new_center


class _Nearest:
    """The codes whose slices are nearest to what every level wants, for given lines (scale, offset [levels, rows]).

    With one level that is rounding. With several the squared distances are weighed against each other, among the
    `_CANDIDATES` codes around the finest level's nearest: further away it would lose more than the others can gain.
    """

    def __init__(self, scale: Floats, offset: Floats, slices: Floats, weights: Floats, bits: int) -> None:
        self._scale, self._offset, self._slices = scale, offset, slices[:, None]
        self._inverse = _quotient(np.ones_like(scale[-1]), scale[-1], _POSITIVE)
        # A level's distances times the root of its weight.
        self._roots = np.sqrt(weights)[:, None]
        self._steps = scale * self._roots
        self._largest = 2**bits - 1
        count = min(_CANDIDATES, 2**bits)
        self._candidates = np.arange(count, dtype=np.float32)[:, None]

    def __call__(self, wanted: Floats) -> tuple[Floats, Floats]:
        """(codes [rows], what they stand for on each level [levels, rows]); wanted: [levels, rows]."""
        code = np.rint((wanted[-1] - self._offset[-1]) * self._inverse)
        if len(wanted) > 1:
            count = len(self._candidates)
            code -= count // 2
            np.minimum(np.maximum(code, 0, out=code), self._largest + 1 - count, out=code)
            candidates = code + self._candidates
            distances = (self._offset - wanted) * self._roots
            off = np.floor(candidates * self._slices[:, None])  # [levels, candidates, rows]
            off *= self._steps[:, None]
            off += distances[:, None]
            off *= off
            cost = off.sum(axis=0)
            code += cost.argmin(axis=0).astype(np.float32)
        else:
            np.minimum(np.maximum(code, 0, out=code), self._largest, out=code)
        return code, np.floor(code * self._slices) * self._scale + self._offset


# -- lines ----------------------------------------------------------------------------------------------------------


def _scales(values: Floats, bits: tuple[int, ...]) -> Floats:
    """Scales [groups, rows], in float16, of values [columns, rows]: those whose steps suit the sub-groups best."""
    rows = values.shape[1]
    tops = []
    merged = np.float32(2 ** (bits[-1] - bits[0]))  # codes of the finest level that are one of level 0
    for begin in range(0, len(values), SUPER_GROUP):
        parts = _by_sub_group(values[begin : begin + SUPER_GROUP])
        low, high = parts.min(axis=1), parts.max(axis=1)
        middle, spread = (low + high) * np.float32(0.5), (high - low) / np.float32(2 ** bits[-1] - 1)
        widest = np.maximum(spread, _least(parts, bits) / merged).max(axis=0)
        lost = []
        for scale in widest * _TRIED_STEPS[:, None]:
            reach = scale * merged * np.float32(_REACH * 2 ** bits[0])
            lost.append(_rounding_error(parts - np.minimum(np.maximum(middle, -reach), reach)[:, None], scale, bits))
        of_largest = [
            np.minimum.reduce([lost[largest + smaller] for smaller in _SMALLER_STEPS]).sum(axis=0)
            for largest in range(len(_LARGEST_STEPS))
        ]
        tops.append(widest * merged * _LARGEST_STEPS[np.argmin(of_largest, axis=0)])
    largest = np.array(tops, np.float32).reshape(-1, rows)
    scales = largest / np.float32(STEPS[-1])
    # Near the least float16 rather too large a scale than none, unless zero is nearer.
    few = (scales < 32 * _LEAST_HALF) & (largest > STEPS[0] * _LEAST_HALF / 2)
    scales = np.where(few, np.ceil(scales / _LEAST_HALF) * _LEAST_HALF, scales)
    # No weight is beyond float16, so that no scale is, by far, also when it grows.
    stored: Floats = scales.astype(np.float16).astype(np.float32)
    return stored


def _by_sub_group(values: Floats) -> Floats:
    """[columns, rows] as [sub-groups, 16, rows]; the last column stands for those that lack."""
    missing = -len(values) % SUB_GROUP
    if missing:
        values = np.concatenate((values, np.repeat(values[-1:], missing, axis=0)))
    return values.reshape(-1, SUB_GROUP, values.shape[1])


def _least(parts: Floats, bits: tuple[int, ...]) -> Floats:
    """The least A of level 0 with which the largest weights of sub-groups are within the codes' reach."""
    codes = 2 ** bits[0]
    found: Floats = np.abs(parts).max(axis=1) / np.float32((codes - 1) / 2 + _REACH * codes)
    return found


def _rounding_error(centered: Floats, scale: Floats, bits: tuple[int, ...]) -> Floats:
    """Weighed over the levels, [sub-groups, rows], of [sub-groups, 16, rows] with scales [rows]."""
    top = np.float32(2 ** bits[-1] - 1)
    codes = centered * _quotient(np.ones_like(scale), scale, _POSITIVE)
    codes += top / 2
    np.rint(codes, out=codes)
    np.minimum(np.maximum(codes, 0, out=codes), top, out=codes)
    total = np.zeros((len(centered), len(scale)), np.float32)
    for width, weight in zip(bits, level_weights(bits), strict=True):
        merged = np.float32(2 ** (bits[-1] - width))
        used = codes if merged == 1 else np.floor(codes / merged) * merged + (merged - 1) / 2
        lost = (used - top / 2) * scale
        lost -= centered
        total += np.float32(weight) * np.einsum("sij,sij->sj", lost, lost)
    return total


def _choose_lines(lines: _Lines, first: int, values: Floats, bits: tuple[int, ...]) -> None:
    """Steps, offsets and nudges of the sub-groups from `first` on, of one group, whose weights should be `values`
    [columns, rows]: of every step with the offset that puts its codes in the middle the best one."""
    parts, group = _by_sub_group(values), first // _SUBS
    rise, center, unit = lines.rises[:, group], lines.centers[:, group], lines.units[group]
    top = np.float32(2 ** bits[-1] - 1)
    middle = (parts.min(axis=1) + parts.max(axis=1)) * np.float32(0.5)
    middle_code = rise[-1] * top / 2 + center[-1]
    best = np.full_like(middle, np.inf)
    subs = slice(first, first + len(parts))
    for step in _STEPS:
        offset = _nearest_offset(_quotient(middle / step - middle_code, np.broadcast_to(unit, middle.shape), _POSITIVE))
        moved = unit * offset
        codes = parts - (step * (moved + center[-1]))[:, None]
        codes *= _quotient(np.ones_like(unit), step * rise[-1], _POSITIVE)
        np.rint(codes, out=codes)
        np.minimum(np.maximum(codes, 0, out=codes), top, out=codes)
        lost, missing = np.zeros_like(middle), np.zeros_like(middle)
        for level, weight in enumerate(level_weights(bits)):
            used = codes if bits[level] == bits[-1] else np.floor(codes * np.float32(2.0 ** (bits[level] - bits[-1])))
            off = parts - (step * (moved + center[level]))[:, None]
            off -= used * (step * rise[level])
            if level == 0:
                missing = off.sum(axis=1)
            lost += np.float32(weight) * np.einsum("sij,sij->sj", off, off)
        better = lost < best
        nudge = np.copysign(np.float32(OWN_OFFSET), missing)
        for kept, new in (
            (best, lost),
            (lines.steps[subs], np.broadcast_to(step, lost.shape)),
            (lines.offsets[subs], offset),
            (lines.nudges[subs], nudge),
        ):
            np.copyto(kept, new, where=better)


def _nearest_offset(offset: Floats) -> Floats:
    """The nearest one that there is."""
    whole = np.rint(offset * np.float32(1 / OFFSET_UNIT))
    found: Floats = OFFSET_UNIT * np.minimum(np.maximum(whole, -4), 3)
    return found


def _quotient(numerator: Floats, denominator: Floats, least: float = 0) -> Floats:
    """0 where the denominator is not larger than `least`."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > least)


def _nearest_shift(step: Floats, ratio: Floats, added: int) -> Floats:
    """The whole shift, of any size, for which the change of center over the new rise comes nearest to `step`."""
    moved = (step - np.float32(0.5)) * np.float32(0.5**added) + np.float32(0.5)
    rounded: Floats = np.rint(32 * moved + 2 * ratio)
    return rounded


def _refined(
    rise: Floats, center: Floats, ratio: Floats, shift: Floats, below: int, width: int
) -> tuple[Floats, Floats]:
    """(rise, center) of the level after. The center is rounded once: the product is exact in float64."""
    added = width - below
    finer = rise * np.float32(0.5**added) * (np.float32(1) + ratio * np.float32(0.125 * 0.5**below))
    moved = shift * np.float32(1 / 32) - ratio * np.float32(1 / 16) - np.float32(0.5)
    step = (moved * np.float32(2**added) + np.float32(0.5)).astype(np.float64)
    return finer, (finer * step + center).astype(np.float32)
