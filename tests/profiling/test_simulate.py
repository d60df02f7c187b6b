"""The simulated store against a small model of it."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.profiling import Trace
from edgemoe.profiling.simulate import simulate_engine, simulate_levels


def random_trace(
    seed: int, experts: tuple[int, ...] = (0, 7, 12, 0, 5), top_k: tuple[int, ...] = (0, 2, 3, 0, 1)
) -> Trace:
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(1, 60))
    columns = []
    for count, k in zip(experts, top_k, strict=True):
        if count:
            drift = np.cumsum(rng.normal(size=(tokens, count)), 0) * 0.4 + rng.normal(size=(tokens, count))
            columns.append(np.argsort(-drift, axis=1)[:, :k])
    ids = np.concatenate(columns, axis=1).astype(np.uint16)
    zeros = np.zeros(tokens, np.int32)
    return Trace("m", "", experts, top_k, ("text",), zeros, np.arange(tokens, dtype=np.int32), ids)


class Store:
    """The engine's expert store with reads that end in the order in which they were asked for."""

    def __init__(self, slots: int) -> None:
        self.slots: list[tuple[int, int] | None] = [None] * slots
        self.last_use = [0] * slots
        self.clock = 0
        self.requested = self.hit = self.read = self.evictions = 0

    def stream(self, layer: int, experts: list[int]) -> None:
        wanted = [(layer, expert) for expert in experts]
        use = {expert: self.clock + number for number, expert in enumerate(wanted, 1)}
        self.clock += len(wanted)
        present = [expert for expert in wanted if expert in self.slots]
        pinned = {self.slots.index(expert) for expert in present}
        for expert in present:
            self.last_use[self.slots.index(expert)] = use[expert]
        self.requested += len(wanted)
        self.hit += len(present)
        for expert in wanted:
            if expert in present:
                continue
            self.read += 1
            if len(pinned) == len(self.slots):
                pinned.remove(min(pinned, key=lambda slot: self.last_use[slot]))  # the first one is done
            slot = min((s for s in range(len(self.slots)) if s not in pinned), key=lambda s: self.last_use[s])
            self.evictions += self.slots[slot] is not None
            self.slots[slot] = expert
            self.last_use[slot] = use[expert]
            pinned.add(slot)


@pytest.mark.parametrize("seed", range(80))
def test_counters_are_the_stores(seed: int) -> None:
    trace = random_trace(seed)
    rng = np.random.default_rng(seed)
    if seed % 2:
        cuts = np.sort(rng.choice(np.arange(1, trace.tokens), size=min(4, trace.tokens - 1), replace=False))
        passes = np.diff(np.concatenate(([0], cuts, [trace.tokens])))
    else:
        passes = np.ones(trace.tokens, int)
    slots = [3, 4, 5, 9, 24, 100]
    costs = [10, 100, 1000]
    results = simulate_engine(trace, slots, expert_bytes=costs, passes=passes, threads=2)
    for size, result in zip(slots, results, strict=True):
        store = Store(size)
        read_bytes = begin = 0
        for length in passes:
            rows = trace.ids[begin : begin + length]
            begin += length
            for number, layer in enumerate(trace.layers):
                picks = rows[:, trace.columns(layer)].ravel().tolist()
                distinct = sorted(set(picks), key=lambda e: (-picks.count(e), picks.index(e)))
                before = store.read
                store.stream(layer, distinct)
                read_bytes += (store.read - before) * costs[number]
        assert result.experts_requested == store.requested
        assert result.experts_hit == store.hit
        assert result.sections_read == store.read
        assert result.evictions == store.evictions
        assert result.bytes_read == read_bytes
        assert result.hit_rate == store.hit / store.requested


def test_below_one_tokens_working_set_a_pool_serves_nothing_new() -> None:
    ids = np.tile(np.arange(4, dtype=np.uint16), (30, 3))  # 3 layers, the same 4 experts every time
    zeros = np.zeros(30, np.int32)
    trace = Trace("m", "", (8, 8, 8), (4, 4, 4), ("text",), zeros, np.arange(30, dtype=np.int32), ids)
    small, enough = simulate_engine(trace, [8, 12])
    assert small.experts_hit == 0
    assert enough.experts_hit == 29 * 12
    assert enough.evictions == 0


def test_passes_must_cover_the_trace() -> None:
    with pytest.raises(ValueError, match="passes of 3 tokens"):
        simulate_engine(random_trace(2), [4], passes=[3])


@pytest.mark.parametrize("seed", range(30))
def test_levels_are_cached_one_by_one(seed: int) -> None:
    trace = random_trace(seed)
    rng = np.random.default_rng(seed)
    wanted = rng.integers(0, 3, trace.ids.shape)
    sizes = np.array([5, 3, 2])
    for capacity in (9, 23, 60, 10**6):
        (result,) = simulate_levels(trace, wanted, sizes, [capacity])
        pool: list[tuple[int, int, int]] = []  # least recently used first
        requested = hit = evictions = read = 0
        for row, needs in zip(trace.ids, wanted, strict=True):
            for layer in trace.layers:
                columns = trace.columns(layer)
                sections = [
                    (layer, int(expert), level)
                    for expert, finest in zip(row[columns], needs[columns], strict=True)
                    for level in range(finest, -1, -1)
                ]
                requested += len(sections)
                there = [section for section in sections if section in pool]
                hit += len(there)
                held = set(there)
                pool = [section for section in pool if section not in held]
                for section in sections:
                    if section in there:
                        continue
                    size = int(sizes[section[2]])
                    read += size
                    while sum(sizes[s[2]] for s in [*pool, *held]) + size > capacity and (pool or held):
                        if pool:
                            pool.pop(0)
                        else:
                            held.remove(min(held, key=sections.index))
                        evictions += 1
                    if sum(sizes[s[2]] for s in [*pool, *held]) + size <= capacity:
                        held.add(section)
                pool += [section for section in sections if section in held]
        counters = (result.experts_requested, result.experts_hit, result.evictions, result.bytes_read)
        assert counters == (requested, hit, evictions, read)


def test_one_level_is_the_engines_pool() -> None:
    trace = random_trace(5)
    slots = [3, 8, 20]
    nothing = np.zeros(trace.ids.shape, int)
    by_level = simulate_levels(trace, nothing, [7], [7 * count for count in slots])
    by_expert = simulate_engine(trace, slots, expert_bytes=7)
    assert [(r.experts_hit, r.bytes_read, r.evictions) for r in by_level] == [
        (r.experts_hit, r.bytes_read, r.evictions) for r in by_expert
    ]
    with pytest.raises(ValueError, match="levels below 1"):
        simulate_levels(trace, nothing + 1, [7], slots)
