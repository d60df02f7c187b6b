"""What a cache that reads only on demand has to read: the least recently used leaves, or (Belady) the latest needed."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

Group = Sequence[int]
"""Experts, numbered through all layers, that one layer asks for at once; none twice."""


def lru_misses(groups: Sequence[Group], slots: int, first: int = 0) -> int:
    """Misses of the groups from number `first` on; the ones before warm the cache.

    As the engine does it: what is there is used first, then the missing ones are read, each in the place of the least
    recently used.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for number, group in enumerate(groups):
        missing = [expert for expert in group if expert not in cache]
        for expert in group:
            if expert in cache:
                cache.move_to_end(expert)
        for expert in missing:
            if len(cache) >= slots:
                cache.popitem(last=False)
            cache[expert] = None
        misses += len(missing) if number >= first else 0
    return misses


def belady_misses(groups: Sequence[Group], slots: int, first: int = 0) -> int:
    """The same for the cache that knows the future: the expert whose next use is farthest away leaves."""
    never = len(groups)
    upcoming: dict[int, int] = {}
    next_use: list[list[int]] = [[] for _ in groups]
    for number in range(len(groups) - 1, -1, -1):
        next_use[number] = [upcoming.get(expert, never) for expert in groups[number]]
        upcoming.update(dict.fromkeys(groups[number], number))
    present: dict[int, int] = {}  # expert -> number of the group that uses it next
    queue: list[tuple[int, int]] = []  # (-next use, expert), entries that are out of date included
    misses = 0
    for number, group in enumerate(groups):
        missing = sum(expert not in present for expert in group)
        misses += missing if number >= first else 0
        # The group itself stays until it is used: its use is the nearest of all.
        while queue and len(present) + missing > slots:
            use, expert = heapq.heappop(queue)
            if present.get(expert) == -use:
                del present[expert]
        for expert, use in zip(group, next_use[number], strict=True):
            present[expert] = use
            heapq.heappush(queue, (-use, expert))
    return misses
