"""How many of the stored levels each expert of a layer keeps, so that the layer's bytes stay within a budget.

The integer programme of Huang et al. (2024, "MC-MoE", arXiv 2410.06270): one level for every expert, the sum of their
errors least, the sum of their bytes bounded. It is solved exactly by dynamic programming over the experts.
Super Experts (Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts Large Language Models") keep every level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Of a super expert's peak: above this percentile of all, and this share of the largest.
_PERCENTILE = 99.5
_SHARE = 0.1
_LAYERS = 0.75


def allocate(
    errors: npt.NDArray[np.float64], sizes: Sequence[int], budget: int, least: Sequence[int] | None = None
) -> list[int]:
    """The level of each expert whose errors [experts, levels] sum to the least.

    sizes: of an expert that ends with a level, ascending; budget: for all experts, in the same unit. least: levels that
    experts must not be below. Of equal sums the one of fewer bytes wins. Raises ValueError if nothing fits.
    """
    experts, levels = errors.shape
    least = [0] * experts if least is None else list(least)
    unit = math.gcd(*sizes)
    costs = [size // unit for size in sizes]
    # Every expert takes at least its least: only what goes beyond it is distributed.
    fixed = sum(costs[level] for level in least)
    room = budget // unit - fixed
    if room < 0:
        raise ValueError(f"the experts take {fixed * unit} bytes at least, more than {budget}")
    room = min(room, sum(costs[-1] - costs[level] for level in least))
    best = np.full(room + 1, np.inf)  # error by what was spent, exactly
    best[0] = 0
    choices = np.zeros((experts, room + 1), np.int8)
    for expert in range(experts):
        following = np.full(room + 1, np.inf)
        for level in range(least[expert], levels):
            extra = costs[level] - costs[least[expert]]
            if extra > room:
                break
            reached = best[: room + 1 - extra] + errors[expert, level]
            better = reached < following[extra:]
            following[extra:][better] = reached[better]
            choices[expert, extra:][better] = level
        best = following
    spent = int(np.argmin(best))
    chosen = []
    for expert in reversed(range(experts)):
        level = int(choices[expert, spent])
        chosen.append(level)
        spent -= costs[level] - costs[least[expert]]
    return chosen[::-1]


def super_experts(peaks: Sequence[npt.NDArray[np.float64] | None]) -> set[tuple[int, int]]:
    """(layer, expert) of the experts whose outputs have extreme magnitudes.

    peaks: per layer the largest magnitude in each expert's output [experts], None for a layer without experts. They
    are those above the 99.5th percentile of all and above a tenth of the largest, in the first three quarters of the
    layers (section 3 of the paper).
    """
    known = [values for values in peaks if values is not None]
    if not known:
        return set()
    everything = np.concatenate(known)
    bound = max(float(np.percentile(everything, _PERCENTILE)), _SHARE * float(everything.max()))
    return {
        (layer, int(expert))
        for layer, values in enumerate(peaks[: round(_LAYERS * len(peaks))])
        if values is not None
        for expert in np.flatnonzero(values > bound)
    }
