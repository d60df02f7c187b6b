"""Reads the tensors of a Hugging Face folder of safetensors files, one at a time and in pieces.

The folder is not trusted: a header's size, every offset, shape and name is checked before it is used, and a read never
takes more memory than the piece that was asked for. Nothing is mapped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from edgemoe.errors import SourceError, quote, shorten
from edgemoe.formats.index import Extent

MAX_HEADER = 100_000_000
"""Bytes of the largest header, as in the reference implementation."""
MAX_JSON = 100_000_000
"""Bytes of the largest other JSON file."""

_READ_AT_ONCE = 16 << 20

# safetensors' name -> (our name, numpy type to read it as). bfloat16 is read as its bit pattern; what has no numpy type
# can lie in a file, but not be read.
_DTYPES: dict[str, tuple[str, str]] = {
    "F32": ("f32", "<f4"),
    "F16": ("f16", "<f2"),
    "BF16": ("bf16", "<u2"),
    "F64": ("f64", "<f8"),
    "I64": ("i64", "<i8"),
    "I32": ("i32", "<i4"),
    "I16": ("i16", "<i2"),
    "I8": ("i8", "i1"),
    "U64": ("u64", "<u8"),
    "U32": ("u32", "<u4"),
    "U16": ("u16", "<u2"),
    "U8": ("u8", "u1"),
    "BOOL": ("bool", "u1"),
    "F8_E4M3": ("f8_e4m3", "u1"),
    "F8_E5M2": ("f8_e5m2", "u1"),
}


class TensorInfo(NamedTuple):
    """dtype: "f32", "bf16", "f16", ... (lower case). shape: as in the file."""

    dtype: str
    shape: tuple[int, ...]


class _Place(NamedTuple):
    info: TensorInfo
    read_as: str
    file: Path
    offset: int


class SafetensorsFolder:
    """The tensors of one model folder, sharded or not.

    files: those that tensors lie in, sorted.
    """

    def __init__(self, folder: Path, places: dict[str, _Place]) -> None:
        self.folder = folder
        self.files = sorted({place.file for place in places.values()})
        self._places = places

    @classmethod
    def open(cls, folder: str | Path) -> SafetensorsFolder:
        """Reads the headers. Raises SourceError."""
        folder = Path(folder)
        places: dict[str, _Place] = {}
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if single.exists() or not index.exists():
            files, promised = [single], {}
            if not single.exists():
                files = sorted(folder.glob("*.safetensors"))
                if len(files) != 1:
                    raise SourceError(f"{folder}: no model.safetensors or model.safetensors.index.json")
        else:
            promised = _weight_map(index)
            files = [folder / name for name in sorted(set(promised.values()))]
        for file in files:
            for name, place in _read_header(file).items():
                if name in places:
                    raise SourceError(f"{file}: tensor {shorten(name)} is in {places[name].file.name} too")
                places[name] = place
        for name, shard in promised.items():
            if name not in places or places[name].file.name != shard:
                raise SourceError(f"{index}: tensor {shorten(name)} is not in {shard}")
        return cls(folder, places)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def info(self, name: str) -> TensorInfo:
        """Raises SourceError if there is no such tensor."""
        return self._place(name).info

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(place.info.shape) * np.dtype(place.read_as).itemsize for place in self._places.values())

    def fingerprint(self) -> str:
        """Changes when a header, or the size or modification time of a file changes."""
        digest = hashlib.sha256()
        for name in self.names():
            place = self._places[name]
            digest.update(repr((name, place.info, place.file.name, place.offset)).encode())
        for file in self.files:
            status = file.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def read(self, name: str, rows: tuple[int, int] | None = None, index: int | None = None) -> npt.NDArray[Any]:
        """The tensor in its own type (bf16 as uint16 bit patterns), or a part of it.

        index: a slice of the first axis, for stacked tensors; rows: then, a range (first, end) of the first axis that
        is left. Only these bytes are read. Raises SourceError.
        """
        place, shape, offset = self._slice(name, rows, index)
        values = np.empty(shape, place.read_as)
        _read_at(place.file, offset, values.reshape(-1).view(np.uint8).data, name)
        return values

    def extent(self, name: str, rows: tuple[int, int] | None = None, index: int | None = None) -> Extent:
        """Where what `read` reads lies, in `files`."""
        place, shape, offset = self._slice(name, rows, index)
        return Extent(self.files.index(place.file), offset, math.prod(shape) * np.dtype(place.read_as).itemsize)

    def _slice(self, name: str, rows: tuple[int, int] | None, index: int | None) -> tuple[_Place, tuple[int, ...], int]:
        """(place, shape, offset in its file) of a tensor or a part of it."""
        place = self._place(name)
        shape, offset, dtype = place.info.shape, place.offset, np.dtype(place.read_as)
        if index is not None:
            if not shape or not 0 <= index < shape[0]:
                raise SourceError(f"{place.file}: tensor {shorten(name)} {list(shape)} has no slice {index}")
            shape = shape[1:]
            offset += index * math.prod(shape) * dtype.itemsize
        if rows is not None:
            if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise SourceError(f"{place.file}: tensor {shorten(name)} {list(shape)} has no rows {rows[0]}-{rows[1]}")
            offset += rows[0] * math.prod(shape[1:]) * dtype.itemsize
            shape = (rows[1] - rows[0], *shape[1:])
        return place, shape, offset

    def _place(self, name: str) -> _Place:
        place = self._places.get(name)
        if place is None:
            raise SourceError(f"{self.folder}: tensor {shorten(name)} is missing")
        return place


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises SourceError."""
    return parse_json(read_bytes(file), file)


def read_bytes(file: Path, limit: int = MAX_JSON) -> bytes:
    """A small file. Raises SourceError if it is missing, not a file, or larger than `limit`."""
    size = _file_size(file)
    if size > limit:
        raise SourceError(f"{file}: {size} bytes are more than the {limit} allowed")
    try:
        return file.read_bytes()
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}") from None


def parse_json(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object; a name twice in one object, a number of absurd length and deep nesting are refused."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_short_integer)
    except RecursionError:
        raise SourceError(f"{file}: nested too deeply") from None
    except ValueError as error:
        raise SourceError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{file}: a JSON object was expected")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{shorten(name)} appears twice")
        result[name] = value
    return result


def _short_integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.+-]+", shard) or not shard.endswith(".safetensors"):
            raise SourceError(f"{index}: {quote(shard)} (of tensor {shorten(name)}) is not the name of a shard")
    return weight_map


def _read_header(file: Path) -> dict[str, _Place]:
    size = _file_size(file)
    prefix = bytearray(8)
    if size < 8:
        raise SourceError(f"{file}: {size} bytes are too few for a safetensors file")
    _read_at(file, 0, memoryview(prefix), "header")
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER, size - 8):
        raise SourceError(f"{file}: a header of {length} bytes in a file of {size} (at most {MAX_HEADER} are allowed)")
    text = bytearray(length)
    _read_at(file, 8, memoryview(text), "header")
    header = parse_json(bytes(text), file)
    header.pop("__metadata__", None)

    data_size = size - 8 - length
    places: dict[str, _Place] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        where = f"{file}: tensor {shorten(name)}"
        if not isinstance(entry, dict):
            raise SourceError(f"{where}: {quote(entry)} is not a description")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise SourceError(f"{where}: unknown dtype {quote(dtype)}")
        if not _are_counts(shape) or len(shape) > 16:
            raise SourceError(f"{where}: bad shape {quote(shape)}")
        if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
            raise SourceError(f"{where}: bad offsets {quote(offsets)} in {data_size} bytes of data")
        our_name, read_as = _DTYPES[dtype]
        expected = math.prod(shape) * np.dtype(read_as).itemsize
        if offsets[1] - offsets[0] != expected:
            raise SourceError(f"{where}: {offsets[1] - offsets[0]} bytes, but {dtype} {quote(shape)} takes {expected}")
        places[name] = _Place(TensorInfo(our_name, tuple(shape)), read_as, file, 8 + length + offsets[0])
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            what = "overlaps the tensor before it" if first < end else f"leaves {first - end} bytes unused before it"
            raise SourceError(f"{file}: tensor {shorten(name)} at {first} {what}")
        end = last
    if end != data_size:
        raise SourceError(f"{file}: {data_size} bytes of data, but the tensors take {end}")
    return places


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _file_size(file: Path) -> int:
    try:
        if not file.is_file():
            raise SourceError(f"{file}: {'not a file' if file.exists() else 'no such file'}")
        return file.stat().st_size
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}") from None


def _read_at(file: Path, offset: int, target: memoryview, what: str) -> None:
    """Fills `target` from the file."""
    done = 0
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while done < len(target):
                count = stream.readinto(target[done : done + _READ_AT_ONCE])
                if not count:
                    raise SourceError(f"{file}: {shorten(what)}: the file ends at byte {offset + done}")
                done += count
            _forget(stream.fileno(), offset, done)
    except OSError as error:
        raise SourceError(f"{file}: {shorten(what)}: {error.strerror}") from None


def _forget(descriptor: int, offset: int, length: int) -> None:
    """Drops what was read from the page cache: a conversion reads everything once and must not push out the rest."""
    if length >= 1 << 20 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
