"""What a layer's experts multiply, and the Hessians that follow from it.

The Hessian of an expert's matrix is that of the squared error of its output weighted by the router: H = sum over the
tokens it works on of c x x^T, c the weight the router gives it (Chen et al. 2025, "MoEQuant", affinity-guided
quantization, arXiv 2505.03804). For gate and up x is the layer's normed input, for down the expert's own hidden
activation. An expert that few tokens chose borrows from the layer: its H / sum(c) is mixed with the mean over all
experts in proportion to how many tokens it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgemoe.engine import LayerRecord
from edgemoe.errors import OptionError
from edgemoe.quantize.layerwise import temporary_array
from edgemoe.spec import LayerSpec
from edgemoe.text.perplexity import read_tokens
from edgemoe.text.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]

SHIPPED = Path(__file__).parent / "texts" / "calibration.txt"
HELD_OUT = Path(__file__).parent / "texts" / "held_out.txt"
WINDOW = 512
"""Tokens of a sequence, or what the model was made for."""

# The layer's mean counts as a tenth as many tokens as the matrix has columns.
_BORROWED = 0.1
# Tokens whose products are summed at once.
_TOKENS = 2048


def windows(tokenizer: Tokenizer, text: Path, window: int, limit: int) -> npt.NDArray[np.int32]:
    """The first `limit` tokens of a text, at least, as sequences: int32 [windows, window].

    Each begins with the token that begins a text, if the model has one. Raises OptionError for a text that is shorter
    than a window.
    """
    ids: list[int] = []
    wanted = -(-limit // window) * window
    for token in read_tokens(tokenizer, text):
        ids.append(token)
        if len(ids) == wanted:
            break
    if len(ids) < window:
        raise OptionError(f"{text}: {len(ids)} tokens, fewer than one window of {window}")
    cut = np.array(ids[: len(ids) // window * window], np.int32).reshape(-1, window)
    if tokenizer.begin_ids:
        cut[:, 0] = tokenizer.begin_ids[0]
    return cut


@dataclass(slots=True)
class Statistics:
    """What the experts of a layer saw of `tokens` tokens.

    inputs [tokens, hidden], picks, weights, energies and peaks [tokens, top_k], hidden [tokens, top_k, ffn]: as
    `Engine.forward_layer` hands them out, in temporary files.
    """

    inputs: Floats
    hidden: Floats
    picks: npt.NDArray[np.int32]
    weights: Floats
    energies: Floats
    peaks: Floats

    @classmethod
    def empty(cls, layer: LayerSpec, hidden_size: int, tokens: int, work: Path) -> Statistics:
        pairs = (tokens, layer.top_k)
        return cls(
            temporary_array(work, (tokens, hidden_size), np.float32),
            temporary_array(work, (*pairs, layer.ffn_dim), np.float32),
            np.zeros(pairs, np.int32),
            *(np.zeros(pairs, np.float32) for _ in range(3)),
        )

    def observe(self, place: slice, seen: LayerRecord) -> None:
        """Takes what one window's tokens gave; what is beyond `tokens` is not looked at."""
        if place.start < len(self.picks):
            for name in self.__slots__:
                getattr(self, name)[place] = getattr(seen, name)

    def expert(self, number: int) -> ExpertStatistics:
        return ExpertStatistics(self, *np.nonzero(self.picks == number))

    def all_experts(self) -> ExpertStatistics:
        return ExpertStatistics(self, *(part.ravel() for part in np.indices(self.picks.shape)))


@dataclass(slots=True)
class ExpertStatistics:
    """The (token, pick) pairs of an expert, or of all."""

    layer: Statistics
    tokens: npt.NDArray[np.intp]
    picks: npt.NDArray[np.intp]

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """The router's, float64 [pairs]."""
        return np.abs(self.layer.weights[self.tokens, self.picks]).astype(np.float64)

    @property
    def effective_tokens(self) -> float:
        """How many tokens of equal weight would say as much."""
        weights = self.weights
        squares = float((weights * weights).sum())
        return float(weights.sum()) ** 2 / squares if squares > 0 else 0.0

    @property
    def output_energy(self) -> float:
        """Sum over its tokens of the squared length of what it adds to the residual stream."""
        energies = self.layer.energies[self.tokens, self.picks].astype(np.float64)
        return float((self.weights**2 * energies).sum())

    @property
    def peak(self) -> float:
        """The largest magnitude in its outputs."""
        return float(self.layer.peaks[self.tokens, self.picks].max(initial=0))

    def hessian(self, part: str) -> Floats:
        """sum(c x x^T) / sum(c), float32 [columns, columns]; part: "inputs" or "hidden". Zero for an unused expert."""
        values: Floats = getattr(self.layer, part)
        total = np.zeros((values.shape[-1],) * 2, np.float32)
        weights = self.weights
        places: tuple[npt.NDArray[np.intp], ...] = (self.tokens, self.picks)
        if part == "inputs":  # one for all experts of a token
            of_tokens: npt.NDArray[np.float64] = np.bincount(self.tokens, weights).astype(np.float64, copy=False)
            places = np.nonzero(of_tokens)
            weights = of_tokens[places]
        roots = np.sqrt(weights / max(weights.sum(), 1e-30)).astype(np.float32)
        for begin in range(0, len(roots), _TOKENS):
            pairs = slice(begin, begin + _TOKENS)
            rows = values[tuple(place[pairs] for place in places)] * roots[pairs, None]
            total += rows.T @ rows
        return total

    def mixed_hessian(self, part: str, mean: Floats) -> Floats:
        """`hessian`, mixed with the layer's."""
        own = self.effective_tokens
        share = np.float32(own / (own + _BORROWED * len(mean)))
        return share * self.hessian(part) + (1 - share) * mean
