"""A model that runs layer by layer: one layer's weights are in memory, and all tokens go through it.

What is kept between layers is the residual stream of every token. So memory is bounded by a layer, whatever the model's
size, each expert is read once, and what a layer's experts multiply can be looked at.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.engine import Engine, LayerRecord, plan_memory
from edgemoe.errors import MemoryBudgetError
from edgemoe.families import TensorSource
from edgemoe.formats.gguf import is_gguf
from edgemoe.formats.gguf_index import GgufSource, build_index
from edgemoe.formats.index import PARTS, DenseTensor, ExpertLayer, Extent, Level, ModelIndex, Part, Section
from edgemoe.formats.pack import BLOCK
from edgemoe.formats.safetensors import SafetensorsFolder
from edgemoe.memory import format_size
from edgemoe.options import EXACT, EngineOptions, Quality
from edgemoe.source import SourceModel, copied_tensor
from edgemoe.spec import ModelSpec

Floats = npt.NDArray[np.float32]
Observer = Callable[[slice, LayerRecord], None]


class LayerwiseModel:
    """index: of the whole model. threads: of the engine. memory: for one layer's weights and activations, in bytes.
    quality: of all rows. work: a folder for a small temporary file. report: called with the number
    of tokens after each window that went through a layer."""

    def __init__(
        self,
        index: ModelIndex,
        window: int,
        *,
        threads: int,
        memory: int,
        work: Path,
        quality: Quality = EXACT,
        report: Callable[[int], None] | None = None,
    ) -> None:
        self.spec = index.spec.for_context(window)
        self.window = window
        self._index = index
        self._memory = memory
        self._report = report
        self._options = EngineOptions(
            threads=threads, context=window, chunk=window, eviction="lru", prefetch=False, quality=quality
        )
        # Stands for the embedding in the layers that do not need it.
        self._zeros = work / "zeros"
        self._zeros.write_bytes(bytes(4096 + 4 * self.spec.hidden_size))

    def run(
        self,
        layer: int,
        tokens: npt.NDArray[np.int32],
        residual: Floats,
        observe: Observer | None = None,
        wanted: npt.NDArray[np.int32] | None = None,
        wanted_from: int = 0,
    ) -> Iterator[Floats]:
        """Takes tokens [windows, window], each window a sequence of its own, through one layer.

        residual: [windows, window, hidden], changed in place. observe: called with a slice of the pairs of windows and
        positions, and what `Engine.forward_layer` hands out for them. After the last layer the logits [wanted, vocab]
        after the positions `wanted` of each window from number `wanted_from` on are yielded; otherwise nothing is.
        """
        engine = self._engine(layer)
        last = layer == len(self.spec.layers) - 1
        nothing = np.zeros(0, np.int32)
        for number, window in enumerate(tokens):
            positions = wanted if wanted is not None and last and number >= wanted_from else nothing
            values = residual[number]
            ids = window if layer == 0 else np.zeros_like(window)
            seen = engine.forward_layer(0, ids, values, layer == 0, positions)
            if observe is not None:
                observe(slice(number * self.window, (number + 1) * self.window), seen)
            if self._report is not None:
                self._report(len(window))
            if len(positions):
                yield seen.logits

    def _engine(self, layer: int) -> Engine:
        first, last = layer == 0, layer == len(self.spec.layers) - 1
        spec = dataclasses.replace(
            self.spec,
            layers=(self.spec.layers[layer],),
            vocab_size=self.spec.vocab_size if first or last else 1,
            tied_embeddings=self.spec.tied_embeddings or not (first and last),
        )
        index = self._layer_index(layer, spec)
        plan = plan_memory(index, self._options)
        room = self._memory - plan.dense - plan.state - plan.scratch
        slots = min(room // max(plan.slot, 1), max(plan.experts, 1))
        if room < 0 or slots < plan.minimum_slots:
            least = self._memory - room + plan.minimum_slots * plan.slot
            free = format_size(max(self._memory, 0))
            raise MemoryBudgetError(f"layer {layer} takes {format_size(least)} to run, {free} are there for it (-M)")
        return Engine(index, dataclasses.replace(self._options, expert_slots=max(slots, 1)))

    def _layer_index(self, layer: int, spec: ModelSpec) -> ModelIndex:
        """The part of the index that a model of this layer alone has."""
        index, shapes = self._index, self.spec.dense_tensors()
        sections = list(index.sections)
        dense = {}
        for name, shape in spec.dense_tensors().items():
            source = name.replace("layers.0.", f"layers.{layer}.", 1) if name.startswith("layers.0.") else name
            if source == "embedding" and layer and not self.spec.tied_embeddings:
                source = "head"  # nothing is embedded after the first layer
            if shapes[source] == shape:
                dense[name] = index.dense[source]
                continue
            layout = "vector" if len(shape) == 1 else "ggml.f32"
            dense[name] = DenseTensor(len(sections), 0, layout, shape)
            sections.append(Section((Extent(len(index.files), 0, 4 * math.prod(shape)),)))
        return dataclasses.replace(
            index,
            files=(*index.files, str(self._zeros)),
            spec=spec,
            sections=tuple(sections),
            dense=dense,
            experts={0: index.experts[layer]} if layer in index.experts else {},
        )


def original_index(path: Path, work: Path) -> ModelIndex:
    """The index of a source's own weights: a GGUF file or a folder of safetensors, matrices read where they
    lie. What the engine cannot read there (vectors of 16 bits, matrices that are transposed or in parts, experts of
    several types) is copied to a temporary file in `work`."""
    if is_gguf(path):
        return build_index(GgufSource.open(path))
    model = SourceModel.open(path)
    assert isinstance(model.folder, SafetensorsFolder)
    return _FolderIndex(model, model.folder, work).index()


class _FolderIndex:
    """Makes the index that a GGUF file of the same tensors would have."""

    def __init__(self, model: SourceModel, folder: SafetensorsFolder, work: Path) -> None:
        self._model = model
        self._folder = folder
        self._sections: list[Section] = []
        self._copy = work / "copied"

    def index(self) -> ModelIndex:
        spec = self._model.spec
        with self._copy.open("wb") as self._stream:
            dense = {}
            for name, shape in spec.dense_tensors().items():
                extent, layout = self._place(name, shape)
                dense[name] = DenseTensor(len(self._sections), 0, layout, shape)
                self._sections.append(Section((extent,)))
            experts = {number: self._layer(number) for number, layer in enumerate(spec.layers) if layer.experts}
        files = tuple(str(file) for file in (*self._folder.files, self._copy))
        return ModelIndex(self._folder.folder, files, spec, tuple(self._sections), dense, experts)

    def _layer(self, number: int) -> ExpertLayer:
        shapes, extents, parts = self._model.spec.expert_tensors(number), list[list[Extent]](), {}
        for at, part in enumerate(PARTS):
            names = [
                f"layers.{number}.experts.{expert}.{part}" for expert in range(self._model.spec.layers[number].experts)
            ]
            sources = [self._model.sources[name] for name in names]
            alike = len({(self._folder.info(source.name).dtype, _in_place(source)) for source in sources}) == 1
            places = [self._place(name, shapes[part], not alike) for name in names]
            extents.append([extent for extent, _ in places])
            parts[part] = Part(places[0][1], at, 0, shapes[part])
        first = len(self._sections)
        self._sections += [Section(together) for together in zip(*extents, strict=True)]
        # The number of bits is for people; nobody sees this index.
        levels = (Level(32, parts),)
        return ExpertLayer(levels, tuple((section,) for section in range(first, len(self._sections))))

    def _place(self, name: str, shape: tuple[int, ...], wide: bool = False) -> tuple[Extent, str]:
        """Where a tensor lies, and its layout; wide: copied in float32."""
        source = self._model.sources[name]
        if len(shape) > 1 and _in_place(source) and not wide:
            extent = self._folder.extent(source.name, source.rows, source.index)
            return extent, f"ggml.{self._folder.info(source.name).dtype}"
        layout, chunks = copied_tensor(self._folder, name, source, shape, wide)
        begin = self._stream.tell()
        for chunk in chunks:
            self._stream.write(chunk)
        length = self._stream.tell() - begin
        self._stream.write(bytes(-length % BLOCK))
        return Extent(len(self._folder.files), begin, length), layout


def _in_place(source: TensorSource) -> bool:
    """Whether a source's bytes are the matrix's."""
    return source == TensorSource(source.name, source.index, source.rows)


def temporary_array(work: Path, shape: Iterable[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array in a file that is gone when the array is: memory that the system may take back."""
    sizes = tuple(shape)
    if 0 in sizes:
        return np.zeros(sizes, dtype)
    with tempfile.TemporaryFile(dir=work) as file:
        return np.memmap(file, dtype, "w+", shape=sizes)
