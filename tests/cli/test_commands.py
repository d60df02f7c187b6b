"""The command group: discovery, help, version, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import edgemoe
from edgemoe.cli import main


def test_every_file_is_a_command() -> None:
    folder = Path(edgemoe.__file__).parent / "cli"
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {"options"}
    context = click.Context(main)
    assert set(main.list_commands(context)) == files >= {"run", "ppl"}
    for name in files:
        command = main.get_command(context, name)
        assert command is not None and command.name == name
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0 and result.stdout.startswith(f"Usage: edgemoe {name}")


def test_help_names_the_commands_without_importing_them() -> None:
    code = (
        "import sys\nfrom edgemoe.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "assert not [name for name in sys.modules if name.startswith('edgemoe.cli.')], sys.modules\n"
    )
    root = str(Path(edgemoe.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert "run  " in done.stdout and "Answer a prompt" in done.stdout


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"edgemoe {edgemoe.__version__}\n")


@pytest.mark.parametrize("name", ["nonsense", "options", "_terminal", "__init__", "../cli/run"])
def test_unknown_command(name: str) -> None:
    result = CliRunner().invoke(main, [name])
    assert result.exit_code == 2
    assert result.stderr.startswith("edgemoe: error: No such command") and result.stderr.count("\n") == 1


def test_broken_pipe_is_quiet(tmp_path: Path) -> None:
    root = str(Path(edgemoe.__file__).parents[1])
    code = "from edgemoe.cli import main; main(['--help'])"
    command = f'{sys.executable} -c "{code}" | true'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=root, check=False)
    assert done.stderr == ""
