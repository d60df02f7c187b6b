"""Reading a config.json: it is not trusted, and what it asks for is either honoured or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgemoe.errors import SourceError, UnsupportedModelError
from edgemoe.spec import MAX_DIMENSION, RopeSpec


class Config:
    """Checked access to the values of a configuration; a JSON null counts as absent."""

    def __init__(self, values: Mapping[str, Any], family: str) -> None:
        self._values = values
        self._family = family

    def integer(self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_DIMENSION) -> int:
        """The first of `names` that is present; without a default one must be."""
        name, value = self._find(names, default)
        if type(value) is not int or not least <= value <= most:
            raise UnsupportedModelError(f"{self._family}: {name} = {value!r} is not a number from {least} to {most}")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A positive finite number."""
        name, value = self._find(names, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UnsupportedModelError(f"{self._family}: {name} = {value!r} is not a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        _, value = self._find((name,), default)
        if type(value) is not bool:
            raise UnsupportedModelError(f"{self._family}: {name} = {value!r} is not true or false")
        return value

    def integers(self, name: str) -> list[int]:
        """A list of numbers, empty if absent."""
        _, value = self._find((name,), [])
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            raise UnsupportedModelError(f"{self._family}: {name} = {_short(value)} is not a list of numbers")
        return value

    def require(self, **expected: object) -> None:
        """Refuses the options that are present with another value than this one."""
        for name, wanted in expected.items():
            value = self._values.get(name)
            if value is not None and value != wanted:
                only = "" if wanted is None else f" (only {wanted!r} is)"
                raise UnsupportedModelError(f"{self._family}: {name} = {_short(value)} is not supported{only}")

    def rope(self, head_dim: int, default_theta: float = 10000.0) -> RopeSpec:
        """Rotary embedding over the whole head: `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`."""
        theta = self.number("rope_theta", default=default_theta)
        for name in ("rope_scaling", "rope_parameters"):
            parameters = self._values.get(name)
            if parameters is None:
                continue
            if not isinstance(parameters, Mapping):
                raise UnsupportedModelError(f"{self._family}: {name} = {_short(parameters)} is not a map")
            inner = Config(parameters, f"{self._family}: {name}")
            inner.require(rope_type="default", type="default", partial_rotary_factor=1.0)
            theta = inner.number("rope_theta", default=theta)
        self.require(partial_rotary_factor=1.0)
        return RopeSpec(tuple(theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)))

    def _find(self, names: tuple[str, ...], default: object) -> tuple[str, Any]:
        for name in names:
            if self._values.get(name) is not None:
                return name, self._values[name]
        if default is None:
            raise SourceError(f"{self._family}: {names[0]} is missing")
        return names[0], default


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
