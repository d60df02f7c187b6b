"""Slice-refit: one code per weight that serves several widths, and a scale and an offset of its own for every width.

A matrix is quantized once, at the largest width, by GPTQ; a level's codes are the high bits of those codes. What makes
the high bits good weights is that every level has its own scale and offset per group of 64 columns, fitted by least
squares under the Hessian, jointly over the groups of a row, and stored relative to the level before (docs/format.md):

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

Everything is float32, and arrays are worked on as [columns, rows]: a column of the weights is contiguous then.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
"""Over the groups of a row, of the joint fit."""

_CLIP_RATIOS = np.linspace(1.0, 0.4, 25, dtype=np.float32)
# The stored offset of level 0 reaches 4 of its steps from the middle of its codes; half a step is left for the fit.
_REACH = 3.4
# What a ratio or a shift can be, [16, 1].
_NIBBLES = np.arange(-8, 8, dtype=np.float32)[:, None]
# Columns whose errors reach the rest of their group together.
_PANEL = 16
# Rows worked on together: what is computed of a group of them stays in the processor's second-level cache.
_ROWS = 512


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
    """How much the squared error of each level counts when a group's range is chosen: .01, .1, 1 for three levels.

    A bit more makes the squared error about four times smaller, and the exact mode computes with the largest width.
    """
    return tuple(10.0**-step for step in range(len(bits) - 1, -1, -1))


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


def quantize(weights: Floats, hessian: Hessian, bits: Sequence[int], sweeps: int = SWEEPS) -> Nested:
    """float32 [rows, columns] at ascending widths `bits`, which are at most 8.

    Matrices with the same inputs share a Hessian: their rows may be stacked, and taken apart with `Nested.rows`.
    Raises ValueError for weights that are not finite or beyond float16.
    """
    levels = check_bits(bits)
    rows = len(weights)
    peak = float(np.abs(weights).max(initial=0))
    if not peak <= LARGEST:  # also for NaN
        raise ValueError(f"the weight {peak:g} does not fit float16 scales (largest {LARGEST:g})")
    parts = [_quantize_rows(weights[begin : begin + _ROWS], hessian, levels, sweeps) for begin in range(0, rows, _ROWS)]
    return parts[0] if len(parts) == 1 else Nested.stacked(parts)


def _quantize_rows(weights: Floats, hessian: Hessian, levels: tuple[int, ...], sweeps: int) -> Nested:
    rows, columns = weights.shape
    target = np.zeros((len(hessian.matrix), rows), np.float32)
    target[:columns] = weights.T
    codes, scale, low = _gptq(target, hessian, levels)
    sliced = [np.floor(codes * np.float32(0.5 ** (levels[-1] - width))) for width in levels]
    fits: list[_Fit] = []
    for level in reversed(range(len(levels))):
        # Before the fit a slice stands for the middle of the codes that share it.
        spread = 2 ** (levels[-1] - levels[level])
        start = scale * np.float32(spread), low + scale * np.float32((spread - 1) / 2)
        fits.insert(0, _Fit(target, sliced[level], start, hessian))
        choose: _Choice = _Coarser(fits[1], levels, level) if len(fits) > 1 else _Free(start, levels)
        if level == 0:
            choose = base = _Base(choose, levels[0], scale.shape)
        fits[0].sweep(choose, sweeps)
    first: list[npt.NDArray[Any]] = [base.first]
    second = [base.second]
    for level in range(1, len(levels)):
        finer = _Finer(fits[level - 1], fits[level].scale.copy(), levels[level - 1], levels[level])
        fits[level].sweep(finer, 1)
        first.append(finer.first)
        second.append(finer.second)
    stored = np.ascontiguousarray(codes.T.astype(np.uint8))
    stored[:, columns:] = 0
    return Nested(
        levels,
        stored,
        tuple(np.ascontiguousarray(values.T) for values in first),
        tuple(np.ascontiguousarray(values.T) for values in second),
    )


# -- codes ----------------------------------------------------------------------------------------------------------


def _gptq(target: Floats, hessian: Hessian, bits: tuple[int, ...]) -> tuple[Floats, Floats, Floats]:
    """(codes float32 [columns, rows], scale, low [groups, rows]): a weight is about scale * code + low."""
    columns, rows = target.shape
    groups = columns // GROUP
    top = np.float32(2 ** bits[-1] - 1)
    codes = np.empty_like(target)
    errors = np.empty_like(target)
    scales, lows = (np.empty((groups, rows), np.float32) for _ in range(2))
    for group in range(groups):
        begin, end = group * GROUP, (group + 1) * GROUP
        known = min(GROUP, hessian.columns - begin)  # without padding
        adjusted = target[begin:end].copy()
        if hessian.feedback is not None and begin:
            adjusted += hessian.feedback[:begin, begin:end].T @ errors[:begin]
        scales[group], lows[group] = scale, low = _range(adjusted[:known], bits)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 1e-30)
        for panel in range(0, GROUP, _PANEL):
            for column in range(panel, panel + _PANEL):
                code = codes[begin + column]
                np.subtract(adjusted[column], low, out=code)
                code *= inverse
                np.rint(code, out=code)
                np.maximum(code, 0, out=code)
                np.minimum(code, top, out=code)
                error = errors[begin + column]
                np.multiply(code, scale, out=error)
                error += low
                np.subtract(target[begin + column], error, out=error)
                if hessian.feedback is not None:
                    factors = hessian.feedback[begin + column, begin + column + 1 : begin + panel + _PANEL]
                    adjusted[column + 1 : panel + _PANEL] += factors[:, None] * error
            rest = panel + _PANEL
            if hessian.feedback is not None and rest < GROUP:
                adjusted[rest:] += (
                    hessian.feedback[begin + panel : begin + rest, begin + rest : end].T
                    @ errors[begin + panel : begin + rest]
                )
    return codes, scales, lows


def _range(values: Floats, bits: tuple[int, ...]) -> tuple[Floats, Floats]:
    """(scale, low) float32 [rows] of values [columns of a group, rows]: the narrowing of the covered range for which
    all levels together fit best.

    For given codes u the squared error of the best scale and offset is n (var(w) - cov(w, u)^2 / var(u)), so the
    candidate of the largest weighted sum of cov^2 / var wins.
    """
    top = np.float32(2 ** bits[-1] - 1)
    count = np.float32(len(values))
    low, high = values.min(axis=0), values.max(axis=0)
    middle, spread = (low + high) * np.float32(0.5), high - low
    # A range far from zero needs steps that are large enough for the stored offset to reach it.
    least = np.abs(middle) / np.float32(_REACH * 2 ** (bits[-1] - bits[0]))
    centred = values - middle
    mean = centred.mean(axis=0)
    best = np.full(spread.shape, -1, np.float32)
    best_scale = np.maximum(spread / top, least)
    codes, sliced = np.empty_like(values), np.empty_like(values)
    for ratio in _CLIP_RATIOS:
        scale = np.maximum(spread * (ratio / top), least)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 1e-30)
        np.multiply(centred, inverse, out=codes)
        codes += top / 2
        np.rint(codes, out=codes)
        np.maximum(codes, 0, out=codes)
        np.minimum(codes, top, out=codes)
        score = np.zeros_like(best)
        for width, weight in zip(bits, level_weights(bits), strict=True):
            if width == bits[-1]:
                used = codes
            else:
                np.multiply(codes, np.float32(0.5 ** (bits[-1] - width)), out=sliced)
                used = np.floor(sliced, out=sliced)
            code_mean = used.mean(axis=0)
            covariance = np.einsum("ij,ij->j", used, centred) / count - code_mean * mean
            variance = np.einsum("ij,ij->j", used, used) / count - code_mean * code_mean
            fits = variance > 1e-6
            score += np.float32(weight) * np.divide(
                covariance * covariance, variance, out=np.zeros_like(variance), where=fits
            )
        better = score > best
        best = np.where(better, score, best)
        best_scale = np.where(better, scale, best_scale)
    return best_scale, middle - best_scale * (top / 2)


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


class _Fit:
    """(A, B) of a level, float32 [groups, rows], and what they leave of the weights."""

    def __init__(self, target: Floats, codes: Floats, start: tuple[Floats, Floats], hessian: Hessian) -> None:
        self.scale, self.offset = start[0].copy(), start[1].copy()
        self._hessian = hessian
        self._codes = codes.reshape(len(self.scale), GROUP, -1)
        self._residual = (self._codes * -self.scale[:, None] - self.offset[:, None]).reshape(target.shape)
        self._residual += target
        self._residual[hessian.columns :] = 0

    def sweep(self, choose: _Choice, sweeps: int) -> None:
        """Lets `choose` find A and B of one group after the other with the others as they are (block coordinate
        descent), `sweeps` times."""
        hessian, residual = self._hessian, self._residual
        identity = hessian.feedback is None
        for _ in range(1 if identity else sweeps):  # without cross terms the first sweep is the last word
            for group, (scale, offset) in enumerate(zip(self.scale, self.offset, strict=True)):
                begin, end = group * GROUP, min((group + 1) * GROUP, hessian.columns)
                u = self._codes[group, : end - begin]
                block = hessian.matrix[begin:end, begin:end]
                gradient = residual[begin:end] if identity else hessian.matrix[begin:end] @ residual
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
                residual[begin:end] -= u * (new_scale - scale) + (new_offset - offset)
                scale[:], offset[:] = new_scale, new_offset


class _Free:
    """The best A and B of the finest level, within a factor of two of where they start and of what the stored offset of
    level 0 can reach."""

    def __init__(self, start: tuple[Floats, Floats], bits: tuple[int, ...]) -> None:
        middle = np.abs(start[1] + start[0] * np.float32((2 ** bits[-1] - 1) / 2))
        self._least = np.maximum(start[0] / 2, middle / np.float32(_REACH * 2 ** (bits[-1] - bits[0])))
        self._most = np.maximum(start[0] * 2, self._least)

    def __call__(self, group: int, optimum: _Optimum) -> tuple[Floats, Floats]:
        scale = np.minimum(np.maximum(optimum.scale, self._least[group]), self._most[group])
        return scale, optimum.offset(scale)


class _Coarser:
    """The best A and B from which those of the next level can be stored: for each of the 16 ratios the best shift, and
    of these pairs the best."""

    def __init__(self, next_level: _Fit, bits: tuple[int, ...], level: int) -> None:
        self._scale, self._offset = next_level.scale, next_level.offset
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
    `wanted`, and the best shift. before: of the level before, `below` bits wide."""

    def __init__(self, before: _Fit, wanted: Floats, below: int, width: int) -> None:
        self._scale, self._offset, self._wanted = before.scale, before.offset, wanted
        self._below, self._width = below, width
        self.first, self.second = (np.zeros(wanted.shape, np.int8) for _ in range(2))

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


def _quotient(numerator: Floats, denominator: Floats) -> Floats:
    """0 where the denominator is not positive."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


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
