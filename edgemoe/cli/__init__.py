"""The `edgemoe` command. A file of this folder is a command: its name is the file's, its one-line help the first line
of the file's docstring, its code the click command that the file calls `command`. Nothing is registered anywhere, and
a command's imports are paid for when it runs."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from edgemoe.errors import EdgemoeError

# Files of this folder that are not commands; names with an underscore in front are not either.
_HELPERS = {"options"}

EXIT_INTERRUPTED = 130  # as a shell reports a process that SIGINT ended
EXIT_BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended


def one_line(message: object) -> str:
    """The message without line breaks, runs of white space as one space."""
    return " ".join(str(message).split())


def report_error(message: object) -> None:
    """Prints `edgemoe: error: MESSAGE` as one line on stderr."""
    click.echo(f"edgemoe: error: {one_line(message)}", err=True)


class _Commands(click.Group):
    """The commands of this folder, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = (path.stem for path in Path(__file__).parent.glob("*.py"))
        return sorted(name for name in names if not name.startswith("_") and name not in _HELPERS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"{__name__}.{cmd_name}").command
        assert isinstance(command, click.Command), f"edgemoe/cli/{cmd_name}.py has no click command named `command`"
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            _leave_broken_pipe()

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line; in standalone mode every failure is one line on stderr and an exit status."""
        rest: dict[str, Any] = {"windows_expand_args": windows_expand_args, **extra}
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **rest)
        for stream in (sys.stdout, sys.stderr):
            # A terminal that cannot show a character gets a question mark, not a traceback.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            status = super().main(args, prog_name or "edgemoe", complete_var, standalone_mode=False, **rest)
        except click.Abort:
            sys.exit(EXIT_INTERRUPTED)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "edgemoe"
            report_error(f"{error.format_message()} (see `{command} --help`)")
            sys.exit(error.exit_code)
        except click.ClickException as error:
            report_error(error.format_message())
            sys.exit(error.exit_code)
        except EdgemoeError as error:
            report_error(error)
            sys.exit(1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            report_error(f"{where}{error.strerror or error}")
            sys.exit(1)
        except MemoryError:
            report_error("out of memory")
            sys.exit(1)
        sys.exit(status if isinstance(status, int) else 0)


def _leave_broken_pipe() -> NoReturn:
    """Leaves quietly: whoever read our output has seen enough. What is still buffered must not be flushed at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(devnull, stream.fileno())
        except (OSError, ValueError):
            continue
    sys.exit(EXIT_BROKEN_PIPE)


def _summary(name: str) -> str:
    """First line of a command file's docstring, read without importing the file."""
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from edgemoe import __version__

        click.echo(f"edgemoe {__version__}")
        ctx.exit()


@click.command(
    "edgemoe",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print it.")
def main() -> None:
    """Run Mixture-of-Experts language models that are larger than the memory they may use."""
