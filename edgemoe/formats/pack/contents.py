"""What a pack that is being written says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

from edgemoe.formats.index import DenseTensor, ExpertLayer, Extent, MeasuredQuality, ModelIndex, Section
from edgemoe.formats.pack.header import BLOCK, align
from edgemoe.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Blob:
    """A small file in the pack: the first `length` bytes of a section."""

    section: int
    length: int


@dataclass(slots=True)
class PackContents:
    """What a pack that is being written says in its index, except the sections."""

    spec: ModelSpec
    generation: dict[str, Any]
    provenance: dict[str, Any]
    dense: dict[str, DenseTensor]
    experts: dict[int, ExpertLayer]
    blobs: dict[str, Blob]
    unused: list[str]
    quality: MeasuredQuality | None = None

    def index(self, path: Path, files: Iterable[str], sections: Iterable[Section]) -> ModelIndex:
        """The same for the engine, with sections in these files."""
        return ModelIndex(
            path=path,
            files=tuple(files),
            spec=self.spec,
            sections=tuple(sections),
            dense=self.dense,
            experts=self.experts,
            generation=self.generation,
            quality=self.quality,
        )


def consecutive_sections(lengths: Iterable[int]) -> tuple[Section, ...]:
    """Sections of these lengths, as a writer places them, one after the other in a pack that does not exist."""
    sections, begin = list[Section](), BLOCK
    for length in lengths:
        sections.append(Section((Extent(0, begin, align(length, BLOCK)),)))
        begin += sections[-1].length
    return tuple(sections)


def encoded_index(contents: PackContents, sections: Sequence[Section]) -> bytes:
    """The index of a pack of one file, as it is stored (docs/format.md)."""
    index = {
        "required_features": [],
        "spec": contents.spec.to_dict(),
        "generation": contents.generation,
        "provenance": contents.provenance,
        "files": [""],
        "sections": [[[[e.file, e.offset, e.length] for e in s.extents], s.checksum] for s in sections],
        "dense": {name: [tensor.section, tensor.offset, tensor.layout] for name, tensor in contents.dense.items()},
        "experts": {
            str(number): {
                "levels": [
                    {
                        "bits": level.bits,
                        "parts": {name: [part.layout, part.extent, part.offset] for name, part in level.parts.items()},
                    }
                    for level in layer.levels
                ],
                "sections": layer.sections,
            }
            for number, layer in contents.experts.items()
        },
        "blobs": {name: [blob.section, blob.length] for name, blob in contents.blobs.items()},
        "unused": contents.unused,
        **({"quality": contents.quality.to_dict()} if contents.quality else {}),
    }
    packed: bytes = msgpack.packb(index)
    return packed
