"""Bytes of files, some megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from edgemoe._core import crc32c
from edgemoe.errors import PackError
from edgemoe.formats.index import Extent

Bytes = bytes | memoryview

CHUNK = 4 << 20


def read_chunks(stream: BinaryIO, extent: Extent, file: Path) -> Iterator[bytes]:
    """The extent's bytes; the stream is at its beginning."""
    done = 0
    while done < extent.length:
        chunk = stream.read(min(CHUNK, extent.length - done))
        if not chunk:
            raise PackError(f"{file}: ends at byte {extent.offset + done}, {extent.length - done} bytes too early")
        done += len(chunk)
        yield chunk


def checksum_of(chunks: Iterable[Bytes]) -> int:
    """CRC32C of all of them, one after the other."""
    checksum = 0
    for chunk in chunks:
        checksum = crc32c(chunk, checksum)
    return checksum
