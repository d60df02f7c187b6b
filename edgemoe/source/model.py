"""A model as its makers published it, a folder of safetensors or a GGUF file, read as far as its headers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgemoe.errors import SourceError, UnsupportedModelError
from edgemoe.families import TensorSource, family_for
from edgemoe.formats.generation import folder_generation
from edgemoe.formats.ggml_blocks import READABLE, TYPES, BlockType
from edgemoe.formats.gguf import GgufModel, is_gguf
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.safetensors import SafetensorsFolder, TensorInfo, read_json
from edgemoe.spec import ModelSpec

_MXFP4 = TYPES["mxfp4"]


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
        self.metadata = model.metadata
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


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model folder or a GGUF file, read as far as its headers.

    form: "safetensors" or "gguf". sources: of every engine tensor; unused: the tensors left over.
    """

    form: str
    folder: TensorFiles
    spec: ModelSpec
    sources: dict[str, TensorSource]
    generation: dict[str, Any]
    unused: list[str]

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
        generation = folder_generation(config, read_json(generation_file) if generation_file.exists() else {}, path)
        used = {tensor.name for tensor in sources.values()} | {tensor.scales for tensor in sources.values()}
        unused = [name for name in folder.names() if name not in used]

        return cls("safetensors", folder, spec, sources, generation, unused)

    @classmethod
    def _open_gguf(cls, path: Path) -> SourceModel:
        gguf = GgufSource.open(path)
        return cls("gguf", GgufTensors(gguf.model), gguf.spec, gguf.sources, gguf.generation, gguf.unused)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and source type of every engine tensor. Raises as `open` for one that does not fit."""
        shapes = self.spec.dense_tensors()
        for name, source in self.sources.items():
            shape = shapes.get(name)
            if shape is None:
                _, layer, _, _, part = name.split(".")
                shape = self.spec.expert_tensors(int(layer))[part]
            yield name, shape, checked_dtype(self.folder, name, source, shape)


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
    if source.shape(found, len(shape) == 1) != shape:
        raise SourceError(f"{where}: shape {list(info.shape)} does not give {name} {list(shape)}")
    return dtype
