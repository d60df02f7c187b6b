"""A device by itself: its memory, the order of what it does, what it refuses, and how its failures come out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import ORDERS, Memory, numbers
from test_kernels import floats, same_bytes

from edgemoe._core import Device, kernels
from edgemoe.errors import DeviceError, DeviceMemoryError

BYTES = np.arange(1000, dtype=np.uint32).tobytes()


@pytest.fixture
def device() -> Device:
    return Device("emulated")


def norm(device: Device, x: int, weight: int, out: int, rows: int, size: int) -> None:
    device.launch("rms_norm", rows, [x, weight, out, numbers(size, 1e-6)])


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_keeps_what_is_written(device: Device) -> None:
    first, second = device.allocate(4000), device.allocate(4000)
    assert first % 256 == 0 and second % 256 == 0
    device.write(first, BYTES)
    device.write(second, np.frombuffer(BYTES, np.uint8)[::-1].copy())
    device.copy(second + 8, first + 4, 100)
    assert device.read(first, 4000) == BYTES
    assert device.read(second, 4000) == BYTES[::-1][:8] + BYTES[4:104] + BYTES[::-1][108:]
    assert device.read(first + 3996, 4) == BYTES[-4:]
    assert device.read(first + 4000, 0) == b""


def test_memory_begins_as_not_a_number(device: Device) -> None:
    assert np.isnan(np.frombuffer(device.read(device.allocate(64), 64), np.float32)).all()


def test_what_is_written_is_copied_at_once(device: Device) -> None:
    address = device.allocate(4)
    data = np.array([7], np.int32)
    device.write(address, data)
    data[0] = 8
    assert np.frombuffer(device.read(address, 4), np.int32) == 7


def test_memory_is_limited_and_comes_back() -> None:
    device = Device("emulated", memory=10_000)
    address = device.allocate(6000)
    assert device.facts() == {"name": "emulated", "memory": 10_000, "available": 4000, "unified": False, "driver": ""}
    with pytest.raises(DeviceMemoryError, match="has 4000 bytes left, not 4001"):
        device.allocate(4001)
    device.allocate(4000)
    device.release(address)
    assert device.facts()["available"] == 6000
    with pytest.raises(DeviceError, match="was not allocated, or released before"):
        device.release(address)


def test_released_memory_is_refused(device: Device) -> None:
    address = device.allocate(64)
    device.release(address)
    for use in (
        lambda: device.read(address, 4),
        lambda: device.write(address, b"1234"),
        lambda: norm(device, address, address, address, 1, 4),
    ):
        with pytest.raises(DeviceError, match="an address where nothing is allocated"):
            use()


def test_a_release_waits_for_what_is_under_way(device: Device) -> None:
    source, target = device.allocate(64), device.allocate(64)
    device.write(source, bytes(range(64)))
    device.copy(target, source, 64)
    device.release(source)
    assert device.read(target, 64) == bytes(range(64))


@pytest.mark.parametrize("size", [65, 1 << 40, (1 << 64) - 1])
def test_beyond_an_allocation(device: Device, size: int) -> None:
    address, other = device.allocate(64), device.allocate(64)
    with pytest.raises(DeviceError, match="a read goes beyond"):
        device.read(address, 65)
    with pytest.raises(DeviceError, match="a write goes beyond"):
        device.write(address + 1, bytes(64))
    with pytest.raises(DeviceError, match="an upload goes beyond"):
        device.upload(address + 60, bytes(5))
    with pytest.raises(DeviceError, match="a copy goes beyond"):
        device.copy(address, other, size)
    with pytest.raises(DeviceError, match="a copy overlaps its source"):
        device.copy(address + 4, address, 8)
    device.write(address, bytes(64))  # it is still usable
    assert device.read(address, 64) == bytes(64)


# --- order ----------------------------------------------------------------------------------------------------------


def test_operations_are_computed_in_order(device: Device) -> None:
    rng = np.random.default_rng(1)
    x, y, weight = floats(rng, 3, 50), floats(rng, 3, 50), floats(rng, 50)
    memory = Memory(device)
    at, weights, out, kept = memory.put(x), memory.put(weight), memory.room((3, 50)), memory.room((3, 50))
    norm(device, at, weights, out, 3, 50)
    device.copy(kept, out, 600)
    device.write(at, y)
    norm(device, at, weights, out, 3, 50)
    for values, found in ((x, kept), (y, out)):
        expected = np.stack([kernels.rms_norm("scalar", row, weight, 1e-6) for row in values])
        same_bytes(expected, memory.get(found))


def test_nothing_is_computed_before_somebody_waits() -> None:
    """A wrong write behind an allocation shows when the operation was done."""
    for eager in (False, True):
        device = Device("emulated", eager=eager)
        x, out = device.allocate(400), device.allocate(396)
        device.write(x, bytes(400))
        if eager:
            with pytest.raises(DeviceError, match="rms_norm: something was written behind an allocation of 396"):
                norm(device, x, x, out, 1, 100)
        else:
            norm(device, x, x, out, 1, 100)
            with pytest.raises(DeviceError, match="rms_norm: something was written behind an allocation of 396"):
                device.wait()


def test_uploads_have_an_order_of_their_own(device: Device) -> None:
    address = device.allocate(8)
    device.write(address, bytes(8))
    first, second, third = (device.upload(address + i, bytes([7 + i])) for i in (0, 1, 2))
    assert (first, second, third) == (1, 2, 3)
    assert device.read(address, 8) == bytes(8)  # waiting for operations is not waiting for uploads
    assert not device.done(first)
    assert device.done(first) and not device.done(third) and not device.done(third)
    assert device.read(address, 8) == bytes([7, 8, 9, 0, 0, 0, 0, 0])
    fourth = device.upload(address, b"1234")
    device.wait(fourth)
    assert device.done(fourth) and device.read(address, 4) == b"1234"
    for number in (0, 5):
        with pytest.raises(DeviceError, match=f"there is no upload {number}"):
            device.done(number)
        with pytest.raises(DeviceError, match=f"there is no upload {number}"):
            device.wait(number)


def test_an_eager_device_uploads_at_once() -> None:
    device = Device("emulated", eager=True)
    address = device.allocate(8)
    assert device.done(device.upload(address, b"12345678"))
    assert device.read(address, 8) == b"12345678"


# --- refusals and failures ------------------------------------------------------------------------------------------


def test_refused_arguments(device: Device) -> None:
    memory = Memory(device)
    x = memory.put(np.ones(8, np.float32))
    host = np.ones(8, np.float32)
    shape = numbers(8, 1e-6)

    def refused(match: str, arguments: list[Any], groups: int = 1, name: str = "rms_norm") -> None:
        with pytest.raises(DeviceError, match=match):
            device.launch(name, groups, arguments)

    refused("there is no kernel nothing", [], name="nothing")
    refused("has 4 arguments, not 3", [x, x, x])
    refused("has 4 arguments, not 5", [x, x, x, shape, shape])
    refused("argument 3: 8 bytes are wanted, not 4", [x, x, x, shape[:4]])
    refused("argument 0: 8 bytes are wanted, not 12", [bytes(12), x, x, shape])
    refused("argument 1: a pointer of the host", [x, host.ctypes.data, x, shape])
    refused("argument 2: an address where nothing is allocated", [x, x, x + (1 << 40), shape])
    refused("argument 2: the address is not aligned", [x, x, x + 2, shape])
    refused("rms_norm is launched with 0 groups", [x, x, x, shape], groups=0)
    norm(device, x, x, x, 1, 8)  # it is still usable
    assert np.isfinite(memory.get(x)).all()


def test_refused_pointers_of_the_host(device: Device) -> None:
    address, host = device.allocate(64), np.zeros(64, np.uint8)
    for use in (
        lambda: device.read(host.ctypes.data, 8),
        lambda: device.write(host.ctypes.data, b"12345678"),
        lambda: device.copy(address, host.ctypes.data, 8),
        lambda: device.copy(host.ctypes.data, address, 8),
        lambda: device.upload(host.ctypes.data, b"12345678"),
    ):
        with pytest.raises(DeviceError, match="a pointer of the host"):
            use()


def test_unknown_kinds_and_orders() -> None:
    with pytest.raises(ValueError, match="unknown kind of device 'abacus'"):
        Device("abacus")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown order 'sideways'"):
        Device("emulated", order="sideways")  # type: ignore[arg-type]


def test_a_device_that_failed_stays_so(device: Device) -> None:
    x, out = device.allocate(400), device.allocate(396)
    norm(device, x, x, out, 1, 100)
    with pytest.raises(DeviceError, match="written behind"):
        device.read(out, 4)
    for use in (
        lambda: device.read(x, 4),
        lambda: device.write(x, b"1234"),
        lambda: device.allocate(4),
        lambda: device.upload(x, b"1234"),
        device.wait,
    ):
        with pytest.raises(DeviceError, match="written behind"):
            use()
    device.release(x)  # only this goes on, so that who cleans up can


@pytest.mark.parametrize("order", ORDERS)
def test_orders_give_the_same(order: Any) -> None:
    rng = np.random.default_rng(2)
    x, weight = floats(rng, 5, 333, wild=True), floats(rng, 333)
    memory = Memory(Device("emulated", order=order, seed=3))
    at = memory.put(x)
    norm(memory.device, at, memory.put(weight), at, 5, 333)
    same_bytes(np.stack([kernels.rms_norm("scalar", row, weight, 1e-6) for row in x]), memory.get(at))
