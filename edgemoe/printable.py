"""Text from a file that is not trusted, on its way to a terminal."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text on one line, with U+FFFD for control characters: names in a pack must not steer the terminal."""
    return _CONTROL.sub("\ufffd", text)
