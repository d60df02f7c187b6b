"""How many reads at a time the disk under a model wants: measured once, and kept in the cache folder."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from edgemoe import _core
from edgemoe.errors import EdgemoeError
from edgemoe.kept import read_kept, write_kept
from edgemoe.options import DEFAULT_READERS

DEPTHS = (1, 2, 4, 8)  # reads under way at once
_SECONDS = 0.12  # of one measurement
_MOST_BYTES = 1 << 30  # ... and what it may read on a very fast disk
_SMALLEST_FILE = 64 << 20  # a smaller file says little, and is read in no time
_ENOUGH = 0.95  # of the best rate: more reads at a time take processor time from the arithmetic
_MOST_AGE = 30 * 24 * 3600  # seconds that a measurement is believed


def reading_threads(file: Path, section: int, folder: Path) -> int:
    """Reads to have under way at once for sections of `section` bytes of `file`: the fewest that reach 95 % of the best
    rate of random direct reads.

    The measurement takes half a second, once for each device and size (to a power of two), and is kept in
    `folder/disk.json`. Where it cannot be made (a small file, a read error) the answer is DEFAULT_READERS.
    """
    try:
        status = file.stat()
    except OSError:
        return DEFAULT_READERS
    if status.st_size < _SMALLEST_FILE:
        return DEFAULT_READERS
    block = 1 << min(max(math.ceil(math.log2(max(section, 1))), 16), 22)
    key = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)} {block}"
    known = read_kept(folder / "disk.json")
    kept = _fresh(known.get(key))
    if kept is not None:
        return kept
    try:
        rates = {depth: _rate(file, block, depth) for depth in DEPTHS}
    except (OSError, EdgemoeError):
        return DEFAULT_READERS
    best = max(rates.values())
    readers = min(depth for depth, rate in rates.items() if rate >= _ENOUGH * best)
    known[key] = {"readers": readers, "bytes_per_second": round(rates[readers]), "measured": int(time.time())}
    write_kept(folder / "disk.json", known)
    return readers


def _rate(file: Path, block: int, depth: int) -> float:
    done, seconds = _core.profiling.disk_read_speed(str(file), block, depth, _SECONDS, _MOST_BYTES)
    return float(done / seconds)


def _fresh(entry: Any) -> int | None:
    """The readers of an entry that is one of ours and not too old; the file is the user's, and may hold anything."""
    if not isinstance(entry, dict):
        return None
    readers, measured = entry.get("readers"), entry.get("measured")
    if type(readers) is not int or readers not in DEPTHS or type(measured) is not int:
        return None
    return readers if 0 <= time.time() - measured < _MOST_AGE else None
