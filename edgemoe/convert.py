"""A Hugging Face folder or a GGUF file becomes an `.emoe` pack: section by section, with a few matrices in memory at a
time.

What goes where is planned from the headers alone; then every section is read, quantized, interleaved and written. The
bytes depend on the source, the options and the version only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe._core import __version__
from edgemoe.errors import OptionError, PackError, SourceError, UnsupportedModelError
from edgemoe.families import TensorSource
from edgemoe.formats.ggml_blocks import TYPES
from edgemoe.formats.gguf import is_gguf
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.index import PARTS, DenseTensor, ExpertLayer, Level, Part
from edgemoe.formats.layouts import BLOCK as ROWS_AT_ONCE
from edgemoe.formats.layouts import ROW_MAJOR, bits_of, tensor_size
from edgemoe.formats.pack import (
    ALIGNMENT,
    BLOCK,
    MAX_SECTION,
    Blob,
    Bytes,
    PackContents,
    PackWriter,
    align,
    partial_path,
)
from edgemoe.processors import usable_processors
from edgemoe.source import BLOBS, GgufTensors, SourceModel, SourceTensor, TensorFiles, checked_dtype, packed_rows
from edgemoe.spec import FLOAT_ONLY, FLOAT_TENSORS

if TYPE_CHECKING:
    from edgemoe.quantize.nested_experts import NestedExperts, NestedOptions

BITS = (32, 16, 8, 4)
# Of the experts of a folder of original weights, unless they are asked for.
_FOLDER_BITS = 4

# Bytes of finished expert sections that may wait for the disk.
_WAITING_BYTES = 256 << 20


def convert(
    source: str | Path,
    target: str | Path,
    bits: int | None = None,
    dense_bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    nested: NestedOptions | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the pack `target` from the folder, or the GGUF file, `source`.

    bits: of the experts. 32: float32; 16: as the source has them (bfloat16, float16; float32, and what a GGUF file has
    quantized, is float32); 8 and 4: groups of 64 weights with a scale and an offset each. None: the blocks of a GGUF
    file as they are, and 4 for a folder. MXFP4 weights of a folder stay what they are unless 32 is asked for.
    dense_bits: of embedding, attention, dense feed-forward parts and output head; unless given, 8 or `bits` if that is
    more, and as they are if the experts are. Routers, convolutions and vectors are float32, the routers of a GGUF file
    whose weights are kept excepted.
    nested: the experts at several widths at once, in place of `bits` (docs/quantization.md); a text runs through the
    source's model for it. NumPy's own threads only get in the way then: OPENBLAS_NUM_THREADS=1 is best.
    progress: called with (work done, work in all), which is bytes written and, with `nested`, what else takes time.

    The target appears when it is complete. An interrupted conversion (KeyboardInterrupt, a killed process) leaves
    `target.partial` and `target.journal`, and the same call continues it; any other failure leaves nothing.
    Raises SourceError, UnsupportedModelError, OptionError, PackError (the target exists, the disk is too small),
    OSError and, with `nested`, MemoryBudgetError and TokenizerError.
    """
    source, target = Path(source), Path(target)
    if target.is_dir():
        raise PackError(f"{target}: is a folder")
    if target.exists() and not overwrite:
        raise PackError(f"{target}: exists already")
    if not target.parent.is_dir():
        raise PackError(f"{target.parent}: no such folder")
    plan = plan_pack(source, bits, dense_bits, nested)
    _require_space(target, plan.size + plan.temporary)
    with PackWriter.create(target, plan.fingerprint) as writer:

        def report(beside: int = 0) -> None:
            if progress is not None:
                total = plan.size - BLOCK + plan.unwritten
                progress(min(writer.bytes_done + beside, total), total)

        report()
        with contextlib.closing(plan.build(writer.done)) as sections:
            for section in sections:
                writer.add(section)
                report()
        if nested is not None:
            from edgemoe.quantize.nested_experts import NestedExperts

            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
                experts = NestedExperts(source, plan.model, nested, Path(work))
                experts.write(writer, plan.contents, len(plan.sections), report)
            report(
                plan.size + plan.unwritten
            )  # texts may be shorter, and levels measured in fewer passes, than planned
        writer.finish(plan.contents)


def estimate_size(source: str | Path, bits: int | None = None, dense_bits: int | None = None) -> int:
    """Bytes that the pack of this conversion takes, its index (some 100 KB) left out. Raises as `convert`."""
    return plan_pack(Path(source), bits, dense_bits).size


def requantized_types(source: str | Path, bits: int | None = None, dense_bits: int | None = None) -> list[str]:
    """The quantized types of a GGUF file that this conversion turns into others; none for a folder. Raises as `convert`
    does for the source."""
    source = Path(source)
    if (bits is None and dense_bits is None) or not is_gguf(source):
        return []
    gguf = GgufSource.open(source)
    kinds = {
        TYPES[gguf.model.info(tensor.name).type]
        for name, tensor in gguf.sources.items()
        if bits is not None or ".experts." not in name
    }
    return sorted(kind.name for kind in kinds if kind.weights > 1)


# -- the plan -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Plan:
    """sections: the tensors, or the bytes, of each one. size: of the pack; temporary: of files that are removed.
    unwritten: other work, in bytes that take as long to write."""

    model: SourceModel
    contents: PackContents
    sections: list[list[SourceTensor] | bytes] = field(default_factory=list)
    size: int = BLOCK
    temporary: int = 0
    unwritten: int = 0
    fingerprint: str = ""

    @property
    def folder(self) -> TensorFiles:
        return self.model.folder

    def add(self, section: list[SourceTensor] | bytes) -> int:
        length = len(section) if isinstance(section, bytes) else section_length(section)
        if length > MAX_SECTION:
            name = "a blob" if isinstance(section, bytes) else section[0].name
            raise SourceError(f"{self.folder.folder}: {name} takes {length} bytes (at most {MAX_SECTION} are possible)")
        self.size += align(length, BLOCK)
        self.sections.append(section)
        return len(self.sections) - 1

    def build(self, first: int) -> Generator[Iterable[Bytes], None, None]:
        """The chunks of every section from number `first` on.

        Large sections are made while they are written; small ones, the experts, by several threads ahead of the disk.
        The order and the bytes are the same.
        """
        pending: deque[Future[list[Bytes]]] = deque()
        waiting = 0
        threads = min(8, usable_processors())
        with ThreadPoolExecutor(threads) as pool:
            try:
                ahead = first
                for number in range(first, len(self.sections)):
                    while (
                        ahead < len(self.sections)
                        and self._is_small(ahead)
                        and len(pending) < 2 * threads
                        and waiting < _WAITING_BYTES
                    ):
                        pending.append(pool.submit(self._finished, ahead))
                        waiting += self._bytes(ahead)
                        ahead += 1
                    if ahead > number:
                        yield pending.popleft().result()
                        waiting -= self._bytes(number)
                    else:
                        yield self._chunks(number)
                        ahead = number + 1
            finally:
                for future in pending:
                    future.cancel()

    def _bytes(self, number: int) -> int:
        section = self.sections[number]
        return len(section) if isinstance(section, bytes) else section_length(section)

    def _is_small(self, number: int) -> bool:
        return self._bytes(number) <= _WAITING_BYTES // 4

    def _finished(self, number: int) -> list[Bytes]:
        return list(self._chunks(number))

    def _chunks(self, number: int) -> Iterator[Bytes]:
        section = self.sections[number]
        if isinstance(section, bytes):
            yield section
            return
        end = 0
        for tensor in section:
            yield bytes(tensor.offset - end)
            yield from packed_rows(self.folder, tensor)
            end = tensor.offset + tensor_size(tensor.layout, tensor.shape)


def plan_pack(source: Path, bits: int | None, dense_bits: int | None, nested: NestedOptions | None = None) -> _Plan:
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
    plan = _Plan(model, contents)
    _plan_dense(plan, model.sources, dense_bits)
    blobs = model.blobs()
    for name in BLOBS:
        if blobs.get(name):
            plan.contents.blobs[name] = Blob(plan.add(blobs[name]), len(blobs[name]))
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


def _plan_dense(plan: _Plan, sources: Mapping[str, TensorSource], bits: int | None) -> None:
    """One section for each layer, and for each of the tensors outside the layers and of those that must be alone."""
    spec, groups = plan.contents.spec, dict[str, list[str]]()
    shapes, layouts, dtypes = spec.dense_tensors(), dict[str, str](), dict[str, str]()
    for name, shape in shapes.items():
        dtypes[name] = checked_dtype(plan.folder, name, sources[name], shape)
        if len(shape) == 1:
            layouts[name] = "vector"
        elif name.endswith(FLOAT_ONLY if bits is None else FLOAT_TENSORS):
            layouts[name] = "f32"
        else:
            layouts[name] = _layout(plan.folder, bits, {name: sources[name]}, {dtypes[name]})
        alone = not name.startswith("layers.") or (layouts[name] in ROW_MAJOR and shape[0] % ROWS_AT_ONCE)
        groups.setdefault(name if alone else ".".join(name.split(".")[:2]), []).append(name)
    for names in groups.values():
        section: list[SourceTensor] = []
        for name in names:
            dtype, layout = dtypes[name], layouts[name]
            section.append(
                SourceTensor(
                    name, sources[name], dtype, shapes[name], layout, align(section_length(section), ALIGNMENT)
                )
            )
        number = plan.add(section)
        for tensor in section:
            plan.contents.dense[tensor.name] = DenseTensor(number, tensor.offset, tensor.layout, tensor.shape)


def _plan_experts(plan: _Plan, number: int, sources: Mapping[str, TensorSource], bits: int | None) -> None:
    """One section for each expert: gate, up and down. All experts of the layer have the same layouts."""
    experts = plan.contents.spec.layers[number].experts
    shapes = plan.contents.spec.expert_tensors(number)
    prefixes = [f"layers.{number}.experts.{expert}." for expert in range(experts)]
    layouts = {}
    dtypes: dict[str, str] = {}
    for part in PARTS:
        for prefix in prefixes:
            name = prefix + part
            dtypes[name] = checked_dtype(plan.folder, name, sources[name], shapes[part])
        same = {prefix + part: sources[prefix + part] for prefix in prefixes}
        layouts[part] = _layout(plan.folder, bits, same, {dtypes[name] for name in same})
        if layouts[part] in ROW_MAJOR and shapes[part][0] % ROWS_AT_ONCE:
            raise UnsupportedModelError(
                f"{plan.folder.folder}: tensor {sources[prefixes[0] + part].name}: {shapes[part][0]} rows of an expert"
                f" are no multiple of {ROWS_AT_ONCE}; a pack can hold them requantized (--bits 8, 4) only"
            )
    sections = []
    for prefix in prefixes:
        section: list[SourceTensor] = []
        for part in PARTS:
            name, offset = prefix + part, align(section_length(section), ALIGNMENT)
            section.append(SourceTensor(name, sources[name], dtypes[name], shapes[part], layouts[part], offset))
        sections.append((plan.add(section),))
    parts = {
        part: Part(tensor.layout, 0, tensor.offset, shapes[part]) for part, tensor in zip(PARTS, section, strict=True)
    }
    if bits is None or set(layouts.values()) <= set(ROW_MAJOR):
        bits = max(bits_of(layout) for layout in layouts.values())
    plan.contents.experts[number] = ExpertLayer((Level(bits, parts),), tuple(sections))


def _nested_experts(model: SourceModel, nested: NestedOptions) -> NestedExperts:
    """To plan with. Raises as `_plan_experts` for tensors that are not what they should be."""
    from edgemoe.quantize.nested_experts import NestedExperts

    for number, layer in enumerate(model.spec.layers):
        shapes = model.spec.expert_tensors(number)
        for expert in range(layer.experts):
            for part in PARTS:
                name = f"layers.{number}.experts.{expert}.{part}"
                checked_dtype(model.folder, name, model.sources[name], shapes[part])
    if not any(layer.experts for layer in model.spec.layers):
        raise UnsupportedModelError(f"{model.folder.folder}: no layer has experts, and levels are of experts")
    return NestedExperts(model.folder.folder, model, nested, Path())


def section_length(section: list[SourceTensor]) -> int:
    return section[-1].offset + tensor_size(section[-1].layout, section[-1].shape) if section else 0


def _layout(folder: TensorFiles, bits: int | None, sources: Mapping[str, TensorSource], dtypes: set[str]) -> str:
    """The layout of a matrix, or of matrices that must share one: engine name -> source, and the types of these."""
    if dtypes == {"mxfp4"} and bits != 32:
        return "ggml.mxfp4"
    if bits is None:
        assert isinstance(folder, GgufTensors)
        kinds = {folder.block_type(source.name) for source in sources.values()}
        if len(kinds) > 1:
            names = ", ".join(sorted(kind.name for kind in kinds))
            raise UnsupportedModelError(f"{folder.folder}: {next(iter(sources))} and its like differ in type ({names})")
        (kind,) = kinds
        return kind.name if kind.weights == 1 else f"ggml.{kind.name}"
    if bits == 16 and len(dtypes) == 1:
        return next(iter(dtypes))
    return {32: "f32", 16: "f32", 8: "q8g64", 4: "q4g64"}[bits]


def _fingerprint(plan: _Plan, experts: NestedExperts | None) -> str:
    """Of everything the bytes depend on, the contents of the tensors aside: for those stands the files' time."""
    contents = plan.contents
    digest = hashlib.sha256(plan.folder.fingerprint().encode())
    digest.update(json.dumps([contents.spec.to_dict(), contents.generation, contents.provenance]).encode())
    for section in plan.sections:
        digest.update(section if isinstance(section, bytes) else repr(section).encode())
    if experts is not None:
        digest.update(repr([experts.levels(number) for number in experts.routed()]).encode())
    return digest.hexdigest()


def _require_space(target: Path, size: int) -> None:
    partial = partial_path(target)
    free = shutil.disk_usage(target.parent).free + (partial.stat().st_size if partial.exists() else 0)
    if size > free:
        raise PackError(f"{target}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
