"""Options of the engine, each of them once."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_READERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How exactly the experts of a row are computed, where they are nested (docs/quantization.md).

    thresholds: ascending; an expert works as many levels below its finest as there are thresholds below the share of
    the router's weight that the row's heavier experts have. None of them: exact. level_cap: no expert works above this
    level; None for all levels.
    """

    thresholds: tuple[float, ...] = ()
    level_cap: int | None = None


EXACT = Quality()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What `_core.Engine` is given beside the model; the engine reads every field (native/src/python/facts.cpp).

    threads: that compute. context: positions that a sequence may have. sequences: whose state is kept.
    chunk: tokens of a prompt computed together.
    expert_slots: memory for so many of the largest experts. readers: reads under way at once.
    eviction: "lru", "lfu", "least_stale" or "next_use". prefetch: read experts that the next layer will probably want.
    quality: of rows that have none of their own. Memory is laid out for it: others have the same bits with every
        layout, but lossy rows of an exact engine save no reads.
    cache_type_k, cache_type_v: how keys and values are kept: "f32", "f16" or "q8_0".
    arrival_jitter_us: for tests: what was read arrives up to so many microseconds later.
    isa: the instruction set; None for EDGEMOE_ISA, or the best that the processor has.
    """

    threads: int
    context: int
    sequences: int = 1
    chunk: int = 512
    expert_slots: int = 1
    readers: int = DEFAULT_READERS
    eviction: str = "next_use"
    prefetch: bool = True
    quality: Quality = EXACT
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    arrival_jitter_us: int = 0
    isa: str | None = None
