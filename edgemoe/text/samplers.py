"""The steps between logits and a draw. Each takes the candidates that are left and leaves fewer, or other logits; what
each does is llama.cpp's, so that its options mean here what they mean there."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import OptionError

if TYPE_CHECKING:
    from edgemoe.text.tokenizer import Tokenizer

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]

# Going through a vocabulary takes a while, so each tokenizer's breakers are found once.
_breakers: weakref.WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], dict[int, set[tuple[int, ...]]]]]
_breakers = weakref.WeakKeyDictionary()


class Candidates:
    """Tokens that may come next.

    tokens: int64 [n], or None for the whole vocabulary, where token i has index i.
    logits: float32 or float64 [n], none of them NaN, at least one of them finite; never written to.
    sorted: whether the likeliest comes first.
    """

    def __init__(self, tokens: Indices | None, logits: Floats, is_sorted: bool = False) -> None:
        self.tokens, self.logits, self.sorted = tokens, logits, is_sorted

    def __len__(self) -> int:
        return len(self.logits)

    def keep(self, chosen: Indices, is_sorted: bool) -> Candidates:
        """The candidates at these indices, in this order."""
        tokens = chosen if self.tokens is None else self.tokens[chosen]
        return Candidates(tokens, self.logits[chosen], is_sorted)

    def changed(self, tokens: Indices, change: Callable[[Floats, Indices], Floats]) -> Candidates:
        """With other logits for those of `tokens` (ascending, each once) that are still candidates: `change` gets
        their logits and their indices in `tokens`. Raises OptionError where none is left that may come."""
        if self.tokens is None:
            at, which = tokens, np.arange(len(tokens))
        else:
            place = np.searchsorted(tokens, self.tokens)
            at = np.flatnonzero(tokens[np.minimum(place, len(tokens) - 1)] == self.tokens)
            which = place[at]
        logits = self.logits.copy()
        with np.errstate(all="ignore"):
            logits[at] = change(logits[at], which)
        if not (np.all(logits[at] < np.inf) and np.any(logits > -np.inf)):  # NaN is neither
            raise OptionError("penalties of this size leave no logit that is a number")
        return Candidates(self.tokens, logits)

    def weights(self) -> NDArray[np.float64]:
        """float64 [n], in proportion to the probabilities; the likeliest token's is 1."""
        logits = self.logits.astype(np.float64)
        result: NDArray[np.float64] = np.exp(logits - logits.max())
        return result


def temperature(candidates: Candidates, value: float) -> Candidates:
    """Divides the logits; at 0 and below only the likeliest token stays, the lowest id among equals."""
    if value <= 0:
        best = np.flatnonzero(candidates.logits == candidates.logits.max())
        if candidates.tokens is not None:
            best = best[np.argmin(candidates.tokens[best]), None]
        return candidates.keep(best[:1], True)
    logits = candidates.logits.astype(np.float64)
    with np.errstate(over="ignore"):
        scaled = logits / value
        if not np.isfinite(scaled.max()):  # next to zero: only differences fit into a number
            scaled = (logits - logits.max()) / value
    return Candidates(candidates.tokens, scaled, candidates.sorted)


def top_k(candidates: Candidates, count: int) -> Candidates:
    """The `count` likeliest; all for 0 and below."""
    if count <= 0 or (candidates.sorted and count >= len(candidates)):
        return candidates
    chosen = np.arange(count) if candidates.sorted else largest(candidates.logits, min(count, len(candidates)))
    return candidates.keep(chosen, True)


def top_p(candidates: Candidates, share: float) -> Candidates:
    """The likeliest that reach this probability together."""
    if share >= 1:
        return candidates
    weights = candidates.weights()
    total, size = weights.sum(), len(candidates)
    if candidates.sorted:
        return candidates.keep(np.arange(min(_reaches(weights, share * total), size)), True)
    # Most of a vocabulary is unlikely: sort more of it only while needed.
    count = min(256, size)
    while True:
        order = largest(candidates.logits, count)
        needed = _reaches(weights[order], share * total)
        if needed <= count or count == size:
            return candidates.keep(order[:needed], True)
        count = min(16 * count, size)


def _reaches(weights: NDArray[np.float64], goal: float) -> int:
    """How many weights from the first on reach the goal together; one more than there are if all do not."""
    return int(np.searchsorted(np.cumsum(weights), goal)) + 1


def min_p(candidates: Candidates, share: float) -> Candidates:
    """Those at least this many times as likely as the likeliest one, which always stays."""
    if share <= 0:
        return candidates
    # As a bound on the logits, in their precision.
    floor = candidates.logits.dtype.type(float(candidates.logits.max()) + math.log(share))
    return candidates.keep(np.flatnonzero(candidates.logits >= floor), candidates.sorted)


def top_n_sigma(candidates: Candidates, count: float) -> Candidates:
    """Those whose logit is at most so many standard deviations (of all finite logits) below the largest."""
    if count <= 0 or len(candidates) < 2:
        return candidates
    logits = candidates.logits.astype(np.float64)
    with np.errstate(over="ignore"):
        deviation = float(np.std(logits[logits > -np.inf]))
    return candidates.keep(np.flatnonzero(logits >= logits.max() - count * deviation), candidates.sorted)


def typical_p(candidates: Candidates, share: float) -> Candidates:
    """Locally typical sampling: those whose surprise is nearest to the expected one (the entropy), until they are
    more likely together than `share`."""
    if share >= 1:
        return candidates
    candidates = candidates.keep(np.flatnonzero(candidates.logits > -np.inf), candidates.sorted)
    if not candidates.sorted:
        candidates = candidates.keep(largest(candidates.logits, len(candidates)), True)
    weights = candidates.weights()
    probabilities = weights / weights.sum()
    surprises = -np.log(np.maximum(probabilities, 1e-300))
    entropy = float(probabilities @ surprises)
    order = np.argsort(np.abs(surprises - entropy), kind="stable")
    needed = int(np.searchsorted(np.cumsum(probabilities[order]), share, side="right")) + 1
    return candidates.keep(order[:needed], False)


def xtc(candidates: Candidates, threshold: float) -> Candidates:
    """Excludes the top choices: of those at least as likely as the threshold, only the least likely stays."""
    weights = candidates.weights()
    above = np.flatnonzero((weights >= threshold * weights.sum()) & (candidates.logits > -np.inf))
    if len(above) < 2:
        return candidates
    least = above[candidates.logits[above] == candidates.logits[above].min()][-1]
    kept = np.ones(len(candidates), bool)
    kept[above] = False
    kept[least] = True
    return candidates.keep(np.flatnonzero(kept), candidates.sorted)


def penalties(
    candidates: Candidates, recent: Sequence[int], repeat: float, presence: float, frequency: float
) -> Candidates:
    """Makes tokens that came lately less likely: `repeat` divides positive and multiplies other logits, `presence` is
    subtracted once, `frequency` for every time that the token came."""
    if not len(recent) or (repeat == 1 and presence == 0 and frequency == 0):
        return candidates
    tokens, counts = np.unique(np.asarray(recent, dtype=np.int64), return_counts=True)

    def change(logits: Floats, which: Indices) -> Floats:
        kind = logits.dtype.type
        kept: Floats = np.where(logits <= 0, logits * kind(repeat), logits / kind(repeat))
        return kept - (counts[which].astype(kind) * kind(frequency) + kind(presence))

    return candidates.changed(tokens, change)


def dry(
    candidates: Candidates,
    recent: Sequence[int],
    breakers: Mapping[int, Collection[tuple[int, ...]]],
    multiplier: float,
    base: float,
    allowed_length: int,
) -> Candidates:
    """Don't repeat yourself: a token that would lengthen a repetition of at least `allowed_length` tokens loses
    multiplier * base^(length - allowed_length).

    breakers: what repetitions do not reach across: first token -> the tokens that follow it, perhaps none.
    """
    size = len(recent)
    if size <= allowed_length:
        return candidates
    limit = _distance_to_breaker(recent, breakers)
    if limit < allowed_length:
        return candidates
    # Beyond this exponent the penalty is as large as a float32 gets.
    largest_exponent = int(88.7228391 / math.log(base)) if base > 1.000001 else 0
    longest = min(limit, allowed_length + largest_exponent)
    # lengths[i]: how many tokens up to and with i are the last tokens of the text again.
    tokens = np.asarray(recent, dtype=np.int64)
    lengths = np.zeros(size, np.int64)
    ends = np.arange(size - 1)
    for length in range(1, longest + 1):
        ends = ends[ends >= length - 1]
        ends = ends[tokens[ends - (length - 1)] == tokens[size - length]]
        if not len(ends):
            break
        lengths[ends] = length
    found = np.flatnonzero(lengths[:-1] >= max(allowed_length, 0))
    if not len(found):
        return candidates
    repeated: dict[int, int] = {}
    for token, length in zip(tokens[found + 1].tolist(), lengths[found].tolist(), strict=True):
        if () not in breakers.get(token, ()):
            repeated[token] = max(repeated.get(token, 0), length)
    if not repeated:
        return candidates
    ids = np.array(sorted(repeated), np.int64)
    penalty = np.array([multiplier * base ** (repeated[token] - allowed_length) for token in ids.tolist()])
    return candidates.changed(ids, lambda logits, which: logits - penalty[which].astype(logits.dtype))


def _distance_to_breaker(recent: Sequence[int], breakers: Mapping[int, Collection[tuple[int, ...]]]) -> int:
    """How many tokens follow the last breaker."""
    if not breakers:
        return len(recent)
    for distance, token in enumerate(reversed(recent)):
        tails = breakers.get(token)
        if tails is None:
            continue
        after = tuple(recent[len(recent) - distance :])
        matching = [len(tail) for tail in tails if after[: len(tail)] == tail]
        if matching:
            return distance - max(matching)
    return len(recent)


def dry_breakers(tokenizer: Tokenizer, texts: tuple[str, ...]) -> dict[int, set[tuple[int, ...]]]:
    """The tokens in which these texts may appear: first token -> the tokens that must follow it (an empty tuple where
    the token has all of the text). A text counts 40 bytes at most, what follows 20 tokens."""
    known = _breakers.setdefault(tokenizer, {})
    if texts not in known:
        known[texts] = _find_breakers(tokenizer, [text.encode(errors="replace")[:40] for text in texts])
    return known[texts]


def _find_breakers(tokenizer: Tokenizer, texts: Sequence[bytes]) -> dict[int, set[tuple[int, ...]]]:
    found: dict[int, set[tuple[int, ...]]] = {}
    tails: dict[bytes, tuple[int, ...]] = {}
    for token in range(tokenizer.vocab_size):
        word = tokenizer.spelling(token)
        for text in texts:
            if text in word:
                found.setdefault(token, set()).add(())
                continue
            for cut in range(1, min(len(text), len(word) + 1)):
                if word.endswith(text[:cut]):
                    rest = text[cut:]
                    if rest not in tails:
                        tails[rest] = tuple(tokenizer.encode(rest.decode(errors="replace"), parse_special=False)[:20])
                    found.setdefault(token, set()).add(tails[rest])
    return found


def largest(logits: Floats, count: int) -> Indices:
    """Indices of the `count` largest logits, largest first, equal ones by index.

    The maximum of a group is a logit of its own, so the count-th largest maximum bounds the count-th largest logit from
    below: two passes over the vocabulary leave a few candidates to sort, much cheaper than a partition of all.
    """
    size = len(logits)
    groups = size // 32
    if count < groups // 2:
        maxima = logits[: 32 * groups].reshape(32, groups).max(axis=0)
        bound = np.partition(maxima, groups - count)[groups - count]
        pool = np.flatnonzero(logits >= bound)
    elif count < size:
        bound = np.partition(logits, size - count)[size - count]
        pool = np.flatnonzero(logits >= bound)
    else:
        pool = np.arange(size)
    # A stable sort of descending values keeps equal ones in index order.
    return pool[np.argsort(-logits[pool], kind="stable")][:count]
