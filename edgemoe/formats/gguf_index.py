"""A GGUF file as a model that runs where it lies: the index a pack would have, with no copy of the weights.

Matrices keep their blocks, row after row ("ggml.q4_k" and so on). An expert is a section of three extents, because GGUF
stacks the gates of all experts of a layer in one tensor, and so their ups and downs; every other tensor is a section of
its own. There are no checksums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemoe.errors import SourceError, UnsupportedModelError
from edgemoe.families import TensorSource, gguf_family_for
from edgemoe.formats.generation import gguf_generation
from edgemoe.formats.ggml_blocks import READABLE
from edgemoe.formats.gguf import GgufModel
from edgemoe.formats.index import PARTS, DenseTensor, ExpertLayer, Extent, Level, ModelIndex, Part, Section
from edgemoe.formats.layouts import bits_of
from edgemoe.spec import FLOAT_ONLY, ModelSpec

MAX_EXPERTS = 1 << 17
"""Experts in all layers; the largest models have 25 000."""


@dataclass(frozen=True, slots=True)
class GgufSource:
    """What a GGUF file says about its model. sources: of every engine tensor; unused: the tensors left over."""

    model: GgufModel
    spec: ModelSpec
    sources: dict[str, TensorSource]
    generation: dict[str, Any]
    unused: list[str]

    @classmethod
    def open(cls, path: str | Path) -> GgufSource:
        """Raises SourceError, UnsupportedModelError and TokenizerError."""
        model = GgufModel.open(path)
        shapes = {name: info.shape for name, info in model.tensors.items()}
        try:
            family = gguf_family_for(model.metadata)
            values = _values(model, getattr(family, "GGUF_VALUES", ()))
            spec = family.spec_from_gguf({**model.metadata, **values}, shapes)
            # Before a list of all expert tensors is made: a hostile file may speak of millions.
            experts = sum(layer.experts for layer in spec.layers)
            if experts > MAX_EXPERTS:
                raise SourceError(f"{experts} experts in all layers (at most {MAX_EXPERTS})")
            sources = family.gguf_tensor_sources(spec, shapes)
            _check_shapes(model, spec, sources)
        except (UnsupportedModelError, SourceError) as error:
            raise type(error)(f"{model.path}: {error}") from None
        used = {source.name for source in sources.values()} | values.keys()
        generation = gguf_generation(model.metadata, str(model.path))
        return cls(model, spec, sources, generation, [name for name in model.names() if name not in used])


def build_index(source: GgufSource) -> ModelIndex:
    """Raises UnsupportedModelError for a type of tensor that the engine has no products for."""
    model, spec = source.model, source.spec
    sections: list[Section] = []

    def extent(name: str) -> Extent:
        tensor = source.sources[name]
        return model.extent(tensor.name, tensor.index, tensor.rows)

    dense = {}
    for name, shape in spec.dense_tensors().items():
        dense[name] = DenseTensor(len(sections), 0, _layout(source, name, len(shape) == 1), shape)
        sections.append(Section((extent(name),)))
    experts = {}
    for number, layer in enumerate(spec.layers):
        if not layer.experts:
            continue
        shapes, here = spec.expert_tensors(number), f"layers.{number}.experts."
        layouts = {part: _layout(source, f"{here}0.{part}") for part in PARTS}
        for expert in range(layer.experts):
            for part in PARTS:
                if _layout(source, f"{here}{expert}.{part}") != layouts[part]:
                    raise UnsupportedModelError(f"{model.path}: experts of layer {number} differ in their types")
        first = len(sections)
        sections += [
            Section(tuple(extent(f"{here}{expert}.{part}") for part in PARTS)) for expert in range(layer.experts)
        ]
        parts = {part: Part(layouts[part], place, 0, shapes[part]) for place, part in enumerate(PARTS)}
        bits = max(bits_of(layout) for layout in layouts.values())
        experts[number] = ExpertLayer(
            (Level(bits, parts),), tuple((first + expert,) for expert in range(layer.experts))
        )
    files = tuple(str(file) for file in model.files)
    return ModelIndex(model.path, files, spec, tuple(sections), dense, experts, source.generation)


def _values(model: GgufModel, names: Iterable[str]) -> dict[str, list[float]]:
    """Of the vectors with these names that are there."""
    values = {}
    for name in names:
        if name in model.tensors:
            info = model.info(name)
            if info.type != "f32" or math.prod(info.shape) > 1 << 14:
                raise UnsupportedModelError(f"tensor {name}: {list(info.shape)} of type {info.type} is not supported")
            values[name] = model.read(name).reshape(-1).tolist()
    return values


def _check_shapes(model: GgufModel, spec: ModelSpec, sources: Mapping[str, TensorSource]) -> None:
    for name, shape in spec.dense_tensors().items():
        _check_shape(model, name, sources[name], shape)
    for number, layer in enumerate(spec.layers):
        for part, shape in spec.expert_tensors(number).items():
            for expert in range(layer.experts):
                name = f"layers.{number}.experts.{expert}.{part}"
                _check_shape(model, name, sources[name], shape)


def _check_shape(model: GgufModel, name: str, source: TensorSource, shape: tuple[int, ...]) -> None:
    info = model.tensors.get(source.name)
    if info is None:
        raise SourceError(f"tensor {source.name} is missing")
    if source.shape(info.shape, len(shape) == 1) != shape:
        raise SourceError(f"tensor {source.name}: shape {list(info.shape)} does not give {name} {list(shape)}")


def _layout(source: GgufSource, name: str, vector: bool = False) -> str:
    tensor = source.sources[name]
    kind = source.model.info(tensor.name).type
    where = f"{source.model.path}: tensor {tensor.name}"
    if kind not in READABLE:
        raise UnsupportedModelError(f"{where}: a tensor of type {kind} is not supported")
    if kind != "f32" and (vector or name.endswith(FLOAT_ONLY)):
        what = "a vector" if vector else "a convolution"
        raise UnsupportedModelError(
            f"{where}: {what} of type {kind} is not read where it lies; edgemoe convert reads it"
        )
    return "vector" if vector else f"ggml.{kind}"
