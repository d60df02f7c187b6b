"""Threads as many as the process may use processors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os
from pathlib import Path
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import edgemoe
from edgemoe.machine import examine
from edgemoe.processors import usable_processors
with edgemoe.load(memory="2GB") as model:
    print(usable_processors(), model.threads, examine(folder=Path(), measure=False).processors)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity masks")
def test_an_affinity_mask_counts_everywhere() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["1", "1", "1"], "")
