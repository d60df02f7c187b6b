"""Round-to-nearest group quantization: an unsigned code, a float16 scale and a float16 offset per group of a row.

8 bits cover the group's range. 4 bits try a few narrower ranges, keep for each group the one whose codes fit the
weights best once scale and offset are their least-squares fit, and round to that fit. Everything is deterministic.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgemoe.formats.layouts import GROUP

LARGEST = 65504.0
"""The largest float16: weights beyond it have no scale and offset."""

_CLIP_RATIOS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
# Groups worked on at a time: the buffers of 64 x 1024 float32 (256 KiB) stay in the processor's second-level cache.
_CHUNK = 1024
# Steps below this are float16 numbers of less than 5 significant bits.
_SMALLEST_FITTED = 2.0**-20

Floats = npt.NDArray[np.float32]


def quantize(
    weights: npt.NDArray[np.float32], bits: int, group: int = GROUP
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Quantizes float32 [rows, columns] to `bits` (8 or 4).

    Returns codes uint8 [rows, columns padded to whole groups, padding 0], scales and offsets float16 [rows, groups]:
    weight ~ scale * code + offset. A group of equal weights is exact if float16 can hold the value, and right to 20
    bits otherwise (above 6e-8, the smallest float16). Raises ValueError for weights that are not finite or beyond the
    range of float16.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits = {bits}: 4 and 8 are known")
    rows, columns = weights.shape
    groups = -(-columns // group)
    source = weights
    if columns % group:
        # The last weight repeated: padding must not widen the range of the last group.
        source = np.pad(weights, ((0, 0), (0, groups * group - columns)), mode="edge")
    by_group = np.ascontiguousarray(source, np.float32).reshape(-1, group)
    codes = np.empty(by_group.shape, np.uint8)
    scales = np.empty(len(by_group), np.float16)
    offsets = np.empty(len(by_group), np.float16)
    # Scratch memory that every chunk reuses: allocating it anew costs more than the arithmetic.
    memory = [np.empty(group * min(_CHUNK, len(by_group)), np.float32) for _ in range(2)]
    for start in range(0, len(by_group), _CHUNK):
        part = slice(start, start + _CHUNK)
        size = min(_CHUNK, len(by_group) - start)
        values, rounded = (part_of[: group * size].reshape(group, size) for part_of in memory)
        _quantize_chunk(by_group[part], (1 << bits) - 1, values, rounded, codes[part], scales[part], offsets[part])
    shaped = codes.reshape(rows, groups * group)
    shaped[:, columns:] = 0
    return shaped, scales.reshape(rows, groups), offsets.reshape(rows, groups)


def _quantize_chunk(
    weights: Floats,
    top: int,
    values: Floats,
    rounded: Floats,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float16],
    offsets: npt.NDArray[np.float16],
) -> None:
    """One chunk: weights float32 [groups, 64] -> codes, scales, offsets (written in place).

    values, rounded: room for float32 [64, groups]. The work is done on the transpose: reductions over a group are then
    sums of whole vectors.
    """
    np.copyto(values, weights.T)
    low, high = values.min(axis=0), values.max(axis=0)
    if not (np.all(low >= -LARGEST) and np.all(high <= LARGEST)):  # also false for NaN
        worst = values.ravel()[np.argmax(np.where(np.isfinite(values), np.abs(values), np.inf))]
        raise ValueError(f"the weight {worst:g} does not fit float16 scales (largest {LARGEST:g})")
    scale16, offset16 = _cover(low, high, top)
    if top < 255:
        scale, offset = _search(values, low, high, top, rounded)
        # Rounded to float16, an offset far larger than a step moves by more than a step, and a tiny step changes by
        # much: such groups keep the covering range.
        fits = (np.abs(offset) <= 64 * scale) & (scale >= _SMALLEST_FITTED)
        scale16[fits] = scale[fits].astype(np.float16)
        offset16[fits] = np.clip(offset[fits], -LARGEST, LARGEST).astype(np.float16)
    # The codes are chosen for the rounded scale and offset: they are the nearest to what is stored.
    _round_codes(values, scale16.astype(np.float32), offset16.astype(np.float32), top, rounded)
    constant = high == low
    if constant.any():
        # value = offset + 1 * scale: the scale carries the bits that float16 has no room for in the offset, which
        # `_cover` rounded down.
        residual = low[constant] - offset16[constant].astype(np.float32)
        scale16[constant] = residual.astype(np.float16)
        rounded[:, constant] = 1.0
    np.copyto(codes, rounded.T, casting="unsafe")
    scales[:], offsets[:] = scale16, offset16


def _round_codes(values: Floats, scale: Floats, offset: Floats, top: int, out: Floats) -> None:
    """out = the codes nearest to `values`, as float32; 0 where the scale is too small to matter."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 1e-12)
    np.subtract(values, offset, out=out)
    np.multiply(out, inverse, out=out)
    np.rint(out, out=out)
    np.clip(out, np.float32(0), np.float32(top), out=out)


def _cover(low: Floats, high: Floats, top: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """(scale, offset) float16 [groups] whose codes 0 to `top` reach from `low` or below to `high` or above."""
    offset = low.astype(np.float16)
    above = offset.astype(np.float32) > low
    offset[above] = np.nextafter(offset[above], np.float16(-np.inf))
    wanted = (high - offset.astype(np.float32)) / np.float32(top)
    scale = wanted.astype(np.float16)
    below = scale.astype(np.float32) < wanted
    scale[below] = np.nextafter(scale[below], np.float16(np.inf))
    return scale, offset


def _search(values: Floats, low: Floats, high: Floats, top: int, codes: Floats) -> tuple[Floats, Floats]:
    """Scale and offset, float32 [groups]: the best of the clip ratios after a least-squares fit to its codes.

    For given codes q the squared error of the best fit is n (var(w) - cov(w, q)^2 / var(q)): the candidate with the
    largest cov^2 / var wins. The weights are centred first, which keeps the float32 sums accurate.
    """
    count = np.float32(len(values))
    middle, spread = (low + high) * np.float32(0.5), high - low
    values -= middle
    mean = values.mean(axis=0)
    best = np.full(spread.shape, -1, np.float32)
    best_scale, best_offset = spread / np.float32(top), low - middle
    for ratio in _CLIP_RATIOS:
        scale = spread * np.float32(ratio / top)
        _round_codes(values, scale, scale * np.float32(-top / 2), top, codes)
        code_mean = codes.mean(axis=0)
        covariance = np.einsum("ij,ij->j", codes, values) / count - code_mean * mean
        variance = np.einsum("ij,ij->j", codes, codes) / count - code_mean * code_mean
        usable = variance > 0
        slope = np.divide(covariance, variance, out=np.zeros_like(variance), where=usable)
        better = usable & (slope * covariance > best)
        best = np.where(better, slope * covariance, best)
        best_scale = np.where(better, slope, best_scale)
        best_offset = np.where(better, mean - slope * code_mean, best_offset)
    values += middle
    return best_scale, best_offset + middle
