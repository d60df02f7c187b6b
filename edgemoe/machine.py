"""What this machine can do: instruction sets, memory, memory and disk bandwidth, and what stands in the way."""

from __future__ import annotations

import errno
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from edgemoe import _core
from edgemoe.device_check import copy_bandwidth, host_exchange, threads, wrong_kernels
from edgemoe.devices import OpenDevice, open_device
from edgemoe.errors import DeviceError, NoDeviceError
from edgemoe.memory import cgroup_headroom, format_size
from edgemoe.processors import usable_processors

BLOCK_SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)  # bytes of a read
DEPTHS = (1, 2, 4, 8)  # reads under way at once
TEST_FILE = 256 << 20  # bytes of the temporary file, less where the disk is short of room
_LEAST_FILE = 16 << 20
_SECONDS = 0.25  # of one measurement
DEVICE_BYTES = 64 << 20  # of a copy

OK, NOTE, PROBLEM = "ok", "note", "problem"

Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. state: "ok", "note" (works, but slower than it could) or "problem" (must be mended)."""

    topic: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    block: int  # bytes of a read
    depth: int  # reads under way at once
    bytes_per_second: float


@dataclass(slots=True)
class DeviceReport:
    """A device beside the processor. Sizes in bytes, speeds in bytes per second; None where it was not measured.

    kind: "cuda" or "emulated". unified: its memory is the processor's. bandwidth: of a copy within its memory, what is
    read and what is written together. upload, pinned_upload: from the host's memory, as it is and page-locked.
    round_trip: seconds of a few bytes there and back. kernels: that there are; wrong: those that compute anything else
    than they should.
    """

    kind: str
    name: str
    driver: str
    memory: int
    available: int
    unified: bool
    bandwidth: float | None = None
    upload: float | None = None
    pinned_upload: float | None = None
    round_trip: float | None = None
    kernels: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Machine:
    """Everything `examine` found. Bandwidths in bytes per second; None where it was not measured or does not apply.

    memory_bandwidth: by number of threads. memory_headroom: what this process may still take (the system's free memory,
    or less in a memory cgroup). direct: direct reads are taken by the filesystem; bypasses_cache: and leave no page
    cache behind (None: cannot be told).
    """

    system: str
    processors: int
    isas: list[str]
    isa: str
    memory_total: int
    memory_headroom: int
    memory_limited: bool
    memory_bandwidth: dict[int, float] = field(default_factory=dict)
    cache_folder: str = ""
    filesystem: str = ""
    free_space: int | None = None
    direct: bool | None = None
    bypasses_cache: bool | None = None
    read_ahead: int | None = None
    rotational: bool | None = None
    disk: list[DiskSpeed] = field(default_factory=list)
    device: DeviceReport | None = None
    build: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return all(finding.state != PROBLEM for finding in self.findings)

    @property
    def best_disk(self) -> DiskSpeed | None:
        return max(self.disk, key=lambda speed: speed.bytes_per_second, default=None)


def examine(
    folder: Path,
    *,
    measure: bool = True,
    announce: Announce | None = None,
    gpu: str = "none",
    cache: Path | None = None,
) -> Machine:
    """Looks at the machine; takes a few seconds where it measures, and leaves nothing behind but what it found of a
    device's kernels, which loading a model wants to know.

    folder: where models lie. measure: bandwidths too. announce: gets what is done next. gpu: as in LoadOptions, a
    device that is looked at, too; its kernels are checked. cache: where that is kept, `folder` if it is left out.
    """
    say = announce or (lambda _: None)
    machine = _processor()
    _memory(machine)
    machine.cache_folder = str(folder)
    usable = _cache_folder(machine, folder)
    if measure:
        say("measuring memory")
        _memory_bandwidth(machine)
        if usable:
            say(f"measuring the disk under {folder}")
            _disk(machine, folder)
    if gpu != "none":
        _device(machine, gpu, measure, say, cache or folder)
    return machine


def _processor() -> Machine:
    isas = [str(name) for name in _core.kernels.available_isas()]
    wanted = os.environ.get("EDGEMOE_ISA", "")
    machine = Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processors=usable_processors(),
        isas=isas,
        isa=wanted or isas[-1],
        memory_total=0,
        memory_headroom=0,
        memory_limited=False,
        build={"edgemoe": _core.__version__, "python": platform.python_version()},
    )
    add = machine.findings.append
    if wanted and wanted not in isas:
        add(
            Finding(
                "processor",
                PROBLEM,
                f"EDGEMOE_ISA={wanted} is not available here ({', '.join(isas)})",
                "unset EDGEMOE_ISA",
            )
        )
    elif machine.isa == "scalar":
        remedy = "unset EDGEMOE_ISA" if wanted else "a processor with AVX2 is many times faster"
        add(Finding("processor", NOTE, f"{machine.processors} processors, no vector instructions in use", remedy))
    else:
        add(Finding("processor", OK, f"{machine.processors} processors, {machine.isa}"))
    return machine


def _memory(machine: Machine) -> None:
    memory = psutil.virtual_memory()
    headroom = cgroup_headroom()
    machine.memory_total = int(memory.total)
    machine.memory_limited = headroom is not None and headroom < memory.available
    machine.memory_headroom = int(memory.available if headroom is None else min(headroom, memory.available))
    text = f"{format_size(machine.memory_headroom)} free of {format_size(machine.memory_total)}"
    if machine.memory_limited:
        text += ", held down by a memory cgroup"
    if machine.memory_headroom < 500_000_000:
        remedy = "raise the cgroup's limit" if machine.memory_limited else "close other programs"
        machine.findings.append(Finding("memory", PROBLEM, f"only {text}", remedy))
    else:
        machine.findings.append(Finding("memory", OK, text))
    swap = psutil.swap_memory()
    if swap.used > machine.memory_total // 20:
        machine.findings.append(
            Finding(
                "memory",
                NOTE,
                f"{format_size(swap.used)} of swap in use: the system is short of memory already",
                "close other programs, or give a smaller --memory",
            )
        )


def _memory_bandwidth(machine: Machine) -> None:
    size = min(256 << 20, machine.memory_headroom // 4)
    if size < 8 << 20:
        return
    threads = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < machine.processors] + [machine.processors]
    for count in threads:
        done, seconds = _core.profiling.memory_read_speed(size, count, _SECONDS)
        machine.memory_bandwidth[count] = done / seconds
    best = max(machine.memory_bandwidth.items(), key=lambda item: item[1])
    machine.findings.append(
        Finding("memory speed", OK, f"{best[1] / 1e9:.1f} GB/s with {best[0]} thread{'s' if best[0] > 1 else ''}")
    )


def _device(machine: Machine, gpu: str, measure: bool, say: Announce, cache: Path) -> None:
    add = machine.findings.append
    try:
        # By its name, so that it is said what is missing.
        device = open_device("cuda" if gpu == "auto" else gpu)
        assert device is not None
    except DeviceError as error:
        cause = error.__cause__ or error
        absent = gpu == "auto" and isinstance(error, NoDeviceError)
        add(Finding("gpu", NOTE if absent else PROBLEM, str(cause), "" if absent else "--gpu none computes without it"))
        return
    found = DeviceReport(
        device.kind, device.name, device.driver, device.memory, device.available, device.unified, kernels=len(threads())
    )
    machine.device = found
    driver = f", driver of {device.driver}" if device.driver else ""
    free = f"{format_size(device.available)} free of {format_size(device.memory)}"
    add(Finding("gpu", OK, f"{device.name}{driver}, {free}{', shared with the processor' if device.unified else ''}"))
    try:
        say("checking the GPU's kernels")
        found.wrong = wrong_kernels(device, cache, anew=True)
        _kernels(machine, found)
        if measure:
            say("measuring the GPU")
            _device_speed(machine, device, found)
    except DeviceError as error:
        add(Finding("gpu", PROBLEM, f"it failed: {error}", "--gpu none computes without it"))


def _kernels(machine: Machine, found: DeviceReport) -> None:
    right = f"{found.kernels - len(found.wrong)} of {found.kernels} kernels give the processor's bits"
    if found.wrong:
        text = f"{right}, but not {', '.join(found.wrong)}"
        machine.findings.append(Finding("gpu kernels", PROBLEM, text, "--gpu none computes without it"))
    else:
        machine.findings.append(Finding("gpu kernels", OK, right))


def _device_speed(machine: Machine, device: OpenDevice, found: DeviceReport) -> None:
    size = min(DEVICE_BYTES, device.available // 4)
    found.bandwidth = copy_bandwidth(device.core, size, _SECONDS)
    exchange = host_exchange(device.core, size, _SECONDS)
    found.round_trip = exchange["round_trip_seconds"]
    found.upload, found.pinned_upload = (
        exchange.get(f"{name}_bytes_per_second") for name in ("upload", "pinned_upload")
    )
    link = f"{(found.pinned_upload or found.upload or 0) / 1e9:.1f} GB/s"
    text = f"memory {found.bandwidth / 1e9:.0f} GB/s, link {link}, {found.round_trip * 1e6:.0f} us there and back"
    machine.findings.append(Finding("gpu speed", OK, text))


def _cache_folder(machine: Machine, folder: Path) -> bool:
    add = machine.findings.append
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        machine.free_space = psutil.disk_usage(str(folder)).free
    except OSError as error:
        add(
            Finding(
                "cache folder",
                PROBLEM,
                f"{folder} cannot be written: {error.strerror or error}",
                "set EDGEMOE_CACHE to a folder that can",
            )
        )
        return False
    machine.filesystem = _filesystem(folder)
    text = f"{folder} ({machine.filesystem or 'unknown filesystem'}), {format_size(machine.free_space)} free"
    if machine.free_space < 5_000_000_000:
        add(Finding("cache folder", NOTE, text, "free some space, or set EDGEMOE_CACHE to a larger disk"))
    else:
        add(Finding("cache folder", OK, text))
    if machine.filesystem in ("tmpfs", "ramfs"):
        add(
            Finding(
                "cache folder",
                NOTE,
                f"{folder} is kept in memory: models there take the memory that they are to save",
                "set EDGEMOE_CACHE to a folder on a disk",
            )
        )
    machine.read_ahead, machine.rotational = _block_device(folder)
    return True


def _filesystem(folder: Path) -> str:
    try:
        place = folder.resolve()
        mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    except (OSError, ValueError):
        return ""
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def _block_device(folder: Path) -> tuple[int | None, bool | None]:
    """(read-ahead in bytes, whether it turns) of the disk under a folder; None where the system does not say."""
    try:
        device = folder.stat().st_dev
        node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve(strict=True)
    except OSError:
        return None, None
    for place in (node, node.parent):  # a partition's queue is its disk's
        try:
            ahead = int((place / "queue" / "read_ahead_kb").read_text()) << 10
            return ahead, (place / "queue" / "rotational").read_text().strip() == "1"
        except (OSError, ValueError):
            continue
    return None, None


def _disk(machine: Machine, folder: Path) -> None:
    add = machine.findings.append
    size = min(TEST_FILE, (machine.free_space or 0) // 8) >> 20 << 20
    if size < _LEAST_FILE:
        add(Finding("disk speed", NOTE, "not measured: too little free space", "free some space in the cache folder"))
        return
    try:
        with _test_file(folder, size) as file:
            machine.direct = bool(_core.profiling.reads_directly(str(file)))
            machine.bypasses_cache = _bypasses_cache(file) if machine.direct else False
            for block in BLOCK_SIZES:
                for depth in DEPTHS:
                    done, seconds = _core.profiling.disk_read_speed(str(file), block, depth, _SECONDS, 4 * size)
                    machine.disk.append(DiskSpeed(block, depth, done / seconds))
    except (OSError, RuntimeError) as error:
        add(Finding("disk speed", PROBLEM, f"{folder}: {error}", "check the disk, or set EDGEMOE_CACHE to another one"))
        return
    if not machine.direct:
        add(
            Finding(
                "direct reads",
                NOTE,
                f"{machine.filesystem or 'the filesystem'} refuses them: reads go through the page cache",
                "keep models on a filesystem such as ext4, xfs, btrfs or apfs",
            )
        )
    elif machine.bypasses_cache is False:
        add(
            Finding(
                "direct reads",
                NOTE,
                "taken, but what is read stays in the page cache",
                "keep models on a local disk; a virtual or network filesystem caches on its own",
            )
        )
    else:
        add(Finding("direct reads", OK, "taken, and they leave no page cache behind"))
    best = machine.best_disk
    assert best is not None
    text = (
        f"{best.bytes_per_second / 1e9:.2f} GB/s in blocks of {best.block >> 10} KiB, {best.depth} at a time "
        "(random places of a fresh file)"
    )
    if best.bytes_per_second < 200e6:
        add(Finding("disk speed", NOTE, text, "keep models on an NVMe disk"))
    else:
        add(Finding("disk speed", OK, text))
    # Virtual disks often claim to turn; one that does is slow in small pieces.
    if machine.rotational and machine.disk[0].bytes_per_second < 30e6:
        add(Finding("disk", NOTE, "the disk turns: every missing expert costs a seek", "keep models on an SSD"))


@contextmanager
def _test_file(folder: Path, size: int) -> Iterator[Path]:
    """A file of random bytes on the disk (not only in its cache), gone afterwards."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor-", suffix=".tmp") as stream:
        chunk = os.urandom(1 << 20)
        for number in range(size >> 20):
            # No two megabytes alike, in case the disk looks for what it has already.
            stream.write(number.to_bytes(8, "little") + chunk[8:])
        stream.flush()
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(stream.name)


def _bypasses_cache(file: Path) -> bool | None:
    """Whether a direct read of the file leaves it out of the page cache."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    block = 1 << 20
    _core.profiling.disk_read_speed(str(file), block, 1, 0.05, 16 << 20)
    with file.open("rb") as stream:
        cached = 0
        for place in range(0, file.stat().st_size, 16 * block):
            try:
                # Gives what is in the page cache, and an error instead of waiting for the disk.
                cached += os.preadv(stream.fileno(), [bytearray(4096)], place, os.RWF_NOWAIT) > 0
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK):
                    return None
    return cached == 0
