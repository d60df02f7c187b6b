"""What benchmarks say about the machine and the peer they ran with."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgemoe.processors import usable_processors


def machine() -> dict[str, Any]:
    """What the results depend on."""
    model = next((line.split(":")[1].strip() for line in read("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((int(line.split()[1]) * 1024 for line in read("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "processor": model or platform.processor(),
        "processors": usable_processors(),
        "memory": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def read(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def peer_version(python: str | None) -> str | None:
    """The version of xllamacpp in that interpreter; None without one."""
    if not python:
        return None
    code = "import xllamacpp, importlib.metadata as m; print(m.version('xllamacpp'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
