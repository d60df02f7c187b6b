"""What every pack begins with, and where that says its index lies."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from edgemoe._core import crc32c
from edgemoe.errors import PackError
from edgemoe.formats.index import Extent
from edgemoe.formats.pack.chunks import read_chunks

MAGIC = b"EMOE"
VERSION = 1
BLOCK = 4096
"""Sections begin at multiples of it, and are padded to one."""
ALIGNMENT = 64
"""Tensors begin at multiples of it within their section."""
MAX_INDEX = 16 << 20
MAX_SECTION = 4 << 30
MAX_BLOB = 256 << 20

_FIELDS = struct.Struct("<4sIQQI")


def header(offset: int, packed: bytes) -> bytes:
    """The first block of a pack whose index, these bytes, lies at `offset`."""
    fields = _FIELDS.pack(MAGIC, VERSION, offset, len(packed), crc32c(packed))
    return (fields + crc32c(fields).to_bytes(4, "little")).ljust(BLOCK, b"\0")


def align(offset: int, to: int) -> int:
    return -(-offset // to) * to


def read_index(stream: BinaryIO, size: int, path: Path) -> tuple[int, bytes]:
    """(offset, bytes) of the index of a file of `size` bytes."""
    block = b"".join(read_chunks(stream, Extent(0, 0, min(size, BLOCK)), path))
    if block[:4] != MAGIC:
        raise PackError(f"{path}: not an .emoe pack (it begins with {block[:4].hex() or 'nothing'})")
    if size < BLOCK:
        raise PackError(f"{path}: {size} bytes, cut off within the header")
    _, version, offset, length, checksum = _FIELDS.unpack_from(block)
    if version != VERSION:
        raise PackError(f"{path}: format version {version}, this edgemoe reads {VERSION}")
    found, stored = crc32c(block[: _FIELDS.size]), int.from_bytes(block[_FIELDS.size : _FIELDS.size + 4], "little")
    if found != stored:
        raise PackError(f"{path}: header checksum {found:08x}, expected {stored:08x}")
    if any(block[_FIELDS.size + 4 :]):
        raise PackError(f"{path}: the rest of the header is not zero")
    if length > MAX_INDEX:
        raise PackError(f"{path}: an index of {length} bytes (at most {MAX_INDEX})")
    if offset % BLOCK or offset < BLOCK or offset + length != size:
        raise PackError(f"{path}: an index of {length} bytes at {offset} does not end a file of {size} bytes")
    stream.seek(offset)
    packed = b"".join(read_chunks(stream, Extent(0, offset, length), path))
    if crc32c(packed) != checksum:
        raise PackError(f"{path}: index checksum {crc32c(packed):08x}, expected {checksum:08x}")
    return offset, packed
