"""How weights lie in a pack: packing to and unpacking from every tensor layout of docs/format.md.

Rows come in blocks of 16, interleaved, so that a vector register holds one row per lane. This module is the readable
reference of the layouts; the engine's kernels read the same bytes. The layouts "ggml.q4_0" and so on are a GGUF file's
own blocks, row after row (`ggml_blocks`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.formats.ggml_blocks import READABLE, TYPES, dequantize

BLOCK = 16
"""Rows of one block."""
GROUP = 64
"""Columns that share a scale and an offset in the quantized layouts."""

LAYOUTS = ("vector", "f32", "bf16", "f16", "q8g64", "q4g64")
QUANTIZED = {"q8g64": 8, "q4g64": 4}
"""Layout -> bits per code, for the layouts that have codes, scales and offsets."""

_PLAIN: dict[str, npt.DTypeLike] = {"f32": "<f4", "bf16": "<u2", "f16": "<f2"}

GGML_LAYOUTS = {f"ggml.{name}": TYPES[name] for name in READABLE}
"""Layouts of rows one after the other, in blocks of a GGUF file's types; packs have those that are not `_PLAIN`."""
ROW_MAJOR = tuple(name for name, kind in GGML_LAYOUTS.items() if kind.weights > 1)
"""The layouts of packs that are interleaved once they are in memory."""


def packed_size(layout: str, rows: int, columns: int = 1) -> int:
    """Bytes of a [rows, columns] tensor in `layout`; a `vector` is [length, 1].

    Raises ValueError for an unknown layout, and for columns that are not whole blocks of it.
    """
    kind = GGML_LAYOUTS.get(layout)
    if kind is not None:
        if columns % kind.weights:
            raise ValueError(f"rows of {columns} are not whole blocks of {kind.weights} ({layout})")
        return rows * columns // kind.weights * kind.nbytes
    if layout == "vector":
        return 4 * rows * columns
    blocks = -(-rows // BLOCK)
    if layout in _PLAIN:
        return blocks * BLOCK * columns * np.dtype(_PLAIN[layout]).itemsize
    return blocks * -(-columns // GROUP) * _group_bytes(layout)


def bits_of(layout: str) -> int:
    """Whole bits that a weight takes in a layout of a GGUF file's types, "ggml.q4_k" or "f16"."""
    kind = GGML_LAYOUTS[f"ggml.{layout.removeprefix('ggml.')}"]
    return kind.nbytes * 8 // kind.weights


def pack(
    layout: str,
    values: npt.NDArray[np.generic],
    scales: npt.NDArray[np.float16] | None = None,
    offsets: npt.NDArray[np.float16] | None = None,
) -> npt.NDArray[np.uint8]:
    """The bytes of one tensor, as a one-dimensional uint8 array of `packed_size` elements.

    values: [rows, columns] float32 (`f32`), uint16 bit patterns (`bf16`) or float16 (`f16`); [length] float32
        (`vector`); codes, uint8 [rows, columns], of the quantized layouts, columns a multiple of 64.
    scales, offsets: float16 [rows, columns / 64], for the quantized layouts only.
    """
    if layout == "vector":
        return np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
    rows, columns = values.shape
    blocks = -(-rows // BLOCK)
    if layout in _PLAIN:
        dtype = np.dtype(_PLAIN[layout])
        if values.dtype != dtype:
            raise TypeError(f"layout {layout} takes {dtype}, not {values.dtype}")
        interleaved = _pad_rows(values, blocks).reshape(blocks, BLOCK, columns).transpose(0, 2, 1)
        return np.ascontiguousarray(interleaved, dtype).reshape(-1).view(np.uint8)
    if scales is None or offsets is None or values.dtype != np.uint8 or columns % GROUP:
        raise TypeError(f"layout {layout} takes uint8 codes in whole groups of {GROUP}, scales and offsets")
    groups = columns // GROUP
    packed = np.empty((blocks, groups, _group_bytes(layout)), np.uint8)
    codes = packed[:, :, : -4 * BLOCK]
    padded = _pad_rows(values, blocks)
    if QUANTIZED[layout] == 4:
        # [block, row, group, octet, half, k] -> byte [block, group, octet, row, k], the second half in the high bits
        split = padded.reshape(blocks, BLOCK, groups, 8, 2, 4)
        joined = split[..., 0, :] | (split[..., 1, :] << np.uint8(4))
        codes.reshape(blocks, groups, 8, BLOCK, 4)[...] = joined.transpose(0, 2, 3, 1, 4)
    else:
        quads = padded.reshape(blocks, BLOCK, groups, 16, 4)
        codes.reshape(blocks, groups, 16, BLOCK, 4)[...] = quads.transpose(0, 2, 3, 1, 4)
    for at, values16 in ((-4 * BLOCK, scales), (-2 * BLOCK, offsets)):
        lanes = _pad_rows(values16.astype("<f2", copy=False), blocks).reshape(blocks, BLOCK, groups).transpose(0, 2, 1)
        end = at + 2 * BLOCK
        packed[:, :, at : end if end else None] = np.ascontiguousarray(lanes).view(np.uint8)
    return packed.reshape(-1)


def unpack(
    layout: str, data: npt.NDArray[np.uint8] | bytes | memoryview, rows: int, columns: int = 1
) -> npt.NDArray[np.float32]:
    """The weights that `data` (exactly `packed_size` bytes) stands for: float32 [rows, columns]."""
    raw = np.frombuffer(data, np.uint8)
    if raw.size != packed_size(layout, rows, columns):
        raise ValueError(
            f"{layout} [{rows}, {columns}] takes {packed_size(layout, rows, columns)} bytes, not {raw.size}"
        )
    if layout in GGML_LAYOUTS:
        return dequantize(GGML_LAYOUTS[layout].name, raw).reshape(rows, columns)
    if layout == "vector":
        return raw.view("<f4").reshape(rows, columns).astype(np.float32)
    blocks = -(-rows // BLOCK)
    if layout in _PLAIN:
        lanes = raw.view(_PLAIN[layout]).reshape(blocks, columns, BLOCK).transpose(0, 2, 1)
        flat = np.ascontiguousarray(lanes).reshape(blocks * BLOCK, columns)[:rows]
        return bf16_to_f32(flat) if layout == "bf16" else flat.astype(np.float32)
    codes, scales, offsets = unpack_codes(layout, raw, rows, columns)
    groups = scales.shape[1]
    weights = codes.reshape(rows, groups, GROUP).astype(np.float32)
    weights *= scales.astype(np.float32)[:, :, None]
    weights += offsets.astype(np.float32)[:, :, None]
    return np.ascontiguousarray(weights.reshape(rows, groups * GROUP)[:, :columns])


def unpack_codes(
    layout: str, raw: npt.NDArray[np.uint8], rows: int, columns: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """(codes uint8 [rows, padded columns], scales, offsets float16 [rows, groups]) of a quantized tensor."""
    blocks, groups = -(-rows // BLOCK), -(-columns // GROUP)
    packed = raw.reshape(blocks, groups, _group_bytes(layout))
    stored = packed[:, :, : -4 * BLOCK]
    if QUANTIZED[layout] == 4:
        octets = stored.reshape(blocks, groups, 8, BLOCK, 4)
        quads = np.stack((octets & np.uint8(15), octets >> np.uint8(4)), axis=3).reshape(blocks, groups, 16, BLOCK, 4)
    else:
        quads = stored.reshape(blocks, groups, 16, BLOCK, 4)
    codes = np.ascontiguousarray(quads.transpose(0, 3, 1, 2, 4)).reshape(blocks * BLOCK, groups * GROUP)
    pairs = np.ascontiguousarray(packed[:, :, -4 * BLOCK :]).view("<f2").reshape(blocks, groups, 2, BLOCK)
    by_row = np.ascontiguousarray(pairs.transpose(2, 0, 3, 1)).reshape(2, blocks * BLOCK, groups)
    return codes[:rows], by_row[0, :rows], by_row[1, :rows]


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 bit patterns as float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _group_bytes(layout: str) -> int:
    if layout not in QUANTIZED:
        raise ValueError(f"unknown layout {layout!r} (known: {', '.join((*LAYOUTS, *ROW_MAJOR))})")
    return BLOCK * GROUP * QUANTIZED[layout] // 8 + 4 * BLOCK


def _pad_rows(values: npt.NDArray[Any], blocks: int) -> npt.NDArray[Any]:
    missing = blocks * BLOCK - values.shape[0]
    return np.ascontiguousarray(np.pad(values, ((0, missing), (0, 0))) if missing else values)
