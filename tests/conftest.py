"""Fixtures that several test files use."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import byte_level_tokenizer, write_tiny_qwen3_moe

from edgemoe import devices


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Child processes start in an empty folder: in the checkout they would import its sources, not what was built."""
    begin = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(begin)


@pytest.fixture(scope="session", autouse=True)
def no_gpu() -> Iterator[None]:
    """Models are loaded as on machines without a GPU, here or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "CUDA_LIBRARY", "/nowhere/libcuda.so.1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of child processes
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> bytes:
    """tokenizer.json of a byte-level BPE with 320 entries."""
    return byte_level_tokenizer()


@pytest.fixture
def tiny_qwen3_moe(tmp_path: Path, tiny_tokenizer: bytes) -> Callable[..., Path]:
    """Makes folders of a tiny random Qwen3-MoE: tiny_qwen3_moe(dtype="F32", shards=2, num_experts=8, ...).

    The options are those of `helpers.write_tiny_qwen3_moe`; every call makes a new folder.
    """
    numbers = itertools.count()

    def make(**options: Any) -> Path:
        return write_tiny_qwen3_moe(tmp_path / f"tiny-{next(numbers)}", **{"tokenizer": tiny_tokenizer, **options})

    return make
