"""Will a model fit into this machine's memory, and how fast will it be? From headers alone: no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.convert import planned_index
from edgemoe.device_memory import DeviceBudget, plan_device
from edgemoe.engine import plan_memory
from edgemoe.errors import OptionError, SourceError, UnsupportedModelError
from edgemoe.families import family_for
from edgemoe.formats.index import DenseTensor, ExpertLayer, Level, ModelIndex, Part
from edgemoe.formats.layouts import tensor_size
from edgemoe.formats.pack import ALIGNMENT, align, consecutive_sections
from edgemoe.formats.read import read_index
from edgemoe.formats.safetensors import read_json
from edgemoe.memory import (
    CHUNKS,
    RESERVE,
    Budget,
    automatic_budget,
    automatic_sequences,
    plan_budget,
    used_now,
)
from edgemoe.options import QUALITIES, EngineOptions, Quality, context_length
from edgemoe.spec import FLOAT_TENSORS, ModelSpec

if TYPE_CHECKING:
    from edgemoe.profiling import Trace

# Hit rates of one least-recently-used cache for all layers at 1, 2 and 3 times the experts one token uses: the least
# and the most consistent of ten small models of the same size (arXiv 2505.16056, toy models).
PUBLISHED_RATIOS = (1.0, 2.0, 3.0)
PUBLISHED_LOW = (0.2018, 0.3557, 0.4891)
PUBLISHED_HIGH = (0.4364, 0.6720, 0.8236)

# What the program may take when it runs beyond what it takes here, where no tokenizer is loaded.
_SLACK = 16_000_000
_ENGINE_PICKS = 8_000_000  # picks of a trace that hit rates are simulated with
# Measured (bench/plan_accuracy.py): the share of the memory's read bandwidth at which one token's weights are worked
# through, attention and norms included, and the share of the shorter one of reading and computing that the longer one
# does not hide (what a layer reads is known only when its router has spoken).
ARITHMETIC_SHARE = 0.75
UNHIDDEN_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Speed:
    """What a memory budget gives. Sizes in bytes; (low, high) where a figure is uncertain.

    slots: experts in memory; hit_rate: of generation. bytes_per_token: read from disk.
    tokens_per_second: low with reads and arithmetic one after the other, high with both at the same time; expected:
    between the two. None where the machine's speed is not known.
    """

    memory: int
    slots: int
    hit_rate: tuple[float, float]
    bytes_per_token: tuple[float, float]
    tokens_per_second: tuple[float, float] | None
    expected: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a model asks of a machine. Sizes in bytes.

    dense: weights always in memory. experts: all routed experts as stored. active: weights that one token works with.
    state: of `parallel` sequences of together `context` positions. least: the smallest budget that runs; sensible: one
    that holds twice the experts of one token, or everything where that is less; everything: with no reads left.
    layers: of the model. device: how a device's memory is divided, whose share the budgets leave out, but dense and
    state do not; None for the processor alone.
    source: where the hit rates come from. qualities: the same budgets in each lossy mode that the pack has measured.
    """

    model: str
    family: str
    parameters: int
    active_parameters: int
    context: int
    parallel: int
    dense: int
    experts: int
    expert: int
    active: int
    state: int
    least: int
    sensible: int
    everything: int
    memory: int
    source: str
    speeds: tuple[Speed, ...]
    qualities: dict[str, tuple[Speed, ...]]
    layers: int
    device: DeviceBudget | None


def plan_model(
    path: Path,
    *,
    memory: int | None = None,
    context: int | None = None,
    parallel: int | None = None,
    bits: int = 8,
    cache_type: str = "f16",
    trace: Trace | None = None,
    disk: float | None = None,
    bandwidth: float | None = None,
    vram: int | None = None,
    gpu_layers: int | None = None,
    unified: bool = False,
) -> Plan:
    """Plans a pack, a GGUF file, or a Hugging Face folder as converted at `bits`: its config.json is enough.

    memory: bytes, None for what is free. parallel: sequences whose state is kept, None for as many as `load` takes.
    disk, bandwidth: bytes per second of the disk and of the memory. vram: bytes of a device's memory, None without one;
    gpu_layers: that are computed there, None for as many as fit; unified: it is the processor's memory, so that it
    counts within `memory`. How fast they are there is not known, so no speeds are given then. trace: of this model,
    for hit rates; without one they are a published range.

    A lossy mode is taken to read, keep and compute the share of an expert that its mean bits are of exact mode's.

    Raises MemoryBudgetError that names the number that would do, SourceError, PackError, UnsupportedModelError,
    OptionError.
    """
    index = _facts(path, bits)
    spec = index.spec
    total_experts = sum(layer.experts for layer in spec.layers)
    if not total_experts:
        raise UnsupportedModelError(f"{path}: every layer is dense; there is nothing to stream")
    length = context_length(context, spec.context)
    index = replace(index, spec=spec.for_context(length))
    options = EngineOptions(
        threads=1,
        context=length,
        sequences=parallel or 1,
        positions=length,
        chunk=CHUNKS[0],
        cache_type_k=cache_type,
        cache_type_v=cache_type,
    )

    if parallel is None:
        parallel = automatic_sequences(memory, index, options)
        options = replace(options, sequences=parallel)

    placed = None if vram is None else plan_device(vram, index, options, layers=gpu_layers)
    if placed is not None and placed.layers:
        options = replace(options, device_layers=placed.layers, device_slots=placed.slots, chunk=placed.chunk)
        bandwidth = None
    largest_chunk = options.chunk

    beside = placed.taken if unified and placed is not None and placed.layers else 0

    def budget(limit: int) -> Budget:
        return plan_budget(limit, index, options, largest_chunk=largest_chunk, beside=beside)

    needs = plan_memory(index, replace(options, chunk=CHUNKS[-1]))
    fixed = used_now() + RESERVE + beside + needs.dense + needs.state + needs.scratch
    working = sum(layer.top_k for layer in spec.layers)
    least = fixed + needs.minimum_slots * needs.slot + _SLACK
    # With room for all experts the largest chunks are used.
    largest = plan_memory(index, options)
    everything = fixed - needs.scratch + largest.scratch + needs.experts * needs.slot + _SLACK
    sensible = min(_smallest(budget, min(2 * working, needs.experts), least, everything), everything)
    limit = automatic_budget() if memory is None else memory
    chosen = budget(limit)

    if trace is not None:
        _check_trace(trace, spec, path)
    limits = sorted({least, sensible, everything, chosen.limit, *_between(least, everything)})
    budgets = [budget(size) for size in limits]
    expert_bytes = _expert_bytes(index)
    active = _active_bytes(index, expert_bytes)
    working_bytes = sum(layer.top_k * size for layer, size in zip(spec.layers, expert_bytes, strict=True))

    # Levels that come and go apart take a little more memory than experts that are always whole.
    levels_apart = plan_memory(index, replace(options, quality=Quality(thresholds=(1.0,))))

    def speeds(share: float, slot: int) -> tuple[Speed, ...]:
        """Of all budgets, with so much of each expert read, kept and computed; slot: bytes of a whole one in memory."""
        # Where experts have fewer levels than the largest, or work at fewer, more of them fit than there are slots.
        held = [int(min(b.cache_bytes / slot / share, b.all_slots)) * total_experts // b.all_slots for b in budgets]
        low, high = _hit_rates(held, spec, trace)
        missing, arithmetic = share * working_bytes, active - (1 - share) * working_bytes
        return tuple(
            _speed(size, division.expert_slots, (worst, best), missing, arithmetic, disk, bandwidth)
            for size, division, worst, best in zip(limits, budgets, low, high, strict=True)
        )

    parameters, active_parameters = spec.parameters()
    return Plan(
        model=path.name,
        family=spec.family,
        parameters=parameters,
        active_parameters=active_parameters,
        context=length,
        parallel=parallel,
        dense=needs.dense + needs.device_dense,
        experts=sum(layer.experts * size for layer, size in zip(spec.layers, expert_bytes, strict=True)),
        expert=max(expert_bytes),
        active=active,
        state=needs.state + needs.device_state,
        least=least,
        sensible=sensible,
        everything=everything,
        memory=chosen.limit,
        source=f"trace of {trace.model}" if trace else "published range for caches of recently used experts",
        speeds=speeds(1.0, needs.slot),
        qualities={name: speeds(share, levels_apart.slot) for name, share in _mode_shares(index).items()},
        layers=len(spec.layers),
        device=placed,
    )


def _speed(
    memory: int,
    slots: int,
    rates: tuple[float, float],
    missing: float,
    active: float,
    disk: float | None,
    bandwidth: float | None,
) -> Speed:
    """What hit rates mean where a token works with `active` bytes, `missing` of them experts'."""
    worst, best = rates
    reads = ((1 - best) * missing, (1 - worst) * missing)
    speed, expected = None, None
    if disk and bandwidth:
        arithmetic = active / (ARITHMETIC_SHARE * bandwidth)
        speed = (1 / (arithmetic + reads[1] / disk), 1 / max(arithmetic, reads[0] / disk))
        reading = sum(reads) / 2 / disk
        expected = 1 / (max(arithmetic, reading) + UNHIDDEN_SHARE * min(arithmetic, reading))
    return Speed(memory, slots, rates, reads, speed, expected)


def _facts(path: Path, bits: int) -> ModelIndex:
    """Of a model file, or of the pack that a folder becomes."""
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if path.is_dir():
        has_weights = next(path.glob("*.safetensors"), None) is not None
        return planned_index(path, bits) if has_weights else _config_facts(path / "config.json", bits)
    return _config_facts(path, bits) if path.suffix == ".json" else read_index(path)


def _mode_shares(index: ModelIndex) -> dict[str, float]:
    """Mean bits of the lossy modes that a pack has measured, relative to those of exact mode."""
    modes = {} if index.quality is None else index.quality.modes
    whole = modes["exact"].mean_bits if "exact" in modes else 0
    shares = {name: modes[name].mean_bits / whole for name in QUALITIES[1:] if name in modes and whole}
    # A file can say anything; a mode uses something of an expert, and no more than all of it.
    return {name: share for name, share in shares.items() if 0 < share <= 1}


def _config_facts(path: Path, bits: int) -> ModelIndex:
    """The same from nothing but the configuration: what it asks for is what the weights will be."""
    config = read_json(path)
    try:
        spec = family_for(config).spec(config)
    except (UnsupportedModelError, SourceError) as error:
        raise type(error)(f"{path}: {error}") from None
    layouts = {32: "f32", 16: "bf16", 8: "q8g64", 4: "q4g64"}
    lengths: list[int] = []
    dense: dict[str, DenseTensor] = {}
    for name, shape in spec.dense_tensors().items():
        layout = "vector" if len(shape) == 1 else "f32" if name.endswith(FLOAT_TENSORS) else layouts[max(bits, 8)]
        dense[name] = DenseTensor(len(lengths), 0, layout, shape)
        lengths.append(tensor_size(layout, shape))
    experts: dict[int, ExpertLayer] = {}
    for number, layer in enumerate(spec.layers):
        if not layer.experts:
            continue
        parts, end = {}, 0
        for name, matrix in spec.expert_tensors(number).items():
            parts[name] = Part(layouts[bits], 0, align(end, ALIGNMENT), matrix)
            end = parts[name].offset + tensor_size(layouts[bits], matrix)
        sections = tuple((len(lengths) + expert,) for expert in range(layer.experts))
        experts[number] = ExpertLayer((Level(bits, parts),), sections)
        lengths += [end] * layer.experts
    return ModelIndex(path, (str(path),), spec, consecutive_sections(lengths), dense, experts)


def _expert_bytes(index: ModelIndex) -> list[int]:
    """Stored bytes of one expert, the largest with all its levels, by layer; 0 for a dense one."""
    layers = max(index.experts) + 1
    return [
        max(index.section_bytes(levels) for levels in index.experts[layer].sections) if layer in index.experts else 0
        for layer in range(layers)
    ]


def _active_bytes(index: ModelIndex, expert_bytes: Sequence[int]) -> int:
    """Bytes of weights that one token works with: all dense ones but the embedding table, and its experts."""
    spec = index.spec
    dense = {tensor.section for name, tensor in index.dense.items() if name != "embedding" or spec.tied_embeddings}
    total = index.section_bytes(dense)
    return total + sum(layer.top_k * size for layer, size in zip(spec.layers, expert_bytes, strict=True))


def _smallest(budget: Callable[[int], Budget], slots: int, low: int, high: int) -> int:
    """The smallest budget, to a megabyte, that gives so many expert slots."""
    while high - low > 1_000_000:
        middle = (low + high) // 2
        if budget(middle).expert_slots >= slots:
            high = middle
        else:
            low = middle
    return high


def _between(least: int, everything: int, count: int = 4) -> list[int]:
    return [int(least + (everything - least) * step / (count + 1)) for step in range(1, count + 1)]


def _check_trace(trace: Trace, spec: ModelSpec, path: Path) -> None:
    mine = [(layer.experts, layer.top_k) for layer in spec.layers]
    theirs = list(zip(trace.experts, trace.top_k, strict=True))
    theirs += [(0, 0)] * (len(mine) - len(theirs))
    if mine != theirs:
        raise OptionError(f"{path}: the trace is of another model ({trace.model}): its layers have other experts")


def _hit_rates(slots: Sequence[int], spec: ModelSpec, trace: Trace | None) -> tuple[list[float], list[float]]:
    if trace is not None:
        from edgemoe.profiling.analysis import head
        from edgemoe.profiling.simulate import simulate_engine

        tokens = min(trace.tokens, max(1, _ENGINE_PICKS // sum(trace.top_k)))
        rates = [counters.hit_rate for counters in simulate_engine(head(trace, tokens), slots)]
        return rates, rates
    working = sum(layer.top_k for layer in spec.layers)
    total = sum(layer.experts for layer in spec.layers)
    # Less than one token's experts push each other out before they are used again.
    ends = [0.95 * working, *(ratio * working for ratio in PUBLISHED_RATIOS if ratio * working < total), float(total)]

    def at(rates: Sequence[float]) -> list[float]:
        return [float(rate) for rate in np.interp(slots, ends, [0.0, *rates[: len(ends) - 2], 1.0])]

    return at(PUBLISHED_LOW), at(PUBLISHED_HIGH)
