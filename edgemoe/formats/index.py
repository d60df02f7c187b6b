"""The index of a model: every fact that the engine is given, in one family of frozen dataclasses.

A pack's index, a GGUF file's header and a folder of safetensors all become a `ModelIndex`. The engine reads it field by
field (native/src/python/facts.cpp): a field that it does not know, or does not find, is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemoe.spec import ModelSpec

PARTS = ("gate", "up", "down")
"""The matrices of an expert, in the order in which they are stored."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes at `offset` of file number `file` of the index."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Section:
    """What is read at once: extents, one after the other, and the CRC32C of all their bytes, where there is one."""

    extents: tuple[Extent, ...]
    checksum: int | None = None

    @property
    def length(self) -> int:
        return sum(extent.length for extent in self.extents)


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A matrix [output, input] or a vector [length] of the dense part; `offset` counts from the beginning of its
    section."""

    section: int
    offset: int
    layout: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix [output, input] of an expert: in which extent of its section, and where in it."""

    layout: str
    extent: int
    offset: int
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Level:
    """One stored precision of a layer's experts; all of them share the places of their parts.

    bits: of a weight, coarser levels included. parts: by the names in `PARTS`.
    """

    bits: int
    parts: Mapping[str, Part]


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """levels: coarse to fine. sections: [expert][level] -> section number; an expert may end with an earlier level."""

    levels: tuple[Level, ...]
    sections: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LevelQuality:
    """What was measured with all experts at one level. kl: divergence from the model before quantization, in nats."""

    bits: int
    perplexity: float
    kl: float


@dataclass(frozen=True, slots=True)
class ModeQuality:
    """What was measured in a mode. thresholds: ascending (docs/quantization.md). mean_bits: over all (token, pick)
    pairs. kl: as `LevelQuality`."""

    thresholds: tuple[float, ...]
    perplexity: float
    kl: float
    mean_bits: float

    def to_dict(self) -> dict[str, Any]:
        """As a pack stores it."""
        return {
            "thresholds": list(self.thresholds),
            "perplexity": self.perplexity,
            "kl": self.kl,
            "mean_bits": self.mean_bits,
        }


@dataclass(frozen=True, slots=True)
class MeasuredQuality:
    """What was measured of levels and modes. text: name of the text; tokens: of it that were predicted.
    reference: perplexity before quantization."""

    text: str
    tokens: int
    reference: float
    levels: tuple[LevelQuality, ...]
    modes: Mapping[str, ModeQuality]

    def to_dict(self) -> dict[str, Any]:
        """As a pack stores it (docs/format.md)."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "reference": {"perplexity": self.reference},
            "levels": [{"bits": level.bits, "perplexity": level.perplexity, "kl": level.kl} for level in self.levels],
            "modes": {name: mode.to_dict() for name, mode in self.modes.items()},
        }


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """A model: where its weights lie, and what the engine must know to compute with them.

    path: of the model, for messages. files: absolute paths; extents refer to them by number. dense: engine name ->
    tensor, those of `spec.dense_tensors()`. experts: layer -> its experts, for layers that have some.
    generation: `bos_token_ids` and `eos_token_ids`, and sampling defaults under their names in generation_config.json.
    quality: None where nothing was measured.
    """

    path: Path
    files: tuple[str, ...]
    spec: ModelSpec
    sections: tuple[Section, ...]
    dense: Mapping[str, DenseTensor]
    experts: Mapping[int, ExpertLayer]
    generation: Mapping[str, Any] = field(default_factory=dict)
    quality: MeasuredQuality | None = None

    @property
    def level_count(self) -> int:
        """Levels of the experts that have the most; 1 without experts."""
        return max((len(layer.levels) for layer in self.experts.values()), default=1)

    def section_bytes(self, numbers: Iterable[int]) -> int:
        """Bytes that these sections take in their files."""
        return sum(self.sections[number].length for number in numbers)
