"""A CUDA device on a fake driver: every call, the processor's bits, and what becomes of each error."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from helpers import write_tiny_qwen3_moe

from edgemoe import kernel_images
from edgemoe._core import Device, kernels
from edgemoe.convert import convert
from edgemoe.engine import Engine
from edgemoe.errors import DeviceError, DeviceMemoryError, NoDeviceError
from edgemoe.formats.pack import Pack
from edgemoe.options import EngineOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no such driver elsewhere")

OUT_OF_MEMORY, NOT_PERMITTED, LAUNCH_FAILED, GONE = 2, 800, 719, 46
MIB = 1 << 20


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    fake = FakeCuda()
    yield fake
    gc.collect()  # devices that an exception's traceback holds
    assert fake.live() == {}


def opened(fake: FakeCuda, image: bytes | None = None) -> Device:
    return Device("cuda", library=fake.path, image=image)


def random_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def norm_of(device: Device, x: np.ndarray[Any, Any], *, source: int | None = None) -> bytes:
    """Launches rms_norm of one row, which may be on the device already, and reads what it gives."""
    address = source or device.allocate(x.nbytes)
    if source is None:
        device.write(address, x)
    weight, out = device.allocate(x.nbytes), device.allocate(x.nbytes)
    device.write(weight, np.ones_like(x))
    shape = np.int32(x.size).tobytes() + np.float32(1e-6).tobytes()
    device.launch("rms_norm", 1, [address, weight, out, shape])
    return device.read(out, x.nbytes)


# --- its calls --------------------------------------------------------------------------------------------------------


def test_facts(fake: FakeCuda) -> None:
    device = opened(fake)
    facts = {"name": "Fake 0", "memory": 8 << 30, "available": 8 << 30, "unified": False}
    assert facts.items() <= device.facts().items()
    device.allocate(MIB)
    assert device.facts()["available"] == (8 << 30) - MIB


def test_of_several_the_first_is_used_and_said_so(fake: FakeCuda) -> None:
    fake.set("devices", 3)
    fake.set("integrated", 1)
    facts = opened(fake).facts()
    assert facts["name"] == "Fake 0 (the first of 3)"
    assert facts["unified"]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, MIB - 1, MIB, MIB + 1, 3 * MIB + 5, 19 * MIB + 7])
def test_what_is_written_is_read(fake: FakeCuda, size: int) -> None:
    device = opened(fake)
    address = device.allocate(size + 2)
    data = random_bytes(size)
    device.write(address, b"<")
    device.write(address + 1, data)
    device.write(address + 1 + size, b">")
    assert device.read(address, size + 2) == b"<" + data + b">"


def test_bytes_may_change_once_they_are_written(fake: FakeCuda) -> None:
    device = opened(fake)
    addresses, wanted = [], []
    source = np.zeros(70_001, np.uint8)
    for i in range(400):  # more than lies in pinned memory at a time: it comes round
        source[:] = i % 251
        addresses.append(device.allocate(source.nbytes))
        device.write(addresses[-1], source)
        wanted.append(source.tobytes())
    source[:] = 255
    for address, data in zip(addresses, wanted, strict=True):
        assert device.read(address, len(data)) == data


def test_copies_and_writes_are_in_order(fake: FakeCuda) -> None:
    device = opened(fake)
    one, other = device.allocate(8), device.allocate(8)
    device.write(one, b"earliest")
    device.copy(other, one, 8)
    device.copy(other, one, 0)
    device.write(one, b"latest..")
    assert device.read(other, 8) == b"earliest"
    assert device.read(one, 8) == b"latest.."


def test_memory_comes_back(fake: FakeCuda) -> None:
    fake.set("memory", 4 * MIB)
    device = opened(fake)
    for _ in range(10):
        address = device.allocate(3 * MIB)
        device.write(address, bytes(3 * MIB))
        device.release(address)
    with pytest.raises(DeviceError, match="not allocated"):
        device.release(address)


def test_uploads_are_beside_the_rest(fake: FakeCuda) -> None:
    device = opened(fake)
    addresses = [device.allocate(2 * MIB) for _ in range(5)]
    data = [random_bytes(2 * MIB, seed) for seed in range(5)]
    numbers = [device.upload(address, one) for address, one in zip(addresses, data, strict=True)]
    assert numbers == [1, 2, 3, 4, 5]
    device.wait()
    assert device.read(addresses[0], 4) == b"\xff" * 4  # neither waits for them
    device.wait(2)
    assert device.read(addresses[1], 2 * MIB) == data[1]
    assert device.done(1)
    assert not device.done(4)
    for _ in range(10):
        if device.done(4):
            break
    assert device.done(4)
    assert device.read(addresses[3], 2 * MIB) == data[3]
    device.wait(5)
    assert device.done(5)
    assert device.upload(addresses[0], data[4]) == 6
    device.wait(6)
    assert device.read(addresses[0], 2 * MIB) == data[4]
    with pytest.raises(DeviceError, match="no such upload"):
        device.wait(7)


def test_a_forgotten_wait_for_an_upload_shows(fake: FakeCuda) -> None:
    x = np.linspace(-1, 1, 256, dtype=np.float32)
    wanted = kernels.rms_norm("scalar", x, np.ones_like(x), 1e-6).tobytes()
    device = opened(fake)
    for waits in (False, True):
        address = device.allocate(x.nbytes)
        number = device.upload(address, x)
        if waits:
            device.wait(number)
        assert (norm_of(device, x, source=address) == wanted) == waits
        device.wait(number)


def test_memory_that_uploads_come_from_is_pinned(fake: FakeCuda) -> None:
    device = opened(fake)
    before = fake.live()["host"]
    data = np.arange(1000, dtype=np.int32)
    assert device.pin(data)
    assert not device.pin(data)
    assert fake.live()["host"] == before + 1
    address = device.allocate(data.nbytes)
    device.wait(device.upload(address, data))
    assert device.read(address, data.nbytes) == data.tobytes()
    device.unpin(data)
    assert fake.live()["host"] == before
    assert device.pin(data)  # and given back with the device


def test_any_thread_may_call(fake: FakeCuda) -> None:
    device = opened(fake)
    address = device.allocate(64)
    device.upload(address, bytes(64))
    errors: list[Exception] = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    more = {"cuMemFree_v2": lambda: device.release(device.allocate(8)), "pin": lambda: device.pin(np.zeros(8))}
    for function, call in {**calls(device, address), **more}.items():
        thread = threading.Thread(target=attempt, args=(call,))  # where no context is current
        thread.start()
        thread.join()
        assert errors == [], function


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_kernels_give_the_processors_bits(order: str) -> None:
    fake = FakeCuda(order=order)
    device = opened(fake)
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    assert norm_of(device, x) == kernels.rms_norm("scalar", x, np.ones_like(x), 1e-6).tobytes()

    codes, scales, sums = kernels.quantize("scalar", x)
    places = [device.allocate(array.nbytes) for array in (codes, scales, sums)]
    source = device.allocate(x.nbytes)
    device.write(source, x)
    device.launch("quantize_rows", 4, [source, *places, np.array([x.size] * 2, np.int32).tobytes(), b"\1\0\0\0"])
    for array, place in zip((codes, scales, sums), places, strict=True):
        assert device.read(place, array.nbytes) == array.tobytes()
    assert fake.launches == ["rms_norm", "quantize_rows"]
    assert not fake.errors


@pytest.mark.parametrize(
    "arguments",
    [[], [0, 0, 0], [0, 0, 0, b"1234567"], [0, 0, 0, b"123456789"], [0, 0, 0, b"12345678", 0]],
)
def test_arguments_are_those_of_the_kernel(fake: FakeCuda, arguments: list[int | bytes]) -> None:
    device = opened(fake)
    with pytest.raises(DeviceError, match="rms_norm"):
        device.launch("rms_norm", 1, arguments)
    assert norm_of(device, np.ones(8, np.float32))


@pytest.mark.parametrize("groups", [0, -1])
def test_there_is_at_least_one_group(fake: FakeCuda, groups: int) -> None:
    device = opened(fake)
    with pytest.raises(DeviceError, match="rms_norm"):
        device.launch("rms_norm", groups, [0, 0, 0, bytes(8)])


def test_a_model_gives_the_processors_logits(fake: FakeCuda, tmp_path: Path) -> None:
    write_tiny_qwen3_moe(tmp_path / "tiny")
    convert(tmp_path / "tiny", tmp_path / "tiny.emoe", 8)
    index = Pack.open(tmp_path / "tiny.emoe").index
    tokens = np.arange(7, dtype=np.int32)
    logits = []
    for layers in (0, len(index.spec.layers) + 1):
        options = EngineOptions(threads=1, context=64, device_layers=layers)
        engine = Engine(index, options, opened(fake) if layers else None)
        one = np.zeros(7, np.int32)
        logits.append(engine.forward(tokens, np.arange(7, dtype=np.int32), one, np.array([6], np.int32)).tobytes())
        logits.append(engine.forward(tokens[:1], np.array([7], np.int32), one[:1], one[:1]).tobytes())
        engine.close()
    assert logits[:2] == logits[2:]
    assert len(fake.launches) > 20


# --- errors -----------------------------------------------------------------------------------------------------------


def test_without_a_driver_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NoDeviceError, match=r"no NVIDIA driver: .*nowhere/libcuda\.so\.1 could not be opened: "):
        Device("cuda", library=str(tmp_path / "nowhere" / "libcuda.so.1"))


def test_another_library_is_no_driver() -> None:
    [library] = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line}
    with pytest.raises(DeviceError, match="has no cuInit"):
        Device("cuda", library=library)


def test_importing_opens_no_driver(fake: FakeCuda) -> None:
    code = "import edgemoe, edgemoe.cli, pathlib; print('libcuda' in pathlib.Path('/proc/self/maps').read_text())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(fake.path).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("devices", 0, "the NVIDIA driver sees no GPU"),
        ("version", 11080, "of CUDA 11.8, but the kernels need 12.0"),
        ("capability", 61, "compute capability is 6.1, but the kernels need 7.5"),
    ],
)
def test_what_the_kernels_cannot_run_on_is_refused(fake: FakeCuda, fact: str, value: int, message: str) -> None:
    fake.set(fact, value)
    with pytest.raises(DeviceError, match=message) as error:
        opened(fake)
    assert isinstance(error.value, NoDeviceError) == (fact == "devices")


def test_what_the_drivers_compiler_says_is_passed_on(fake: FakeCuda) -> None:
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_INVALID_PTX (.|\n)*ptxas fatal"):
        opened(fake, b"no PTX")


def test_an_image_without_a_kernel_is_refused(fake: FakeCuda) -> None:
    with pytest.raises(DeviceError, match=r"cuModuleGetFunction: CUDA_ERROR_NOT_FOUND .*: rms_norm"):
        opened(fake, kernel_images.ptx().replace(b".entry rms_norm(", b".entry other(", 1))


OPENING = (
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuModuleLoadDataEx",
    "cuModuleGetFunction",
    "cuStreamCreate",
    "cuEventCreate",
    "cuMemHostAlloc",
)


@pytest.mark.parametrize("function", OPENING)
@pytest.mark.parametrize("n", [1, 2])
def test_a_failure_while_it_is_opened_leaves_nothing_behind(fake: FakeCuda, function: str, n: int) -> None:
    fake.fail(function, NOT_PERMITTED, n)
    try:
        device = opened(fake)
    except DeviceError as error:
        assert function in str(error)
        assert "800" in str(error)
    else:
        assert n == 2  # those that are called once
        del device


def calls(device: Device, address: int) -> dict[str, Any]:
    """By the driver's function that each begins with."""
    return {
        "cuDeviceGetName": device.facts,
        "cuDeviceTotalMem_v2": device.facts,
        "cuMemGetInfo_v2": device.facts,
        "cuMemAlloc_v2": lambda: device.allocate(64),
        "cuMemcpyHtoDAsync_v2": lambda: device.write(address, b"x"),
        "cuMemcpyDtoDAsync_v2": lambda: device.copy(address, address + 8, 8),
        "cuMemcpyDtoHAsync_v2": lambda: device.read(address, 8),
        "cuStreamSynchronize": device.wait,
        "cuLaunchKernel": lambda: device.launch("rms_norm", 1, [address, address, address, bytes(8)]),
        "cuEventRecord": lambda: device.upload(address, b"x"),
        "cuEventQuery": lambda: device.done(1),
        "cuEventSynchronize": lambda: device.wait(1),
    }


@pytest.mark.parametrize("status", [OUT_OF_MEMORY, NOT_PERMITTED])
def test_each_failed_call_raises_its_error(fake: FakeCuda, status: int) -> None:
    device = opened(fake)
    address = device.allocate(64)
    device.upload(address, b"12345678")
    kind = DeviceMemoryError if status == OUT_OF_MEMORY else DeviceError
    for function, call in calls(device, address).items():
        fake.fail(function, status)
        with pytest.raises(DeviceError, match=rf"{function}.*\({status}\)") as caught:
            call()
        assert type(caught.value) is kind, function
    assert set(calls(device, address)) | set(OPENING) >= {"cuMemAlloc_v2", "cuLaunchKernel"}


def test_no_room_is_an_error_that_it_survives(fake: FakeCuda) -> None:
    fake.set("memory", 2 * MIB)
    device = opened(fake)
    with pytest.raises(DeviceMemoryError, match=r"cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY .*: 3145728 bytes"):
        device.allocate(3 * MIB)
    assert norm_of(device, np.ones(8, np.float32))


def test_a_kernel_that_fails_is_heard_of_when_somebody_waits(fake: FakeCuda) -> None:
    device = opened(fake)
    address = device.allocate(64)
    fake.fail("kernel", LAUNCH_FAILED)
    device.launch("rms_norm", 1, [address, address, address, bytes(8)])
    with pytest.raises(DeviceError, match="cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED"):
        device.wait()
    for call in calls(device, address).values():
        with pytest.raises(DeviceError):
            call()


def test_a_lost_device_fails_and_is_given_back(fake: FakeCuda) -> None:
    device = opened(fake)
    address = device.allocate(64)
    device.upload(address, b"x")
    device.write(address, b"y")
    fake.lose(GONE)
    for call in calls(device, address).values():
        with pytest.raises(DeviceError, match="an unknown error \\(46\\)"):
            call()
