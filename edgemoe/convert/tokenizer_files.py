"""The files that a pack's tokenizer is made of."""

from __future__ import annotations

from edgemoe.formats.pack import MAX_BLOB
from edgemoe.formats.read import TOKENIZER_FILES
from edgemoe.formats.safetensors import read_bytes
from edgemoe.source import GgufTensors, SourceModel
from edgemoe.text.gguf_tokenizer import tokenizer_files


def tokenizer_blobs(model: SourceModel) -> dict[str, bytes]:
    """Name -> contents of those that a folder has, or that are made of a GGUF file's metadata. Raises SourceError and
    TokenizerError."""
    files = model.folder
    if isinstance(files, GgufTensors):
        return tokenizer_files(files.metadata, str(files.folder))
    return {
        name: read_bytes(files.folder / name, MAX_BLOB) for name in TOKENIZER_FILES if (files.folder / name).exists()
    }
