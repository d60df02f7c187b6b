"""How weights lie in a pack: packing to and unpacking from every tensor layout of docs/format.md.

Rows come in blocks of 16, interleaved, so that a vector register holds one row per lane. This module is the readable
reference of the layouts; the engine's kernels read the same bytes. The layouts "ggml.q4_0" and so on are a GGUF file's
own blocks, row after row (`ggml_blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

NESTED = tuple(f"{kind}{bits}{form}" for kind, form in (("base", "g16"), ("refine", "n64")) for bits in range(1, 9))
"""Layouts of one level of a nested matrix: "base2g16" is level 0 of 2 bits, "refine1n64" a later one that adds one."""
SUB_GROUP = 16
"""Columns that share a scale step and an offset of level 0 of a nested matrix."""
STEPS = (2, 4, 7, 9, 10, 11, 13, 15)
"""The scale steps that a level 0 can have, in the order of their numbers."""
SUPER_GROUP = 256
"""Columns that share a float16 scale of level 0 of a nested matrix."""
_CHUNK = SUPER_GROUP // GROUP  # in later levels the codes of so many groups lie together, followed by their parameters
_LINE = 64  # bytes that headers and parameters are filled up to
_SUB_GROUPS = GROUP // SUB_GROUP

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
    if layout in NESTED:
        return blocks * _level(layout).block_bytes(-(-columns // GROUP))
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


class _Level(NamedTuple):
    """A level of a nested matrix: the bits it adds to a code; whether it is level 0."""

    bits: int
    base: bool

    def places(self, groups: int) -> list[tuple[int, int]]:
        """Offsets of every group's codes and parameters in the row block."""
        codes = 128 * self.bits
        if self.base:
            header = _whole_lines(2 * BLOCK * -(-groups // _CHUNK))
            return [(at, at + codes) for at in range(header, self.block_bytes(groups), codes + BLOCK * _SUB_GROUPS)]
        places, at = [], 0
        for first in range(0, groups, _CHUNK):
            count = min(_CHUNK, groups - first)
            end = at + count * codes
            places += [(at + i * codes, end + i * BLOCK) for i in range(count)]
            at = end + _whole_lines(count * BLOCK)
        return places

    def block_bytes(self, groups: int) -> int:
        """Bytes of 16 rows."""
        if self.base:
            return _whole_lines(2 * BLOCK * -(-groups // _CHUNK)) + groups * (128 * self.bits + BLOCK * _SUB_GROUPS)
        whole, rest = divmod(groups, _CHUNK)
        return groups * 128 * self.bits + whole * _whole_lines(_CHUNK * BLOCK) + _whole_lines(rest * BLOCK)

    def parameters(self, groups: int) -> tuple[tuple[str, npt.DTypeLike, int, int, int], ...]:
        """(name, type, how many a row, least, largest) of the arrays of parameters."""
        if self.base:
            scales = -(-groups // _CHUNK)
            return (
                ("scales", np.float16, scales, 0, 0),
                ("steps", np.uint8, groups * _SUB_GROUPS, 0, len(STEPS) - 1),
                ("offsets", np.int8, groups * _SUB_GROUPS, -16, 15),
            )
        return ("ratios", np.int8, groups, -8, 7), ("shifts", np.int8, groups, -8, 7)

    def planes(self) -> list[int]:
        """Shifts of the planes' bits within this level's part of a code, high bits first."""
        return list(range(self.bits - 2, -1, -2)) + ([0] if self.bits % 2 else [])

    def plane_bits(self) -> list[int]:
        return [2] * (self.bits // 2) + [1] * (self.bits % 2)


def level_bits(layout: str) -> tuple[int, bool]:
    """(bits that a nested layout's level adds, whether it is level 0). Raises ValueError for another layout."""
    return _level(layout)


def pack_level(
    layout: str, codes: npt.NDArray[np.uint8], parameters: Sequence[npt.NDArray[Any]]
) -> npt.NDArray[np.uint8]:
    """The bytes of one level of a nested matrix, a one-dimensional uint8 array of `packed_size` elements.

    layout: one of NESTED. codes: uint8 [rows, groups * 64], the d bits of this level only (values below 2^d).
    parameters: of level 0, scales float16 [rows, groups / 4 rounded up], steps uint8 [rows, groups * 4], numbers of
    `STEPS`, and offsets int8 [rows, groups * 4] within -16 to 15, the lowest bit being level 0's own; of later levels,
    ratios and shifts int8 [rows, groups] within -8 to 7. Raises TypeError for other types and shapes, ValueError for
    values beyond these.
    """
    level = _level(layout)
    rows, columns = codes.shape
    blocks, groups = -(-rows // BLOCK), columns // GROUP
    if codes.dtype != np.uint8 or columns % GROUP:
        raise TypeError(f"layout {layout} takes uint8 codes in whole groups of {GROUP}")
    if codes.size and int(codes.max()) >> level.bits:
        raise ValueError(f"layout {layout}: a code of {codes.max()} has more than {level.bits} bits")
    known = level.parameters(groups)
    if len(parameters) != len(known):
        raise TypeError(f"layout {layout} takes {', '.join(name for name, *_ in known)}, not {len(parameters)} arrays")
    for values, (name, kind, count, least, largest) in zip(parameters, known, strict=True):
        if values.dtype != kind or values.shape != (rows, count):
            found = f"{values.dtype} {list(values.shape)}"
            raise TypeError(f"layout {layout} takes {name} {np.dtype(kind)} [{rows}, {count}], not {found}")
        if largest and values.size and (int(values.min()) < least or int(values.max()) > largest):
            within = f"{values.min()} to {values.max()}, not {least} to {largest}"
            raise ValueError(f"layout {layout}: {name} within {within}")
    packed = np.zeros((blocks, level.block_bytes(groups)), np.uint8)
    if level.base:
        scales, steps, offsets = parameters
        lanes = _pad_rows(scales.astype("<f2"), blocks).reshape(blocks, BLOCK, -1).transpose(0, 2, 1)
        header = np.ascontiguousarray(lanes).view(np.uint8).reshape(blocks, -1)
        packed[:, : header.shape[1]] = header
        stored = steps | offsets.view(np.uint8) << np.uint8(3)
    else:
        ratios, shifts = (values.view(np.uint8) for values in parameters)
        stored = ratios << np.uint8(4) | shifts & np.uint8(15)
    # [block, group, row, of the group]
    bytes_of_row = _pad_rows(stored, blocks).reshape(blocks, BLOCK, groups, -1).transpose(0, 2, 1, 3)
    # [block, group, quad, row, k]
    quads = _pad_rows(codes, blocks).reshape(blocks, BLOCK, groups, 16, 4).transpose(0, 2, 3, 1, 4)
    planes = []
    for shift, width in zip(level.planes(), level.plane_bits(), strict=True):
        fields = (quads >> np.uint8(shift)) & np.uint8((1 << width) - 1)
        per_byte = 8 // width  # quads in a byte
        split = fields.reshape(blocks, groups, 16 // per_byte, per_byte, BLOCK, 4) << _shifts(width)[:, None, None]
        planes.append(np.bitwise_or.reduce(split, axis=3).reshape(blocks, groups, -1))
    bytes_of_group = np.concatenate(planes, axis=2)
    bytes_of_rows = bytes_of_row.reshape(blocks, groups, -1)
    for group, (at, end) in enumerate(level.places(groups)):
        packed[:, at : at + bytes_of_group.shape[2]] = bytes_of_group[:, group]
        packed[:, end : end + bytes_of_rows.shape[2]] = bytes_of_rows[:, group]
    return packed.reshape(-1)


def unpack_level(
    layout: str, data: npt.NDArray[np.uint8] | bytes | memoryview, rows: int, columns: int
) -> tuple[npt.NDArray[np.uint8], tuple[npt.NDArray[Any], ...]]:
    """The inverse of `pack_level`: codes [rows, columns padded to whole groups] and the parameters."""
    level = _level(layout)
    raw = np.frombuffer(data, np.uint8)
    if raw.size != packed_size(layout, rows, columns):
        raise ValueError(
            f"{layout} [{rows}, {columns}] takes {packed_size(layout, rows, columns)} bytes, not {raw.size}"
        )
    blocks, groups = -(-rows // BLOCK), -(-columns // GROUP)
    packed = raw.reshape(blocks, -1)
    bytes_of_group = np.empty((blocks, groups, 128 * level.bits), np.uint8)
    bytes_of_row = np.empty((blocks, groups, BLOCK * (_SUB_GROUPS if level.base else 1)), np.uint8)
    for group, (at, end) in enumerate(level.places(groups)):
        bytes_of_group[:, group] = packed[:, at : at + bytes_of_group.shape[2]]
        bytes_of_row[:, group] = packed[:, end : end + bytes_of_row.shape[2]]
    quads = np.zeros((blocks, groups, 16, BLOCK, 4), np.uint8)
    at = 0
    for shift, width in zip(level.planes(), level.plane_bits(), strict=True):
        per_byte = 8 // width
        plane = bytes_of_group[:, :, at : at + 128 * width].reshape(blocks, groups, 16 // per_byte, 1, BLOCK, 4)
        fields = (plane >> _shifts(width)[:, None, None]) & np.uint8((1 << width) - 1)
        quads |= fields.reshape(quads.shape) << np.uint8(shift)
        at += 128 * width
    codes = np.ascontiguousarray(quads.transpose(0, 3, 1, 2, 4)).reshape(blocks * BLOCK, groups * GROUP)
    stored = bytes_of_row.reshape(blocks, groups, BLOCK, -1).transpose(0, 2, 1, 3).reshape(blocks * BLOCK, -1)[:rows]
    if not level.base:
        nibbles = stored.view(np.int8)
        return codes[:rows], (nibbles >> np.int8(4), (nibbles << np.int8(4)) >> np.int8(4))
    count = -(-groups // _CHUNK)
    halves = np.ascontiguousarray(packed[:, : 2 * BLOCK * count]).view("<f2").reshape(blocks, count, BLOCK)
    scales = halves.transpose(0, 2, 1).reshape(blocks * BLOCK, count)[:rows].astype(np.float16, copy=False)
    return codes[:rows], (scales, stored & np.uint8(7), stored.view(np.int8) >> np.int8(3))


def _whole_lines(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _shifts(width: int) -> npt.NDArray[np.uint8]:
    """Where the quads of a byte of a plane have their bits: 8 / width of them, in ascending column order."""
    if width == 2:
        return np.arange(0, 8, 2, dtype=np.uint8)
    return np.array([0, 2, 4, 6, 1, 3, 5, 7], np.uint8)


def _level(layout: str) -> _Level:
    if layout not in NESTED:
        raise ValueError(f"layout {layout!r} is not a level of a nested matrix ({', '.join(NESTED)})")
    return _Level(int(layout[-4]), layout.startswith("base"))


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
