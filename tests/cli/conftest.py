"""What tests of several commands use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def folder(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model in original weights, and a cache folder of its own for what it becomes."""
    monkeypatch.setenv("EDGEMOE_CACHE", str(tmp_path / "cache"))
    return str(tiny_qwen3_moe())
