"""What the tests of device kernels share: arrays in the memory of a device, and structs for its kernels."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe._core import Device

ORDERS = ("ascending", "descending", "shuffled")
"""In which warps and lanes of an emulated device take their turns."""

GUARD = 4096
"""Bytes behind every array, of which a kernel must not change one."""


def groups_for(elements: int) -> int:
    """Of a kernel that has a thread for each element."""
    return -(-elements // 256)


def emulated(seed: int = 0) -> Device:
    """A device with one of the three orders, by its seed."""
    return Device("emulated", order=ORDERS[seed % 3], seed=seed)


class Memory:
    """Arrays in the memory of a device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.arrays: dict[int, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}

    def put(self, values: NDArray[Any]) -> int:
        """A copy of an array; its address."""
        values = np.ascontiguousarray(values)
        address = self.room(values.shape, values.dtype)
        self.device.write(address, values.reshape(-1).view(np.uint8))
        return address

    def room(self, shape: int | Sequence[int], dtype: Any = np.float32) -> int:
        """Memory for an array, of any content; its address."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self.device.allocate(size + GUARD)
        self.device.write(address + size, bytes(GUARD))
        self.arrays[address] = (size, shape, np.dtype(dtype))
        return address

    def get(self, address: int) -> NDArray[Any]:
        """The array that lies there now."""
        size, shape, dtype = self.arrays[address]
        data = self.device.read(address, size + GUARD)
        assert not any(data[size:]), "something was written behind an array"
        return np.frombuffer(data[:size], dtype).reshape(shape)


def run(device: Device, kernel: str, groups: int, *arguments: NDArray[Any] | bytes | None) -> list[NDArray[Any]]:
    """Runs a kernel by itself. Arguments are arrays, structs, or None for an address that is 0. All arrays come back in
    their order, those that the kernel only reads too."""
    memory = Memory(device)
    given = [memory.put(one) if isinstance(one, np.ndarray) else one or 0 for one in arguments]
    device.launch(kernel, groups, given)
    results = [memory.get(address) for address in memory.arrays]
    for address in memory.arrays:
        device.release(address)
    return results


def canonical(values: NDArray[Any]) -> NDArray[Any]:
    """Whatever is not a number as the one NaN that a device writes. The processor leaves others where they do not
    last."""
    values = np.array(values, np.float32)
    values.view(np.uint32)[np.isnan(values)] = 0x7FC00000
    return values


def number(value: int | float) -> bytes:
    """An i32 or a float."""
    return struct.pack("<i" if isinstance(value, int) else "<f", value)


def numbers(*values: int | float) -> bytes:
    """A struct of i32 and float members, one after the other."""
    return b"".join(number(value) for value in values)
