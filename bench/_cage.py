"""Runs a process in a memory cgroup of an exact size, with swap off; cgroup v1 and v2."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Charge:
    """What a cage was charged. peak: bytes. failures: how often a charge met the limit (for page cache that is no harm:
    some of it is dropped); kills: processes that were killed for it. None where the system does not tell."""

    peak: int | None
    failures: int | None
    kills: int | None


class Cage:
    """A memory cgroup; a context manager. Use `Cage.create`."""

    def __init__(self, folder: Path, version: int, limit: int | None) -> None:
        self.folder = folder
        self.version = version
        self.limit = limit

    @classmethod
    def create(cls, limit: int | None) -> Cage:
        """limit: bytes; None for a group that only counts. Raises OSError without the rights."""
        base, version = _place()
        folder = base / f"edgemoe-bench-{os.getpid()}-{time.monotonic_ns()}"
        if version == 2 and base == _ROOT:
            with contextlib.suppress(OSError):
                (base / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        cage = cls(folder, version, limit)
        try:
            if version == 1:
                cage._write("memory.swappiness", 0)
            elif (folder / "memory.swap.max").exists():
                cage._write("memory.swap.max", 0)
            if limit is not None:
                cage._write("memory.limit_in_bytes" if version == 1 else "memory.max", limit)
            cage.charge()
        except OSError:
            folder.rmdir()
            raise
        return cage

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` within: a shell enters the group and becomes it."""
        return ["/bin/sh", "-c", f'echo $$ > "{self.folder / "cgroup.procs"}" && exec "$@"', "sh", *command]

    def charge(self) -> Charge:
        if self.version == 1:
            control = dict(line.split() for line in self._read("memory.oom_control").splitlines())
            kills = int(control["oom_kill"]) if "oom_kill" in control else None
            return Charge(int(self._read("memory.max_usage_in_bytes")), int(self._read("memory.failcnt")), kills)
        events = dict(line.split() for line in self._read("memory.events").splitlines())
        peak = int(self._read("memory.peak")) if (self.folder / "memory.peak").exists() else None
        return Charge(peak, int(events["max"]), int(events["oom_kill"]))

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text().strip()

    def __enter__(self) -> Cage:
        return self

    def __exit__(self, *_: object) -> None:
        if self.version == 1:  # what is left of the page cache would be charged to the parent
            with contextlib.suppress(OSError):
                self._write("memory.force_empty", 0)
        for _attempt in range(50):  # a process that has just ended may still be counted
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)
        print(f"{self.folder} could not be removed", file=sys.stderr)


def _place() -> tuple[Path, int]:
    """The folder in which a cage is made, and the version. Raises OSError where there is no memory controller."""
    if (_ROOT / "memory" / "memory.limit_in_bytes").exists():
        return _ROOT / "memory", 1
    if "memory" in (_ROOT / "cgroup.controllers").read_text().split():
        return _ROOT, 2
    raise OSError(f"{_ROOT}: no memory controller")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a child reported (its last line, JSON), or None and why; charge: None outside of a cage."""

    report: dict[str, Any] | None
    error: str
    charge: Charge | None


def run(
    command: Sequence[str], limit: int | None, *, caged: bool, environment: Mapping[str, str], timeout: float = 7200
) -> Outcome:
    """Runs a child that prints one line of JSON; limit: bytes, None for a cage that only counts."""

    def execute(line: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
        try:
            done = subprocess.run(line, capture_output=True, text=True, env=dict(environment), timeout=timeout)
        except subprocess.TimeoutExpired:
            return None, f"took more than {timeout:.0f} s"
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            telling = [line for line in lines if "error" in line.lower()][:1] or lines[-1:] or [""]
            why = "killed" if done.returncode == -9 else f"exit code {done.returncode}"
            return None, f"{why} {telling[0]}".strip()
        try:
            return json.loads(done.stdout.strip().splitlines()[-1]), ""
        except (ValueError, IndexError):
            return None, f"no report: {done.stdout[-200:]!r} {done.stderr[-200:]!r}"

    if not caged:
        return Outcome(*execute(command), None)
    with Cage.create(limit) as cage:
        report, error = execute(cage.command(command))
        return Outcome(report, error, cage.charge())


@contextlib.contextmanager
def readahead(path: Path, kilobytes: int) -> Iterator[str]:
    """Sets the read-ahead of the device that holds `path`, and restores it. Yields what was done, in words."""
    device = path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    places = [Path(f"/sys/class/bdi/{name}/read_ahead_kb"), Path(f"/sys/dev/block/{name}/bdi/read_ahead_kb")]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        yield "the device's read-ahead is not known"
        return
    before = place.read_text().strip()
    try:
        place.write_text(str(kilobytes))
    except OSError as error:
        yield f"read-ahead {before} kB (it could not be set to {kilobytes}: {error.strerror})"
        return
    try:
        yield f"read-ahead {kilobytes} kB (the system's: {before} kB)"
    finally:
        place.write_text(before)


def drop_cache(path: Path) -> None:
    """Takes the file out of the page cache: what a cage's process reads of it is then charged to the cage."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
