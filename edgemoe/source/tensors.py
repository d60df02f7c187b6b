"""The tensors of a source as the engine's, some rows at a time: at the precision they have there, or in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.families import Slices, TensorSource
from edgemoe.formats.ggml_blocks import dequantize, mxfp4_blocks
from edgemoe.formats.layouts import BLOCK, ROW_MAJOR, bf16_to_f32, pack, unpack
from edgemoe.formats.pack import Bytes
from edgemoe.source.model import GgufTensors, TensorFiles, checked_dtype

Rows = tuple[int, int]

# Weights read at once.
_WEIGHTS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """An engine tensor that lies in a source. name: the engine's. dtype: of the source. shape: [output, input] of a
    matrix, [length] of a vector."""

    name: str
    source: TensorSource
    dtype: str
    shape: tuple[int, ...]


def copied_tensor(
    folder: TensorFiles, name: str, source: TensorSource, shape: tuple[int, ...], wide: bool = False
) -> tuple[str, Iterator[Bytes]]:
    """(layout, bytes) of a tensor at the precision it has in the source; wide: in float32. Raises as
    `checked_dtype`."""
    dtype = checked_dtype(folder, name, source, shape)
    layout = "f32" if wide else "ggml.mxfp4" if dtype == "mxfp4" else dtype
    if len(shape) == 1:
        layout = "vector"
    return layout, packed_rows(folder, SourceTensor(name, source, dtype, shape), layout)


def read_matrix(
    folder: TensorFiles, name: str, source: TensorSource, shape: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """A whole matrix as float32 [output, input]; name: the engine's."""
    layout, chunks = copied_tensor(folder, name, source, shape, wide=True)
    parts = [unpack(layout, chunk, len(chunk) // (4 * shape[1]), shape[1]) for chunk in chunks]
    return np.concatenate(parts)[: shape[0]]


def packed_rows(folder: TensorFiles, tensor: SourceTensor, layout: str) -> Iterator[Bytes]:
    """The tensor's bytes in a layout that loses nothing, some blocks of rows at a time: "vector", the source's own, or
    float32."""
    source, columns = tensor.source, tensor.shape[-1]
    if layout == "vector":
        first, step = source.every or (0, 1)
        vector = _float32(folder.read(source.name, source.rows, source.index)[..., first::step], tensor.dtype)
        yield pack("vector", -np.exp(vector) if source.negative_exp else vector).data
    elif layout in ROW_MAJOR and source.scales is None:
        assert isinstance(folder, GgufTensors)
        if source.flat:
            yield memoryview(folder.read_blocks(source.name))
            return
        begin = source.rows[0] if source.rows else 0
        for start, end in _ranges(tensor.shape):
            yield memoryview(folder.read_blocks(source.name, (begin + start, begin + end), source.index))
    else:
        for (start, end), values in _rows(folder, tensor):
            if layout == "ggml.mxfp4":
                yield values.reshape(-1).data
            elif tensor.dtype == "mxfp4":
                yield pack("f32", dequantize("mxfp4", values.reshape(-1)).reshape(end - start, columns)).data
            else:
                yield pack(layout, values if layout == tensor.dtype else _float32(values, tensor.dtype)).data


def float_rows(folder: TensorFiles, tensor: SourceTensor) -> Iterator[tuple[Rows, npt.NDArray[np.float32]]]:
    """((first, end), float32 [end - first, columns]) of a matrix that is not in blocks, some rows at a time."""
    for place, values in _rows(folder, tensor):
        yield place, _float32(values, tensor.dtype)


def _rows(folder: TensorFiles, tensor: SourceTensor) -> Iterator[tuple[Rows, npt.NDArray[Any]]]:
    """The same in the source's type; of MXFP4 the blocks, uint8 [end - first, bytes of a row]."""
    source = tensor.source
    first, step = source.every or (0, 1)
    whole = None
    if source.transpose:
        whole = folder.read(source.name, source.rows, source.index).T[first::step]
    elif source.flat or source.slices is not None:
        whole = folder.read(source.name)
        whole = whole.reshape(-1, whole.shape[-1])
        whole = whole if source.slices is None else _sliced(whole, source.slices)
    first += source.rows[0] if source.rows else 0

    def read(name: str, start: int, end: int) -> npt.NDArray[Any]:
        return folder.read(name, (first + step * start, first + step * (end - 1) + 1), source.index)[::step]

    for start, end in _ranges(tensor.shape):
        if source.scales is not None:
            yield (start, end), mxfp4_blocks(read(source.name, start, end), read(source.scales, start, end))
        else:
            yield (start, end), whole[start:end] if whole is not None else read(source.name, start, end)


def _ranges(shape: tuple[int, ...]) -> Iterator[Rows]:
    """(first, end) of the rows that are read together: whole blocks of the pack's layouts."""
    rows, columns = shape
    at_once = max(1, _WEIGHTS_AT_ONCE // (columns * BLOCK)) * BLOCK
    for start in range(0, rows, at_once):
        yield start, min(start + at_once, rows)


def _sliced(values: npt.NDArray[Any], slices: Slices) -> npt.NDArray[Any]:
    groups = values.reshape(slices.groups, -1, values.shape[1])
    pieces = [groups[:, first:end] for first, end in slices.ranges]
    if slices.transpose:
        pieces = [piece.swapaxes(1, 2) for piece in pieces]
    return np.concatenate([piece.reshape(-1, piece.shape[-1]) for piece in pieces])


def _float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    return bf16_to_f32(values) if dtype == "bf16" else values.astype(np.float32, copy=False)
