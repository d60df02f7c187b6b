"""Writes a pack, one section after the other.

A writer works on `NAME.partial` beside the target and notes every finished section in `NAME.journal`; `finish` adds the
index and the header and renames. An interrupted writer leaves both files, and the next one with the same fingerprint
continues; any other failure removes them.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from edgemoe._core import crc32c
from edgemoe.errors import PackError
from edgemoe.formats.index import Extent, ModelIndex, Section
from edgemoe.formats.pack.chunks import CHUNK, Bytes
from edgemoe.formats.pack.contents import PackContents, encoded_index
from edgemoe.formats.pack.header import BLOCK, MAX_INDEX, MAX_SECTION, align, header
from edgemoe.formats.pack.journal import (
    finished_sections,
    first_line,
    journal_path,
    lock,
    note_line,
    partial_path,
    section_line,
)


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
            lock(descriptor, target)
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
        self._sections, self.notes = finished_sections(self._stream, journal_path(self.target), fingerprint)
        self._end += sum(section.length for section in self._sections)
        self._stream.truncate(self._end)
        self._journal = journal_path(self.target).open("wb", buffering=0)
        self._journal.write(first_line(fingerprint))
        for layer, levels in self.notes.items():
            self._journal.write(note_line(layer, levels))
        for section in self._sections:
            self._journal.write(section_line(section))

    def note(self, layer: int, levels: list[int]) -> None:
        """Keeps for a later run how many levels the experts of a layer have, before the first of them is added."""
        self.notes[layer] = levels
        assert self._journal is not None
        self._journal.write(note_line(layer, levels))

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
        self._journal.write(section_line(section))
        return len(self._sections) - 1

    def finish(self, contents: PackContents) -> None:
        """Writes index and header, and gives the file its name: from then on it is a pack."""
        packed = encoded_index(contents, self._sections)
        if len(packed) > MAX_INDEX:
            raise PackError(f"{self.target}: an index of {len(packed)} bytes (at most {MAX_INDEX})")
        self._stream.seek(self._end)
        self._write(packed)
        self._stream.seek(0)
        self._write(header(self._end, packed))
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
                done += self._stream.write(view[done : done + CHUNK])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(partial_path(self.target))) from None
        return done


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
