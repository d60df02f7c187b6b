"""Perplexity by llama-perplexity's method, so that the figures compare.

The text's tokens are cut into chunks of the context's size. Each chunk is evaluated on its own; its first half is
context only, and each token of the second half counts with the probability the model gave it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import OptionError
from edgemoe.text.tokenizer import Tokenizer, split_text

# (tokens, first) -> float32 [len(tokens) - first, vocab]: the logits after token `first` and each later one.
Forward = Callable[[Sequence[int], int], NDArray[np.float32]]

# Rows whose probabilities are computed together, in float64.
_ROWS = 16


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is known after some chunks.

    chunks: evaluated; tokens: scored. total, total_squares: sums of the negative log-likelihoods (in nats), and of
    their squares.
    """

    chunks: int = 0
    tokens: int = 0
    total: float = 0.0
    total_squares: float = 0.0

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.total / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def error(self) -> float:
        """The standard error of the perplexity, tokens taken as independent; NaN for fewer than two."""
        if self.tokens < 2:
            return math.nan
        mean = self.total / self.tokens
        variance = max(self.total_squares / self.tokens - mean * mean, 0.0)
        return self.perplexity * math.sqrt(variance / (self.tokens - 1))


def perplexity(
    tokens: Iterable[int], forward: Forward, context: int, bos: int | None = None, chunks: int | None = None
) -> Iterator[Estimate]:
    """Yields the estimate after each chunk.

    tokens: of the text, its begin-of-text token included if the model adds one; taken as needed, never all at once.
    context: tokens in a chunk. bos: the token that then stands first in every chunk, in place of the text's own.
    chunks: at most so many. An incomplete last chunk does not count. Raises OptionError without a complete one.
    """
    if context < 4:
        raise OptionError(f"a context of {context} tokens is too short for a perplexity: 4 is the least")
    first = context // 2
    estimate = Estimate()
    chunk: list[int] = []
    for token in tokens:
        chunk.append(token)
        if len(chunk) < context:
            continue
        inputs = chunk if bos is None else [bos, *chunk[1:]]
        losses = negative_log_likelihoods(forward(inputs, first)[:-1], chunk[first + 1 :])
        estimate = Estimate(
            estimate.chunks + 1,
            estimate.tokens + len(losses),
            estimate.total + math.fsum(losses),
            estimate.total_squares + math.fsum(losses * losses),
        )
        yield estimate
        if estimate.chunks == chunks:
            return
        chunk = []
    if not estimate.chunks:
        raise OptionError(f"the text has {len(chunk)} tokens, fewer than one chunk of {context}: a smaller -c would do")


def negative_log_likelihoods(logits: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """float64 [n], in nats: minus the logarithm of the probability that logits [n, vocab] give to each target."""
    losses = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):  # a few rows at a time: they are large
        rows = np.asarray(logits[start : start + _ROWS], dtype=np.float64)
        peak = rows.max(axis=1)
        chosen = rows[np.arange(len(rows)), targets[start : start + _ROWS]]
        losses[start : start + _ROWS] = np.log(np.exp(rows - peak[:, None]).sum(axis=1)) + peak - chosen
    return losses


def read_tokens(tokenizer: Tokenizer, path: str | Path, on_read: Callable[[int], None] | None = None) -> Iterator[int]:
    """The tokens of a UTF-8 file, of any length in the same memory: those that llama-perplexity scores, with the
    tokens that begin a text, special tokens that the text spells taken as text, and without its last line end.

    `on_read` gets the number of bytes read so far. Raises OptionError for a file that is empty or no UTF-8, OSError
    where it cannot be read.
    """
    done = 0

    def counted(pieces: Iterable[str]) -> Iterator[str]:
        nonlocal done
        for piece in pieces:
            yield piece
            done += len(piece.encode())  # when the next one is asked for
            if on_read:
                on_read(done)

    for ids in tokenizer.encode_pieces(counted(_pieces(Path(path))), add_special=True, parse_special=False):
        yield from ids


def _pieces(path: Path) -> Iterator[str]:
    """`split_text` of a file without its last line end."""
    # newline="": a carriage return is part of the text, as llama.cpp reads it.
    with path.open(encoding="utf-8", newline="") as file:
        pieces = split_text(file.read)
        try:
            held = next(pieces)
            for piece in pieces:
                yield held
                held = piece
        except UnicodeDecodeError as error:
            wrong = error.object[error.start]
            raise OptionError(f"{path}: not UTF-8 text: {error.reason} (byte {wrong:#x})") from None
    held = held.removesuffix("\n")
    if held:
        yield held
    else:
        raise OptionError(f"{path}: the file is empty")
