"""Random direct reads: how fast a disk gives sections of one size."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path


def random_read_bandwidth(
    path: Path, size: int, offsets: Sequence[int], *, threads: int = 2, seconds: float = 4.0, seed: int = 0
) -> float:
    """Bytes per second of reads of `size` bytes at `offsets` (multiples of 4096), drawn at random, with O_DIRECT.

    threads: reads under way at a time. Where the file system refuses O_DIRECT the page cache is dropped before.
    """
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    end = path.stat().st_size
    places = [offset for offset in offsets if offset + size <= end]
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    read = [0] * threads
    begin = time.perf_counter()

    def work(number: int) -> None:
        buffer, choose = mmap.mmap(-1, size), random.Random(seed * threads + number)
        while time.perf_counter() - begin < seconds:
            read[number] += os.preadv(descriptor, [buffer], choose.choice(places))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        os.close(descriptor)
    return sum(read) / (time.perf_counter() - begin)
