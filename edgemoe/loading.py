"""From a model's index and what a user says about it to an engine that is ready to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from edgemoe.device_memory import DeviceBudget, automatic_vram, plan_device
from edgemoe.devices import OpenDevice, open_device
from edgemoe.disk import reading_threads
from edgemoe.engine import Engine
from edgemoe.errors import DeviceError, DeviceMemoryError, OptionError
from edgemoe.formats.index import ModelIndex
from edgemoe.memory import CHUNKS, Budget, automatic_sequences, format_size, plan_budget
from edgemoe.model_files import default_cache_dir
from edgemoe.options import (
    DEFAULT_READERS,
    EXACT,
    QUALITIES,
    EngineOptions,
    LoadOptions,
    Quality,
    context_length,
)
from edgemoe.processors import usable_processors
from edgemoe.spec import ModelSpec

Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A device that computes some of a model: its kind and name, of how many layers, and how its memory is divided."""

    kind: str
    name: str
    model_layers: int
    budget: DeviceBudget

    def __str__(self) -> str:
        layers = min(self.budget.layers, self.model_layers)
        head = " and the head" if self.budget.layers > self.model_layers else ""
        slots = f", {self.budget.slots} of {self.budget.all_slots} experts" if self.budget.all_slots else ""
        return f"{self.name}, {layers} of {self.model_layers} layers{head}{slots}, {format_size(self.budget.taken)}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine, what it was given, and how the memory is divided. device: what computes beside the processor."""

    engine: Engine
    options: EngineOptions
    budget: Budget
    device: DeviceUse | None

    @property
    def resident(self) -> bool:
        """Whether every expert has its place in memory."""
        return self.budget.expert_slots >= self.budget.all_slots


def load_engine(index: ModelIndex, options: LoadOptions, announce: Announce | None = None) -> Loaded:
    """Plans the memory and reads the dense weights. What the process holds already counts: whatever else a model needs
    is to be loaded before. announce: told where a device does not do what could be expected of it.

    Raises MemoryBudgetError, OptionError, ReadError, ThreadError, DeviceError.
    """
    say = announce or (lambda _: None)
    context = context_length(options.context, index.spec.context)
    _check_cache_types(index.spec, options.cache_type_k, options.cache_type_v)
    if options.level_cap is not None and options.level_cap >= index.level_count:
        raise OptionError(f"{index.path}: level_cap {options.level_cap}: its highest level is {index.level_count - 1}")
    chosen = EngineOptions(
        threads=usable_processors() if options.threads is None else options.threads,
        context=context,
        sequences=options.parallel or 1,
        positions=context,
        readers=DEFAULT_READERS if options.readers is None else options.readers,
        eviction=options.eviction,
        prefetch=options.prefetch,
        quality=Quality(thresholds=_thresholds(index, options), level_cap=options.level_cap),
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        arrival_jitter_us=options.arrival_jitter_us,
    )
    index = replace(index, spec=index.spec.for_context(context))
    if options.parallel is None:
        chosen = replace(chosen, sequences=automatic_sequences(options.memory_bytes, index, chosen))
    device = _device(options, say)
    if device is None:
        return _load(index, chosen, options, None, say)
    failed = ""
    try:
        return _load(index, chosen, options, device, say)
    except DeviceError as error:
        if options.gpu != "auto":
            less = "a smaller --vram or -ngl takes less of it, " if isinstance(error, DeviceMemoryError) else ""
            name = device.name
            del device  # an error that somebody keeps would keep it
            raise type(error)(f"{name}: {error}; {less}--gpu none computes without it") from error.with_traceback(None)
        failed = str(error)  # and not the error, which would keep the engine
    say(f"{device.name}: {failed}; the processor computes everything")
    del device
    return _load(index, chosen, options, None, say)


def _device(options: LoadOptions, say: Announce) -> OpenDevice | None:
    """What is to compute beside the processor. Raises DeviceError."""
    if options.layers_on_gpu == 0:
        return None
    device = open_device(options.gpu, say)
    if device is None:
        if options.gpu == "auto" and (options.layers_on_gpu is not None or options.vram_bytes is not None):
            say("there is no GPU: the processor computes everything")
        return None
    if device.unified and options.vram_bytes is None:
        text = f"{device.name} shares the processor's memory: say with --vram how much of --memory it may take"
        if options.gpu != "auto":
            raise OptionError(text)
        say(f"{text}; the processor computes everything")
        return None
    failed = _failed_check(device)
    if failed:
        if options.gpu != "auto":
            raise DeviceError(f"{failed}; --gpu none computes without it")
        say(f"{failed}; the processor computes everything")
        return None
    return device


def _failed_check(device: OpenDevice) -> str:
    """Why a GPU is not to be relied on; empty if it is. The emulated device is what its kernels are compared with."""
    if device.kind == "emulated":
        return ""
    from edgemoe.device_check import wrong_kernels

    try:
        wrong = wrong_kernels(device, default_cache_dir())
    except DeviceError as error:
        return f"{device.name}: {error}"
    if not wrong:
        return ""
    return f"{device.name}: {', '.join(wrong)} give other bits than the processor's (edgemoe doctor --gpu looks again)"


def _load(
    index: ModelIndex, chosen: EngineOptions, options: LoadOptions, device: OpenDevice | None, say: Announce
) -> Loaded:
    """With as much on the device as its memory holds."""
    limit, placed = options.memory_bytes, None
    states = 3 if options.prompt_cache_dir else 1
    if device is not None:
        vram = automatic_vram(device.available) if options.vram_bytes is None else options.vram_bytes
        placed = plan_device(vram, index, chosen, layers=options.layers_on_gpu, chunk=options.chunk)
        if not placed.layers:
            say(f"{device.name}: {format_size(vram)} of its memory hold no layer; the processor computes everything")
            device = placed = None

    def divide(chunk: int | None, largest: int = CHUNKS[0]) -> tuple[EngineOptions, Budget]:
        given, beside = chosen, 0
        if placed is not None:
            given = replace(chosen, device_layers=placed.layers, device_slots=placed.slots)
            # One memory: what the device takes of it counts once. An emulated one takes it from what is free.
            if device is not None and (device.unified or (device.kind == "emulated" and limit is None)):
                beside = placed.taken
        budget = plan_budget(
            limit,
            index,
            given,
            chunk=chunk,
            expert_slots=options.expert_slots,
            states=states,
            largest_chunk=largest,
            beside=beside,
        )
        return replace(given, chunk=budget.chunk, expert_slots=budget.expert_slots), budget

    given, budget = divide(options.chunk, CHUNKS[0] if placed is None else placed.chunk)
    if placed is not None and budget.chunk < placed.chunk:
        # Smaller chunks leave more of the device's memory, too.
        placed = plan_device(placed.limit, index, chosen, layers=options.layers_on_gpu, chunk=budget.chunk)
        given, budget = divide(budget.chunk)
    if options.readers is None and budget.expert_slots < budget.all_slots:
        given = replace(given, readers=reading_threads(index.path, budget.slot_bytes, default_cache_dir()))
    if device is None or placed is None:
        return Loaded(Engine(index, given), given, budget, None)
    use = DeviceUse(device.kind, device.name, len(index.spec.layers), placed)
    return Loaded(Engine(index, given, device.core), given, budget, use)


def _check_cache_types(spec: ModelSpec, key_type: str, value_type: str) -> None:
    """Raises OptionError where heads cannot be kept in blocks of 32."""
    for layer in spec.layers:
        attention = layer.attention
        types, dim = {key_type, value_type}, attention.head_dim
        if attention.kind == "mla":  # the latent is a key; it has no values beside it
            types, dim = {key_type}, attention.kv_rank + attention.rope_dim
        elif attention.kind != "full":
            types = set()
        if "q8_0" in types and dim % 32:
            raise OptionError(f"cache type q8_0 needs heads of a multiple of 32, not {dim}")


def quality_of(index: ModelIndex, name: str) -> Quality:
    """What a mode's name means for a pack. Raises OptionError."""
    if name not in QUALITIES:
        raise OptionError(f"quality = {name!r} is not one of {', '.join(QUALITIES)}")
    if name == "exact":
        return EXACT
    if index.level_count == 1:
        raise OptionError(f"{index.path}: quality {name!r}: all experts are stored at one precision")
    modes = {} if index.quality is None else index.quality.modes
    if name not in modes:
        raise OptionError(f"{index.path}: quality {name!r}: the pack does not say what was measured for this mode")
    return Quality(thresholds=tuple(modes[name].thresholds))


def _thresholds(index: ModelIndex, options: LoadOptions) -> tuple[float, ...]:
    """What a mode's name means for a pack, or the thresholds that were chosen in its place. Raises OptionError."""
    quality, chosen = options.quality, options.thresholds
    if chosen is None:
        chosen = quality_of(index, quality).thresholds
    elif quality != "exact":
        raise OptionError(f"quality {quality!r} and thresholds exclude each other")
    try:
        thresholds = tuple(float(threshold) for threshold in chosen)
    except (TypeError, ValueError):
        raise OptionError(f"thresholds {chosen!r} are not a list of numbers") from None
    if len(thresholds) >= index.level_count and thresholds:
        raise OptionError(f"{index.path}: {len(thresholds)} thresholds for experts of {index.level_count} levels")
    if any(not -1 <= threshold <= 1 for threshold in thresholds) or list(thresholds) != sorted(thresholds):
        raise OptionError(f"{index.path}: thresholds {list(thresholds)} do not ascend from -1 to 1 at most")
    return thresholds
