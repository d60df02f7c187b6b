"""What the engine's expert cache would do with a trace, counter by counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgemoe.profiling.trace import Trace

_BLOCK = 4096  # forward passes that are laid out at once


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """The engine's counters (`Model.stats()`) for one size of the cache.

    capacity: slots, or bytes where sections have sizes. tokens: of the trace. bytes_read: 0 where the sizes of the
    experts are not known.
    """

    capacity: int
    tokens: int
    experts_requested: int
    experts_hit: int
    sections_read: int
    evictions: int
    bytes_read: int

    @property
    def hit_rate(self) -> float:
        return self.experts_hit / self.experts_requested if self.experts_requested else 0.0

    @property
    def bytes_read_per_token(self) -> float:
        return self.bytes_read / self.tokens if self.tokens else 0.0


def simulate_engine(
    trace: Trace,
    slots: Sequence[int],
    *,
    expert_bytes: int | Sequence[int] = 0,
    passes: ArrayLike | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[CacheCounters]:
    """Counters of an engine with so many expert slots, one result per entry of `slots`.

    One pool of equal slots serves all layers, least recently used first out. A layer's distinct experts of a forward
    pass are asked for together and used in the order of how many tokens chose them, most first (for one token: by
    weight); a hit is what is in the pool at that moment. The others are read, each into a free slot or that of the
    least recently used expert that is not among them. The pool starts empty and lives through the whole trace.

    The counters are those of an engine with `eviction="lru"` and `prefetch=False` as long as every pass finds slots for
    all of a layer's experts at once (one token always does); otherwise reads are taken to end in the order in which
    they were asked for.

    expert_bytes: what a read of an expert costs, one number or one per layer with experts.
    passes: tokens of each forward pass (a prompt's chunks, 1 for each generated token); by default 1 for every token.
    """
    from edgemoe._core import profiling

    layers = trace.layers
    ks, experts = [trace.top_k[layer] for layer in layers], [trace.experts[layer] for layer in layers]
    lengths = np.ones(trace.tokens, np.int64) if passes is None else np.asarray(passes, np.int64)
    if lengths.sum() != trace.tokens or (lengths < 1).any():
        raise ValueError(f"passes of {int(lengths.sum())} tokens for a trace of {trace.tokens}")
    cost = np.broadcast_to(np.asarray(expert_bytes, np.int64), len(layers))
    pools = profiling.Pools(np.ones(sum(experts), np.int64), np.asarray(slots, np.int64), len(layers))
    ends = np.cumsum(lengths)
    for begin in range(0, len(lengths), _BLOCK):
        block = lengths[begin : begin + _BLOCK]
        end = int(ends[begin + len(block) - 1])
        rows = trace.ids[end - int(block.sum()) : end]
        items, offsets, groups = profiling.engine_requests(rows, ks, experts, block)
        pools.request(items, offsets, groups, threads)
        if progress:
            progress(end, trace.tokens)
    return _counters(pools, slots, trace.tokens, cost)


def simulate_levels(
    trace: Trace,
    wanted: NDArray[np.integer],
    section_bytes: ArrayLike,
    capacities: Sequence[int],
    *,
    threads: int = 1,
) -> list[CacheCounters]:
    """As `simulate_engine` for one token per pass, with experts stored in levels that are cached one by one.

    wanted: [tokens, width], the finest level a pick needs, from 0; it needs the coarser ones too.
    section_bytes: [levels] or [layers with experts, levels]. capacities: bytes, one result per entry.

    A level is a section of its own: requested, hit, read and dropped by itself, least recently used first; an expert's
    levels are used from the finest to the coarsest, so that the finest goes first. `experts_requested`, `experts_hit`
    count sections here.
    """
    from edgemoe._core import profiling

    layers = trace.layers
    experts = np.asarray([trace.experts[layer] for layer in layers])
    sizes = np.asarray(section_bytes, np.int64)
    sizes = np.broadcast_to(sizes, (len(layers), sizes.shape[-1]))
    levels = sizes.shape[1]
    needed = np.asarray(wanted)
    if needed.shape != trace.ids.shape or needed.min() < 0 or needed.max() >= levels:
        raise ValueError(f"wanted must be {trace.ids.shape} levels below {levels}")
    first = np.concatenate(([0], np.cumsum(experts)))
    column_layer = np.repeat(np.arange(len(layers)), [trace.top_k[layer] for layer in layers])
    item_sizes = np.repeat(sizes, experts, axis=0).ravel()
    pools = profiling.Pools(item_sizes, np.asarray(capacities, np.int64), len(layers))
    order = np.arange(levels)[::-1]
    for begin in range(0, trace.tokens, _BLOCK):
        ids = trace.ids[begin : begin + _BLOCK].astype(np.int64) + first[column_layer]
        items = ids[:, :, None] * levels + order
        there = needed[begin : begin + _BLOCK, :, None] >= order
        counts = np.add.reduceat(there.sum(axis=2), np.flatnonzero(np.diff(column_layer, prepend=-1)), axis=1)
        offsets = np.concatenate(([0], np.cumsum(counts.ravel())))
        groups = np.tile(np.arange(len(layers)), len(ids))
        pools.request(items[there], offsets, groups, threads)
    return _counters(pools, capacities, trace.tokens, None)


def _counters(
    pools: Any, capacities: Sequence[int], tokens: int, cost: NDArray[np.int64] | None
) -> list[CacheCounters]:
    found = pools.counters()
    return [
        CacheCounters(
            capacity=int(capacity),
            tokens=tokens,
            experts_requested=int(found["requested"][i]),
            experts_hit=int(found["hit"][i]),
            sections_read=int(found["requested"][i] - found["hit"][i]),
            evictions=int(found["evictions"][i]),
            bytes_read=int(found["missed_size"][i] if cost is None else found["missed_by_group"][i] @ cost),
        )
        for i, capacity in enumerate(capacities)
    ]
