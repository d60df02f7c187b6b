"""An unfinished pack on disk: `NAME.partial` and, beside it, `NAME.journal`, by which an interrupted run continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO

from edgemoe.errors import PackError
from edgemoe.formats.index import Extent, Section
from edgemoe.formats.pack.checks import is_counts
from edgemoe.formats.pack.chunks import checksum_of, read_chunks
from edgemoe.formats.pack.header import BLOCK, MAX_SECTION


def partial_path(target: Path) -> Path:
    """Where a pack is while it is written."""
    return target.with_name(target.name + ".partial")


def journal_path(target: Path) -> Path:
    """JSON lines: [fingerprint], then [length, checksum] of every finished section."""
    return target.with_name(target.name + ".journal")


def first_line(fingerprint: str) -> bytes:
    return json.dumps([fingerprint]).encode() + b"\n"


def section_line(section: Section) -> bytes:
    return json.dumps([section.length, section.checksum]).encode() + b"\n"


def note_line(layer: int, levels: list[int]) -> bytes:
    return json.dumps({"layer": layer, "levels": levels}).encode() + b"\n"


def finished_sections(stream: BinaryIO, journal: Path, fingerprint: str) -> tuple[list[Section], dict[int, list[int]]]:
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
            if type(entry.get("layer")) is int and is_counts(entry.get("levels"), None):
                notes[entry["layer"]] = entry["levels"]
            continue
        if not is_counts(entry, 2) or not 0 < entry[0] <= MAX_SECTION:
            break
        section = Section((Extent(0, offset, entry[0]),), entry[1])
        stream.seek(offset)
        try:
            checksum = checksum_of(read_chunks(stream, section.extents[0], journal))
        except PackError:
            break
        if checksum != section.checksum:
            break
        sections.append(section)
        offset += entry[0]
    return sections, notes


def lock(descriptor: int, target: Path) -> None:
    """Raises PackError if another process has the lock of this partial pack."""
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
