"""One number for a device's memory: dividing it among dense weights, states, activations and experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from edgemoe.engine import MemoryPlan, plan_memory
from edgemoe.errors import MemoryBudgetError
from edgemoe.formats.index import ModelIndex
from edgemoe.memory import CHUNKS, format_size
from edgemoe.options import EngineOptions

# Left to other programs, and to what the driver itself takes later, by `auto`.
MARGIN = 500 * 1000**2
# Tables that grow, and what is lost between pieces of memory.
RESERVE = 32 * 1000**2


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """How a device's memory is divided, in bytes.

    limit: the budget. layers: whose dense part lies there, one more than the model has where the head does, too.
    dense, state, scratch: the device's share of the weights always in memory, of the states of all sequences, of the
    activations of a chunk. slots: memory for experts, slot_bytes each; all_slots hold all experts of those layers.
    chunk: tokens of a prompt computed together.
    """

    limit: int
    layers: int
    dense: int
    state: int
    scratch: int
    slots: int
    slot_bytes: int
    all_slots: int
    chunk: int

    @property
    def taken(self) -> int:
        """All that is to lie there."""
        return self.dense + self.state + self.scratch + self.slots * self.slot_bytes


def automatic_vram(available: int) -> int:
    """What `auto` means of a memory of which so much is available."""
    return available - min(MARGIN, available // 8)


def plan_device(
    limit: int,
    index: ModelIndex,
    options: EngineOptions,
    *,
    layers: int | None = None,
    chunk: int | None = None,
) -> DeviceBudget:
    """Divides `limit` bytes of a device: as many layers as fit, the last first, and after all of them the head; then
    experts. layers: so many instead. `chunk`, `device_layers` and `device_slots` of the options are not read. chunk:
    that is planned with, otherwise the largest that leaves three quarters to all else.

    With no room for a single layer there are none, unless a number was given: then MemoryBudgetError names the least
    that would do.
    """
    most = len(index.spec.layers) + 1
    room = max(limit - RESERVE, 0)
    for size in CHUNKS if chunk is None else [chunk]:
        chosen = replace(options, chunk=size, expert_slots=1, device_slots=0)

        def plan(count: int, chosen: EngineOptions = chosen) -> MemoryPlan:
            return plan_memory(index, replace(chosen, device_layers=count))

        # Activations are those of a layer, however many there are.
        if 4 * plan(1).device_scratch <= room:
            break
    fit = _most(lambda count: _fixed(plan(count)) <= room, most)
    count = fit if layers is None else min(layers, most)
    found = plan(count)
    if _fixed(found) > room:
        raise MemoryBudgetError(
            f"{index.path}: {format_size(limit)} of the device's memory are too little for {count} layers "
            f"(-ngl / gpu_layers=): {format_size(found.device_dense)} dense weights, {format_size(found.device_state)} "
            f"state, {format_size(found.device_scratch)} activations; the least that works is "
            f"--vram {-(-(_fixed(found) + RESERVE) // 1000**2)}MB, or -ngl {fit}"
        )
    slots = min((room - _fixed(found)) // found.device_slot, found.device_experts) if found.device_slot else 0
    return DeviceBudget(
        limit,
        count,
        found.device_dense,
        found.device_state,
        found.device_scratch,
        slots,
        found.device_slot,
        found.device_experts,
        size,
    )


def _fixed(plan: MemoryPlan) -> int:
    return plan.device_dense + plan.device_state + plan.device_scratch


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` that fits, where all smaller ones do."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
