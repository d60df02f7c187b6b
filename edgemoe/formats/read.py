"""The index of a model file, whatever its format."""

from __future__ import annotations

from pathlib import Path

from edgemoe.formats.gguf import is_gguf
from edgemoe.formats.gguf_index import GgufSource, build_index
from edgemoe.formats.index import ModelIndex
from edgemoe.formats.pack import Pack


def read_index(path: Path) -> ModelIndex:
    """Of a pack or of a GGUF file. Raises PackError, SourceError, UnsupportedModelError, TokenizerError."""
    return build_index(GgufSource.open(path)) if is_gguf(path) else Pack.open(path).index
