"""From a model's index and what a user says about it to an engine that is ready to compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgemoe.disk import reading_threads
from edgemoe.engine import Engine
from edgemoe.errors import OptionError
from edgemoe.formats.index import ModelIndex
from edgemoe.memory import Budget, automatic_sequences, plan_budget
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


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine, what it was given, and how the memory is divided."""

    engine: Engine
    options: EngineOptions
    budget: Budget

    @property
    def resident(self) -> bool:
        """Whether every expert has its place in memory."""
        return self.budget.expert_slots >= self.budget.all_slots


def load_engine(index: ModelIndex, options: LoadOptions) -> Loaded:
    """Plans the memory and reads the dense weights. What the process holds already counts: whatever else a model needs
    is to be loaded before.

    Raises MemoryBudgetError, OptionError, ReadError, ThreadError.
    """
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
    budget = plan_budget(
        options.memory_bytes,
        index,
        chosen,
        chunk=options.chunk,
        expert_slots=options.expert_slots,
        states=3 if options.prompt_cache_dir else 1,
    )
    chosen = replace(chosen, chunk=budget.chunk, expert_slots=budget.expert_slots)
    if options.readers is None and budget.expert_slots < budget.all_slots:
        chosen = replace(chosen, readers=reading_threads(index.path, budget.slot_bytes, default_cache_dir()))
    return Loaded(Engine(index, chosen), chosen, budget)


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
