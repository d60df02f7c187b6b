"""Slice-refit: one code per weight that serves several widths, and a scale and an offset of its own for every width.

A matrix is quantized once, at the largest width, by GPTQ; a level's codes are the high bits of those codes. What makes
the high bits good weights is that every level has its own scale and offset per group of 64 columns, fitted by least
squares under the Hessian, jointly over the groups of a row, and stored relative to the level before (docs/format.md):

    level 0:    A = scale,                                     B = A * (offset / 32 - (2^bits - 1) / 2)
    level l:    A' = A * 2^-d * (1 + ratio / 256),             B' = B + A' * (shift / 64 - (2^d - 1) / 2)

with d the bits that level l adds; a weight is A * code + B.

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
# Of the 2 steps that a later level's stored shift reaches: what a coarser level's scale, and its offset, may take away.
_SCALE_SHARE, _OFFSET_SHARE = 0.8, 1.1
# Columns whose errors reach the rest of their group together.
_PANEL = 16
# Rows worked on together: what is computed of a group of them stays in the processor's second-level cache.
_ROWS = 512


@dataclass(frozen=True, slots=True)
class Nested:
    """A matrix at several widths.

    bits: ascending. codes: uint8 [rows, groups * 64], of the largest width, 0 in the padding. first, second: one array
    [rows, groups] per level: scale (float16) and offset (int8) of level 0, ratio and shift (int8) of each later one.
    """

    bits: tuple[int, ...]
    codes: npt.NDArray[np.uint8]
    first: tuple[npt.NDArray[np.float16] | npt.NDArray[np.int8], ...]
    second: tuple[npt.NDArray[np.int8], ...]

    def level_codes(self, level: int) -> npt.NDArray[np.uint8]:
        """The bits that this level adds, uint8 [rows, groups * 64] below 2^d: what `layouts.pack_level` packs."""
        below = self.bits[level - 1] if level else 0
        sliced = self.codes >> np.uint8(self.bits[-1] - self.bits[level])
        return sliced & np.uint8((1 << (self.bits[level] - below)) - 1)

    def parameters(self, level: int) -> tuple[Floats, Floats]:
        """(A, B) of a level, float32 [rows, groups]."""
        scale = self.first[0].astype(np.float32)
        offset = scale * _base_step(self.second[0].astype(np.float32), self.bits[0])
        for finer in range(1, level + 1):
            added = self.bits[finer] - self.bits[finer - 1]
            ratio = self.first[finer].astype(np.float32) * np.float32(1 / 256)
            scale = scale * np.float32(0.5**added) * (np.float32(1) + ratio)
            offset = _refined_offset(scale, self.second[finer].astype(np.float32), offset, added)
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
    """How much the squared error of each level counts when a group's range is chosen: .1, .3, 1 for three levels.

    The largest width counts most: its error is the smallest, and it is what the exact mode computes with.
    """
    return tuple(10.0 ** (-0.5 * step) for step in range(len(bits) - 1, -1, -1))


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
    first, second = [], []
    fitted: tuple[Floats, Floats] | None = None
    for level, width in enumerate(levels):
        dropped = levels[-1] - width
        sliced = np.floor(codes * np.float32(0.5**dropped)) if dropped else codes
        # Before the fit a slice stands for the middle of the codes that share it.
        start = scale * np.float32(2**dropped), low + scale * np.float32((2**dropped - 1) / 2)
        coarser = None if fitted is None else (*fitted, width - levels[level - 1])
        finer = levels[level + 1] - width if dropped else None
        one, two, fitted = _fit(target, sliced, start, hessian, coarser, finer, width, sweeps)
        first.append(np.ascontiguousarray(one.T))
        second.append(np.ascontiguousarray(two.T))
    stored = np.ascontiguousarray(codes.T.astype(np.uint8))
    stored[:, columns:] = 0
    return Nested(levels, stored, tuple(first), tuple(second))


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


def _fit(
    target: Floats,
    codes: Floats,
    start: tuple[Floats, Floats],
    hessian: Hessian,
    coarser: tuple[Floats, Floats, int] | None,
    finer: int | None,
    width: int,
    sweeps: int,
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic], tuple[Floats, Floats]]:
    """The two stored arrays [groups, rows] of a level, and its (A, B), float32 [groups, rows].

    Minimizes (w - A u - B)^T H (w - A u - B) of each row over the numbers that can be stored, one group after the
    other with the others as they are (block coordinate descent), `sweeps` times.
    coarser: (A, B, added bits) of the level before; None for level 0. finer: bits that the next level adds; None for
    the last one. A level stays so close to where it starts that the numbers stored for the next one can reach theirs.
    """
    groups, rows = start[0].shape
    scale, offset = start[0].copy(), start[1].copy()
    by_group = codes.reshape(groups, GROUP, rows)
    identity = hessian.feedback is None
    residual = (by_group * -scale[:, None] - offset[:, None]).reshape(target.shape)
    residual += target
    residual[hessian.columns :] = 0
    stored_one = np.zeros((groups, rows), np.float16 if coarser is None else np.int8)
    stored_two = np.zeros((groups, rows), np.int8)
    for _ in range(1 if identity else sweeps):  # without cross terms the first sweep is the last word
        for group in range(groups):
            begin, end = group * GROUP, min((group + 1) * GROUP, hessian.columns)
            u = by_group[group, : end - begin]
            block = hessian.matrix[begin:end, begin:end]
            gradient = residual[begin:end] if identity else hessian.matrix[begin:end] @ residual
            ones = block.sum(axis=1)
            uu = np.einsum("ij,ij->j", u, u if identity else block @ u)
            u1, total = ones @ u, ones.sum()
            right_u, right_1 = np.einsum("ij,ij->j", u, gradient), gradient.sum(axis=0)
            determinant = uu * total - u1 * u1
            solvable = determinant > 1e-5 * uu * total
            change = np.divide(
                right_u * total - right_1 * u1, determinant, out=np.zeros_like(determinant), where=solvable
            )
            wanted = scale[group] + change
            if coarser is None:
                middle = offset[group] + scale[group] * np.float32((2**width - 1) / 2)
                wanted = np.maximum(wanted, np.abs(middle) / np.float32(_REACH))
            if finer is not None:
                slack = _SCALE_SHARE / ((2**width - 1) / 2 * 2**finer)
                wanted = np.maximum(wanted, start[0][group] * np.float32(max(1 - slack, 0.7)))
                wanted = np.minimum(wanted, start[0][group] * np.float32(min(1 + slack, 1.9)))
            one, new_scale = _storable_scale(wanted, None if coarser is None else (coarser[0][group], coarser[2]))
            # The offset makes up for what the scale lost when it was rounded.
            change = new_scale - scale[group]
            wanted = offset[group] + (right_1 - u1 * change) / total
            if finer is not None:
                middle = start[1][group] + (start[0][group] - new_scale) * np.float32((2**width - 1) / 2)
                slack = start[0][group] * np.float32(_OFFSET_SHARE / 2**finer)
                wanted = np.minimum(np.maximum(wanted, middle - slack), middle + slack)
            two, new_offset = _storable_offset(
                wanted,
                new_scale,
                width,
                None if coarser is None else (coarser[1][group], coarser[2]),
            )
            residual[begin:end] -= u * change + (new_offset - offset[group])
            stored_one[group], stored_two[group] = one, two
            scale[group], offset[group] = new_scale, new_offset
    return stored_one, stored_two, (scale, offset)


def _storable_scale(wanted: Floats, coarser: tuple[Floats, int] | None) -> tuple[npt.NDArray[np.generic], Floats]:
    """(what is stored, the scale it stands for) nearest to `wanted` [rows]; coarser: (A of the level before, added
    bits)."""
    if coarser is None:
        half = np.clip(wanted, 0, LARGEST).astype(np.float16)
        return half, half.astype(np.float32)
    nominal = coarser[0] * np.float32(0.5 ** coarser[1])
    ratio = np.divide(wanted, nominal, out=np.ones_like(wanted), where=nominal > 0)
    stored = np.clip(np.rint(256 * (ratio - 1)), -128, 127).astype(np.int8)
    return stored, nominal * (1 + stored.astype(np.float32) / 256)


def _storable_offset(
    wanted: Floats, scale: Floats, width: int, coarser: tuple[Floats, int] | None
) -> tuple[npt.NDArray[np.int8], Floats]:
    """(what is stored, the offset it stands for) nearest to `wanted` [rows]; coarser: (B of the level before, added
    bits)."""
    before = np.float32(0) if coarser is None else coarser[0]
    steps = np.divide(wanted - before, scale, out=np.zeros_like(wanted), where=scale > 0)
    unit, bits = (32, width) if coarser is None else (64, coarser[1])
    stored = np.clip(np.rint(unit * (steps + np.float32((2**bits - 1) / 2))), -128, 127).astype(np.int8)
    if coarser is None:
        return stored, scale * _base_step(stored.astype(np.float32), width)
    return stored, _refined_offset(scale, stored.astype(np.float32), coarser[0], bits)


def _base_step(offset: Floats, bits: int) -> Floats:
    return offset * np.float32(1 / 32) - np.float32((2**bits - 1) / 2)


def _refined_offset(scale: Floats, shift: Floats, before: Floats, added: int) -> Floats:
    """before + scale * (shift / 64 - ...), rounded once: the product is exact in float64."""
    step = (shift / 64 - np.float32((2**added - 1) / 2)).astype(np.float64)
    rounded: Floats = (scale * step + before).astype(np.float32)
    return rounded
