"""Token ids from a caller, checked."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from typing import Any

import numpy as np

from edgemoe.errors import OptionError

# Iterables that are no sequence of token ids, whatever they yield.
_OTHERS = (str, bytes, bytearray, memoryview, Mapping, Set)


def token_ids(value: Any, vocab_size: int, what: str, limit: int | None = None) -> list[int]:
    """The ids in `value`, an iterable of whole numbers below `vocab_size` (a list, an integer array [tokens], ...).

    what: what messages call it. limit: more than one id beyond it is not looked at. Raises OptionError for bytes, truth
    values, floats and everything else that is not token ids.
    """
    if isinstance(value, _OTHERS) or not isinstance(value, Iterable):
        raise OptionError(f"{what} is a sequence of token ids, not {type(value).__name__}")
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu" and limit is None:
        wrong = np.flatnonzero((value < 0) | (value >= vocab_size))
        if not len(wrong):
            return list[int](value.tolist())
    ids: list[int] = []
    for item in islice(value, None if limit is None else limit + 1):
        if isinstance(item, (bool, np.bool_)):
            raise OptionError(f"{what}: {item!r} at {len(ids)} is a truth value, not a token id")
        try:
            token = operator.index(item)
        except TypeError:
            raise OptionError(f"{what}: {item!r:.100} at {len(ids)} is not a token id, a whole number") from None
        if not 0 <= token < vocab_size:
            raise OptionError(f"{what}: token {token} at {len(ids)} is not in the vocabulary of {vocab_size}")
        ids.append(token)
    return ids
