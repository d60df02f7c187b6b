"""What a conversion writes, planned from headers alone: every tensor's layout, and what lies in each section."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemoe._core import __version__
from edgemoe.convert.tokenizer_files import tokenizer_blobs
from edgemoe.errors import OptionError, SourceError, UnsupportedModelError
from edgemoe.families import TensorSource
from edgemoe.formats.index import PARTS, DenseTensor, ExpertLayer, Level, Part
from edgemoe.formats.layouts import BLOCK as ROWS_AT_ONCE
from edgemoe.formats.layouts import ROW_MAJOR, bits_of, tensor_size
from edgemoe.formats.pack import ALIGNMENT, BLOCK, MAX_SECTION, Blob, PackContents, align
from edgemoe.formats.read import TOKENIZER_FILES
from edgemoe.quantize.nested_experts import NestedExperts, NestedOptions
from edgemoe.source import GgufTensors, SourceModel, SourceTensor, TensorFiles, checked_dtype
from edgemoe.spec import FLOAT_ONLY, FLOAT_TENSORS

BITS = (32, 16, 8, 4)
# Of the experts of a folder of original weights, unless they are asked for.
_FOLDER_BITS = 4


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor on its way into a pack: its layout there, and its offset within its section."""

    tensor: SourceTensor
    layout: str
    offset: int

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + tensor_size(self.layout, self.tensor.shape)


@dataclass(frozen=True, slots=True)
class PlannedSection:
    """The tensors of a section, or its bytes where it is a blob."""

    tensors: tuple[PlannedTensor, ...] = ()
    blob: bytes = b""

    @property
    def length(self) -> int:
        """Bytes, without the padding at the end."""
        return self.tensors[-1].end if self.tensors else len(self.blob)


@dataclass(slots=True)
class ConversionPlan:
    """size: bytes of the pack, its index (some 100 KB) left out; temporary: of files that are removed again.
    unwritten: other work, in bytes that take as long to write. fingerprint: of everything the bytes depend on."""

    model: SourceModel
    contents: PackContents
    sections: list[PlannedSection] = field(default_factory=list)
    size: int = BLOCK
    temporary: int = 0
    unwritten: int = 0
    fingerprint: str = ""

    def add(self, section: PlannedSection) -> int:
        """Its number."""
        if section.length > MAX_SECTION:
            name = section.tensors[0].tensor.name if section.tensors else "a blob"
            where = self.model.folder.folder
            raise SourceError(f"{where}: {name} takes {section.length} bytes (at most {MAX_SECTION} are possible)")
        self.size += align(section.length, BLOCK)
        self.sections.append(section)
        return len(self.sections) - 1


def plan_pack(
    source: Path, bits: int | None, dense_bits: int | None, nested: NestedOptions | None = None
) -> ConversionPlan:
    """Of a folder or a GGUF file, with the options of `convert`. Raises as `convert`, before anything is written."""
    for name, value in (("bits", bits), ("dense_bits", dense_bits)):
        if value is not None and value not in BITS:
            raise OptionError(f"{name} = {value} is not one of {', '.join(map(str, BITS))}")
    model = SourceModel.open(source)
    if nested is not None and bits is not None:
        raise OptionError("bits and levels exclude each other")
    if bits is None and model.form != "gguf" and nested is None:
        bits = _FOLDER_BITS
    if dense_bits is None and (bits is not None or nested is not None):
        dense_bits = max(bits or 0, 8)
    provenance: dict[str, Any] = {
        "source": source.resolve().name,
        "source_format": model.form,
        "edgemoe_version": __version__,
    }
    # None where the weights are the source's own.
    provenance |= {name: value for name, value in (("bits", bits), ("dense_bits", dense_bits)) if value is not None}
    if nested is not None:
        provenance |= nested.provenance()
    contents = PackContents(model.spec, model.generation, provenance, {}, {}, {}, model.unused)
    plan = ConversionPlan(model, contents)
    _plan_dense(plan, model.sources, dense_bits)
    blobs = tokenizer_blobs(model)
    for name in TOKENIZER_FILES:
        if blobs.get(name):
            plan.contents.blobs[name] = Blob(plan.add(PlannedSection(blob=blobs[name])), len(blobs[name]))
    for number, layer in enumerate(model.spec.layers):
        if layer.experts and nested is None:
            _plan_experts(plan, number, model.sources, bits)
    experts = None
    if nested is not None:
        experts = _nested_experts(model, nested)
        plan.size += experts.size()
        plan.temporary = experts.temporary_size()
        plan.unwritten = experts.unwritten()
    plan.fingerprint = _fingerprint(plan, experts)
    return plan


def _plan_dense(plan: ConversionPlan, sources: Mapping[str, TensorSource], bits: int | None) -> None:
    """One section for each layer, and for each of the tensors outside the layers and of those that must be alone."""
    folder, groups = plan.model.folder, dict[str, list[tuple[SourceTensor, str]]]()
    for name, shape in plan.contents.spec.dense_tensors().items():
        tensor = SourceTensor(name, sources[name], checked_dtype(folder, name, sources[name], shape), shape)
        if len(shape) == 1:
            layout = "vector"
        elif name.endswith(FLOAT_ONLY if bits is None else FLOAT_TENSORS):
            layout = "f32"
        else:
            layout = _layout(folder, bits, [tensor])
        alone = not name.startswith("layers.") or (layout in ROW_MAJOR and shape[0] % ROWS_AT_ONCE)
        groups.setdefault(name if alone else ".".join(name.split(".")[:2]), []).append((tensor, layout))
    for members in groups.values():
        section = _section(members)
        number = plan.add(section)
        for planned in section.tensors:
            tensor = planned.tensor
            plan.contents.dense[tensor.name] = DenseTensor(number, planned.offset, planned.layout, tensor.shape)


def _plan_experts(plan: ConversionPlan, number: int, sources: Mapping[str, TensorSource], bits: int | None) -> None:
    """One section for each expert: gate, up and down. All experts of the layer have the same layouts."""
    folder, spec = plan.model.folder, plan.contents.spec
    layouts, tensors = {}, {}
    for part, shape in spec.expert_tensors(number).items():
        names = [f"layers.{number}.experts.{expert}.{part}" for expert in range(spec.layers[number].experts)]
        dtypes = [checked_dtype(folder, name, sources[name], shape) for name in names]
        tensors[part] = [
            SourceTensor(name, sources[name], dtype, shape) for name, dtype in zip(names, dtypes, strict=True)
        ]
        layouts[part] = _layout(folder, bits, tensors[part])
        if layouts[part] in ROW_MAJOR and shape[0] % ROWS_AT_ONCE:
            raise UnsupportedModelError(
                f"{folder.folder}: tensor {sources[names[0]].name}: {shape[0]} rows of an expert are no multiple of"
                f" {ROWS_AT_ONCE}; a pack can hold them requantized (--bits 8, 4) only"
            )
    experts = zip(*(tensors[part] for part in PARTS), strict=True)
    sections = [_section(zip(expert, (layouts[part] for part in PARTS), strict=True)) for expert in experts]
    numbers = tuple((plan.add(section),) for section in sections)
    shapes = spec.expert_tensors(number)
    parts = {
        part: Part(planned.layout, 0, planned.offset, shapes[part])
        for part, planned in zip(PARTS, sections[0].tensors, strict=True)
    }
    if bits is None or set(layouts.values()) <= set(ROW_MAJOR):
        bits = max(bits_of(layout) for layout in layouts.values())
    plan.contents.experts[number] = ExpertLayer((Level(bits, parts),), numbers)


def _section(members: Iterable[tuple[SourceTensor, str]]) -> PlannedSection:
    """Tensors in these layouts, one after the other."""
    tensors, end = list[PlannedTensor](), 0
    for tensor, layout in members:
        tensors.append(PlannedTensor(tensor, layout, align(end, ALIGNMENT)))
        end = tensors[-1].end
    return PlannedSection(tuple(tensors))


def _nested_experts(model: SourceModel, nested: NestedOptions) -> NestedExperts:
    """To plan with. Raises as `_plan_experts` for tensors that are not what they should be."""
    for number, layer in enumerate(model.spec.layers):
        shapes = model.spec.expert_tensors(number)
        for expert in range(layer.experts):
            for part in PARTS:
                name = f"layers.{number}.experts.{expert}.{part}"
                checked_dtype(model.folder, name, model.sources[name], shapes[part])
    if not any(layer.experts for layer in model.spec.layers):
        raise UnsupportedModelError(f"{model.folder.folder}: no layer has experts, and levels are of experts")
    return NestedExperts(model.folder.folder, model, nested, Path())


def _layout(folder: TensorFiles, bits: int | None, tensors: Sequence[SourceTensor]) -> str:
    """The layout of a matrix, or of matrices that must share one."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes == {"mxfp4"} and bits != 32:
        return "ggml.mxfp4"
    if bits is None:
        assert isinstance(folder, GgufTensors)
        kinds = {folder.block_type(tensor.source.name) for tensor in tensors}
        if len(kinds) > 1:
            names = ", ".join(sorted(kind.name for kind in kinds))
            raise UnsupportedModelError(f"{folder.folder}: {tensors[0].name} and its like differ in type ({names})")
        (kind,) = kinds
        return kind.name if kind.weights == 1 else f"ggml.{kind.name}"
    if bits == 16 and len(dtypes) == 1:
        return next(iter(dtypes))
    return {32: "f32", 16: "f32", 8: "q8g64", 4: "q4g64"}[bits]


def _fingerprint(plan: ConversionPlan, experts: NestedExperts | None) -> str:
    """Of everything the bytes depend on, the contents of the tensors aside: for those stands the files' time."""
    contents = plan.contents
    digest = hashlib.sha256(plan.model.folder.fingerprint().encode())
    digest.update(json.dumps([contents.spec.to_dict(), contents.generation, contents.provenance]).encode())
    for section in plan.sections:
        digest.update(section.blob or repr(section).encode())
    if experts is not None:
        digest.update(repr([experts.levels(number) for number in experts.routed()]).encode())
    return digest.hexdigest()
