"""One exception class for each kind of failure.

Every message names the file, the tensor or section, and the wrong number.
"""

from __future__ import annotations

import reprlib

QUOTED = 80
"""Characters of a value that a message quotes at most."""


class EdgemoeError(Exception):
    """Base of every error that edgemoe raises on purpose; the command line prints it on one line."""


class PackError(EdgemoeError):
    """An `.emoe` file is missing, truncated, damaged, or asks for a feature this version does not have."""


class SourceError(EdgemoeError):
    """A model folder or one of its files (config, safetensors, tokenizer) cannot be used."""


class UnsupportedModelError(EdgemoeError):
    """The model's family, or an option its configuration asks for, is not known."""


class MemoryBudgetError(EdgemoeError):
    """The memory budget is too small; the message names the least that works."""


class ContextLengthError(EdgemoeError):
    """A prompt or generation does not fit into the context.

    prompt_tokens, context: how many tokens there were, and how many fit; None where that is not known.
    """

    def __init__(self, message: str, prompt_tokens: int | None = None, context: int | None = None) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.context = context


class OverloadedError(EdgemoeError):
    """More requests wait than the queue has room for; later there will be room again."""


class StateError(EdgemoeError):
    """A sequence cannot go back to a position, because a layer with a window or a recurrence does not keep what it
    would need there; or there is no room for another sequence."""


class TokenizerError(EdgemoeError):
    """The tokenizer or the chat template is missing, broken, or does not belong to the model."""


class OptionError(EdgemoeError):
    """An option has a value that makes no sense."""


class ReadError(EdgemoeError):
    """Weights could not be read, or what was read has the wrong checksum; the model stays usable."""


class ThreadError(EdgemoeError):
    """The system does not let the process start as many threads as were asked for; what was loaded stays usable."""


class DeviceError(EdgemoeError):
    """A device (a GPU) is not there, failed, or does not do what it was asked; what was loaded on it is of no use any
    more."""


class NoDeviceError(DeviceError):
    """There is no such device, or no driver for it."""


class DeviceMemoryError(DeviceError):
    """A device has no room for so much."""


class TraceError(EdgemoeError):
    """A routing trace is missing, truncated, or not one."""


def quote(value: object) -> str:
    """What a message says of a value from a file: its `repr`, on one line and cut, however large the value is."""
    if isinstance(value, (bytes, bytearray)):
        value = value[:QUOTED]
    text = " ".join(_REPR.repr(value).split())
    return text if len(text) <= QUOTED else text[: QUOTED - 3] + "..."


def shorten(name: str) -> str:
    """A name from a file, or a phrase with one, as a message shows it: printable, on one line and cut."""
    printable = "".join(c if c.isprintable() or c.isspace() else "?" for c in name[: 2 * QUOTED])
    text = " ".join(printable.split()) or "''"
    return text if len(text) <= QUOTED else text[: QUOTED - 3] + "..."


# Bounds what is written out before it is cut.
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = 20
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = QUOTED
