"""Options, each of them once: its name, type and default, what it means, and which values make sense.

`EngineOptions` is what the engine is given, `LoadOptions` what a user may say about it. The command line takes
defaults, choices, bounds and help from here.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from edgemoe.errors import OptionError

CACHE_TYPES = ("f32", "f16", "q8_0")
EVICTION_POLICIES = ("next_use", "lru", "lfu", "least_stale")
GPUS = ("auto", "none", "cuda", "emulated")
QUALITIES = ("exact", "high", "balanced", "fast")
DEFAULT_CONTEXT = 4096
DEFAULT_READERS = 2
DEFAULT_MAX_GAP = 5.0
DEFAULT_QUEUE = 256
DEFAULT_PROMPT_CACHE = "8GB"

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{prefix: 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}


@dataclass(frozen=True, slots=True)
class Meaning:
    """What is known of an option beside its name, type and default.

    help: for people. choices: the texts that it may be. least, most: of a number. automatic: what stands for it where
    it is None.
    """

    help: str
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    automatic: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raises OptionError for a value that makes no sense."""
        if self.choices and value not in self.choices:
            raise OptionError(f"{name} = {value!r} is not one of {', '.join(self.choices)}")
        if self.least is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise OptionError(f"{name} = {value!r} is not a whole number")
        if value < self.least or (self.most is not None and value > self.most):
            bounds = f"at least {self.least}" if self.most is None else f"between {self.least} and {self.most}"
            raise OptionError(f"{name} = {value} is not {bounds}")


def _option(meaning: Meaning, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"meaning": meaning})


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
    """What the engine is given beside the model; it reads every field (native/src/python/facts.cpp).

    The bounds are those of what users may ask for: `LoadOptions` checks them.

    Rows of another quality than the engine's have the same bits with every layout of the memory, but lossy rows of an
    exact engine save no reads.
    """

    threads: int = _option(Meaning("Threads that compute.", least=1, most=1024, automatic="one per processor"))
    context: int = _option(Meaning("Positions that a sequence may have.", least=1))
    sequences: int = _option(Meaning("Sequences whose state is kept.", least=1, most=256), 1)
    positions: int = _option(Meaning("Positions of all sequences together; 0 for those of one.", least=0), 0)
    chunk: int = _option(Meaning("Tokens of a prompt that are computed together.", least=1, most=1 << 20), 512)
    expert_slots: int = _option(Meaning("Memory for so many of the largest experts.", least=1, most=(1 << 31) - 1), 1)
    readers: int = _option(Meaning("Reads that are under way at once.", least=1, most=1024), DEFAULT_READERS)
    eviction: str = _option(
        Meaning("Which expert leaves a full memory first; the text does not depend on it.", EVICTION_POLICIES),
        "next_use",
    )
    prefetch: bool = _option(Meaning("Read experts that the next layer will probably want."), True)
    quality: Quality = field(
        default=EXACT,
        metadata={"meaning": Meaning("Of rows that have no quality of their own; memory is laid out for it.")},
    )
    cache_type_k: str = _option(Meaning("How attention keys are kept.", CACHE_TYPES), "f16")
    cache_type_v: str = _option(Meaning("How attention values are kept.", CACHE_TYPES), "f16")
    arrival_jitter_us: int = _option(
        Meaning("For tests: what was read arrives up to so many microseconds later.", least=0, most=1_000_000), 0
    )
    device_layers: int = _option(
        Meaning("The last so many layers are computed by a device; one more than there are: the head, too.", least=0), 0
    )
    device_slots: int = _option(Meaning("Memory of the device for so many of the largest experts.", least=0), 0)
    isa: str | None = _option(
        Meaning("The instruction set.", automatic="EDGEMOE_ISA, or the best that the processor has"), None
    )


def _as_engine(name: str, default: Any = MISSING) -> Any:
    """An option that means the same to the engine, with its default or another one."""
    known = EngineOptions.__dataclass_fields__[name]
    return field(default=known.default if default is MISSING else default, metadata=known.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is to be loaded. Refuses values that make no sense with OptionError.

    memory: bytes, "8GB" (10^9), "6GiB" or "auto": what the process may take in all. threads: None for the processors
        that this process may use.
    context: positions of a sequence; None for 4096, or what the model was made for if that is less; 0 for all that.
    parallel: texts that are computed at once, on one pool of as many positions as `context` says; any one of them may
        use all of it. Further ones wait; where the pool is full, the text that began last waits, too, and what was
        computed for it is computed again. None for 4, or fewer where their windows or recurrences take memory.
    max_gap: seconds that a text may pause at most because others have their turn. queue: texts that may wait for one.
    prompt_cache_dir, prompt_cache_size: a folder for states of texts, which then survive the program, and its limit.
        Memory for two more states is taken then.
    cache_type_k, cache_type_v: how keys and values are kept: "f32", "f16" or "q8_0".
    gpu: "auto": a GPU if there is one, and it has room; "none"; "cuda": an NVIDIA GPU, or an error; "emulated": one
        that the processor plays, slowly, in memory beside the budget. None of them changes a bit of the result.
    gpu_layers: the last so many layers have their dense part on the device; one more than there are: the head, too.
        None or "auto" for as many as fit. vram: bytes of the device's memory that may be taken in all, as `memory`;
        what is left beside the layers holds experts.
    eviction: which expert leaves memory first, one of EVICTION_POLICIES. prefetch: read the experts that the next layer
        will probably want while the disk is idle. Neither changes a bit of the result.
    quality: "exact" uses every stored bit of every expert. "high", "balanced" and "fast" use fewer of the experts that
        the router gives less weight; they need a pack with several levels whose modes were measured.

    To measure and to test: thresholds, in place of those of `quality` (ascending; an expert works as many levels below
    its finest as there are thresholds below the share of the router's weight that the token's heavier experts have);
    level_cap; chunk, expert_slots and readers, where None is what the memory and the disk suggest; arrival_jitter_us.
    """

    memory: int | str | None = _option(
        Meaning("What the program may take in all, such as 8GB (10^9) or 6GiB.", automatic="auto"), None
    )
    threads: int | None = _as_engine("threads", None)
    context: int | None = _option(
        Meaning(
            "Tokens of prompt and answer together; 0 for all the model was made for.",
            least=0,
            automatic=f"{DEFAULT_CONTEXT}, or that",
        ),
        None,
    )
    parallel: int | None = _option(
        Meaning("Texts that are computed at once.", least=1, most=256, automatic="4, fewer where they take memory"),
        None,
    )
    cache_type_k: str = _as_engine("cache_type_k")
    cache_type_v: str = _as_engine("cache_type_v")
    gpu: str = _option(
        Meaning(
            "Computes, beside the processor: an NVIDIA GPU (auto: if there is one), or one that the processor plays, "
            "which is slow and for tests; the text does not depend on it.",
            GPUS,
        ),
        "auto",
    )
    gpu_layers: int | str | None = _option(
        Meaning(
            "The last N layers have their dense part on the GPU; with more than there are, the head, too.",
            least=0,
            automatic="auto, as many as fit",
        ),
        None,
    )
    vram: int | str | None = _option(
        Meaning("What may be taken of the GPU's memory in all: layers first, then experts.", automatic="auto"), None
    )
    eviction: str = _as_engine("eviction")
    prefetch: bool = _as_engine("prefetch")
    quality: str = _option(
        Meaning(
            "Fewer bits for experts of little weight, where a pack has several levels and says what it costs.",
            QUALITIES,
        ),
        "exact",
    )
    thresholds: Sequence[float] | None = _option(Meaning("Of a lossy mode, in place of a quality's."), None)
    level_cap: int | None = _option(Meaning("No expert works above this level.", least=0, automatic="all levels"), None)
    max_gap: float = _option(
        Meaning("Seconds that a text may pause at most because others have their turn."), DEFAULT_MAX_GAP
    )
    queue: int = _option(Meaning("Texts that may wait for their turn; more are refused.", least=0), DEFAULT_QUEUE)
    prompt_cache_dir: str | None = _option(
        Meaning("Where states of texts are kept, to go on from after they have left memory or the program has ended."),
        None,
    )
    prompt_cache_size: int | str = _option(Meaning("Bytes that this may take on disk."), DEFAULT_PROMPT_CACHE)
    chunk: int | None = _as_engine("chunk", None)
    expert_slots: int | None = _as_engine("expert_slots", None)
    readers: int | None = _as_engine("readers", None)
    arrival_jitter_us: int = _as_engine("arrival_jitter_us")

    def __post_init__(self) -> None:
        if self.gpu_layers == "auto":
            object.__setattr__(self, "gpu_layers", None)
        for known in dataclasses.fields(self):
            value = getattr(self, known.name)
            if value is None and known.default is None:
                continue
            known.metadata["meaning"].check(known.name, value)
            if isinstance(known.default, bool) and not isinstance(value, bool):
                raise OptionError(f"{known.name} = {value!r} is not true or false")
        object.__setattr__(self, "memory", None if self.memory is None else parse_size(self.memory))
        object.__setattr__(self, "vram", None if self.vram is None else parse_size(self.vram, "vram"))
        if self.prompt_cache_dir is not None:
            object.__setattr__(self, "prompt_cache_dir", os.fspath(self.prompt_cache_dir))
        size = parse_size(self.prompt_cache_size, "prompt_cache_size")
        if size is None:
            raise OptionError(f"prompt_cache_size = {self.prompt_cache_size!r} is not a number of bytes")
        object.__setattr__(self, "prompt_cache_size", size)

    @classmethod
    def given(cls, options: Mapping[str, Any]) -> LoadOptions:
        """From names and values. An unknown name is an OptionError."""
        known = [option.name for option in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise OptionError(f"unknown option {unknown[0]!r} (known: {', '.join(known)})")
        return cls(**options)

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number; None for what is free."""
        assert not isinstance(self.memory, str)
        return self.memory

    @property
    def vram_bytes(self) -> int | None:
        """`vram` as a number; None for what is available."""
        assert not isinstance(self.vram, str)
        return self.vram

    @property
    def layers_on_gpu(self) -> int | None:
        """`gpu_layers` as a number; None for as many as fit."""
        assert not isinstance(self.gpu_layers, str)
        return self.gpu_layers


def context_length(asked: int | None, longest: int) -> int:
    """Positions of a sequence: those asked for, where the model was made for `longest`. Raises OptionError."""
    if asked is None:
        return min(longest, DEFAULT_CONTEXT)
    if not 0 <= asked <= longest:
        raise OptionError(f"a context of {asked} positions: the model was made for 1 to {longest}")
    return asked or longest


def parse_size(text: str | int, name: str = "memory") -> int | None:
    """Bytes of "8GB" (10^9), "6GiB" (2^30), "500M" or a plain number; None for "auto". name: of what it is the size.
    Raises OptionError."""
    if isinstance(text, str):
        if text.strip().lower() == "auto":
            return None
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
        if not match or match[2].upper() not in _UNITS:
            raise OptionError(f"{name} {text!r} is not a size such as 8GB, 6GiB or auto")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    else:
        size = text
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 62:
        raise OptionError(f"{name} {text!r} is not between 1 byte and 4 EiB")
    return size
