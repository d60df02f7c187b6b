"""Devices beside the processor: which kinds there are, and how one is opened."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from edgemoe import _core
from edgemoe.errors import DeviceError, NoDeviceError

CUDA_LIBRARY = "libcuda.so.1"
"""The NVIDIA driver's."""


@dataclass(frozen=True, slots=True)
class OpenDevice:
    """A device, and what it said of itself when it was opened.

    kind: "cuda" or "emulated". memory, available: bytes. unified: its memory is the processor's. driver: its version,
    empty where there is none.
    """

    core: _core.Device
    kind: str
    name: str
    memory: int
    available: int
    unified: bool
    driver: str


def open_device(gpu: str, say: Callable[[str], None] | None = None) -> OpenDevice | None:
    """The device that is asked for: "cuda" or "emulated"; "auto": a GPU if there is one, with a word to `say` where
    there is a driver and it fails; "none". Raises DeviceError for one that is asked for by name and is not there."""
    if gpu == "none":
        return None
    if gpu == "auto":
        try:
            ctypes.CDLL(CUDA_LIBRARY)
            return _opened("cuda")
        except (OSError, NoDeviceError):
            return None
        except DeviceError as error:
            if say is not None:
                say(f"the GPU is not used: {error}; the processor computes everything")
            return None
    try:
        return _opened("emulated" if gpu == "emulated" else "cuda")
    except DeviceError as error:
        raise type(error)(f"--gpu {gpu}: {error}; --gpu none computes without it") from error


def _opened(kind: str) -> OpenDevice:
    core = _core.Device("emulated") if kind == "emulated" else _core.Device("cuda", library=CUDA_LIBRARY)
    facts = core.facts()
    return OpenDevice(
        core,
        kind,
        str(facts["name"]),
        int(facts["memory"]),
        int(facts["available"]),
        bool(facts["unified"]),
        str(facts["driver"]),
    )
