"""A CUDA driver for machines without a GPU: native/tests/gpu/fakecuda.cpp on an emulated device."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from edgemoe._core import Device

SOURCE = Path(__file__).parent / ".." / "native" / "tests" / "gpu" / "fakecuda.cpp"
KINDS = ("allocations", "host", "modules", "streams", "events", "contexts")

_address = ctypes.c_ulonglong
_size = ctypes.c_size_t
_pointer = ctypes.c_void_p
_ints = ctypes.POINTER(ctypes.c_int)


class _Machine(ctypes.Structure):
    _fields_ = (
        ("allocate", ctypes.CFUNCTYPE(ctypes.c_int, _size, ctypes.POINTER(_address))),
        ("release", ctypes.CFUNCTYPE(ctypes.c_int, _address)),
        ("write", ctypes.CFUNCTYPE(ctypes.c_int, _address, _pointer, _size)),
        ("read", ctypes.CFUNCTYPE(ctypes.c_int, _pointer, _address, _size)),
        ("copy", ctypes.CFUNCTYPE(ctypes.c_int, _address, _address, _size)),
        ("launch", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, _ints, _pointer)),
    )


@functools.cache
def library() -> Path:
    """Its file. Skips the test where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = Path(tempfile.mkdtemp(prefix="edgemoe-fake-cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "libcuda.so.1"
    subprocess.run([compiler, "-std=c++20", "-fPIC", "-shared", "-o", str(path), str(SOURCE)], check=True)
    return path


class FakeCuda:
    """The driver, as a process that has just started finds it."""

    def __init__(self, **emulated: Any) -> None:
        self.path = str(library())
        self.errors: list[Exception] = []  # of the emulated device: what a driver would call a failed launch
        self.launches: list[str] = []
        self._device = Device("emulated", eager=True, **emulated)
        self._library = ctypes.CDLL(self.path)
        self._machine = _Machine()
        for name, kind in _Machine._fields_:
            setattr(self._machine, name, kind(self._guarded(getattr(self, f"_{name}"))))
        self._library.fake_connect(ctypes.byref(self._machine))

    def set(self, name: str, value: int) -> None:
        """Facts: devices, integrated, version, capability (87 is 8.7), memory; `eager`: streams never lag behind."""
        self._library.fake_set(name.encode(), ctypes.c_longlong(value))

    def fail(self, function: str, status: int, n: int = 1) -> None:
        """The n-th call of a function from now on fails; "kernel": what was launched does, when it is computed."""
        self._library.fake_fail(function.encode(), n, status)

    def lose(self, status: int) -> None:
        """The device is gone."""
        self._library.fake_lose(status)

    def live(self) -> dict[str, int]:
        """What was taken and not given back."""
        counts = {kind: self._library.fake_live(kind.encode()) for kind in KINDS}
        return {kind: count for kind, count in counts.items() if count}

    def _guarded(self, function: Any) -> Any:
        def call(*arguments: Any) -> int:
            try:
                function(*arguments)
            except Exception as error:
                self.errors.append(error)
                return 1
            return 0

        return call

    def _allocate(self, nbytes: int, address: Any) -> None:
        address[0] = self._device.allocate(nbytes)

    def _release(self, address: int) -> None:
        self._device.release(address)

    def _write(self, to: int, source: int, nbytes: int) -> None:
        self._device.write(to, ctypes.string_at(source, nbytes))

    def _read(self, to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, self._device.read(source, nbytes), nbytes)

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        self._device.copy(to, source, nbytes)

    def _launch(self, name: bytes, groups: int, count: int, sizes: Any, values: int) -> None:
        arguments: list[int | bytes] = []
        for i in range(count):
            data = ctypes.string_at(values, sizes[i] or 8)
            arguments.append(data if sizes[i] else int.from_bytes(data, "little"))
            values += len(data)
        self.launches.append(name.decode())
        self._device.launch(name.decode(), groups, arguments)


class WrongCuda(FakeCuda):
    """One kernel computes something else."""

    def _launch(self, name: bytes, *arguments: Any) -> None:
        super()._launch(b"add_scaled" if name == b"add_vector" else name, *arguments)
