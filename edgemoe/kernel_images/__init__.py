"""The device kernels as NVIDIA's drivers read them. `tools.gpu_images` makes them of native/gpu."""

from __future__ import annotations

import gzip
from pathlib import Path


def ptx() -> bytes:
    """Of compute capability 7.5 and CUDA 12.0: what every later driver compiles for its GPU."""
    return gzip.decompress(Path(__file__).with_name("kernels.ptx.gz").read_bytes())


def digest() -> str:
    """Of the kernels' text that it was made of."""
    return Path(__file__).with_name("kernels.digest").read_text("ascii").strip()
