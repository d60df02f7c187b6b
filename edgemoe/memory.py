"""One number for memory: reading it, finding it, and dividing it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from edgemoe.engine import plan_memory
from edgemoe.errors import MemoryBudgetError
from edgemoe.formats.index import ModelIndex
from edgemoe.options import EngineOptions

# What Python's heap may still grow by after loading (strings, lists of tokens, samplers' arrays).
RESERVE = 32 * 1000**2
# Left to the rest of the system by `auto`.
MARGIN = 1000**3
# A prompt is computed in chunks of as many tokens as leave the experts at least three quarters of what is left.
CHUNKS = (512, 256, 128, 64, 32)


def format_size(size: float) -> str:
    """A size for people: 1.86 GB, 512 MB."""
    for unit, name in ((1000**4, "TB"), (1000**3, "GB"), (1000**2, "MB"), (1000, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:.0f} {name}"
    return f"{size:.0f} B"


def format_count(number: int) -> str:
    """A number of parameters for people: 30.53 B, 20.96 M."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def cgroup_headroom() -> int | None:
    """Bytes this process's memory cgroup may still be charged; None without a limit. Reads cgroup v2 and v1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    best: int | None = None
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit_name, usage_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_name, usage_name = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):  # the tightest limit on the way up counts
            try:
                limit = int((place / limit_name).read_text())
                headroom = limit - int((place / usage_name).read_text())
            except (OSError, ValueError):
                limit = 1 << 62
            if limit < 1 << 60 and (best is None or headroom < best):
                best = headroom
            if place == root:
                break
    return best


def used_now() -> int:
    """Bytes of memory this process holds now."""
    return int(psutil.Process().memory_info().rss)


def automatic_budget() -> int:
    """What `auto` means: what this process holds and what is free, less a margin for the rest of the system."""
    available = int(psutil.virtual_memory().available)
    headroom = cgroup_headroom()
    if headroom is not None:
        available = min(available, headroom)
    return used_now() + available - min(MARGIN, available // 4)


SEQUENCES = 4
"""Where the user does not say how many."""
SEQUENCES_SHARE = 0.02
"""Of the budget, that all sequences but the first may take."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How the memory is divided, in bytes.

    limit: the budget. base: what the process held before weights were loaded, plus a reserve. dense, state, scratch:
    weights always in memory, the states of all sequences, activations of a chunk. expert_slots: memory for experts, in
    the largest of them with all its levels, slot_bytes each; all_slots hold all experts. chunk: tokens of a prompt
    computed together.
    """

    limit: int
    base: int
    dense: int
    state: int
    scratch: int
    slot_bytes: int
    expert_slots: int
    all_slots: int
    chunk: int

    @property
    def cache_bytes(self) -> int:
        return self.expert_slots * self.slot_bytes


def automatic_sequences(limit: int | None, index: ModelIndex, options: EngineOptions) -> int:
    """As many sequences as take little memory beside what one takes: what grows with the text they share."""
    limit = automatic_budget() if limit is None else limit
    states = [
        plan_memory(index, replace(options, chunk=CHUNKS[-1], expert_slots=1, sequences=count)).state
        for count in (1, SEQUENCES)
    ]
    each = (states[1] - states[0]) // (SEQUENCES - 1)
    return max(min(1 + int(SEQUENCES_SHARE * limit) // max(each, 1), SEQUENCES), 1)


def plan_budget(
    limit: int | None,
    index: ModelIndex,
    options: EngineOptions,
    *,
    chunk: int | None = None,
    expert_slots: int | None = None,
    states: int = 1,
    largest_chunk: int = CHUNKS[0],
    beside: int = 0,
) -> Budget:
    """Divides `limit` bytes (None: automatic). `chunk` and `expert_slots` of the options are not read: they are what is
    planned, unless they are given here. states: copies of the sequences' state that there may be at a time; a
    device has one of them. largest_chunk: that is taken by itself. beside: bytes that a device takes of this memory.

    Raises MemoryBudgetError that names the least that would do."""
    automatic = limit is None
    limit = automatic_budget() if limit is None else limit
    base = used_now() + RESERVE + beside
    chunks = tuple(size for size in CHUNKS if size <= largest_chunk) if chunk is None else (chunk,)
    for size in chunks:
        plan = plan_memory(index, replace(options, chunk=size, expert_slots=1))
        state = states * plan.state + (states - 1) * plan.device_state
        fixed = base + plan.dense + state + plan.scratch
        room = limit - fixed
        everything = plan.experts * plan.slot
        if room >= everything or plan.scratch * 4 <= room + plan.scratch or size == chunks[-1]:
            break
    slots = plan.minimum_slots if expert_slots is None else min(expert_slots, plan.experts)
    least = fixed + slots * plan.slot
    if limit < least:
        count, positions = options.sequences, options.positions or options.context
        sequences = f" in {count} sequences" if count > 1 else ""
        experts = "one token's experts" if expert_slots is None else f"{slots} experts"
        raise MemoryBudgetError(
            f"{index.path}: {'the memory that is free' if automatic else 'a memory budget'} of {format_size(limit)} is "
            f"too small: {format_size(base)} for the program, {format_size(plan.dense)} dense weights, "
            f"{format_size(state)} state for {positions} positions{sequences}, "
            f"{format_size(plan.scratch)} activations, {format_size(slots * plan.slot)} for {experts}; "
            f"the least that works is {-(-least // 1000**2)}MB"
        )
    if expert_slots is None:
        slots = plan.experts if room >= everything else room // plan.slot
    return Budget(limit, base, plan.dense, state, plan.scratch, plan.slot, slots, plan.experts, size)
