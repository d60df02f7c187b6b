"""Slice-refit: one code per weight that serves several widths, and a scale and an offset of its own for every width.

A level's codes are the high bits of one code. What makes them good weights is that every level has its own scale and
offset per group of 64 columns, fitted by least squares under the Hessian, jointly over the groups of a row, and stored
relative to the level before (docs/format.md):

    level 0:    A = scale,                                B = A * (offset / 32 - (2^bits - 1) / 2)
    level l:    A' = A * 2^-d * (1 + ratio / 2^(b + 3)),  B' = B + A' * (2^d * (shift / 32 - ratio / 16 - 1/2) + 1/2)

with b the bits of the level before and d those that level l adds; a weight is A * code + B. `ratio` and `shift` have 4
bits each: `ratio` turns the line of the weights about the middle of the codes, `shift` moves it. So few bits are enough
because the fine levels are fitted first: a coarse level has errors so large that it loses little when its scale and
offset are chosen among those from which the next level's can be stored.

GPTQ is Frantar et al. (2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"), in
the form of Chee et al. (2023, "QuIP: 2-Bit Quantization of Large Language Models With Guarantees": LDLQ, proved there
to be the same): with H = R R^T, R upper triangular, column k is rounded after adding the errors of the columns before
it times R[:k, k] / R[k, k]. So one Cholesky factorization is all that is needed of H, for all matrices of one input.
Here every level carries its own errors along, and a column gets the code whose slices together come nearest to what the
levels then want (cf. MatGPTQ, 2026, arXiv 2602.03537, which feeds back the mean of the levels' errors): what the high
bits of a code that was made for the largest width alone lose is mostly that feedback. Sweeps of coordinate descent over
lines and codes follow, by turns.

Everything is float32, and arrays are worked on as [columns, rows]: a column of the weights is contiguous then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgemoe.formats.layouts import GROUP

Floats = npt.NDArray[np.float32]

LARGEST = 65504.0
"""The largest float16: weights beyond it have no scale."""
DAMPING = 0.01
"""Of the mean diagonal element, added to a Hessian's diagonal."""
SWEEPS = 2
"""Over the groups of a row, in which lines and codes are chosen by turns."""

_CLIP_RATIOS = np.linspace(1.0, 0.4, 25, dtype=np.float32)
# The stored offset of level 0 reaches 4 of its steps from the middle of its codes; half a step is left for the fit.
_REACH = 3.4
# What a ratio or a shift can be, [16, 1].
_NIBBLES = np.arange(-8, 8, dtype=np.float32)[:, None]
# Columns whose errors reach the rest of their group together.
_PANEL = 16
# Codes that are weighed against each other where several levels matter.
_CANDIDATES = 4
# The least scale that is not none.
_POSITIVE = 1e-30
# The least variance of codes that are not all the same.
_VARIES = 1e-6
# Rows worked on together: enough that NumPy computes for most of the time, not calls.
_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Nested:
    """A matrix at several widths.

    bits: ascending. codes: uint8 [rows, groups * 64], of the largest width, 0 in the padding. first, second: one array
    [rows, groups] per level: scale (float16) and offset (int8) of level 0, ratio and shift (int8, within -8 to 7) of
    each later one.
    """

    bits: tuple[int, ...]
    codes: npt.NDArray[np.uint8]
    first: tuple[npt.NDArray[Any], ...]
    second: tuple[npt.NDArray[np.int8], ...]

    def level_codes(self, level: int) -> npt.NDArray[np.uint8]:
        """The bits that this level adds, uint8 [rows, groups * 64] below 2^d: what `layouts.pack_level` packs."""
        below = self.bits[level - 1] if level else 0
        sliced = self.codes >> np.uint8(self.bits[-1] - self.bits[level])
        return sliced & np.uint8((1 << (self.bits[level] - below)) - 1)

    def parameters(self, level: int) -> tuple[Floats, Floats]:
        """(A, B) of a level, float32 [rows, groups]."""
        scale = self.first[0].astype(np.float32)
        offset = _base_offset(scale, self.second[0], self.bits[0])
        for finer in range(1, level + 1):
            below, width = self.bits[finer - 1], self.bits[finer]
            scale, offset = _refined(scale, offset, self.first[finer], self.second[finer], below, width)
        return scale, offset

    def weights(self, level: int, columns: int) -> Floats:
        """float32 [rows, columns]: what the level stands for."""
        scale, offset = self.parameters(level)
        sliced = (self.codes >> np.uint8(self.bits[-1] - self.bits[level])).astype(np.float32)
        values = sliced.reshape(*scale.shape, GROUP) * scale[:, :, None] + offset[:, :, None]
        return np.ascontiguousarray(values.reshape(len(sliced), -1)[:, :columns])

    @classmethod
    def stacked(cls, parts: Sequence[Nested]) -> Nested:
        """One matrix of the rows of several."""
        levels = range(len(parts[0].bits))
        return cls(
            parts[0].bits,
            np.concatenate([part.codes for part in parts]),
            tuple(np.concatenate([part.first[level] for part in parts]) for level in levels),
            tuple(np.concatenate([part.second[level] for part in parts]) for level in levels),
        )

    def rows(self, begin: int, end: int) -> Nested:
        """These rows alone."""
        return Nested(
            self.bits,
            self.codes[begin:end],
            tuple(values[begin:end] for values in self.first),
            tuple(values[begin:end] for values in self.second),
        )


def check_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """Raises ValueError unless the widths ascend within 1 to 8."""
    if not bits or bits[0] < 1 or bits[-1] > 8 or any(a >= b for a, b in itertools.pairwise(bits)):
        raise ValueError(f"levels {','.join(map(str, bits))} do not ascend within 1 to 8")
    return tuple(bits)


def level_weights(bits: Sequence[int]) -> tuple[float, ...]:
    """How much the squared error of each level counts: 1/36, 1/6, 1 for levels of 2, 3 and 4 bits.

    A bit less makes the squared error about four times larger, so this is nearly the relative error, and a little more
    for the largest width, with which the exact mode computes.
    """
    return tuple((1 / 6) ** (bits[-1] - width) for width in bits)


class Hessian:
    """H = sum over inputs of c x x^T of one matrix's inputs, damped and factorized, padded to whole groups.

    values: float32 [columns, columns], of any scale; None: the identity, for which GPTQ is rounding to nearest and the
    fit ordinary least squares.
    """

    def __init__(self, values: Floats | None, columns: int) -> None:
        size = -(-columns // GROUP) * GROUP
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
        reversed_factor = None
        damping = DAMPING
        diagonal[:columns] += np.float32(damping)
        while reversed_factor is None:
            try:
                reversed_factor = np.linalg.cholesky(self.matrix[::-1, ::-1])
            except np.linalg.LinAlgError:  # float32 has no room for its smallest eigenvalues
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
    parts = [_quantize_rows(weights[begin : begin + _ROWS], hessian, levels) for begin in range(0, rows, _ROWS)]
    return parts[0] if len(parts) == 1 else Nested.stacked(parts)


def _quantize_rows(weights: Floats, hessian: Hessian, levels: tuple[int, ...]) -> Nested:
    columns = weights.shape[1]
    rounding = _Rounding(weights, hessian, levels)
    top = len(levels) - 1
    choices: list[_Choice] = [_Free(rounding, levels)]
    for level in reversed(range(top)):
        choices.insert(0, _Coarser(rounding, levels, level))
    choices[0] = base = _Base(choices[0], levels[0], rounding.scale.shape[1:])
    for _ in range(SWEEPS):
        rounding.sweep(choices)
    first: list[npt.NDArray[Any]] = [base.first]
    second = [base.second]
    for level in range(1, top + 1):
        finer = _Finer(rounding, levels, level)
        rounding.fit(level, finer)
        first.append(finer.first)
        second.append(finer.second)
    stored = np.ascontiguousarray(rounding.codes.T.astype(np.uint8))
    stored[:, columns:] = 0
    return Nested(
        levels,
        stored,
        tuple(np.ascontiguousarray(values.T) for values in first),
        tuple(np.ascontiguousarray(values.T) for values in second),
    )


# -- codes ----------------------------------------------------------------------------------------------------------


class _Rounding:
    """Rows of a matrix on their way: codes float32 [columns, rows] of the largest width, and for every level the lines
    that its slices of the codes lie on, (A, B) float32 [levels, groups, rows]."""

    def __init__(self, weights: Floats, hessian: Hessian, bits: tuple[int, ...]) -> None:
        rows = len(weights)
        size = len(hessian.matrix)
        self._hessian = hessian
        self._bits = bits
        self._weights = np.array(level_weights(bits), np.float32)
        # What the largest width's codes are multiplied by before they are cut to a level's.
        self._slices = np.array([0.5 ** (bits[-1] - width) for width in bits], np.float32)
        self._target = np.zeros((size, rows), np.float32)
        self._target[: hessian.columns] = weights.T
        self.codes = np.zeros_like(self._target)
        self.scale, self.offset = (np.empty((len(bits), size // GROUP, rows), np.float32) for _ in range(2))
        # target - (A u + B) of each level.
        self._errors = np.zeros((len(bits), *self._target.shape), np.float32)
        for group in range(size // GROUP):
            self._gptq(group)

    def _columns(self, group: int) -> slice:
        """Without padding."""
        return slice(group * GROUP, min((group + 1) * GROUP, self._hessian.columns))

    def _gptq(self, group: int) -> None:
        """Codes and lines of a group, from what all levels' errors in the groups before it leave to make up for."""
        columns, feedback = self._columns(group), self._hessian.feedback
        adjusted = np.repeat(self._target[None, columns], len(self._bits), axis=0)
        if feedback is None:
            factors = None
        else:
            factors = feedback[columns, columns]
            if group:
                adjusted += feedback[: columns.start, columns].T @ self._errors[:, : columns.start]
        self.scale[:, group], self.offset[:, group] = _lines(adjusted[-1], self._bits)
        self._round(group, adjusted, factors)

    def sweep(self, choices: Sequence[_Choice]) -> None:
        """Makes lines and codes better, one group after the other with the others as they are (block coordinate
        descent): `choices` find the lines of each level, the codes are chosen one column after the other.

        For codes this is Behdin et al. (2023, "QuantEase: Optimization-based Quantization for Language Models").
        """
        for group in range(self.scale.shape[1]):
            gradient = self._gradient(group)
            self._fit_group(group, gradient, choices)
            self._descend(group, gradient)
            self._fit_group(group, gradient, choices)

    def fit(self, level: int, choose: _Choice) -> None:
        """Lets `choose` find the line of one level for all groups, the codes as they are."""
        for group in range(self.scale.shape[1]):
            self._fit_level(level, group, self._gradient(group, level), choose)

    def _gradient(self, group: int, level: int | None = None) -> Floats:
        """H times the errors of all levels, or of one, for a group's columns: [levels, columns, rows] or without the
        first."""
        errors = self._errors if level is None else self._errors[level]
        columns, real = self._columns(group), self._hessian.columns
        if self._hessian.feedback is None:
            return errors[..., columns, :].copy()
        found: Floats = self._hessian.matrix[columns, :real] @ errors[..., :real, :]
        return found

    def _descend(self, group: int, gradient: Floats) -> None:
        """Chooses the codes of a group anew, each for what the errors of all other columns leave to make up for."""
        columns = self._columns(group)
        block = self._hessian.matrix[columns, columns]
        errors = self._errors[:, columns]
        before = errors.copy()
        if self._hessian.feedback is None:
            self._round(group, np.repeat(self._target[None, columns], len(self._bits), axis=0), None)
            gradient += errors - before
        else:
            diagonal = np.einsum("ii->i", block)
            adjusted = gradient / diagonal[:, None]
            adjusted += self._target[columns] - errors
            self._round(group, adjusted, block / diagonal)
            gradient += block @ (errors - before)

    def _round(self, group: int, adjusted: Floats, factors: Floats | None) -> None:
        """Chooses a group's codes, one column after the other: those whose slices come nearest to `adjusted` [levels,
        columns, rows], which changes by `factors` [columns, later columns] times what an error changes by."""
        columns = self._columns(group)
        target, codes, errors = self._target[columns], self.codes[columns], self._errors[:, columns]
        nearest = _Nearest(self.scale[:, group], self.offset[:, group], self._slices, self._weights, self._bits[-1])
        size = len(target)
        for panel in range(0, size, _PANEL):
            end = min(panel + _PANEL, size)
            before = errors[:, panel:end].copy()
            for column in range(panel, end):
                codes[column], values = nearest(adjusted[:, column])
                np.subtract(target[column], values, out=errors[:, column])
                if factors is not None and column + 1 < end:
                    change = errors[:, column] - before[:, column - panel]
                    adjusted[:, column + 1 : end] += factors[column, column + 1 : end, None] * change[:, None]
            if factors is not None and end < size:
                adjusted[:, end:] += factors[panel:end, end:].T @ (errors[:, panel:end] - before)

    def _fit_group(self, group: int, gradient: Floats, choices: Sequence[_Choice]) -> None:
        for level in reversed(range(len(self._bits))):
            self._fit_level(level, group, gradient[level], choices[level])

    def _fit_level(self, level: int, group: int, gradient: Floats, choose: _Choice) -> None:
        """gradient: [columns, rows], brought up to date."""
        columns = self._columns(group)
        identity = self._hessian.feedback is None
        u = np.floor(self.codes[columns] * self._slices[level])
        scale, offset = self.scale[level, group], self.offset[level, group]
        block = self._hessian.matrix[columns, columns]
        ones = block.sum(axis=1)
        total = ones.sum()
        mean = (ones @ u) / total
        uu = np.einsum("ij,ij->j", u, u if identity else block @ u)
        curvature = uu - total * mean * mean
        rise = gradient.sum(axis=0) / total
        change = np.divide(
            np.einsum("ij,ij->j", u, gradient) - total * mean * rise,
            curvature,
            out=np.zeros_like(curvature),
            where=curvature > 1e-5 * uu,
        )
        # Where the codes are all the same, any scale would do: it stays where it is.
        curvature = np.maximum(curvature, np.float32(1e-5) * (uu + total))
        optimum = _Optimum(scale + change, offset + scale * mean + rise, mean, curvature, total)
        new_scale, new_offset = choose(group, optimum)
        moved = u * (new_scale - scale) + (new_offset - offset)
        self._errors[level, columns] -= moved
        gradient -= moved if identity else block @ moved
        scale[:], offset[:] = new_scale, new_offset


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


def _lines(values: Floats, bits: tuple[int, ...]) -> tuple[Floats, Floats]:
    """(A, B) of each level, float32 [levels, rows], of values [columns of a group, rows]: the finest level's covers the
    part of their range for which all levels together fit best, the others' fit the codes that this gives.

    For given codes u the squared error of the best line is n (var(w) - cov(w, u)^2 / var(u)), so the candidate of the
    largest weighted sum of cov^2 / var wins.
    """
    top = np.float32(2 ** bits[-1] - 1)
    low, high = values.min(axis=0), values.max(axis=0)
    middle, spread = (low + high) * np.float32(0.5), high - low
    # A range far from zero needs steps that are large enough for the stored offset to reach it.
    least = np.abs(middle) / np.float32(_REACH * 2 ** (bits[-1] - bits[0]))
    centred = values - middle
    weights = level_weights(bits)
    best = np.full(spread.shape, -1, np.float32)
    best_scale = np.maximum(spread / top, least)
    for ratio in _CLIP_RATIOS:
        scale = np.maximum(spread * (ratio / top), least)
        score = np.zeros_like(best)
        for weight, (_, covariance, variance) in zip(weights, _moments(centred, scale, bits), strict=True):
            score += np.float32(weight) * _quotient(covariance * covariance, variance, _VARIES)
        better = score > best
        best = np.where(better, score, best)
        best_scale = np.where(better, scale, best_scale)
    mean = centred.mean(axis=0)
    slopes, offsets = [], []
    for width, (code_mean, covariance, variance) in zip(bits, _moments(centred, best_scale, bits), strict=True):
        merged = np.float32(2 ** (bits[-1] - width))  # codes of the finest level that are one of this
        slope = np.where(variance > _VARIES, _quotient(covariance, variance), best_scale * merged)
        slopes.append(np.maximum(slope, least * merged))
        offsets.append(middle + mean - slopes[-1] * code_mean)
    return np.array(slopes), np.array(offsets)


def _moments(centred: Floats, scale: Floats, bits: tuple[int, ...]) -> Iterator[tuple[Floats, Floats, Floats]]:
    """For each level, of its slices of the nearest codes: mean, covariance with the values, variance, [rows]."""
    top, count = np.float32(2 ** bits[-1] - 1), np.float32(len(centred))
    inverse = _quotient(np.ones_like(scale), scale, _POSITIVE)
    codes = centred * inverse
    codes += top / 2
    np.rint(codes, out=codes)
    np.maximum(codes, 0, out=codes)
    np.minimum(codes, top, out=codes)
    mean = centred.mean(axis=0)
    for width in bits:
        used = codes if width == bits[-1] else np.floor(codes * np.float32(0.5 ** (bits[-1] - width)))
        code_mean = used.mean(axis=0)
        covariance = np.einsum("ij,ij->j", used, centred) / count - code_mean * mean
        variance = np.einsum("ij,ij->j", used, used) / count - code_mean * code_mean
        yield code_mean, covariance, variance


# -- scales and offsets ---------------------------------------------------------------------------------------------


class _Optimum(NamedTuple):
    """Of a group's rows: how (w - A u - B)^T H (w - A u - B) depends on A and B, the other groups as they are.

    In A and in the mean weight A mean(u) + B it is a sum of two squares, and a constant. All arrays are [rows].
    """

    scale: Floats  # the best A
    weight: Floats  # the best mean weight
    mean: Floats  # of the codes u, weighted by H
    curvature: Floats
    total: np.float32  # sum of the group's H

    def offset(self, scale: Floats) -> Floats:
        """The best B for a given A, [..., rows]."""
        return self.weight - self.mean * scale

    def error(self, scale: Floats, offset: Floats) -> Floats:
        """Without the constant, [..., rows]."""
        turned = scale - self.scale
        moved = offset - self.offset(scale)
        found: Floats = self.curvature * turned * turned + self.total * moved * moved
        return found


class _Choice(Protocol):
    def __call__(self, group: int, optimum: _Optimum) -> tuple[Floats, Floats]:
        """(A, B) float32 [rows] of a group."""


class _Free:
    """The best A and B of the finest level, within a factor of two of where they start and of what the stored offset of
    level 0 can reach."""

    def __init__(self, rounding: _Rounding, bits: tuple[int, ...]) -> None:
        scale = rounding.scale[-1]
        middle = np.abs(rounding.offset[-1] + scale * np.float32((2 ** bits[-1] - 1) / 2))
        self._least = np.maximum(scale / 2, middle / np.float32(_REACH * 2 ** (bits[-1] - bits[0])))
        self._most = np.maximum(scale * 2, self._least)

    def __call__(self, group: int, optimum: _Optimum) -> tuple[Floats, Floats]:
        scale = np.minimum(np.maximum(optimum.scale, self._least[group]), self._most[group])
        return scale, optimum.offset(scale)


class _Coarser:
    """The best A and B from which those of the next level can be stored: for each of the 16 ratios the best shift, and
    of these pairs the best."""

    def __init__(self, rounding: _Rounding, bits: tuple[int, ...], level: int) -> None:
        self._scale, self._offset = rounding.scale[level + 1], rounding.offset[level + 1]
        self._below, self._width = bits[level], bits[level + 1]
        self._base_bits = bits[0]

    def __call__(self, group: int, optimum: _Optimum) -> tuple[Floats, Floats]:
        finer, target = self._scale[group], self._offset[group]
        added = self._width - self._below
        scales = finer * np.float32(2**added) / _ratio_factor(_NIBBLES, self._below)
        steps = _quotient(target - optimum.offset(scales), finer)
        # The last step either way is left for what the rounding of this level's own offset will take.
        shifts = np.minimum(np.maximum(_nearest_shift(steps, _NIBBLES, added), -7), 6)
        offsets = target - finer * _offset_step(_NIBBLES, shifts, added)
        errors = optimum.error(scales, offsets)
        # Smaller scales only as far as the stored offset of level 0 can reach the middle of the weights.
        middle = np.abs(target + finer * np.float32((2**self._width - 1) / 2))
        reach = scales * np.float32(_REACH * 2 ** (self._below - self._base_bits))
        errors[(_NIBBLES > 0) & (reach < middle)] = np.inf
        best = errors.argmin(axis=0)[None]
        return np.take_along_axis(scales, best, 0)[0], np.take_along_axis(offsets, best, 0)[0]


class _Base:
    """What `choose` finds for level 0 as it can be stored: first float16, second int8 [groups, rows]."""

    def __init__(self, choose: _Choice, bits: int, shape: tuple[int, ...]) -> None:
        self._choose, self._bits = choose, bits
        self.first, self.second = np.zeros(shape, np.float16), np.zeros(shape, np.int8)

    def __call__(self, group: int, optimum: _Optimum) -> tuple[Floats, Floats]:
        wanted, offset = self._choose(group, optimum)
        self.first[group] = np.minimum(np.maximum(wanted, 0), np.float32(LARGEST))
        scale = self.first[group].astype(np.float32)
        # The offset makes up for what the scale lost when it was rounded.
        steps = _quotient(offset + optimum.mean * (wanted - scale), scale)
        stored = np.rint(32 * (steps + np.float32((2**self._bits - 1) / 2)))
        self.second[group] = np.minimum(np.maximum(stored, -128), 127)
        return scale, _base_offset(scale, self.second[group], self._bits)


class _Finer:
    """What is stored of a later level, int8 [groups, rows]: the ratio that comes nearest to the scale that was chosen,
    and the best shift."""

    def __init__(self, rounding: _Rounding, bits: tuple[int, ...], level: int) -> None:
        self._scale, self._offset = rounding.scale[level - 1], rounding.offset[level - 1]
        self._wanted = rounding.scale[level].copy()
        self._below, self._width = bits[level - 1], bits[level]
        self.first, self.second = (np.zeros(self._wanted.shape, np.int8) for _ in range(2))

    def __call__(self, group: int, optimum: _Optimum) -> tuple[Floats, Floats]:
        coarser, offset = self._scale[group], self._offset[group]
        added = self._width - self._below
        factor = _quotient(self._wanted[group] * np.float32(2**added), coarser)
        ratio = np.minimum(np.maximum(np.rint((factor - 1) * np.float32(8 * 2**self._below)), -8), 7)
        self.first[group] = ratio
        scale = coarser * np.float32(0.5**added) * _ratio_factor(ratio, self._below)
        steps = _quotient(optimum.offset(scale) - offset, scale)
        self.second[group] = np.minimum(np.maximum(_nearest_shift(steps, ratio, added), -8), 7)
        return _refined(coarser, offset, self.first[group], self.second[group], self._below, self._width)


def _quotient(numerator: Floats, denominator: Floats, least: float = 0) -> Floats:
    """0 where the denominator is not larger than `least`."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > least)


def _base_offset(scale: Floats, offset: npt.NDArray[np.int8], bits: int) -> Floats:
    """B of level 0."""
    return scale * (offset.astype(np.float32) * np.float32(1 / 32) - np.float32((2**bits - 1) / 2))


def _ratio_factor(ratio: Floats, below: int) -> Floats:
    return np.float32(1) + ratio * np.float32(0.125 * 0.5**below)


def _offset_step(ratio: Floats, shift: Floats, added: int) -> Floats:
    """(B' - B) / A', exactly."""
    moved = shift * np.float32(1 / 32) - ratio * np.float32(1 / 16) - np.float32(0.5)
    return moved * np.float32(2**added) + np.float32(0.5)


def _nearest_shift(step: Floats, ratio: Floats, added: int) -> Floats:
    """The whole shift, of any size, for which `_offset_step` comes nearest to `step`."""
    moved = (step - np.float32(0.5)) * np.float32(0.5**added) + np.float32(0.5)
    rounded: Floats = np.rint(32 * moved + 2 * ratio)
    return rounded


def _refined(
    scale: Floats, offset: Floats, ratio: npt.NDArray[np.int8], shift: npt.NDArray[np.int8], below: int, width: int
) -> tuple[Floats, Floats]:
    """(A', B') of the level after (A, B). The offset is rounded once: the product is exact in float64."""
    added, ratios = width - below, ratio.astype(np.float32)
    finer = scale * np.float32(0.5**added) * _ratio_factor(ratios, below)
    step = _offset_step(ratios, shift.astype(np.float32), added).astype(np.float64)
    return finer, (finer * step + offset).astype(np.float32)
