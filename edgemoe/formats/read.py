"""What a model file holds, whatever its format: its index, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from edgemoe.errors import TokenizerError
from edgemoe.formats.gguf import GgufModel, is_gguf
from edgemoe.formats.index import ModelIndex
from edgemoe.formats.pack import Pack
from edgemoe.text.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Their names, in a folder and in a pack."""


def read_index(path: Path) -> ModelIndex:
    """Of a pack or of a GGUF file. Raises PackError, SourceError, UnsupportedModelError, TokenizerError."""
    if not is_gguf(path):
        return Pack.open(path).index
    from edgemoe.formats.gguf_index import GgufSource, build_index

    return build_index(GgufSource.open(path))


def read_model(path: Path) -> tuple[ModelIndex, Tokenizer]:
    """`read_index` and `load_tokenizer` of a file that is opened and checked once."""
    if not is_gguf(path):
        pack = Pack.open(path)
        return pack.index, pack_tokenizer(pack)
    from edgemoe.formats.gguf_index import GgufSource, build_index
    from edgemoe.text.gguf_tokenizer import tokenizer_from_gguf

    source = GgufSource.open(path)
    return build_index(source), tokenizer_from_gguf(source.model.metadata, str(path))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a pack, of a Hugging Face folder or of a GGUF file. Raises TokenizerError, PackError,
    SourceError."""
    path = Path(path)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    if is_gguf(path):
        from edgemoe.text.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(GgufModel.open(path).metadata, str(path))
    return pack_tokenizer(Pack.open(path))


def pack_tokenizer(pack: Pack) -> Tokenizer:
    """The tokenizer of an open pack. Raises TokenizerError."""
    tokenizer, *others = TOKENIZER_FILES
    if tokenizer not in pack.blobs:
        raise TokenizerError(f"{pack.index.path}: no {tokenizer} in the pack")
    config, template = (pack.read_blob(name) if name in pack.blobs else None for name in others)
    return Tokenizer.from_files(
        pack.read_blob(tokenizer), config, pack.index.generation, template, name=str(pack.index.path)
    )
