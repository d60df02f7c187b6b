"""The caches that benchmarks are compared with."""

import itertools
import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench._bounds import belady_misses, lru_misses


def test_least_recently_used_leaves() -> None:
    groups = [[0, 1], [2], [0], [3, 0], [1]]
    assert lru_misses(groups, 8) == 4
    assert lru_misses(groups, 3) == 5
    assert lru_misses(groups, 3, first=3) == 2


@pytest.mark.parametrize("seed", range(8))
def test_belady_reads_least(seed: int) -> None:
    """Against the best of all ways to evict."""
    choose = random.Random(seed)
    groups = [choose.sample(range(5), choose.choice((1, 2))) for _ in range(8)]

    def best(number: int, cache: set[int]) -> int:
        if number == len(groups):
            return 0
        group = set(groups[number])
        others, room = cache - group, 3 - len(group)
        kept = itertools.combinations(others, min(room, len(others)))
        return len(group - cache) + min(best(number + 1, group.union(some)) for some in kept)

    found = belady_misses(groups, 3)
    assert found == best(0, set())
    assert found <= lru_misses(groups, 3)
    assert belady_misses(groups, 3, first=len(groups)) == 0
