"""Reads a pack, whose index is checked before anything of it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

from edgemoe._core import crc32c
from edgemoe.errors import PackError
from edgemoe.formats.index import ModelIndex, Section
from edgemoe.formats.layouts import tensor_size
from edgemoe.formats.pack.checks import IndexChecker
from edgemoe.formats.pack.chunks import read_chunks
from edgemoe.formats.pack.contents import Blob
from edgemoe.formats.pack.header import read_index


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack whose index has been read and checked; the sections are read when they are asked for.

    index: file 0 is the pack itself. provenance: where it comes from. unused: tensors of the source that are not in it.
    """

    index: ModelIndex
    provenance: dict[str, Any]
    blobs: dict[str, Blob]
    unused: list[str]

    @classmethod
    def open(cls, path: str | Path) -> Pack:
        """Raises PackError unless every section and tensor lies within its file."""
        path = Path(path)
        try:
            if not path.is_file() and path.exists():  # opening a pipe would wait for its other end
                raise PackError(f"{path}: not a file")
            with path.open("rb", buffering=0) as stream:
                offset, packed = read_index(stream, os.fstat(stream.fileno()).st_size, path)
            return cls(*IndexChecker(path, offset).check(_unpack(packed, path)))
        except OSError as error:
            raise PackError(f"{path}: {error.strerror or error}") from None

    def read_section(self, number: int) -> bytes:
        """The bytes of a section, padding included. Raises PackError if the checksum differs."""
        section = self.index.sections[number]
        data = bytearray(section.length)
        at = 0
        for chunk in self._chunks(section):
            data[at : at + len(chunk)] = chunk
            at += len(chunk)
        found = crc32c(data)
        if found != section.checksum:
            raise PackError(f"{self._damage(number)}: checksum {found:08x}, expected {section.checksum:08x}")
        return bytes(data)

    def read_blob(self, name: str) -> bytes:
        """Raises PackError if there is none of this name."""
        if name not in self.blobs:
            raise PackError(f"{self.index.path}: no {name} in it")
        blob = self.blobs[name]
        return self.read_section(blob.section)[: blob.length]

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Reads everything; returns one line for each damaged section. progress(bytes read, bytes in all)."""
        total, done = sum(section.length for section in self.index.sections), 0
        damaged = []
        for number, section in enumerate(self.index.sections):
            checksum = 0
            try:
                for chunk in self._chunks(section):
                    checksum = crc32c(chunk, checksum)
                    if progress is not None:
                        progress(done + min(section.length, len(chunk)), total)
                if checksum != section.checksum:
                    damaged.append(f"{self._damage(number)}: checksum {checksum:08x}, expected {section.checksum:08x}")
            except PackError as error:
                damaged.append(f"{self._damage(number)}: {error}")
            done += section.length
            if progress is not None:
                progress(done, total)
        return damaged

    def layout_bytes(self) -> dict[str, dict[str, int]]:
        """{"dense": {layout: bytes}, "experts": {layout: bytes}}, without padding between tensors."""
        dense: dict[str, int] = {}
        for tensor in self.index.dense.values():
            dense[tensor.layout] = dense.get(tensor.layout, 0) + tensor_size(tensor.layout, tensor.shape)
        experts: dict[str, int] = {}
        for layer in self.index.experts.values():
            for number, level in enumerate(layer.levels):
                count = sum(len(sections) > number for sections in layer.sections)
                for part in level.parts.values():
                    size = count * tensor_size(part.layout, part.shape)
                    experts[part.layout] = experts.get(part.layout, 0) + size
        return {"dense": dense, "experts": experts}

    def section_contents(self, number: int) -> str:
        """What lies in a section, in words: "layer 3, expert 17"."""
        for layer_number, layer in self.index.experts.items():
            for expert, sections in enumerate(layer.sections):
                if number in sections:
                    level = f", level {sections.index(number)}" if len(sections) > 1 else ""
                    return f"layer {layer_number}, expert {expert}{level}"
        names = [name for name, tensor in self.index.dense.items() if tensor.section == number]
        names += [name for name, blob in self.blobs.items() if blob.section == number]
        return ", ".join(names) or "not used"

    def _damage(self, number: int) -> str:
        return f"{self.index.path}: section {number} ({self.section_contents(number)})"

    def _chunks(self, section: Section) -> Iterator[bytes]:
        for extent in section.extents:
            file = Path(self.index.files[extent.file])
            try:
                with file.open("rb", buffering=0) as stream:
                    stream.seek(extent.offset)
                    yield from read_chunks(stream, extent, file)
                    if extent.length >= 1 << 20 and hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(stream.fileno(), extent.offset, extent.length, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise PackError(f"{file}: {error.strerror}") from None


def _unpack(packed: bytes, path: Path) -> dict[str, Any]:
    try:
        # One pass without building anything: a count that is not followed by as many items ends here, before a list
        # of that length is allocated.
        unpacker = msgpack.Unpacker(max_buffer_size=len(packed) + 1)
        unpacker.feed(packed)
        unpacker.skip()
        if unpacker.tell() != len(packed):
            raise ValueError(f"{len(packed) - unpacker.tell()} bytes follow it")
        index = msgpack.unpackb(packed, raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise PackError(f"{path}: the index is not valid msgpack: {error or type(error).__name__}") from None
    if not isinstance(index, dict):
        raise PackError(f"{path}: the index is not a map")
    return index
