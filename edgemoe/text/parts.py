"""The parts of an answer."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """A piece of an answer.

    kind: "content", "reasoning" (what the model thinks before it answers) or "tool_call".
    text: the piece; of a tool call a piece of its arguments: those of one call, put together, are JSON text.
    index: of the tool call, counted from 0; None for other kinds.
    name, id: of the function and of the call, on the first piece of each call; None on others.
    """

    kind: str
    text: str
    index: int | None = None  # type: ignore[assignment]  # a tuple's method, which nobody needs of a part
    name: str | None = None
    id: str | None = None
