"""The files that a pack's tokenizer is made of."""

from __future__ import annotations

from edgemoe.formats.pack import MAX_BLOB
from edgemoe.formats.safetensors import read_bytes
from edgemoe.source import GgufTensors, SourceModel
from edgemoe.text.gguf_tokenizer import tokenizer_files

BLOBS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Their names, in a folder and in a pack."""


def tokenizer_blobs(model: SourceModel) -> dict[str, bytes]:
    """Name -> contents of those that a folder has, or that are made of a GGUF file's metadata. Raises SourceError and
    TokenizerError."""
    files = model.folder
    if isinstance(files, GgufTensors):
        return tokenizer_files(files.metadata, str(files.folder))
    return {name: read_bytes(files.folder / name, MAX_BLOB) for name in BLOBS if (files.folder / name).exists()}
