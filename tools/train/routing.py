"""Statistics of routing: local consistency, unused experts, and how far domains share their hot experts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _load_metrics() -> Any:
    # By its path: the recipe must not need the package built.
    path = Path(__file__).parents[2] / "edgemoe" / "profiling" / "metrics.py"
    spec = importlib.util.spec_from_file_location("edgemoe_profiling_metrics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


srp = _load_metrics().srp


def shares(picks: NDArray[np.integer], num_experts: int) -> NDArray[np.float64]:
    """Share of the picks ``[tokens, k]`` that fell on each expert, ``[num_experts]``, sum 1."""
    return np.bincount(picks.ravel(), minlength=num_experts) / picks.size


def hot_overlap(first: NDArray[np.float64], second: NDArray[np.float64], fraction: float = 0.25) -> float:
    """Share of the hottest ``fraction`` of experts which two domains have in common, from their shares of picks."""
    hot = max(1, round(fraction * len(first)))
    return len(set(np.argsort(-first)[:hot].tolist()) & set(np.argsort(-second)[:hot].tolist())) / hot
