"""A Hugging Face folder or a GGUF file becomes an `.emoe` pack: section by section, with a few matrices in memory at a
time.

What goes where is planned from the headers alone; then every section is read, quantized, interleaved and written. The
bytes depend on the source, the options and the version only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgemoe._core import __version__
from edgemoe.errors import OptionError, PackError, SourceError, UnsupportedModelError, quote
from edgemoe.families import Slices, TensorSource, family_for
from edgemoe.formats.ggml_blocks import READABLE, TYPES, BlockType, dequantize, mxfp4_blocks
from edgemoe.formats.gguf import GgufModel, is_gguf
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.index import PARTS, DenseTensor, ExpertLayer, Level, Part
from edgemoe.formats.layouts import BLOCK as ROWS_AT_ONCE
from edgemoe.formats.layouts import QUANTIZED, ROW_MAJOR, bf16_to_f32, bits_of, pack, tensor_size, unpack
from edgemoe.formats.pack import (
    ALIGNMENT,
    BLOCK,
    MAX_BLOB,
    MAX_SECTION,
    Blob,
    Bytes,
    PackContents,
    PackWriter,
    align,
    partial_path,
)
from edgemoe.formats.safetensors import SafetensorsFolder, TensorInfo, read_bytes, read_json
from edgemoe.processors import usable_processors
from edgemoe.quantize.rtn import quantize
from edgemoe.sampling_names import SAMPLING_NAMES
from edgemoe.spec import FLOAT_ONLY, FLOAT_TENSORS, ModelSpec
from edgemoe.text.gguf_tokenizer import tokenizer_files

if TYPE_CHECKING:
    from edgemoe.quantize.nested_experts import NestedExperts, NestedOptions

BITS = (32, 16, 8, 4)
# Of the experts of a folder of original weights, unless they are asked for.
_FOLDER_BITS = 4

BLOBS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_MXFP4 = TYPES["mxfp4"]

# Weights converted at once, and bytes of finished expert sections that may wait for the disk.
_WEIGHTS_AT_ONCE = 1 << 20
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
    plan = _plan(source, bits, dense_bits, nested)
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
    return _plan(Path(source), bits, dense_bits).size


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


# -- the source -----------------------------------------------------------------------------------------------------


class TensorFiles(Protocol):
    """What a conversion asks of its source; `SafetensorsFolder` describes it."""

    folder: Path

    def names(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def nbytes(self) -> int: ...
    def fingerprint(self) -> str: ...
    def read(self, name: str, rows: tuple[int, int] | None = None, index: int | None = None) -> npt.NDArray[Any]: ...


class GgufTensors:
    """A GGUF file's tensors in the types of a folder's: what is quantized is read as float32."""

    def __init__(self, model: GgufModel) -> None:
        self.folder = model.path
        self._model = model

    def names(self) -> list[str]:
        return self._model.names()

    def info(self, name: str) -> TensorInfo:
        info = self._model.info(name)
        if info.type not in READABLE:
            return TensorInfo(info.type, info.shape)
        return TensorInfo(info.type if info.type in ("f16", "bf16") else "f32", info.shape)

    def nbytes(self) -> int:
        return self._model.nbytes()

    def fingerprint(self) -> str:
        return self._model.fingerprint()

    def read(self, name: str, rows: tuple[int, int] | None = None, index: int | None = None) -> npt.NDArray[Any]:
        values = self._model.read(name, index, rows)
        dtype = self._model.info(name).type
        if dtype == "f16":
            return values.astype("<f2")
        return (values.view(np.uint32) >> 16).astype("<u2") if dtype == "bf16" else values

    def block_type(self, name: str) -> BlockType:
        return TYPES[self._model.info(name).type]

    def read_blocks(self, name: str, rows: tuple[int, int] | None = None, index: int | None = None) -> bytearray:
        """As `read`, in the file's own blocks."""
        return self._model.read_bytes(name, index, rows)


@dataclass(slots=True)
class SourceModel:
    """A model folder or a GGUF file, read as far as its headers.

    form: "safetensors" or "gguf". sources: of every engine tensor; unused: the tensors left over. blobs: makes the
    contents of the tokenizer's files.
    """

    form: str
    folder: TensorFiles
    spec: ModelSpec
    sources: dict[str, TensorSource]
    generation: dict[str, Any]
    unused: list[str]
    blobs: Callable[[], dict[str, bytes]]

    @classmethod
    def open(cls, path: Path) -> SourceModel:
        """Raises SourceError, UnsupportedModelError and, for a GGUF file, TokenizerError."""
        if is_gguf(path):
            return cls._open_gguf(path)
        if not path.is_dir():
            raise SourceError(f"{path}: {'not a model folder, nor a GGUF file' if path.exists() else 'no such folder'}")
        config = read_json(path / "config.json")
        folder = SafetensorsFolder.open(path)
        try:
            family = family_for(config)
            spec = family.spec(config)
            # Before a list of all expert tensors is made: a hostile configuration may speak of millions.
            experts = sum(layer.experts for layer in spec.layers)
            if 3 * experts > folder.nbytes():
                raise SourceError(f"{experts} experts, but only {folder.nbytes()} bytes of tensors")
            sources = family.tensor_sources(spec, config, folder.names())
        except (UnsupportedModelError, SourceError) as error:
            raise type(error)(f"{path / 'config.json'}: {error}") from None
        generation_file = path / "generation_config.json"
        generation = _generation(config, read_json(generation_file) if generation_file.exists() else {}, path)
        used = {tensor.name for tensor in sources.values()} | {tensor.scales for tensor in sources.values()}
        unused = [name for name in folder.names() if name not in used]

        def blobs() -> dict[str, bytes]:
            return {name: read_bytes(path / name, MAX_BLOB) for name in BLOBS if (path / name).exists()}

        return cls("safetensors", folder, spec, sources, generation, unused, blobs)

    @classmethod
    def _open_gguf(cls, path: Path) -> SourceModel:
        gguf = GgufSource.open(path)

        def blobs() -> dict[str, bytes]:
            return tokenizer_files(gguf.model.metadata, str(path))

        return cls("gguf", GgufTensors(gguf.model), gguf.spec, gguf.sources, gguf.generation, gguf.unused, blobs)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and source type of every engine tensor. Raises as `open` for one that does not fit."""
        shapes = self.spec.dense_tensors()
        for name, source in self.sources.items():
            shape = shapes.get(name)
            if shape is None:
                _, layer, _, _, part = name.split(".")
                shape = self.spec.expert_tensors(int(layer))[part]
            yield name, shape, _checked_dtype(self.folder, name, source, shape)


# -- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor on its way: shape [output, input], offset within its section."""

    name: str
    source: TensorSource
    dtype: str
    shape: tuple[int, ...]
    layout: str
    offset: int


@dataclass(slots=True)
class _Plan:
    """sections: the tensors, or the bytes, of each one. size: of the pack; temporary: of files that are removed.
    unwritten: other work, in bytes that take as long to write."""

    model: SourceModel
    contents: PackContents
    sections: list[list[_Tensor] | bytes] = field(default_factory=list)
    size: int = BLOCK
    temporary: int = 0
    unwritten: int = 0
    fingerprint: str = ""

    @property
    def folder(self) -> TensorFiles:
        return self.model.folder

    def add(self, section: list[_Tensor] | bytes) -> int:
        length = len(section) if isinstance(section, bytes) else _length(section)
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
        return len(section) if isinstance(section, bytes) else _length(section)

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
            yield from _packed_rows(self.folder, tensor)
            end = tensor.offset + tensor_size(tensor.layout, tensor.shape)


def _plan(source: Path, bits: int | None, dense_bits: int | None, nested: NestedOptions | None = None) -> _Plan:
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
        dtypes[name] = _checked_dtype(plan.folder, name, sources[name], shape)
        if len(shape) == 1:
            layouts[name] = "vector"
        elif name.endswith(FLOAT_ONLY if bits is None else FLOAT_TENSORS):
            layouts[name] = "f32"
        else:
            layouts[name] = _layout(plan.folder, bits, {name: sources[name]}, {dtypes[name]})
        alone = not name.startswith("layers.") or (layouts[name] in ROW_MAJOR and shape[0] % ROWS_AT_ONCE)
        groups.setdefault(name if alone else ".".join(name.split(".")[:2]), []).append(name)
    for names in groups.values():
        section: list[_Tensor] = []
        for name in names:
            dtype, layout = dtypes[name], layouts[name]
            section.append(
                _Tensor(name, sources[name], dtype, shapes[name], layout, align(_length(section), ALIGNMENT))
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
            dtypes[name] = _checked_dtype(plan.folder, name, sources[name], shapes[part])
        same = {prefix + part: sources[prefix + part] for prefix in prefixes}
        layouts[part] = _layout(plan.folder, bits, same, {dtypes[name] for name in same})
        if layouts[part] in ROW_MAJOR and shapes[part][0] % ROWS_AT_ONCE:
            raise UnsupportedModelError(
                f"{plan.folder.folder}: tensor {sources[prefixes[0] + part].name}: {shapes[part][0]} rows of an expert"
                f" are no multiple of {ROWS_AT_ONCE}; a pack can hold them requantized (--bits 8, 4) only"
            )
    sections = []
    for prefix in prefixes:
        section: list[_Tensor] = []
        for part in PARTS:
            name, offset = prefix + part, align(_length(section), ALIGNMENT)
            section.append(_Tensor(name, sources[name], dtypes[name], shapes[part], layouts[part], offset))
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
                _checked_dtype(model.folder, name, model.sources[name], shapes[part])
    if not any(layer.experts for layer in model.spec.layers):
        raise UnsupportedModelError(f"{model.folder.folder}: no layer has experts, and levels are of experts")
    return NestedExperts(model.folder.folder, model, nested, Path())


def _length(section: list[_Tensor]) -> int:
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


def _checked_dtype(folder: TensorFiles, name: str, source: TensorSource, shape: tuple[int, ...]) -> str:
    """The type of the source of engine tensor `name`, once its type and shape are known to be right."""
    info = folder.info(source.name)
    where = f"{folder.folder}: tensor {source.name}"
    found, dtype = info.shape, info.dtype
    if source.scales is not None:
        scales = folder.info(source.scales)
        if (dtype, scales.dtype) != ("u8", "u8"):
            raise UnsupportedModelError(f"{where} and its scales: dtypes {dtype}, {scales.dtype} are not uint8")
        if found[-1:] != (_MXFP4.nbytes - 1,) or scales.shape != found[:-1]:
            raise SourceError(f"{where}: shape {list(found)} does not go with scales {list(scales.shape)}")
        found, dtype = (*found[:-2], found[-2] * _MXFP4.weights), "mxfp4"
    elif dtype not in ("f32", "bf16", "f16"):
        raise UnsupportedModelError(f"{where}: dtype {dtype} is not supported (f32, bf16 and f16 are)")
    if source.index is not None:
        found = found[1:] if found and source.index < found[0] else ()
    if source.rows is not None:
        found = (source.rows[1] - source.rows[0], *found[1:]) if found and source.rows[1] <= found[0] else ()
    if source.transpose:
        found = found[::-1]
    if source.every is not None:
        axis, (first, step) = (len(found) - 1 if len(shape) == 1 else 0), source.every
        found = tuple(len(range(first, size, step)) if i == axis else size for i, size in enumerate(found))
    if source.flat and found:
        found = (math.prod(found[:-1]), found[-1])
    if source.slices is not None:
        found = _sliced_shape(found, source.slices)
    if len(shape) == 1:
        found = (math.prod(found),)
    if found != shape:
        raise SourceError(f"{where}: shape {list(info.shape)} does not give {name} {list(shape)}")
    return dtype


def _sliced_shape(shape: tuple[int, ...], slices: Slices) -> tuple[int, ...]:
    """Of what remains; () where the ranges do not lie within groups of this shape."""
    if len(shape) != 2 or shape[0] % slices.groups or slices.ranges[-1][1] > shape[0] // slices.groups:
        return ()
    rows = sum(end - first for first, end in slices.ranges)
    return (slices.groups * shape[1], rows) if slices.transpose else (slices.groups * rows, shape[1])


def _sliced(values: npt.NDArray[Any], slices: Slices) -> npt.NDArray[Any]:
    groups = values.reshape(slices.groups, -1, values.shape[1])
    pieces = [groups[:, first:end] for first, end in slices.ranges]
    if slices.transpose:
        pieces = [piece.swapaxes(1, 2) for piece in pieces]
    return np.concatenate([piece.reshape(-1, piece.shape[-1]) for piece in pieces])


def _generation(config: Mapping[str, Any], generation: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Token ids as lists, and the sampling defaults under their names in generation_config.json."""
    result: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id"):
        ids = generation.get(name, config.get(name))
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if any(type(token) is not int or not 0 <= token < 1 << 31 for token in ids):
            raise SourceError(f"{folder}: {name} = {quote(ids)} is not a token id or a list of them")
        result[name + "s"] = ids
    for name in ("do_sample", *(sampling.config for sampling in SAMPLING_NAMES)):
        value = generation.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            raise SourceError(f"{folder / 'generation_config.json'}: {name} = {quote(value)} is not a number")
        result[name] = value
    return result


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


def copied_tensor(
    folder: TensorFiles, name: str, source: TensorSource, shape: tuple[int, ...], wide: bool = False
) -> tuple[str, Iterator[Bytes]]:
    """(layout, bytes) of a tensor at the precision it has in the source; wide: in float32."""
    dtype = _checked_dtype(folder, name, source, shape)
    layout = "f32" if wide else "ggml.mxfp4" if dtype == "mxfp4" else dtype
    if len(shape) == 1:
        layout = "vector"
    return layout, _packed_rows(folder, _Tensor(name, source, dtype, shape, layout, 0))


def read_matrix(
    folder: TensorFiles, name: str, source: TensorSource, shape: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """A whole matrix as float32 [output, input]; name: the engine's."""
    layout, chunks = copied_tensor(folder, name, source, shape, wide=True)
    parts = [unpack(layout, chunk, len(chunk) // (4 * shape[1]), shape[1]) for chunk in chunks]
    return np.concatenate(parts)[: shape[0]]


# -- the weights ----------------------------------------------------------------------------------------------------


def _packed_rows(folder: TensorFiles, tensor: _Tensor) -> Iterator[Bytes]:
    """The tensor's bytes, some blocks of rows at a time."""
    source = tensor.source
    first, step = source.every or (0, 1)
    if tensor.layout == "vector":
        vector = _float32(folder.read(source.name, source.rows, source.index)[..., first::step], tensor.dtype)
        yield pack("vector", -np.exp(vector) if source.negative_exp else vector).data
        return
    rows, columns = tensor.shape
    whole = None
    if tensor.layout in ROW_MAJOR and source.flat:
        assert isinstance(folder, GgufTensors)
        yield memoryview(folder.read_blocks(source.name))
        return
    if source.transpose:
        whole = folder.read(source.name, source.rows, source.index).T[first::step]
    elif source.flat or source.slices is not None:
        whole = folder.read(source.name)
        whole = whole.reshape(-1, whole.shape[-1])
        whole = whole if source.slices is None else _sliced(whole, source.slices)
    at_once = max(1, _WEIGHTS_AT_ONCE // (columns * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    first += source.rows[0] if source.rows else 0

    def read(name: str, start: int, end: int) -> npt.NDArray[Any]:
        return folder.read(name, (first + step * start, first + step * (end - 1) + 1), source.index)[::step]

    for start in range(0, rows, at_once):
        end = min(start + at_once, rows)
        if source.scales is not None:
            blocks = mxfp4_blocks(read(source.name, start, end), read(source.scales, start, end))
            if tensor.layout == "ggml.mxfp4":
                yield blocks.reshape(-1).data
            else:
                yield pack("f32", dequantize("mxfp4", blocks.reshape(-1)).reshape(end - start, columns)).data
            continue
        if tensor.layout in ROW_MAJOR:
            assert isinstance(folder, GgufTensors)
            yield memoryview(folder.read_blocks(source.name, (first + start, first + end), source.index))
            continue
        values = whole[start:end] if whole is not None else read(source.name, start, end)
        if tensor.layout == tensor.dtype:
            yield pack(tensor.layout, values).data
        elif tensor.layout in QUANTIZED:
            try:
                codes, scales, offsets = quantize(_float32(values, tensor.dtype), QUANTIZED[tensor.layout])
            except ValueError as error:
                raise SourceError(f"{folder.folder}: tensor {source.name}, rows {start}-{end}: {error}") from None
            yield pack(tensor.layout, codes, scales, offsets).data
        else:
            yield pack("f32", _float32(values, tensor.dtype)).data


def _float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    return bf16_to_f32(values) if dtype == "bf16" else values.astype(np.float32, copy=False)
