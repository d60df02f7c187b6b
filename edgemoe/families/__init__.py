"""Model families: one file each, named after the `model_type` of its configurations.

A family turns a configuration, or the metadata of a GGUF file, into a `ModelSpec` and says which source tensor every
engine tensor comes from. Adding a
file to this package adds the family; there is no other list to edit (a leading underscore marks a file of helpers).
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from edgemoe.errors import UnsupportedModelError, quote
from edgemoe.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Slices:
    """Rows taken out of groups: the source's rows are `groups` groups of as many. Of each group the rows of every range
    (first, end) remain, those of the first range of all groups before those of the second. transpose: every piece
    [rows, columns] becomes [columns, rows]."""

    groups: int
    ranges: tuple[tuple[int, int], ...]
    transpose: bool = False

    def shape(self, found: tuple[int, ...]) -> tuple[int, ...]:
        """Of what remains of a matrix of this shape; () where the ranges do not lie within its groups."""
        if len(found) != 2 or found[0] % self.groups or self.ranges[-1][1] > found[0] // self.groups:
            return ()
        rows = sum(end - first for first, end in self.ranges)
        return (self.groups * found[1], rows) if self.transpose else (self.groups * rows, found[1])


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where an engine tensor lies in the source.

    name: the source tensor. index: the slice of its first axis, for stacked tensors. rows: the range (first, end) of
    the rows that remain, for fused tensors. transpose: the source is [input, output]. every: of the rows of the
    result, or the elements of a vector's last axis, (first, step) says which remain, for alternating ones. They apply
    in this order. scales: the source is MXFP4 blocks, uint8 [..., rows, blocks, 16], and this tensor their exponents,
    uint8 [..., rows, blocks]. A vector may have any shape with as many elements in the source.
    flat: all axes of the source but the last are one, [heads, rows, columns] or [channels, 1, taps]. slices: rows out
    of groups of rows. negative_exp: the tensor is -exp of the source. These three go with none of the others.
    """

    name: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transpose: bool = False
    every: tuple[int, int] | None = None
    scales: str | None = None
    flat: bool = False
    slices: Slices | None = None
    negative_exp: bool = False

    def shape(self, found: tuple[int, ...], vector: bool) -> tuple[int, ...]:
        """Of the engine tensor, where the source has this shape; another one than any tensor has, such as (), where
        they do not go together."""
        if self.index is not None:
            found = found[1:] if found and self.index < found[0] else ()
        if self.rows is not None:
            found = (self.rows[1] - self.rows[0], *found[1:]) if found and self.rows[1] <= found[0] else ()
        if self.transpose:
            found = found[::-1]
        if self.every is not None:
            axis, (first, step) = (len(found) - 1 if vector else 0), self.every
            found = tuple(len(range(first, size, step)) if i == axis else size for i, size in enumerate(found))
        if self.flat and found:
            found = (math.prod(found[:-1]), found[-1])
        if self.slices is not None:
            found = self.slices.shape(found)
        return (math.prod(found),) if vector else found


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes the calls of tools that it wants made.

    syntax: what a call looks like (edgemoe/text/call_syntax.py reads them):
        "json": an object with name and arguments, or a list of such objects;
        "named": the name, `separator`, the arguments as JSON;
        "tagged": the name, then each argument between marks of its own, its value bare text or JSON;
        "python": a list of calls, `[f(a=1, b="x"), g()]`;
        "gemma": `call:f{a:1,b:<|"|>x<|"|>}`;
        "harmony": a message whose header names the function, its body the arguments as JSON.
    begin, end: marks around calls. together: all calls of an answer stand between one pair of them; otherwise each has
        its own. parallel: there may be several in an answer.
    signs: texts that a template of this format has, all of them; empty where templates do not show it.
    name_begin, name_end, call_end: around the name, and after the last argument ("named", "tagged"). separator: between
        name and arguments ("named").
    key_begin, key_end, value_begin, value_end: around an argument's name and its value ("tagged").
    loose_begin: what a call may begin with where the model leaves `begin` out.
    name_prefix: what stands before the name and is no part of it. numbered: the name is followed by a colon and the
        call's number, and all of it is the call's id.
    lines: every mark stands on a line of its own ("json", "tagged"). own_lines: every value, too.
    id_length: characters of an id, letters and digits; 0 for any. quotes: marks around texts in arguments.
    result_role: of messages with results, where templates write any role as it is.
    """

    syntax: str
    begin: str
    end: str = ""
    together: bool = False
    parallel: bool = True
    signs: tuple[str, ...] = ()
    name_begin: str = ""
    name_end: str = ""
    separator: str = ""
    call_end: str = ""
    key_begin: str = ""
    key_end: str = ""
    value_begin: str = ""
    value_end: str = ""
    loose_begin: str = ""
    name_prefix: str = ""
    numbered: bool = False
    lines: bool = False
    own_lines: bool = False
    id_length: int = 0
    quotes: tuple[str, ...] = ()
    result_role: str = ""

    def tokens(self) -> tuple[str, ...]:
        """What of its marks may be tokens of their own."""
        marks = (
            *(self.begin, self.end, self.name_begin, self.name_end, self.name_prefix, self.separator, self.call_end),
            *(self.key_begin, self.key_end, self.value_begin, self.value_end, *self.quotes),
        )
        return tuple(dict.fromkeys(token for mark in marks for token in re.findall(r"<[^<>\s]+>|\[[^\[\]\s]+\]", mark)))


class Family(Protocol):
    """What a family's module offers."""

    MODEL_TYPE: str
    GGUF_ARCHITECTURE: str | None
    """`general.architecture` of its GGUF files; None where there are none."""

    GGUF_VALUES: tuple[str, ...]
    """Vectors of GGUF files whose values `spec_from_gguf` finds, as lists, in the metadata under their names (may be
    left out)."""

    TOOL_FORMATS: tuple[ToolFormat, ...]
    """How its models write calls of tools; the usual form comes first (may be left out)."""

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The model of a config.json. Raises UnsupportedModelError for what a ModelSpec cannot express."""
        ...

    def tensor_sources(
        self, spec: ModelSpec, config: Mapping[str, Any], names: Collection[str]
    ) -> dict[str, TensorSource]:
        """Engine tensor name -> source. `names` are the source's tensors: some families have been saved in two forms.

        The keys are those of `ModelSpec.dense_tensors` and `layers.N.experts.E.{gate,up,down}`.
        """
        ...

    def spec_from_gguf(self, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
        """The model of a GGUF file; `shapes` are those of its tensors, rows first. Raises as `spec`."""
        ...

    def gguf_tensor_sources(self, spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
        """As `tensor_sources`, for a GGUF file."""
        ...


def family_names() -> list[str]:
    """The known model types, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises UnsupportedModelError that names the known ones."""
    model_type, known = config.get("model_type"), family_names()
    if model_type not in known:
        raise UnsupportedModelError(f"model_type = {quote(model_type)} is not supported (known: {', '.join(known)})")
    return _family(str(model_type))


def gguf_family_for(metadata: Mapping[str, Any]) -> Family:
    """The family of a GGUF file's metadata. Raises UnsupportedModelError that names the known ones."""
    architecture = metadata.get("general.architecture")
    families = {getattr(family, "GGUF_ARCHITECTURE", None): family for family in map(_family, family_names())}
    families.pop(None, None)
    if not isinstance(architecture, str) or architecture not in families:
        known = ", ".join(sorted(filter(None, families)))
        raise UnsupportedModelError(f"general.architecture = {quote(architecture)} is not supported (known: {known})")
    return families[architecture]


def tool_formats(name: str) -> tuple[ToolFormat, ...]:
    """How models of this family write calls of tools; empty where no form is known."""
    return tuple(getattr(_family(name), "TOOL_FORMATS", ())) if name in family_names() else ()


def describe(name: str) -> dict[str, Any]:
    """What the docstring of a family says, which begins "Name (models): features.": model_type, gguf_architecture (or
    None), name, models (a list), features."""
    module = importlib.import_module(f"{__name__}.{name}")
    text = " ".join((module.__doc__ or "").partition("\n\n")[0].split())
    title, _, rest = text.partition(" (")
    models, _, features = rest.partition("): ")
    return {
        "model_type": name,
        "gguf_architecture": getattr(module, "GGUF_ARCHITECTURE", None),
        "name": title,
        "models": models.split(", "),
        "features": features.removesuffix("."),
    }


def _family(name: str) -> Family:
    return cast(Family, importlib.import_module(f"{__name__}.{name}"))
