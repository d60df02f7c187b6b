"""Reading a config.json: it is not trusted, and what it asks for is either honoured or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgemoe.errors import SourceError, UnsupportedModelError, quote
from edgemoe.spec import MAX_DIMENSION, MAX_LAYERS, RopeSpec


class Config:
    """Checked access to the values of a configuration; a JSON null counts as absent."""

    def __init__(self, values: Mapping[str, Any], family: str) -> None:
        self._values = values
        self._family = family

    def integer(self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_DIMENSION) -> int:
        """The first of `names` that is present; without a default one must be."""
        name, value = self._find(names, default)
        if type(value) is not int or not least <= value <= most:
            raise UnsupportedModelError(
                f"{self._family}: {name} = {quote(value)} is not a number from {least} to {most}"
            )
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A positive finite number."""
        name, value = self._find(names, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UnsupportedModelError(f"{self._family}: {name} = {quote(value)} is not a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        _, value = self._find((name,), default)
        if type(value) is not bool:
            raise UnsupportedModelError(f"{self._family}: {name} = {quote(value)} is not true or false")
        return value

    def integers(self, name: str) -> list[int]:
        """A list of numbers, empty if absent."""
        _, value = self._find((name,), [])
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            raise UnsupportedModelError(f"{self._family}: {name} = {quote(value)} is not a list of numbers")
        return value

    def require(self, **expected: object) -> None:
        """Refuses the options that are present with another value than this one."""
        for name, wanted in expected.items():
            value = self._values.get(name)
            if value is not None and value != wanted:
                only = "" if wanted is None else f" (only {wanted!r} is)"
                raise UnsupportedModelError(f"{self._family}: {name} = {quote(value)} is not supported{only}")

    def text(self, name: str, default: str) -> str:
        _, value = self._find((name,), default)
        if not isinstance(value, str):
            raise UnsupportedModelError(f"{self._family}: {name} = {quote(value)} is not a name")
        return value

    def numbers(self, name: str) -> list[float]:
        """A list of positive finite numbers, empty if absent."""
        _, value = self._find((name,), [])
        if not isinstance(value, list) or any(
            type(item) not in (int, float) or not 0 < item < math.inf for item in value
        ):
            raise UnsupportedModelError(f"{self._family}: {name} = {quote(value)} is not a list of positive numbers")
        return [float(item) for item in value]

    def choices(self, name: str, known: tuple[str, ...], count: int) -> list[str]:
        """A list of `count` names, each one of `known`; empty if absent."""
        _, value = self._find((name,), [])
        if not isinstance(value, list) or len(value) not in (0, count):
            raise UnsupportedModelError(f"{self._family}: {name} = {quote(value)} is not a list of {count} names")
        for item in value:
            if item not in known:
                raise UnsupportedModelError(
                    f"{self._family}: {name}: {quote(item)} is not supported (known: {', '.join(known)})"
                )
        return value

    def part(self, name: str) -> Config:
        """A map within the configuration; an empty one if absent."""
        _, value = self._find((name,), {})
        if not isinstance(value, Mapping):
            raise UnsupportedModelError(f"{self._family}: {name} = {quote(value)} is not a map")
        return Config(value, f"{self._family}: {name}")

    def allow(self, *names: str) -> None:
        """Refuses everything else that is present."""
        for name, value in self._values.items():
            if value is not None and name not in names:
                raise UnsupportedModelError(f"{self._family}: {name} = {quote(value)} is not supported")

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def layers(self) -> int:
        return self.integer("num_hidden_layers", most=MAX_LAYERS)

    def rope(
        self,
        head_dim: int,
        default_theta: float = 10000.0,
        *,
        partial: float | None = None,
        interleaved: bool = False,
        types: tuple[str, ...] = ("default",),
        parameters: Config | None = None,
    ) -> RopeSpec:
        """Rotary embedding of a head of `head_dim`, as the configuration scales it.

        Read from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` and `partial_rotary_factor`.
        partial: the part of the head that turns, where the configuration says nothing; None: always the whole head.
        types: those that the family is known to have, of default, linear, proportional, yarn (Peng et al. 2023) and
        longrope (Ding et al. 2024). Others are refused by name.
        parameters: what stands for `rope_parameters`, where a configuration has several of them.
        """
        theta = self.number("rope_theta", default=default_theta)
        scaling = self.part("rope_scaling")
        if parameters is not None:
            scaling = parameters
        elif self.has("rope_parameters"):
            scaling = self.part("rope_parameters")
        theta = scaling.number("rope_theta", default=theta)
        if partial is None:
            for holder in (self, scaling):
                holder.require(partial_rotary_factor=1.0)
        partial = self.number("partial_rotary_factor", default=partial or 1.0)
        partial = scaling.number("partial_rotary_factor", default=partial)
        if not 0 < partial <= 1:
            raise UnsupportedModelError(f"{self._family}: partial_rotary_factor = {partial} is not in (0, 1]")
        kind = "default"
        for name in ("type", "rope_type"):
            kind = scaling.text(name, kind)
            if kind not in types:
                only = f"only {', '.join(map(repr, types))} {'is' if len(types) == 1 else 'are'}"
                raise UnsupportedModelError(f"{scaling._family}: {name} = {quote(kind)} is not supported ({only})")
        if kind == "proportional":  # the angles of the whole head, the last of them zero
            turning = int(partial * head_dim // 2)
            angles = [theta ** (-2 * pair / head_dim) for pair in range(turning)]
            factor = scaling.number("factor", default=1.0)
            frequencies = [angle / factor for angle in angles] + [0.0] * (head_dim // 2 - turning)
            return RopeSpec(tuple(frequencies), interleaved)
        dim = int(head_dim * partial)
        plain = tuple(theta ** (-2 * pair / dim) for pair in range(dim // 2))
        if kind == "default":
            return RopeSpec(plain, interleaved)
        if kind == "linear":
            factor = scaling.number("factor")
            return RopeSpec(tuple(frequency / factor for frequency in plain), interleaved)
        context = self.integer("max_position_embeddings", most=1 << 30)
        original = self.integer("original_max_position_embeddings", default=context, most=1 << 30)
        original = scaling.integer("original_max_position_embeddings", default=original, most=1 << 30)
        if kind == "yarn":
            return _yarn(scaling, plain, theta, dim, context, original, interleaved)
        return _longrope(scaling, plain, context, original, interleaved)

    def _find(self, names: tuple[str, ...], default: object) -> tuple[str, Any]:
        for name in names:
            if self._values.get(name) is not None:
                return name, self._values[name]
        if default is None:
            raise SourceError(f"{self._family}: {names[0]} is missing")
        return names[0], default


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on cosine and sine for a context `factor` times as long (Peng et al. 2023, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(
    scaling: Config, plain: tuple[float, ...], theta: float, dim: int, context: int, original: int, interleaved: bool
) -> RopeSpec:
    """Fast pairs turn as they did, slow ones `factor` times slower, those between in proportion (Peng et al. 2023,
    section 3.2)."""
    factor = scaling.number("factor", default=context / original)
    mscale, mscale_all = (scaling.number(name, default=1.0) for name in ("mscale", "mscale_all_dim"))
    attention_factor = yarn_attention_factor(factor)
    if scaling.has("mscale") and scaling.has("mscale_all_dim"):
        attention_factor = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all)
    attention_factor = scaling.number("attention_factor", default=attention_factor)

    def pair_of(rotations: float) -> float:
        """The pair, not a whole number, that turns so often within the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_of(scaling.number("beta_fast", default=32.0))
    high = pair_of(scaling.number("beta_slow", default=1.0))
    if scaling.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    slowed = [min(max((pair - low) / width, 0.0), 1.0) for pair in range(dim // 2)]
    return RopeSpec(
        tuple(f / factor * slow + f * (1 - slow) for f, slow in zip(plain, slowed, strict=True)),
        interleaved,
        attention_factor,
    )


def _longrope(scaling: Config, plain: tuple[float, ...], context: int, original: int, interleaved: bool) -> RopeSpec:
    """Each pair has a divisor for contexts up to the original one, and another for longer ones."""
    factor = scaling.number("factor", default=context / original)
    attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention_factor = scaling.number("attention_factor", default=attention_factor)
    frequencies = []
    for name in ("short_factor", "long_factor"):
        divisors = scaling.numbers(name)
        if len(divisors) != len(plain):
            raise UnsupportedModelError(f"{scaling._family}: {name} has {len(divisors)} numbers, not {len(plain)}")
        frequencies.append(tuple(f / divisor for f, divisor in zip(plain, divisors, strict=True)))
    return RopeSpec(
        frequencies[0],
        interleaved,
        scaling.number("short_mscale", default=attention_factor),
        frequencies[1],
        scaling.number("long_mscale", default=attention_factor),
        original,
    )
