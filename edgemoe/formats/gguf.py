"""Reads GGUF files: metadata, and tensors piece by piece.

The file is not trusted. Every count, length and offset is checked against what is left of the file before it is used,
the metadata are bounded in bytes and in elements, and a read takes no more memory than the piece that was asked for.
Nothing is mapped.
"""

from __future__ import annotations

import array
import hashlib
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from edgemoe.errors import SourceError, quote, shorten
from edgemoe.formats.ggml_blocks import TYPES, TYPES_BY_CODE, dequantize
from edgemoe.formats.index import Extent

MAX_METADATA = 128 << 20
"""Bytes of metadata and tensor descriptions of one file (the largest vocabularies take 20 MiB)."""
MAX_STRINGS = 4 << 20
"""Strings in all arrays of one file."""
MAX_STRING = 16 << 20
"""Bytes of one string outside of arrays (a chat template)."""
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME = 1 << 10
"""Bytes of the name of a key or a tensor."""
MAX_SHARDS = 1000

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_STRING, _ARRAY = 8, 9
# Number of a scalar's type -> its form for struct and numpy.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NUMPY = {"B": "u1", "b": "i1", "H": "<u2", "h": "<i2", "I": "<u4", "i": "<i4", "f": "<f4", "?": "u1"}
_NUMPY |= {"Q": "<u8", "q": "<i8", "d": "<f8"}

_READ_AT_ONCE = 4 << 20
_WEIGHTS_AT_ONCE = 1 << 20
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def is_gguf(path: Path) -> bool:
    """Whether the file calls itself one, by its name or its first bytes."""
    try:
        if not path.is_file():
            return False
        with path.open("rb", buffering=0) as stream:
            return path.suffix == ".gguf" or stream.read(4) == _MAGIC
    except OSError:
        return False


class TensorInfo(NamedTuple):
    """type: a name of `ggml_blocks.TYPES`. shape: rows first, so a matrix is [output, input] and a stack of experts
    [experts, output, input]. file: number of the file it lies in; offset: from the beginning of that file; nbytes."""

    type: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


class StringArray(Sequence[str]):
    """An array of strings as it lies in the file; an element is decoded when it is asked for."""

    def __init__(self, data: bytes, starts: array.array[int], where: str) -> None:
        """starts: where each string begins in `data`, and 8 bytes past the end of the last (there is a length before
        each)."""
        self._data = data
        self._starts = starts
        self._where = where

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Raises SourceError for a string that is not UTF-8."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return _text(self._data[self._starts[number] : self._starts[number + 1] - 8], f"{self._where}[{number}]")

    def __iter__(self) -> Iterator[str]:
        data, starts = self._data, self._starts
        begin = starts[0]
        for number in range(len(starts) - 1):
            end = starts[number + 1]
            try:
                yield data[begin : end - 8].decode()
            except UnicodeDecodeError:
                raise SourceError(f"{self._where}[{number}] is not UTF-8") from None
            begin = end

    def __repr__(self) -> str:
        return f"StringArray of {len(self)}"


class GgufModel:
    """One model: a GGUF file, or the files it was split into.

    files: absolute paths, in order; `TensorInfo.file` counts them. metadata: of the first file; numbers, bools and
    strings as such, arrays of numbers as numpy arrays, arrays of strings as `StringArray`. A float32 is given as the
    shortest decimal number that means it (1e-06, not 9.999999974752427e-07). tensors: name -> TensorInfo.
    """

    def __init__(self, files: list[Path], metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = files[0]
        self.files = files
        self.metadata = metadata
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | Path) -> GgufModel:
        """Reads the descriptions. The path of any file of a split model stands for all. Raises SourceError."""
        path = Path(os.path.abspath(path))  # noqa: PTH100 (resolve would follow the links of a cache folder)
        match = _SHARD.fullmatch(path.name)
        if match is None:
            metadata, tensors = _read_header(path, 0)
            count = metadata.get("split.count", 1)
            if count not in (0, 1):
                raise SourceError(f"{path}: one of {count} files, but not called NAME-00001-of-{count:05}.gguf")
            return cls([path], metadata, tensors)
        stem, count = match[1], int(match[3])
        if not 1 <= int(match[2]) <= count <= MAX_SHARDS:
            raise SourceError(f"{path}: file {int(match[2])} of {count} (at most {MAX_SHARDS})")
        files = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
        first: dict[str, Any] = {}
        tensors = {}
        for number, file in enumerate(files):
            metadata, found = _read_header(file, number)
            if number == 0:
                first = metadata
            for key, expected in (("split.no", number), ("split.count", count)):
                if metadata.get(key, 1 if count == 1 and key == "split.count" else 0) != expected:
                    raise SourceError(f"{file}: {key} = {quote(metadata.get(key))}, expected {expected}")
            for name, info in found.items():
                if name in tensors:
                    raise SourceError(f"{file}: tensor {shorten(name)} is in {files[tensors[name].file].name} too")
                tensors[name] = info
            if len(tensors) > MAX_TENSORS:
                raise SourceError(f"{file}: more than {MAX_TENSORS} tensors")
        promised = first.get("split.tensors.count", len(tensors))
        if promised != len(tensors):
            raise SourceError(f"{files[0]}: split.tensors.count = {quote(promised)}, but the files have {len(tensors)}")
        return cls(files, first, tensors)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Raises SourceError if there is no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise SourceError(f"{self.path}: tensor {shorten(name)} is missing")
        return info

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """Changes when a description, or the size or modification time of a file changes."""
        digest = hashlib.sha256()
        for name in self.names():
            digest.update(repr((name, *self.tensors[name])).encode())
        for file in self.files:
            status = file.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def extent(self, name: str, index: int | None = None, rows: tuple[int, int] | None = None) -> Extent:
        """Where the tensor's bytes lie, or those of one slice of its first axis, or of a range of rows of it. They are
        always contiguous: a row is a whole number of blocks. Raises SourceError."""
        info, shape, first = self._part(name, index, rows)
        kind = TYPES[info.type]
        offset = info.offset + first // kind.weights * kind.nbytes
        return Extent(info.file, offset, math.prod(shape) // kind.weights * kind.nbytes)

    def read(self, name: str, index: int | None = None, rows: tuple[int, int] | None = None) -> npt.NDArray[np.float32]:
        """The tensor's values as float32, or those of a part of it.

        index: a slice of the first axis, for stacked tensors; rows: then, a range (first, end) of the first axis that
        is left. Only these bytes are read. Raises SourceError, also for types that are not in `ggml_blocks.READABLE`.
        """
        info, shape, _ = self._part(name, index, rows)
        kind, extent = TYPES[info.type], self.extent(name, index, rows)
        dequantize(info.type, np.empty(0, np.uint8))  # refuses before anything is read
        values = np.empty(math.prod(shape), np.float32)
        step = max(1, _WEIGHTS_AT_ONCE // kind.weights)
        blocks = np.empty(min(step * kind.nbytes, extent.length), np.uint8)
        file = self.files[info.file]
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(extent.offset)
                for done in range(0, extent.length, step * kind.nbytes):
                    piece = blocks[: min(len(blocks), extent.length - done)]
                    _fill(stream, piece.data, file, name)
                    at = done // kind.nbytes * kind.weights
                    values[at : at + len(piece) // kind.nbytes * kind.weights] = dequantize(info.type, piece)
                _forget(stream.fileno(), extent)
        except OSError as error:
            raise SourceError(f"{file}: {shorten(name)}: {error.strerror}") from None
        return values.reshape(shape)

    def read_bytes(self, name: str, index: int | None = None, rows: tuple[int, int] | None = None) -> bytearray:
        """The blocks themselves. Raises SourceError."""
        extent = self.extent(name, index, rows)
        data, file = bytearray(extent.length), self.files[extent.file]
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(extent.offset)
                _fill(stream, memoryview(data), file, name)
                _forget(stream.fileno(), extent)
        except OSError as error:
            raise SourceError(f"{file}: {shorten(name)}: {error.strerror}") from None
        return data

    def _part(
        self, name: str, index: int | None, rows: tuple[int, int] | None
    ) -> tuple[TensorInfo, tuple[int, ...], int]:
        """(the tensor, shape of the part, number of its first weight)."""
        info = self.info(name)
        shape, first, where = info.shape, 0, self.files[info.file]
        if index is not None:
            if len(shape) < 2 or not 0 <= index < shape[0]:
                raise SourceError(f"{where}: tensor {shorten(name)} {list(info.shape)} has no slice {index}")
            shape = shape[1:]
            first = index * math.prod(shape)
        if rows is not None:
            if len(shape) < 2 or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise SourceError(f"{where}: tensor {shorten(name)} {list(info.shape)} has no rows {rows[0]}-{rows[1]}")
            first += rows[0] * math.prod(shape[1:])
            shape = (rows[1] - rows[0], *shape[1:])
        return info, shape, first


class _Cursor:
    """Reads the beginning of a file, further and further, and never more than MAX_METADATA of it."""

    def __init__(self, stream: BinaryIO, size: int, file: Path) -> None:
        self._stream = stream
        self._limit = min(size, MAX_METADATA)
        self.file = file
        self.size = size
        self.data = bytearray()
        self.at = 0

    @property
    def left(self) -> int:
        """Bytes that metadata can still take."""
        return self._limit - self.at

    def need(self, count: int, what: str) -> int:
        """Makes sure that `count` bytes from here on are in `data`, moves past them and returns where they begin."""
        if count > self.left:
            place = "the file" if self._limit == self.size else f"the {MAX_METADATA} bytes that metadata may take"
            raise SourceError(
                f"{self.file}: {what}: {count} bytes at {self.at} go beyond the end of {place} of {self.size} bytes"
            )
        begin, self.at = self.at, self.at + count
        while len(self.data) < self.at:
            piece = bytearray(min(_READ_AT_ONCE, self._limit - len(self.data)))
            _fill(self._stream, memoryview(piece), self.file, what)
            self.data += piece
        return begin

    def scalar(self, form: str, what: str) -> Any:
        begin = self.need(struct.calcsize("<" + form), what)
        return struct.unpack_from("<" + form, self.data, begin)[0]

    def string(self, what: str, most: int = MAX_STRING) -> str:
        length = self.scalar("Q", what)
        if length > most:
            raise SourceError(f"{self.file}: {what}: a string of {length} bytes (at most {most})")
        begin = self.need(length, what)
        return _text(bytes(self.data[begin : begin + length]), f"{self.file}: {what}")

    def strings(self, count: int, what: str) -> StringArray:
        """An array of strings; the caller has checked that `count` of them can be there."""
        starts: array.array[int] = array.array("Q")
        begin = position = self.at
        unpack, append = struct.Struct("<Q").unpack_from, starts.append
        for number in range(count):
            # The loop of `need`, spelled out for the common case: a vocabulary has half a million strings.
            if position + 8 > len(self.data):
                self.at = position
                self.need(8, what)
            length = unpack(self.data, position)[0]
            position += 8
            append(position - begin)
            if length > len(self.data) - position:
                self.at = position
                self.need(length, f"{what}[{number}]")
            position += length
        self.at = position
        append(position - begin + 8)
        return StringArray(bytes(self.data[begin:position]), starts, f"{self.file}: {what}")


class _Header:
    """What has been read of one file's header, so far."""

    def __init__(self, cursor: _Cursor) -> None:
        self._cursor = cursor
        self._strings = 0

    def metadata(self, count: int) -> dict[str, Any]:
        cursor = self._cursor
        values: dict[str, Any] = {}
        for number in range(count):
            key = cursor.string(f"key {number}", MAX_NAME)
            if not key or key in values:
                raise SourceError(
                    f"{cursor.file}: key {number}: {shorten(key)} {'appears twice' if key else 'is empty'}"
                )
            what = f"key {shorten(key)}"
            kind = cursor.scalar("I", what)
            if kind == _ARRAY:
                values[key] = self._array(what)
            elif kind == _STRING:
                values[key] = cursor.string(what)
            elif kind in _SCALARS:
                values[key] = _scalar(cursor, _SCALARS[kind], what)
            else:
                raise SourceError(f"{cursor.file}: {what}: unknown type {kind}")
        return values

    def _array(self, what: str) -> StringArray | npt.NDArray[Any]:
        cursor = self._cursor
        kind, count = cursor.scalar("I", what), cursor.scalar("Q", what)
        if kind == _STRING:
            self._strings += count
            if self._strings > MAX_STRINGS:
                raise SourceError(f"{cursor.file}: {what}: {self._strings} strings in arrays (at most {MAX_STRINGS})")
            if 8 * count > cursor.left:
                raise SourceError(f"{cursor.file}: {what}: {count} strings in the {cursor.left} bytes that are left")
            return cursor.strings(count, what)
        if kind not in _SCALARS:
            problem = "arrays in arrays are not supported" if kind == _ARRAY else f"an array of unknown type {kind}"
            raise SourceError(f"{cursor.file}: {what}: {problem}")
        dtype = np.dtype(_NUMPY[_SCALARS[kind]])
        begin = cursor.need(count * dtype.itemsize, what)
        # Copied before anything else is read: a bytearray cannot grow while a numpy array looks at it.
        values = np.frombuffer(bytes(cursor.data[begin : cursor.at]), dtype)
        return values != 0 if _SCALARS[kind] == "?" else values

    def tensor(self, number: int) -> tuple[str, TensorInfo]:
        """The next description; its offset still counts from the beginning of the tensors' data."""
        cursor = self._cursor
        name = cursor.string(f"tensor {number}", MAX_NAME)
        where = f"{cursor.file}: tensor {shorten(name)}"
        dimensions = cursor.scalar("I", f"tensor {shorten(name)}")
        if not 1 <= dimensions <= 4:
            raise SourceError(f"{where}: {dimensions} dimensions (1 to 4 are allowed)")
        shape = tuple(reversed([cursor.scalar("Q", f"tensor {shorten(name)}") for _ in range(dimensions)]))
        code, offset = cursor.scalar("I", f"tensor {shorten(name)}"), cursor.scalar("Q", f"tensor {shorten(name)}")
        if 0 in shape or math.prod(shape) >= 1 << 56:
            raise SourceError(f"{where}: bad shape {list(shape)}")
        kind = TYPES_BY_CODE.get(code)
        if kind is None:
            raise SourceError(f"{where}: unknown type {code}")
        if shape[-1] % kind.weights:
            raise SourceError(f"{where}: rows of {shape[-1]} are not whole blocks of {kind.weights} ({kind.name})")
        return name, TensorInfo(kind.name, shape, 0, offset, math.prod(shape) // kind.weights * kind.nbytes)


def _read_header(file: Path, number: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """(metadata, tensors) of one file; `number` is its number in the model."""
    try:
        if not file.is_file():
            raise SourceError(f"{file}: {'not a file' if file.exists() else 'no such file'}")
        with file.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            return _parse(_Cursor(stream, size, file), number)
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}") from None


def _parse(cursor: _Cursor, number: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    file = cursor.file
    begin = cursor.need(4, "header")
    if cursor.data[begin : begin + 4] != _MAGIC:
        raise SourceError(f"{file}: not a GGUF file (it begins with {cursor.data[begin : begin + 4].hex()})")
    version = cursor.scalar("I", "header")
    if version not in (2, 3):
        reason = "a big-endian file" if version and version % (1 << 16) == 0 else f"version {version}"
        raise SourceError(f"{file}: {reason} (versions 2 and 3, little-endian, are supported)")
    tensor_count, key_count = cursor.scalar("Q", "header"), cursor.scalar("Q", "header")
    for what, count, most in (("tensors", tensor_count, MAX_TENSORS), ("keys", key_count, MAX_KEYS)):
        if count > most:
            raise SourceError(f"{file}: {count} {what} (at most {most})")
    header = _Header(cursor)
    metadata = header.metadata(key_count)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise SourceError(f"{file}: general.alignment = {quote(alignment)} is not a power of two")
    described: dict[str, TensorInfo] = {}
    for index in range(tensor_count):
        name, info = header.tensor(index)
        if not name or name in described:
            raise SourceError(f"{file}: tensor {index}: {shorten(name)} {'appears twice' if name else 'has no name'}")
        if info.offset % alignment:
            raise SourceError(f"{file}: tensor {shorten(name)}: offset {info.offset} is no multiple of {alignment}")
        described[name] = info
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: info._replace(file=number, offset=info.offset + start) for name, info in described.items()}
    end, previous = start, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise SourceError(
                f"{file}: tensor {shorten(name)} at {info.offset} overlaps {shorten(previous)}, up to {end}"
            )
        end, previous = info.offset + info.nbytes, name
        if end > cursor.size:
            raise SourceError(
                f"{file}: tensor {shorten(name)}: {info.nbytes} bytes at {info.offset} go beyond the end of the file of"
                f" {cursor.size} bytes"
            )
    return metadata, tensors


def _scalar(cursor: _Cursor, form: str, what: str) -> Any:
    value = cursor.scalar(form, what)
    return float(str(np.float32(value))) if form == "f" else value


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{where} is not UTF-8 at byte {error.start}") from None


def _fill(stream: BinaryIO, target: memoryview, file: Path, what: str) -> None:
    done = 0
    while done < len(target):
        count = stream.readinto(target[done : done + _READ_AT_ONCE])  # type: ignore[attr-defined]
        if not count:
            raise SourceError(f"{file}: {shorten(what)}: the file ends {len(target) - done} bytes too early")
        done += count


def _forget(descriptor: int, extent: Extent) -> None:
    """Drops what was read from the page cache: a conversion reads everything once and must not push out the rest."""
    if extent.length >= 1 << 20 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, extent.offset, extent.length, os.POSIX_FADV_DONTNEED)
