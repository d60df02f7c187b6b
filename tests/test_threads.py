"""Threads that the system does not give: an error that says so, and a process that goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgemoe.convert import convert

# A thread takes address space for its stack, so that with a limit on it only some of so many can be started.
LIMITED = """
import resource
import sys

import numpy as np

import edgemoe
from edgemoe._core import profiling
from edgemoe.errors import ThreadError


def load(threads, readers=2):
    return edgemoe.load(sys.argv[1], threads=threads, readers=readers)


def refused(asked, start):
    try:
        start()
    except ThreadError as error:
        assert f"of {asked} threads" in str(error) and "ask for fewer" in str(error), error
    else:
        raise AssertionError(f"{asked} threads were started")


with load(1) as model:
    expected = model.logits([1, 2, 3])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
pools = profiling.Pools(np.ones(4, np.int64), np.ones(1000, np.int64), 1)
zero = np.zeros(1, np.int32)
for _ in range(3):
    refused(1000, lambda: load(1000))
    refused(1000, lambda: load(1, 1000))
    refused(1000, lambda: profiling.memory_read_speed(4096, 1000, 0.001))
    refused(256, lambda: profiling.disk_read_speed(sys.argv[1], 4096, 256, 0.001, 4096))
    refused(1000, lambda: pools.request(zero, np.array([0, 1]), zero, 1000))
pools.request(zero, np.array([0, 1]), zero, 2)
with load(2) as model:
    assert np.array_equal(model.logits([1, 2, 3]), expected)
print("usable")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on address space binds on Linux")
def test_threads_that_cannot_be_started(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "tiny.emoe"
    convert(tiny_qwen3_moe(), path, 8)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "usable\n"), done.stderr
