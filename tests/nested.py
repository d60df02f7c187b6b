"""Nested weights by plain rounding, and packs of them: enough for tests of the engine, no match for the quantizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.formats.index import PARTS, DenseTensor, ExpertLayer, Level, MeasuredQuality, Part
from edgemoe.formats.layouts import (
    GROUP,
    OFFSET_UNIT,
    STEPS,
    SUB_GROUP,
    SUPER_GROUP,
    pack_level,
    packed_size,
    unpack,
    unpack_level,
)
from edgemoe.formats.pack import ALIGNMENT, Blob, Pack, PackContents, PackWriter, align

Parameters = tuple[NDArray[Any], ...]
"""Of level 0, as `pack_level` takes them; later levels have none."""
SUB_GROUPS = SUPER_GROUP // SUB_GROUP
"""Of a super group."""


def level_names(bits: Sequence[int]) -> list[str]:
    """The layouts of levels of these widths."""
    return [
        f"base{width}r{len(bits) - 1}" if level == 0 else f"refine{width - bits[level - 1]}"
        for level, width in enumerate(bits)
    ]


def level_codes(codes: NDArray[np.uint8], bits: Sequence[int], level: int) -> NDArray[np.uint8]:
    """The bits that a level adds to codes of bits[-1] bits."""
    below = bits[-1] - bits[level]
    width = bits[level] - (bits[level - 1] if level else 0)
    return (codes >> np.uint8(below)) & np.uint8((1 << width) - 1)


def affine(bits: Sequence[int], parameters: Parameters) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(scale, offset) float64 [rows, groups * 4] of every level: a weight is scale * code + offset."""
    scales, numbers, offsets, ratios, shifts = parameters

    def of_sub_groups(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.repeat(values.astype(np.float64), SUB_GROUPS, axis=1)[:, : numbers.shape[1]]

    steps, moved = 3.0 + numbers, offsets // 2 * 8.0
    # The lowest bit is level 0's own.
    own = np.where(offsets % 2, moved + 3, moved - 3)
    scale = of_sub_groups(scales)
    unit, center = scale * 2.0 ** bits[0] / 128, scale * (1 - 2.0 ** bits[0]) / 2
    found = [(steps * scale, steps * (unit * own + center))]
    for level in range(1, len(bits)):
        ratio, shift = (of_sub_groups(values[level - 1]) for values in (ratios, shifts))
        codes = 2.0 ** (bits[level] - bits[level - 1])
        scale = scale / codes * (1 + ratio / 2.0 ** (bits[level - 1] + 3))
        center = center + scale * (codes * (shift / 32 - ratio / 16 - 0.5) + 0.5)
        found.append((steps * scale, steps * (unit * moved + center)))
    return found


def quantize(weights: NDArray[np.float32], bits: Sequence[int]) -> tuple[NDArray[np.uint8], Parameters]:
    """Codes uint8 [rows, groups * 64] of bits[-1] bits and the parameters."""
    rows, columns = weights.shape
    groups, top = -(-columns // GROUP), bits[-1]
    padded = np.pad(weights, ((0, 0), (0, groups * GROUP - columns)), mode="edge").reshape(rows, -1, SUB_GROUP)
    low, high = padded.min(2).astype(np.float64), padded.max(2).astype(np.float64)
    # What a step of the finest level would be in every part, if nothing but its codes were stored.
    spacing = np.maximum((high - low) / (2**top - 1), 1e-4)

    def by_super_group(values: NDArray[np.float64]) -> NDArray[np.float64]:
        missing = -values.shape[1] % SUB_GROUPS
        filled = np.pad(values, ((0, 0), (0, missing)), constant_values=np.nan)
        return filled.reshape(rows, -1, SUB_GROUPS)

    def target(width: int) -> NDArray[np.float64]:
        found: NDArray[np.float64] = low + spacing * (2 ** (top - width) - 1) / 2
        return found

    first = 2.0 ** bits[0]
    wanted = spacing * 2.0 ** (top - bits[0])
    scales = (np.nanmax(by_super_group(wanted), axis=2) / STEPS[-1]).astype(np.float16)
    of_256 = np.repeat(scales.astype(np.float64), SUB_GROUPS, axis=1)[:, : wanted.shape[1]]
    numbers = np.minimum(np.searchsorted(STEPS, wanted / of_256), len(STEPS) - 1).astype(np.uint8)
    moved = (target(bits[0]) / (np.array(STEPS)[numbers] * of_256) + (first - 1) / 2) * 128 / first
    nearest = np.clip(np.rint(moved / OFFSET_UNIT), -4, 3)
    offsets = (2 * nearest + (moved > OFFSET_UNIT * nearest)).astype(np.int8)
    ratios, shifts = np.zeros((2, len(bits) - 1, *scales.shape), np.int8)
    parameters = (scales, numbers, offsets, ratios, shifts)
    for level in range(1, len(bits)):
        scale, offset = affine(bits[: level + 1], parameters)[-1]
        # In 32nds of the level before's scale, which is that of this level times its codes.
        missing = (target(bits[level]) - offset) * 32 / (scale * 2.0 ** (bits[level] - bits[level - 1]))
        of_weights = by_super_group(missing[:, : -(-columns // SUB_GROUP)])  # not of padding
        shifts[level - 1] = np.clip(np.rint(np.nanmean(of_weights, axis=2)), -8, 7)
    scale, offset = affine(bits, parameters)[-1]
    codes = np.clip(np.rint((padded - offset[:, :, None]) / scale[:, :, None]), 0, 2**top - 1)
    return codes.astype(np.uint8).reshape(rows, -1), parameters


def dequantize(
    bits: Sequence[int], levels: Sequence[NDArray[np.uint8]], rows: int, columns: int
) -> NDArray[np.float64]:
    """float64 [rows, columns]: the weights that the first len(levels) packed levels of those of `bits` stand for."""
    names = level_names(bits)
    codes, parameters = unpack_level(names[0], levels[0], rows, columns)
    for level in range(1, len(levels)):
        part, _ = unpack_level(names[level], levels[level], rows, columns)
        codes = codes << np.uint8(bits[level] - bits[level - 1]) | part
    scale, offset = affine(bits[: len(levels)], parameters)[-1]
    weights = codes.reshape(rows, -1, SUB_GROUP) * scale[:, :, None] + offset[:, :, None]
    return weights.reshape(rows, -1)[:, :columns]


def write_nested_pack(
    source: Path,
    target: Path,
    bits: Sequence[int] = (2, 3, 4),
    levels_of: Callable[[int, int], int] | None = None,
    quality: MeasuredQuality | None = None,
) -> Path:
    """The pack `source`, whose experts are float32, with nested experts instead.

    levels_of(layer, expert): how many levels an expert has; all of them unless it is given. quality: of the index.
    """
    old = Pack.open(source)
    contents = PackContents(
        spec=old.index.spec,
        generation=old.index.generation,
        provenance=old.provenance,
        dense={},
        experts={},
        blobs={},
        unused=old.unused,
        quality=quality,
    )
    names = level_names(bits)
    with PackWriter.create(target, str(bits)) as writer:
        numbers: dict[int, int] = {}

        def kept(section: int) -> int:
            if section not in numbers:
                numbers[section] = writer.add([old.read_section(section)])
            return numbers[section]

        for name, tensor in old.index.dense.items():
            contents.dense[name] = DenseTensor(kept(tensor.section), tensor.offset, tensor.layout, tensor.shape)
        for name, blob in old.blobs.items():
            contents.blobs[name] = Blob(kept(blob.section), blob.length)
        for number, layer in old.index.experts.items():
            shapes = {part: layer.levels[0].parts[part].shape for part in PARTS}
            levels = []
            for width, layout in zip(bits, names, strict=True):
                parts, offset = {}, 0
                for part in PARTS:
                    parts[part] = Part(layout, 0, offset, shapes[part])
                    offset = align(offset + packed_size(layout, *shapes[part]), ALIGNMENT)
                levels.append(Level(width, parts))
            sections = []
            for expert, (section,) in enumerate(layer.sections):
                data = np.frombuffer(old.read_section(section), np.uint8)
                quantized = {}
                for name in PARTS:
                    place = layer.levels[0].parts[name]
                    size = packed_size(place.layout, *place.shape)
                    weights = unpack(place.layout, data[place.offset : place.offset + size], *place.shape)
                    quantized[name] = quantize(weights, bits)
                count = len(bits) if levels_of is None else levels_of(number, expert)
                mine = []
                for level in range(count):
                    body = bytearray()
                    for name in PARTS:
                        codes, parameters = quantized[name]
                        added = level_codes(codes, bits, level), () if level else parameters
                        body += bytes(levels[level].parts[name].offset - len(body))
                        body += pack_level(names[level], *added).tobytes()
                    mine.append(writer.add([bytes(body)]))
                sections.append(tuple(mine))
            contents.experts[number] = ExpertLayer(tuple(levels), tuple(sections))
        writer.finish(contents)
    return target
