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

_MAX_BITS = 8
NESTED = (
    *(f"base{bits}r{later}" for bits in range(1, _MAX_BITS + 1) for later in range(_MAX_BITS + 1 - bits)),
    *(f"refine{bits}" for bits in range(1, _MAX_BITS)),
)
"""Layouts of one level of a nested matrix: "base2r1" is level 0 of 2 bits with one later level, "refine1" a later one
that adds one bit."""
SUB_GROUP = 16
"""Columns that share a step and an offset of a nested matrix."""
STEPS = (3, 4, 5, 6)
"""The steps that a sub-group can have, in the order of their numbers."""
OFFSET_UNIT = 8
"""What offsets of a nested matrix are multiples of."""
OWN_OFFSET = 3
"""What they are more or less in products with level 0 alone."""
SUPER_GROUP = 256
"""Columns that share scales of a nested matrix's levels."""
_CHUNK = SUPER_GROUP // GROUP
_LINE = 64  # bytes: one for every row and sub-group of a group
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


def tensor_size(layout: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of one or two dimensions."""
    return packed_size(layout, shape[0], shape[1] if len(shape) > 1 else 1)


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
    """A level of a nested matrix: the bits it adds to a code; whether it is level 0, with parameters, and how many
    later levels these speak of."""

    bits: int
    base: bool
    later: int

    def lines(self) -> int:
        """64 bytes of parameters that a chunk has."""
        return _CHUNK + -(-max(self.later - 2, 0) // 4) if self.base else 0

    def places(self, groups: int) -> list[int]:
        """Offsets of the codes of every group in the row block."""
        return [group * 128 * self.bits + (group // _CHUNK + 1) * self.lines() * _LINE for group in range(groups)]

    def block_bytes(self, groups: int) -> int:
        """Bytes of 16 rows."""
        return groups * 128 * self.bits + -(-groups // _CHUNK) * self.lines() * _LINE

    def parameters(self, rows: int, groups: int) -> tuple[tuple[str, npt.DTypeLike, tuple[int, ...], int, int], ...]:
        """(name, type, shape, least, largest) of the arrays of parameters."""
        if not self.base:
            return ()
        of_sub_groups, of_super_groups = (rows, groups * _SUB_GROUPS), (rows, -(-groups // _CHUNK))
        return (
            ("scales", np.float16, of_super_groups, 0, 0),
            ("steps", np.uint8, of_sub_groups, 0, len(STEPS) - 1),
            ("offsets", np.int8, of_sub_groups, -8, 7),
            ("ratios", np.int8, (self.later, *of_super_groups), -8, 7),
            ("shifts", np.int8, (self.later, *of_super_groups), -8, 7),
        )

    def planes(self) -> list[int]:
        """Shifts of the planes' bits within this level's part of a code, high bits first."""
        return list(range(self.bits - 2, -1, -2)) + ([0] if self.bits % 2 else [])

    def plane_bits(self) -> list[int]:
        return [2] * (self.bits // 2) + [1] * (self.bits % 2)


def level_bits(layout: str) -> tuple[int, int | None]:
    """(bits that a nested layout's level adds, how many later levels it has parameters of if it is level 0).

    Raises ValueError for another layout."""
    bits, base, later = _level(layout)
    return bits, later if base else None


def pack_level(
    layout: str, codes: npt.NDArray[np.uint8], parameters: Sequence[npt.NDArray[Any]] = ()
) -> npt.NDArray[np.uint8]:
    """The bytes of one level of a nested matrix, a one-dimensional uint8 array of `packed_size` elements.

    layout: one of NESTED. codes: uint8 [rows, groups * 64], the d bits of this level only (values below 2^d).
    parameters: of level 0, scales float16 [rows, groups / 4 rounded up]; steps uint8 [rows, groups * 4], numbers of
    `STEPS`; offsets int8 [rows, groups * 4] within -8 to 7, the lowest bit being level 0's own, the rest in
    `OFFSET_UNIT`; ratios and shifts of later levels, int8 [later levels, rows, groups / 4 rounded up] within -8 to 7.
    Of later levels: none. Raises TypeError for other types and shapes, ValueError for values beyond these.
    """
    level = _level(layout)
    rows, columns = codes.shape
    blocks, groups = -(-rows // BLOCK), columns // GROUP
    if codes.dtype != np.uint8 or columns % GROUP:
        raise TypeError(f"layout {layout} takes uint8 codes in whole groups of {GROUP}")
    if codes.size and int(codes.max()) >> level.bits:
        raise ValueError(f"layout {layout}: a code of {codes.max()} has more than {level.bits} bits")
    known = level.parameters(rows, groups)
    if len(parameters) != len(known):
        names = ", ".join(name for name, *_ in known) or "no parameters"
        raise TypeError(f"layout {layout} takes {names}, not {len(parameters)} arrays")
    for values, (name, kind, shape, least, largest) in zip(parameters, known, strict=True):
        if values.dtype != kind or values.shape != shape:
            found = f"{values.dtype} {list(values.shape)}"
            raise TypeError(f"layout {layout} takes {name} {np.dtype(kind)} {list(shape)}, not {found}")
        if largest and values.size and (int(values.min()) < least or int(values.max()) > largest):
            within = f"{values.min()} to {values.max()}, not {least} to {largest}"
            raise ValueError(f"layout {layout}: {name} within {within}")
    packed = np.zeros((blocks, level.block_bytes(groups)), np.uint8)
    # [block, group, quad, row, k]
    quads = _pad_rows(codes, blocks).reshape(blocks, BLOCK, groups, 16, 4).transpose(0, 2, 3, 1, 4)
    planes = []
    for shift, width in zip(level.planes(), level.plane_bits(), strict=True):
        fields = (quads >> np.uint8(shift)) & np.uint8((1 << width) - 1)
        per_byte = 8 // width  # quads in a byte
        split = fields.reshape(blocks, groups, 16 // per_byte, per_byte, BLOCK, 4) << _shifts(width)[:, None, None]
        planes.append(np.bitwise_or.reduce(split, axis=3).reshape(blocks, groups, -1))
    bytes_of_group = np.concatenate(planes, axis=2)
    for group, at in enumerate(level.places(groups)):
        packed[:, at : at + bytes_of_group.shape[2]] = bytes_of_group[:, group]
    if level.base:
        lines = _pad_rows(_pack_parameters(groups, *parameters), blocks)
        by_chunk = lines.reshape(blocks, BLOCK, -1, level.lines(), 4).transpose(0, 2, 3, 1, 4)
        for chunk, at in enumerate(level.places(groups)[::_CHUNK]):
            size = level.lines() * _LINE
            packed[:, at - size : at] = by_chunk[:, chunk].reshape(blocks, size)
    return packed.reshape(-1)


def _pack_parameters(
    groups: int,
    scales: npt.NDArray[np.float16],
    steps: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int8],
    ratios: npt.NDArray[np.int8],
    shifts: npt.NDArray[np.int8],
) -> npt.NDArray[np.uint8]:
    """A row's parameters as docs/format.md orders them: [rows, chunks * lines of a chunk * 4]."""
    rows, chunks = scales.shape
    later = len(ratios)
    own = np.zeros((rows, chunks * _CHUNK * _SUB_GROUPS), np.uint8)
    own[:, : groups * _SUB_GROUPS] = steps | (offsets.view(np.uint8) & np.uint8(15)) << np.uint8(2)
    own = own.reshape(rows, chunks, _CHUNK, 4)
    lines = ratios.view(np.uint8) << np.uint8(4) | shifts.view(np.uint8) & np.uint8(15)
    # Four at a time, the last one first; the first four are the second and first level's behind the scale.
    further = -(-max(later - 2, 0) // 4)
    of_levels = np.zeros((2 + 4 * further, rows, chunks), np.uint8)
    of_levels[:later] = lines
    first = np.empty((rows, chunks, 4), np.uint8)
    first[:, :, :2] = scales.astype("<f2")[:, :, None].view(np.uint8)
    first[:, :, 2:] = of_levels[1::-1].transpose(1, 2, 0)
    for group in range(_CHUNK):
        own[:, :, group] |= (first >> np.uint8(2 * group) & np.uint8(3)) << np.uint8(6)
    rest = of_levels[2:].reshape(further, 4, rows, chunks)[:, ::-1].transpose(2, 3, 0, 1)
    return np.concatenate((own, rest), axis=2).reshape(rows, -1)


def _unpack_parameters(
    groups: int, later: int, lines: npt.NDArray[np.uint8]
) -> tuple[
    npt.NDArray[np.float16],
    npt.NDArray[np.uint8],
    npt.NDArray[np.int8],
    npt.NDArray[np.int8],
    npt.NDArray[np.int8],
]:
    """The inverse; lines: [rows, chunks, lines of a chunk, 4]."""
    rows, chunks = lines.shape[:2]
    own, rest = lines[:, :, :_CHUNK], lines[:, :, _CHUNK:]
    first = np.zeros((rows, chunks, 4), np.uint8)
    for group in range(_CHUNK):
        first |= own[:, :, group] >> np.uint8(6) << np.uint8(2 * group)
    scales = np.ascontiguousarray(first[:, :, :2]).view("<f2")[:, :, 0].astype(np.float16, copy=False)
    of_levels = np.concatenate((first[:, :, :1:-1], rest[:, :, :, ::-1].reshape(rows, chunks, -1)), axis=2)
    levels = np.ascontiguousarray(of_levels[:, :, :later].transpose(2, 0, 1)).view(np.int8)
    parts = own.reshape(rows, -1)[:, : groups * _SUB_GROUPS]
    offsets = (parts << np.uint8(2)).view(np.int8) >> np.int8(4)
    return scales, parts & np.uint8(3), offsets, levels >> np.int8(4), (levels << np.int8(4)) >> np.int8(4)


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
    for group, at in enumerate(level.places(groups)):
        bytes_of_group[:, group] = packed[:, at : at + bytes_of_group.shape[2]]
    quads = np.zeros((blocks, groups, 16, BLOCK, 4), np.uint8)
    at = 0
    for shift, width in zip(level.planes(), level.plane_bits(), strict=True):
        per_byte = 8 // width
        plane = bytes_of_group[:, :, at : at + 128 * width].reshape(blocks, groups, 16 // per_byte, 1, BLOCK, 4)
        fields = (plane >> _shifts(width)[:, None, None]) & np.uint8((1 << width) - 1)
        quads |= fields.reshape(quads.shape) << np.uint8(shift)
        at += 128 * width
    codes = np.ascontiguousarray(quads.transpose(0, 3, 1, 2, 4)).reshape(blocks * BLOCK, groups * GROUP)
    if not level.base:
        return codes[:rows], ()
    size = level.lines() * _LINE
    by_chunk = np.stack([packed[:, at - size : at] for at in level.places(groups)[::_CHUNK]], axis=1)
    lines = by_chunk.reshape(blocks, -1, level.lines(), BLOCK, 4).transpose(0, 3, 1, 2, 4)
    by_row = lines.reshape(blocks * BLOCK, -1, level.lines(), 4)[:rows]
    return codes[:rows], _unpack_parameters(groups, level.later, by_row)


def _shifts(width: int) -> npt.NDArray[np.uint8]:
    """Where the quads of a byte of a plane have their bits: 8 / width of them, in ascending column order."""
    if width == 2:
        return np.arange(0, 8, 2, dtype=np.uint8)
    return np.array([0, 2, 4, 6, 1, 3, 5, 7], np.uint8)


def _level(layout: str) -> _Level:
    if layout not in NESTED:
        raise ValueError(f"layout {layout!r} is not a level of a nested matrix ({', '.join(NESTED)})")
    if layout.startswith("refine"):
        return _Level(int(layout[-1]), False, 0)
    return _Level(int(layout[-3]), True, int(layout[-1]))


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
