"""edgemoe runs Mixture-of-Experts language models that are larger than the memory they may use.

import edgemoe

with edgemoe.load("model.emoe", memory="4GB") as model:
    for text in model.generate("Once upon a time", max_tokens=100):
        print(text, end="", flush=True)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemoe._core import __version__
    from edgemoe.errors import (
        ContextLengthError,
        DeviceError,
        DeviceMemoryError,
        EdgemoeError,
        MemoryBudgetError,
        OptionError,
        OverloadedError,
        PackError,
        ReadError,
        SourceError,
        ThreadError,
        TokenizerError,
        UnsupportedModelError,
    )
    from edgemoe.formats.read import load_tokenizer
    from edgemoe.model import Model, load
    from edgemoe.spec import ModelSpec
    from edgemoe.text.tokenizer import Tokenizer

__all__ = [
    "ContextLengthError",
    "DeviceError",
    "DeviceMemoryError",
    "EdgemoeError",
    "MemoryBudgetError",
    "Model",
    "ModelSpec",
    "OptionError",
    "OverloadedError",
    "PackError",
    "ReadError",
    "SourceError",
    "ThreadError",
    "Tokenizer",
    "TokenizerError",
    "UnsupportedModelError",
    "__version__",
    "load",
    "load_tokenizer",
]

_HOMES = {
    "__version__": "edgemoe._core",
    "Model": "edgemoe.model",
    "load": "edgemoe.model",
    "ModelSpec": "edgemoe.spec",
    "Tokenizer": "edgemoe.text.tokenizer",
    "load_tokenizer": "edgemoe.formats.read",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for when it is asked for: a command line that only prints its help need not wait."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'edgemoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "edgemoe.errors")), name)
