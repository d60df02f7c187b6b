"""From what a user calls a model to its file: the bundled one, a path, a folder's conversion in the cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from edgemoe.errors import SourceError

# A folder of a model's original weights is converted at this width when it is run.
DEFAULT_BITS = 8

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def default_cache_dir() -> Path:
    """Where converted models are kept: EDGEMOE_CACHE, or ~/.cache/edgemoe."""
    return Path(os.environ.get("EDGEMOE_CACHE") or Path.home() / ".cache" / "edgemoe")


def bundled_model() -> Path:
    """The demonstration model: EDGEMOE_MODEL, or the pack installed with the package. Raises SourceError."""
    chosen = os.environ.get("EDGEMOE_MODEL")
    if chosen:
        return Path(chosen)
    here = Path(__file__).resolve().parent
    for folder in (here / "models", here.parent / "models"):  # installed; in a checkout
        for pack in sorted(folder.glob("*.emoe")):
            return pack
    raise SourceError(f"no model was named and {here / 'models'} holds no bundled one")


def cached_pack(folder: Path) -> Path:
    """Where the conversion of a Hugging Face folder is kept; the name changes with the folder's files."""
    digest = hashlib.sha256()
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".safetensors", ".jinja"):
                status = file.stat()
                digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    except OSError as error:
        raise SourceError(f"{folder}: {error.strerror}") from error
    return default_cache_dir() / f"{folder.resolve().name}-{DEFAULT_BITS}bit-{digest.hexdigest()[:12]}.emoe"


def resolve(
    path: str | os.PathLike[str] | None,
    *,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Path:
    """The file behind a model argument: None (the bundled pack), a pack, a GGUF file, or a Hugging Face folder.

    A folder is converted once, into the cache; `announce` gets a line that says so and how much disk it takes,
    `progress` is called with (bytes done, bytes in all).
    """
    source = bundled_model() if path is None else Path(path)
    if not source.exists():
        raise SourceError(f"{source}: no such file or folder")
    if not source.is_dir():
        return source
    from edgemoe.convert import convert, estimate_size

    pack = cached_pack(source)
    if not pack.exists():
        pack.parent.mkdir(parents=True, exist_ok=True)
        if announce:
            size = estimate_size(source, DEFAULT_BITS)
            announce(f"converting {source} at {DEFAULT_BITS} bits, once: {size / 1e9:.2f} GB in {pack}")
        convert(source, pack, DEFAULT_BITS, progress=progress)
    return pack
