"""The `.emoe` pack (docs/format.md): writing one section after the other, and reading with nothing taken on trust.

A writer works on `NAME.partial` beside the target and notes every finished section in `NAME.journal`; `finish` adds the
index and the header and renames. An interrupted writer leaves both files, and the next one with the same fingerprint
continues; any other failure removes them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import stat
import struct
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import msgpack  # type: ignore[import-untyped]

from edgemoe._core import crc32c
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
from edgemoe.formats.layouts import LAYOUTS, NESTED, ROW_MAJOR, level_bits, packed_size
from edgemoe.spec import ModelSpec

MAGIC = b"EMOE"
VERSION = 1
BLOCK = 4096
"""Sections begin at multiples of it, and are padded to one."""
ALIGNMENT = 64
"""Tensors begin at multiples of it within their section."""
MAX_INDEX = 16 << 20
MAX_SECTION = 4 << 30
MAX_BLOB = 256 << 20
MAX_LEVELS = 8
MAX_NESTED_BITS = 8
KNOWN_FEATURES: frozenset[str] = frozenset()

_HEADER = struct.Struct("<4sIQQI")
_CHUNK = 4 << 20

Bytes = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Blob:
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


def tensor_size(layout: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of one or two dimensions."""
    return packed_size(layout, shape[0], shape[1] if len(shape) > 1 else 1)


def align(offset: int, to: int) -> int:
    return -(-offset // to) * to


# -- writing --------------------------------------------------------------------------------------------------------


class PackWriter:
    """Writes one pack; a context manager.

    `done` sections were finished by an interrupted run with the same fingerprint: leave them out and `add` the rest.
    Leaving the context without `finish` removes what was written, except after KeyboardInterrupt.
    """

    def __init__(self, target: Path, stream: BinaryIO) -> None:
        self.target = target
        self._stream = stream
        self._journal: BinaryIO | None = None
        self._sections: list[Section] = []
        self.notes: dict[int, list[int]] = {}
        """Layer -> how many levels each of its experts has, as `note` was told, also in the interrupted run."""
        self._end = BLOCK
        self._finished = False

    @classmethod
    def create(cls, target: str | Path, fingerprint: str) -> PackWriter:
        """fingerprint: of the source and of all options. Raises PackError if another process writes this pack, OSError
        if the folder cannot be written."""
        target = Path(target)
        descriptor = os.open(partial_path(target), os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        stream = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            _lock(descriptor, target)
        except BaseException:
            stream.close()
            raise
        writer = cls(target, stream)
        try:
            writer._resume(fingerprint)
        except BaseException as error:
            writer.__exit__(type(error), error, None)
            raise
        return writer

    def _resume(self, fingerprint: str) -> None:
        """Keeps the sections of an interrupted run, and begins the journal anew with them."""
        self._sections, self.notes = _finished_sections(self._stream, journal_path(self.target), fingerprint)
        self._end += sum(section.length for section in self._sections)
        self._stream.truncate(self._end)
        self._journal = journal_path(self.target).open("wb", buffering=0)
        self._journal.write(json.dumps([fingerprint]).encode() + b"\n")
        for layer, levels in self.notes.items():
            self._journal.write(_note_line(layer, levels))
        for section in self._sections:
            self._journal.write(_journal_line(section))

    def note(self, layer: int, levels: list[int]) -> None:
        """Keeps for a later run how many levels the experts of a layer have, before the first of them is added."""
        self.notes[layer] = levels
        assert self._journal is not None
        self._journal.write(_note_line(layer, levels))

    def unfinished(self, contents: PackContents) -> ModelIndex:
        """The pack as far as it is written, to run it where it lies."""
        path = partial_path(self.target)
        return contents.index(path, [os.path.abspath(path)], self._sections)  # noqa: PTH100

    @property
    def done(self) -> int:
        """Sections written, the resumed ones included."""
        return len(self._sections)

    @property
    def bytes_done(self) -> int:
        return self._end - BLOCK

    def add(self, chunks: Iterable[Bytes]) -> int:
        """Writes the next section, the chunks one after the other and padded; returns its number."""
        start, checksum = self._end, 0
        self._stream.seek(start)
        for chunk in chunks:
            checksum = crc32c(chunk, checksum)
            self._end += self._write(chunk)
        padding = bytes(align(self._end, BLOCK) - self._end)
        checksum = crc32c(padding, checksum)
        self._end += self._write(padding)
        length = self._end - start
        if not 0 < length <= MAX_SECTION:
            raise PackError(f"{self.target}: section {len(self._sections)} has {length} bytes (at most {MAX_SECTION})")
        section = Section((Extent(0, start, length),), checksum)
        self._sections.append(section)
        assert self._journal is not None
        self._journal.write(_journal_line(section))
        return len(self._sections) - 1

    def finish(self, contents: PackContents) -> None:
        """Writes index and header, and gives the file its name: from then on it is a pack."""
        packed = msgpack.packb(_index(contents, self._sections))
        if len(packed) > MAX_INDEX:
            raise PackError(f"{self.target}: an index of {len(packed)} bytes (at most {MAX_INDEX})")
        self._stream.seek(self._end)
        self._write(packed)
        header = _HEADER.pack(MAGIC, VERSION, self._end, len(packed), crc32c(packed))
        self._stream.seek(0)
        self._write((header + crc32c(header).to_bytes(4, "little")).ljust(BLOCK, b"\0"))
        os.fsync(self._stream.fileno())
        if os.name == "nt":  # where an open file has no new name; elsewhere the lock is held until it has
            self._stream.close()
        partial_path(self.target).replace(self.target)
        self._finished = True
        self._close()
        journal_path(self.target).unlink(missing_ok=True)
        _sync_folder(self.target.parent)

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._finished:
            return
        if not (kind is not None and issubclass(kind, KeyboardInterrupt)):
            for leftover in (journal_path(self.target), partial_path(self.target)):
                with contextlib.suppress(OSError):
                    leftover.unlink()
        self._close()

    def _close(self) -> None:
        self._stream.close()
        if self._journal is not None:
            self._journal.close()

    def _write(self, data: Bytes) -> int:
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += self._stream.write(view[done : done + _CHUNK])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(partial_path(self.target))) from None
        return done


def partial_path(target: Path) -> Path:
    """Where a pack is while it is written."""
    return target.with_name(target.name + ".partial")


def journal_path(target: Path) -> Path:
    """JSON lines: [fingerprint], then [length, checksum] of every finished section."""
    return target.with_name(target.name + ".journal")


def _journal_line(section: Section) -> bytes:
    return json.dumps([section.length, section.checksum]).encode() + b"\n"


def _note_line(layer: int, levels: list[int]) -> bytes:
    return json.dumps({"layer": layer, "levels": levels}).encode() + b"\n"


def _finished_sections(stream: BinaryIO, journal: Path, fingerprint: str) -> tuple[list[Section], dict[int, list[int]]]:
    """The sections of an interrupted run that are wholly in the file (their checksums are computed anew), and the
    notes."""
    try:
        lines = journal.read_bytes().split(b"\n")[:-1]  # what follows the last line feed was cut off
        if not lines or json.loads(lines[0]) != [fingerprint]:
            return [], {}
        entries = [json.loads(line) for line in lines[1:]]
    except (OSError, ValueError, RecursionError):
        return [], {}
    sections, notes, offset = list[Section](), dict[int, list[int]](), BLOCK
    for entry in entries:
        if isinstance(entry, dict):
            if type(entry.get("layer")) is int and _is_counts(entry.get("levels"), None):
                notes[entry["layer"]] = entry["levels"]
            continue
        if not _is_counts(entry, 2) or not 0 < entry[0] <= MAX_SECTION:
            break
        section = Section((Extent(0, offset, entry[0]),), entry[1])
        stream.seek(offset)
        try:
            checksum = _checksum(_read_chunks(stream, section.extents[0], journal))
        except PackError:
            break
        if checksum != section.checksum:
            break
        sections.append(section)
        offset += entry[0]
    return sections, notes


def _lock(descriptor: int, target: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The file may have been finished and renamed between our opening and our locking it.
        ours = os.path.samestat(os.fstat(descriptor), partial_path(target).stat())
    except OSError:
        ours = False
    if not ours:
        raise PackError(f"{target}: another process is writing it")


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _index(contents: PackContents, sections: list[Section]) -> dict[str, Any]:
    return {
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


# -- reading --------------------------------------------------------------------------------------------------------


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
                offset, packed = _read_index(stream, os.fstat(stream.fileno()).st_size, path)
            return _Checker(path, offset).pack(_unpack(packed, path))
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
                    yield from _read_chunks(stream, extent, file)
                    if extent.length >= 1 << 20 and hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(stream.fileno(), extent.offset, extent.length, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise PackError(f"{file}: {error.strerror}") from None


def _read_chunks(stream: BinaryIO, extent: Extent, file: Path) -> Iterator[bytes]:
    """The extent's bytes; the stream is at its beginning."""
    done = 0
    while done < extent.length:
        chunk = stream.read(min(_CHUNK, extent.length - done))
        if not chunk:
            raise PackError(f"{file}: ends at byte {extent.offset + done}, {extent.length - done} bytes too early")
        done += len(chunk)
        yield chunk


def _checksum(chunks: Iterable[Bytes]) -> int:
    checksum = 0
    for chunk in chunks:
        checksum = crc32c(chunk, checksum)
    return checksum


def _read_index(stream: BinaryIO, size: int, path: Path) -> tuple[int, bytes]:
    """(offset, bytes) of the index of a file of `size` bytes."""
    header = b"".join(_read_chunks(stream, Extent(0, 0, min(size, BLOCK)), path))
    if header[:4] != MAGIC:
        raise PackError(f"{path}: not an .emoe pack (it begins with {header[:4].hex() or 'nothing'})")
    if size < BLOCK:
        raise PackError(f"{path}: {size} bytes, cut off within the header")
    _, version, offset, length, checksum = _HEADER.unpack_from(header)
    if version != VERSION:
        raise PackError(f"{path}: format version {version}, this edgemoe reads {VERSION}")
    found, stored = crc32c(header[: _HEADER.size]), int.from_bytes(header[_HEADER.size : _HEADER.size + 4], "little")
    if found != stored:
        raise PackError(f"{path}: header checksum {found:08x}, expected {stored:08x}")
    if any(header[_HEADER.size + 4 :]):
        raise PackError(f"{path}: the rest of the header is not zero")
    if length > MAX_INDEX:
        raise PackError(f"{path}: an index of {length} bytes (at most {MAX_INDEX})")
    if offset % BLOCK or offset < BLOCK or offset + length != size:
        raise PackError(f"{path}: an index of {length} bytes at {offset} does not end a file of {size} bytes")
    stream.seek(offset)
    packed = b"".join(_read_chunks(stream, Extent(0, offset, length), path))
    if crc32c(packed) != checksum:
        raise PackError(f"{path}: index checksum {crc32c(packed):08x}, expected {checksum:08x}")
    return offset, packed


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


class _Checker:
    """Turns an index into a `Pack`, checking each value before it is used."""

    def __init__(self, path: Path, index_offset: int) -> None:
        self._path = path
        self._index_offset = index_offset
        self._section_lengths: list[int] = []
        self._extent_lengths: list[list[int]] = []

    def pack(self, index: dict[str, Any]) -> Pack:
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
        return Pack(
            ModelIndex(
                path=self._path,
                files=tuple(files),
                spec=spec,
                sections=tuple(sections),
                dense=self._dense(self._map(index, "dense"), spec),
                experts=self._experts(self._map(index, "experts"), spec),
                generation=self._generation(index),
                quality=self._quality(index.get("quality")),
            ),
            provenance=self._map(index, "provenance"),
            blobs=self._blobs(self._map(index, "blobs")),
            unused=self._strings(index, "unused"),
        )

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
            if not _is_counts(ids, None) or any(token >= 1 << 31 for token in ids):
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
                if not _is_counts(extent, 3):
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
            if not isinstance(entry, list) or len(entry) != 3 or not _is_counts(entry[:2], 2):
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
        sections = value.get("sections")
        if not isinstance(sections, list) or len(sections) != experts:
            raise self._error(f"{where}: sections is not a list of {experts} experts")
        for expert, numbers in enumerate(sections):
            if (
                not _is_counts(numbers, None)
                or not 1 <= len(numbers) <= len(levels)
                or any(n >= len(self._section_lengths) for n in numbers)
            ):
                raise self._error(
                    f"{where}, expert {expert}: {quote(numbers)} are not 1 to {len(levels)} of"
                    f" {len(self._section_lengths)} sections"
                )
            for level, section in zip(levels, numbers, strict=False):
                lengths = self._extent_lengths[section]
                for name, part in level.parts.items():
                    tensor = f"layers.{number}.experts.{expert}.{name}"
                    if part.extent >= len(lengths):
                        raise self._error(f"tensor {tensor}: extent {part.extent} of {len(lengths)}")
                    size = tensor_size(part.layout, part.shape)
                    self._fits(tensor, part.offset, size, lengths[part.extent], f"section {section}")
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
            if not isinstance(entry, list) or len(entry) != 3 or not _is_counts(entry[1:], 2):
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
            if not _is_counts(entry, 2) or entry[0] >= len(self._section_lengths):
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


def _is_counts(value: Any, length: int | None) -> TypeGuard[list[int]]:
    """A list of integers >= 0, of this length unless it is None."""
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )
