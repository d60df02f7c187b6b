"""The conversation that `edgemoe run` holds on a terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli import report_error
from edgemoe.cli._terminal import AnswerWriter, note, print_counters
from edgemoe.errors import ContextLengthError, EdgemoeError

if TYPE_CHECKING:
    from edgemoe.model import Model
    from edgemoe.serving.answer import Answer
    from edgemoe.serving.generation import Generation


def converse(engine: Model, templated: bool, system_prompt: str | None, options: dict[str, Any], verbose: bool) -> None:
    """Reads lines and answers them until the end of input (Ctrl-D); Ctrl-C stops an answer.

    With a chat template each line is the user's turn. Without, the model continues everything written so far, the
    lines and its own words. Either way the text only grows, so a turn costs its new tokens only.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    note("Ctrl-C stops an answer, Ctrl-D leaves." + ("" if templated else " The model continues the text."))
    begin = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages, written = list(begin), ""
    while True:
        line = _read_turn()
        if line is None:
            return
        asked = [*messages, {"role": "user", "content": line}]
        prompt = f"{written}\n{line}" if written else line
        writer = AnswerWriter()
        try:
            generation = engine.chat_parts(asked, **options) if templated else engine.generate(prompt, **options)
            _speak(writer, generation)
        except ContextLengthError as error:
            report_error(error)
            if messages != begin or written:
                note("The conversation is full and begins anew.")
            messages, written = list(begin), ""
            continue
        except EdgemoeError as error:
            report_error(error)  # the model stays usable; this turn did not happen
            continue
        writer.finish(line=True)
        answer = {"role": "assistant", "content": writer.content}
        if writer.reasoning:
            answer["reasoning_content"] = writer.reasoning
        messages = [*asked, answer]
        written = prompt + writer.content
        if verbose:
            print_counters(engine.stats(generation.result))


def _speak(writer: AnswerWriter, generation: Answer | Generation) -> None:
    """Writes an answer as it comes, until its end or Ctrl-C."""
    try:
        writer.write_all(generation)
    except KeyboardInterrupt:
        note(" (stopped)")
    except EdgemoeError:
        if writer.content or writer.reasoning:
            click.echo()
        raise


def _read_turn() -> str | None:
    """What the user says, which is not empty; None at the end of input. Ctrl-C asks anew."""
    interrupted = False
    while True:
        try:
            if interrupted:  # not where it is caught: the next one may come at once
                interrupted = False
                note("")
            line = _read_line()
            if line:
                return line
        except EOFError:
            try:
                note("")
            except KeyboardInterrupt:  # pressed while no key was waited for, and seen only now
                return None
            return None
        except KeyboardInterrupt:
            interrupted = True


def _read_line() -> str:
    """A line; one that ends with a backslash goes on in the next."""
    lines: list[str] = []
    while True:
        prompt = "... " if lines else "> "
        if not sys.stdout.isatty():  # the standard output is for the model's text
            click.echo(prompt, nl=False, err=True)
            prompt = ""
        line = input(prompt)
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
