"""A model's original weights: a Hugging Face folder or a GGUF file, read as far as its headers, and its tensors in the
types that it has them in, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgemoe.errors import SourceError, UnsupportedModelError, quote
from edgemoe.families import Slices, TensorSource, family_for
from edgemoe.formats.ggml_blocks import READABLE, TYPES, BlockType, dequantize, mxfp4_blocks
from edgemoe.formats.gguf import GgufModel, is_gguf
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.layouts import BLOCK as ROWS_AT_ONCE
from edgemoe.formats.layouts import QUANTIZED, ROW_MAJOR, bf16_to_f32, pack, unpack
from edgemoe.formats.pack import (
    MAX_BLOB,
    Bytes,
)
from edgemoe.formats.rtn import quantize
from edgemoe.formats.safetensors import SafetensorsFolder, TensorInfo, read_bytes, read_json
from edgemoe.sampling_names import SAMPLING_NAMES
from edgemoe.spec import ModelSpec
from edgemoe.text.gguf_tokenizer import tokenizer_files

BLOBS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_MXFP4 = TYPES["mxfp4"]
# Weights that are converted at once.
_WEIGHTS_AT_ONCE = 1 << 20


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
            yield name, shape, checked_dtype(self.folder, name, source, shape)


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor on its way: shape [output, input], offset within its section."""

    name: str
    source: TensorSource
    dtype: str
    shape: tuple[int, ...]
    layout: str
    offset: int


def checked_dtype(folder: TensorFiles, name: str, source: TensorSource, shape: tuple[int, ...]) -> str:
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


def copied_tensor(
    folder: TensorFiles, name: str, source: TensorSource, shape: tuple[int, ...], wide: bool = False
) -> tuple[str, Iterator[Bytes]]:
    """(layout, bytes) of a tensor at the precision it has in the source; wide: in float32."""
    dtype = checked_dtype(folder, name, source, shape)
    layout = "f32" if wide else "ggml.mxfp4" if dtype == "mxfp4" else dtype
    if len(shape) == 1:
        layout = "vector"
    return layout, packed_rows(folder, SourceTensor(name, source, dtype, shape, layout, 0))


def read_matrix(
    folder: TensorFiles, name: str, source: TensorSource, shape: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """A whole matrix as float32 [output, input]; name: the engine's."""
    layout, chunks = copied_tensor(folder, name, source, shape, wide=True)
    parts = [unpack(layout, chunk, len(chunk) // (4 * shape[1]), shape[1]) for chunk in chunks]
    return np.concatenate(parts)[: shape[0]]


def packed_rows(folder: TensorFiles, tensor: SourceTensor) -> Iterator[Bytes]:
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
