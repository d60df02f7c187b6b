"""Checks the index of a pack: nothing in it is taken on trust."""

from __future__ import annotations

import itertools
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from edgemoe.errors import PackError, UnsupportedModelError, quote
from edgemoe.formats.index import (
    PARTS,
    DenseTensor,
    ExpertLayer,
    Extent,
    Level,
    LevelQuality,
    MeasuredQuality,
    ModelIndex,
    ModeQuality,
    Part,
    Section,
)
from edgemoe.formats.layouts import BLOCK as ROW_BLOCK
from edgemoe.formats.layouts import LAYOUTS, NESTED, ROW_MAJOR, level_bits, tensor_size
from edgemoe.formats.pack.contents import Blob
from edgemoe.formats.pack.header import ALIGNMENT, BLOCK, MAX_BLOB, MAX_SECTION
from edgemoe.spec import ModelSpec

MAX_LEVELS = 8
MAX_NESTED_BITS = 8
KNOWN_FEATURES: frozenset[str] = frozenset()


def is_counts(value: Any, length: int | None) -> TypeGuard[list[int]]:
    """A list of integers >= 0, of this length unless it is None."""
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


class IndexChecker:
    """Checks an index, each value before it is used."""

    def __init__(self, path: Path, index_offset: int) -> None:
        self._path = path
        self._index_offset = index_offset
        self._section_lengths: list[int] = []
        self._extent_lengths: list[list[int]] = []

    def check(self, index: dict[str, Any]) -> tuple[ModelIndex, dict[str, Any], dict[str, Blob], list[str]]:
        """What the engine needs, provenance, blobs and the unused tensors of the source. Raises PackError."""
        features = self._strings(index, "required_features")
        for feature in features:
            if feature not in KNOWN_FEATURES:
                raise self._error(f"it needs the feature {feature!r}, which this edgemoe does not have")
        try:
            spec = ModelSpec.from_dict(index.get("spec"))
        except UnsupportedModelError as error:
            raise self._error(str(error)) from None
        files, sizes = self._files(self._strings(index, "files"))
        sections = self._sections(index.get("sections"), sizes)
        checked = ModelIndex(
            path=self._path,
            files=tuple(files),
            spec=spec,
            sections=tuple(sections),
            dense=self._dense(self._map(index, "dense"), spec),
            experts=self._experts(self._map(index, "experts"), spec),
            generation=self._generation(index),
            quality=self._quality(index.get("quality")),
        )
        provenance, blobs = self._map(index, "provenance"), self._blobs(self._map(index, "blobs"))
        return checked, provenance, blobs, self._strings(index, "unused")

    def _error(self, message: str) -> PackError:
        # It may quote the index: at some length, and with what steers a terminal.
        message = "".join(c if c.isprintable() else "\ufffd" for c in message[:400])
        return PackError(f"{self._path}: {message}")

    def _map(self, index: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = index.get(key)
        if not isinstance(value, dict) or any(not isinstance(name, str) for name in value):
            raise self._error(f"index: {key} is not a map")
        return value

    def _strings(self, index: Mapping[str, Any], key: str) -> list[str]:
        value = index.get(key)
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            raise self._error(f"index: {key} is not a list of names")
        return value

    def _generation(self, index: Mapping[str, Any]) -> dict[str, Any]:
        generation = self._map(index, "generation")
        for key in ("bos_token_ids", "eos_token_ids"):
            ids = generation.get(key, [])
            if not is_counts(ids, None) or any(token >= 1 << 31 for token in ids):
                raise self._error(f"index: generation: {key} = {quote(ids)} is not a list of token ids")
        return generation

    def _quality(self, value: Any) -> MeasuredQuality | None:
        """What is known is checked and kept, anything else left out."""
        if value is None:
            return None

        def number(entry: Any, key: str, where: str) -> float:
            found: Any = entry.get(key) if isinstance(entry, dict) else None
            if type(found) not in (int, float) or not math.isfinite(found) or found < 0:
                raise self._error(f"index: quality: {where}: {key} = {quote(found)} is not a number from 0 on")
            return float(found)

        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise self._error("index: quality: no text")
        levels, modes = value.get("levels"), value.get("modes")
        if not isinstance(levels, list) or not 1 <= len(levels) <= MAX_LEVELS:
            raise self._error(f"index: quality: levels are {quote(levels)}")
        if not isinstance(modes, dict) or any(not isinstance(name, str) for name in modes) or len(modes) > 16:
            raise self._error(f"index: quality: modes are {quote(modes)}")
        checked: dict[str, ModeQuality] = {}
        for name, mode in modes.items():
            where = f"mode {quote(name)}"
            thresholds = mode.get("thresholds") if isinstance(mode, dict) else None
            if (
                not isinstance(thresholds, list)
                or len(thresholds) >= MAX_LEVELS
                or any(type(item) not in (int, float) or not -1 <= item <= 1 for item in thresholds)
                or thresholds != sorted(thresholds)
            ):
                raise self._error(f"index: quality: {where}: {quote(thresholds)} are not ascending thresholds")
            checked[name] = ModeQuality(
                thresholds=tuple(float(item) for item in thresholds),
                perplexity=number(mode, "perplexity", where),
                kl=number(mode, "kl", where),
                mean_bits=number(mode, "mean_bits", where),
            )
        return MeasuredQuality(
            text=value["text"],
            tokens=int(number(value, "tokens", "text")),
            reference=number(value.get("reference"), "perplexity", "reference"),
            levels=tuple(
                LevelQuality(
                    int(number(level, "bits", "levels")),
                    number(level, "perplexity", "levels"),
                    number(level, "kl", "levels"),
                )
                for level in levels
            ),
            modes=checked,
        )

    def _files(self, names: list[str]) -> tuple[list[str], list[int]]:
        """Absolute paths and usable sizes. Other files lie beside the pack, under plain names."""
        if not names or names[0] != "" or len(names) > 1 << 16:
            raise self._error("index: files does not begin with the pack itself")
        own = Path(os.path.abspath(self._path))  # noqa: PTH100 (resolve would follow the links of a cache folder)
        paths, sizes = [str(own)], [self._index_offset]
        for name in names[1:]:
            if not name or name in (".", "..") or any(c in "/\\:" or ord(c) < 32 or c == "\x7f" for c in name):
                raise self._error(f"index: {quote(name)} is not the name of a file beside the pack")
            file = own.with_name(name)
            try:
                status = file.lstat()
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise self._error(f"its file {quote(name)}: {reason}") from None
            if not stat.S_ISREG(status.st_mode):
                raise self._error(f"its file {quote(name)} is not a regular file")
            paths.append(str(file))
            sizes.append(status.st_size)
        return paths, sizes

    def _sections(self, value: Any, sizes: list[int]) -> list[Section]:
        if not isinstance(value, list):
            raise self._error("index: sections is not a list")
        sections, spans = [], []
        for number, entry in enumerate(value):
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list) or not entry[0]:
                raise self._error(f"section {number}: {quote(entry)} is not extents and a checksum")
            if type(entry[1]) is not int or not 0 <= entry[1] < 1 << 32:
                raise self._error(f"section {number}: {quote(entry[1])} is not a checksum")
            extents = []
            for extent in entry[0]:
                if not is_counts(extent, 3):
                    raise self._error(f"section {number}: {quote(extent)} is not an extent")
                file, offset, length = extent
                if file >= len(sizes):
                    raise self._error(f"section {number}: file {file} of {len(sizes)}")
                first = BLOCK if file == 0 else 0
                if length < 1 or offset < first or offset + length > sizes[file]:
                    raise self._error(
                        f"section {number}: {length} bytes at {offset} are not within bytes {first}-{sizes[file]}"
                        f" of file {file}"
                    )
                extents.append(Extent(file, offset, length))
                spans.append((file, offset, length, number))
            if len(extents) > len(PARTS):
                raise self._error(f"section {number}: {len(extents)} extents (at most {len(PARTS)})")
            section = Section(tuple(extents), entry[1])
            if section.length > MAX_SECTION:
                raise self._error(f"section {number}: {section.length} bytes (at most {MAX_SECTION})")
            sections.append(section)
            self._section_lengths.append(section.length)
            self._extent_lengths.append([extent.length for extent in extents])
        # Without this, a small file could claim a great amount of data.
        spans.sort()
        for (file, offset, length, number), (next_file, next_offset, _, next_number) in itertools.pairwise(spans):
            if file == next_file and offset + length > next_offset:
                raise self._error(f"sections {number} and {next_number} overlap at byte {next_offset} of file {file}")
        return sections

    def _dense(self, value: dict[str, Any], spec: ModelSpec) -> dict[str, DenseTensor]:
        shapes = spec.dense_tensors()
        if value.keys() != shapes.keys():
            missing, unknown = sorted(shapes.keys() - value.keys()), sorted(value.keys() - shapes.keys())
            what = f"{missing[0]} is missing" if missing else f"the model has no {quote(unknown[0])}"
            raise self._error(f"index: dense: {what}")
        tensors = {}
        for name, shape in shapes.items():
            entry = value[name]
            if not isinstance(entry, list) or len(entry) != 3 or not is_counts(entry[:2], 2):
                raise self._error(f"tensor {name}: {quote(entry)} is not [section, offset, layout]")
            section, offset, layout = entry
            size = self._tensor_size(name, layout, shape)
            if layout in NESTED:
                raise self._error(f"tensor {name}: layout {layout} is for experts only")
            if section >= len(self._section_lengths):
                raise self._error(f"tensor {name}: section {section} of {len(self._section_lengths)}")
            self._fits(name, offset, size, self._section_lengths[section], f"section {section}")
            tensors[name] = DenseTensor(section, offset, layout, shape)
        users = Counter(tensor.section for tensor in tensors.values())
        for name, tensor in tensors.items():
            if users[tensor.section] > 1:
                self._can_be_interleaved(name, tensor.layout, tensor.shape, f"section {tensor.section}")
        return tensors

    def _experts(self, value: dict[str, Any], spec: ModelSpec) -> dict[int, ExpertLayer]:
        expected = {str(number): number for number, layer in enumerate(spec.layers) if layer.experts}
        if value.keys() != expected.keys():
            wrong = sorted(value.keys() ^ expected.keys())[0]
            raise self._error(
                f"index: experts: layer {quote(wrong)} {'is missing' if wrong in expected else 'has none'}"
            )
        return {number: self._layer(number, value[key], spec) for key, number in expected.items()}

    def _layer(self, number: int, value: Any, spec: ModelSpec) -> ExpertLayer:
        where, experts = f"layer {number}", spec.layers[number].experts
        if not isinstance(value, dict) or not isinstance(value.get("levels"), list):
            raise self._error(f"{where}: experts have no levels")
        if not 1 <= len(value["levels"]) <= MAX_LEVELS:
            raise self._error(f"{where}: {len(value['levels'])} levels (1 to {MAX_LEVELS} are allowed)")
        levels = tuple(
            self._level(f"{where}, level {i}", level, spec.expert_tensors(number))
            for i, level in enumerate(value["levels"])
        )
        self._are_nested(where, levels)
        # Once for all experts: a model has thousands.
        sizes = [{name: tensor_size(part.layout, part.shape) for name, part in level.parts.items()} for level in levels]
        sections = value.get("sections")
        if not isinstance(sections, list) or len(sections) != experts:
            raise self._error(f"{where}: sections is not a list of {experts} experts")
        for expert, numbers in enumerate(sections):
            if (
                not is_counts(numbers, None)
                or not 1 <= len(numbers) <= len(levels)
                or any(n >= len(self._section_lengths) for n in numbers)
            ):
                raise self._error(
                    f"{where}, expert {expert}: {quote(numbers)} are not 1 to {len(levels)} of"
                    f" {len(self._section_lengths)} sections"
                )
            for level, size, section in zip(levels, sizes, numbers, strict=False):
                lengths = self._extent_lengths[section]
                for name, part in level.parts.items():
                    tensor = f"layers.{number}.experts.{expert}.{name}"
                    if part.extent >= len(lengths):
                        raise self._error(f"tensor {tensor}: extent {part.extent} of {len(lengths)}")
                    self._fits(tensor, part.offset, size[name], lengths[part.extent], f"section {section}")
        return ExpertLayer(levels, tuple(tuple(numbers) for numbers in sections))

    def _level(self, where: str, value: Any, shapes: dict[str, tuple[int, int]]) -> Level:
        if not isinstance(value, dict) or type(value.get("bits")) is not int or not 1 <= value["bits"] <= 32:
            raise self._error(f"{where}: no bits from 1 to 32")
        entries = value.get("parts")
        if not isinstance(entries, dict) or set(entries) != set(PARTS):
            raise self._error(f"{where}: parts are not {', '.join(PARTS)}")
        parts = {}
        for name in PARTS:
            entry = entries[name]
            if not isinstance(entry, list) or len(entry) != 3 or not is_counts(entry[1:], 2):
                raise self._error(f"{where}: {name}: {quote(entry)} is not [layout, extent, offset]")
            self._tensor_size(f"{where}: {name}", entry[0], shapes[name])
            parts[name] = Part(entry[0], entry[1], entry[2], shapes[name])
        users = Counter(part.extent for part in parts.values())
        for name, part in parts.items():
            if users[part.extent] > 1:
                self._can_be_interleaved(f"{where}: {name}", part.layout, part.shape, f"extent {part.extent}")
        return Level(value["bits"], parts)

    def _are_nested(self, where: str, levels: tuple[Level, ...]) -> None:
        """Several levels must refine each other; a single one can have any layout but that of a refinement."""
        below = 0
        for number, level in enumerate(levels):
            for name, part in level.parts.items():
                if part.layout not in NESTED:
                    if len(levels) > 1:
                        raise self._error(f"{where}, level {number}: {name}: layout {part.layout} is not nested")
                    continue
                bits, later = level_bits(part.layout)
                if (later is None) != (number > 0) or below + bits != level.bits or level.bits > MAX_NESTED_BITS:
                    raise self._error(
                        f"{where}, level {number}: {name}: layout {part.layout} does not make {level.bits} bits of"
                        f" the {below} of coarser levels (at most {MAX_NESTED_BITS})"
                    )
                if later is not None and later != len(levels) - 1:
                    raise self._error(
                        f"{where}: {name}: layout {part.layout} has parameters of {later} later levels, there are"
                        f" {len(levels) - 1}"
                    )
            below = level.bits

    def _blobs(self, value: dict[str, Any]) -> dict[str, Blob]:
        blobs = {}
        for name, entry in value.items():
            if not is_counts(entry, 2) or entry[0] >= len(self._section_lengths):
                raise self._error(f"blob {quote(name)}: {quote(entry)} is not [section, length]")
            if entry[1] > min(self._section_lengths[entry[0]], MAX_BLOB):
                raise self._error(
                    f"blob {quote(name)}: {entry[1]} bytes in a section of {self._section_lengths[entry[0]]}"
                    f" (at most {MAX_BLOB})"
                )
            blobs[name] = Blob(entry[0], entry[1])
        return blobs

    def _tensor_size(self, name: str, layout: Any, shape: tuple[int, ...]) -> int:
        if not isinstance(layout, str) or layout not in (*LAYOUTS, *NESTED, *ROW_MAJOR):
            raise self._error(
                f"tensor {name}: unknown layout {quote(layout)} (made by another edgemoe? convert the model anew)"
            )
        if (layout == "vector") != (len(shape) == 1):
            raise self._error(f"tensor {name}: layout {layout} for shape {list(shape)}")
        try:
            return tensor_size(layout, shape)
        except ValueError as error:
            raise self._error(f"tensor {name}: {error}") from None

    def _can_be_interleaved(self, name: str, layout: str, shape: tuple[int, ...], where: str) -> None:
        # In memory the last rows are filled up to a whole block; what shares its place has no room for that.
        if layout in ROW_MAJOR and shape[0] % ROW_BLOCK:
            raise self._error(
                f"tensor {name}: {shape[0]} rows of {layout} share {where}; only multiples of {ROW_BLOCK} can"
            )

    def _fits(self, name: str, offset: int, size: int, length: int, where: str) -> None:
        if offset % ALIGNMENT:
            raise self._error(f"tensor {name}: offset {offset} is not a multiple of {ALIGNMENT}")
        if offset + size > length:
            raise self._error(f"tensor {name}: {size} bytes at {offset} do not fit into {length} bytes of {where}")
