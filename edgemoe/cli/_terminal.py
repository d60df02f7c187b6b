"""What the commands print: generated text on stdout, everything else on stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgemoe.text.parts import Part

# A model's text must not steer the terminal: escape sequences could change its title, its colours or its input.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def emit(text: str) -> None:
    """Writes generated text to stdout at once; a terminal gets U+FFFD for control characters."""
    if sys.stdout.isatty():
        text = _CONTROL.sub("\ufffd", text)
    click.echo(text, nl=False)
    sys.stdout.flush()


class AnswerWriter:
    """Writes an answer as it comes: its content to stdout, what the model thinks to stderr, dim on a terminal.

    content, reasoning: what came of each. silent: only gather them.
    """

    def __init__(self, silent: bool = False) -> None:
        self.content = self.reasoning = ""
        self._silent = silent
        self._thinking = False

    def write(self, kind: str, text: str) -> None:
        if kind == "reasoning":
            self.reasoning += text
            if not self._silent:
                self._think(text)
        else:
            self.content += text
            if not self._silent:
                self._stop_thinking()
                emit(text)

    def write_all(self, pieces: Iterable[Part | str]) -> None:
        """pieces: parts of an answer, or text that is all content."""
        for piece in pieces:
            self.write(*(("content", piece) if isinstance(piece, str) else (piece.kind, piece.text)))

    def finish(self, line: bool) -> None:
        """line: end the line that the answer ends in."""
        self._stop_thinking()
        if line and not self.content.endswith("\n"):
            click.echo()

    def _think(self, text: str) -> None:
        self._thinking = True
        if sys.stderr.isatty():
            text = f"\x1b[2m{_CONTROL.sub(chr(0xFFFD), text)}\x1b[0m"
        click.echo(text, nl=False, err=True)
        sys.stderr.flush()

    def _stop_thinking(self) -> None:
        if self._thinking:
            click.echo("\n", err=True)
        self._thinking = False


def note(text: str) -> None:
    """Writes a line to stderr."""
    click.echo(text, err=True)


def print_counters(counters: Mapping[str, Any]) -> None:
    """Writes a run's counters to stderr, one a line, in units for people."""
    for name, value in counters.items():
        label, text = _readable(name, value)
        note(f"  {label:<24}{text:>14}")


def _readable(name: str, value: Any) -> tuple[str, str]:
    from edgemoe.memory import format_size

    if "bytes" in name:
        return name.replace("_bytes", "").replace("bytes_", ""), format_size(value)
    if name.endswith("_ms"):
        return name[:-3], f"{value:,.1f} ms"
    if name.endswith("_tps"):
        return name[:-4], f"{value:,.2f} tokens/s"
    if name.endswith("_mb_s"):
        return name[:-5], f"{value:,.0f} MB/s"
    if name.endswith("_rate"):
        return name, f"{100 * value:.1f} %"
    return name, f"{value:,.2f}" if isinstance(value, float) and not value.is_integer() else f"{value:,.0f}"


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function (done, total) that draws a bar on stderr; nothing where stderr is no terminal. The bar appears
    with the first call, and a call with the same figures costs next to nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)

    def advance(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()
