"""Fields of a request's JSON, checked one by one. What is wrong is a FieldError that names the field.

null counts as absent, since clients send it for what they leave out. Fields that nobody asks for are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NoReturn

from edgemoe.errors import OptionError, quote, shorten

MAX_ITEMS = 100_000
"""Of a list in a request."""


class FieldError(OptionError):
    """A field of a request is missing, wrong, or asks for what cannot be done.

    field: its path, such as `messages[2].content`; empty for the body as a whole. code: for programs.
    """

    def __init__(self, field: str, reason: str, code: str = "invalid_value") -> None:
        self.field = field
        self.code = code
        super().__init__(f"{shorten(field)} {reason}" if field else f"the request {reason}")


class Fields:
    """A JSON object of a request. path: what messages call it; empty for the body."""

    __slots__ = ("path", "values")

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise FieldError(path, f"is not a JSON object but {quote(value)}", "invalid_type")
        self.values: dict[str, Any] = value
        self.path = path

    def name(self, key: str) -> str:
        """The path of a field."""
        return f"{self.path}.{key}" if self.path else key

    def fail(self, key: str, reason: str, code: str = "invalid_value") -> NoReturn:
        raise FieldError(self.name(key), reason, code)

    def get(self, key: str) -> Any:
        """The value as it is; None where it is absent."""
        return self.values.get(key)

    def need(self, key: str) -> Any:
        """The value, which must be there."""
        value = self.values.get(key)
        if value is None:
            self.fail(key, "is required", "missing_required_parameter")
        return value

    def text(self, key: str, choices: Collection[str] = ()) -> str | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fail(key, f"= {quote(value)} is not a string", "invalid_type")
        if choices and value not in choices:
            self.fail(key, f"= {quote(value)} is not one of {', '.join(choices)}")
        return value

    def need_text(self, key: str, choices: Collection[str] = ()) -> str:
        self.need(key)
        value = self.text(key, choices)
        assert value is not None
        return value

    def whole(self, key: str, least: int, most: int) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # 1.0 is a whole number in JSON
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(key, f"= {quote(value)} is not a whole number", "invalid_type")
        if not least <= value <= most:
            self.fail(key, f"= {quote(value)} is not between {least} and {most}")
        return value

    def number(self, key: str, least: float = -math.inf, most: float = math.inf) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(key, f"= {quote(value)} is not a number", "invalid_type")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and least <= number <= most):
            bounds = "finite" if math.isinf(most) else f"between {least} and {most}"
            self.fail(key, f"= {quote(value)} is not {bounds}")
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, f"= {quote(value)} is not true or false", "invalid_type")
        return value

    def inner(self, key: str) -> Fields | None:
        value = self.values.get(key)
        return None if value is None else Fields(value, self.name(key))

    def items(self, key: str, most: int = MAX_ITEMS) -> list[Any]:
        """The items; none where it is absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.fail(key, f"= {quote(value)} is not a list", "invalid_type")
        if len(value) > most:
            self.fail(key, f"has {len(value)} items, more than {most}")
        return value

    def objects(self, key: str, most: int = MAX_ITEMS) -> list[Fields]:
        name = self.name(key)
        return [Fields(item, f"{name}[{number}]") for number, item in enumerate(self.items(key, most))]

    def texts(self, key: str, most: int = MAX_ITEMS) -> tuple[str, ...]:
        """Strings: a list of them, or one."""
        value = self.values.get(key)
        items = [value] if isinstance(value, str) else self.items(key, most)
        for number, item in enumerate(items):
            if not isinstance(item, str):
                raise FieldError(f"{self.name(key)}[{number}]", f"= {quote(item)} is not a string", "invalid_type")
        return tuple(items)

    def refuse(self, key: str, reason: str) -> None:
        """The field must not be there (absent, null, false, or empty): it would change the answer, and cannot."""
        value = self.values.get(key)
        if value is not None and value is not False and value != "" and value != [] and value != {}:
            self.fail(key, f"is not supported: {reason}", "unsupported_parameter")
