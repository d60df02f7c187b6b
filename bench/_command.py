"""What the command lines of several benchmarks share: options, children that measure, and the report at the end."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._cage import Cage, Outcome, run
from bench._machine import say
from edgemoe.processors import usable_processors

ROOT = Path(__file__).resolve().parents[1]


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """With the options that all have. description: the module's docstring, of which the first line is shown."""
    result = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=(description or "").splitlines()[0])
    result.add_argument("--threads", type=int, default=usable_processors(), help="default: all processors")
    result.add_argument("--json", type=Path, help="write the results here")
    result.add_argument("--markdown", type=Path, help="write the report here too")
    return result


def percentages(text: str) -> list[float]:
    """The type of an option such as "25,50"."""
    values = [float(value) for value in text.split(",")]
    if not all(0 < value <= 100 for value in values):
        raise ValueError(text)
    return values


def can_cage() -> bool:
    """Whether this process may make memory cgroups; says why not."""
    try:
        with Cage.create(None):
            return True
    except OSError as error:
        say(f"runs are not caged: {error}")
        return False


def publish(options: argparse.Namespace, text: str, results: Mapping[str, Any]) -> None:
    """Prints the report, and writes what the options ask for."""
    print(text, end="" if text.endswith("\n") else "\n")
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Children:
    """Processes that run a job of bench/_ours.py with edgemoe. name: of the benchmark, for messages. caged: whether
    memory cgroups can be made."""

    name: str
    threads: int
    context: int
    caged: bool

    def outcome(self, job: str, cage: int | None, *, caged: bool, **options: Any) -> Outcome:
        """cage: bytes; None for a group that only counts. caged: in a group at all, where that can be."""
        options |= {"job": job, "threads": self.threads, "context": self.context}
        command = [sys.executable, str(ROOT / "bench" / "_ours.py"), json.dumps(options)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return run(command, cage, caged=caged and self.caged, environment={**os.environ, "PYTHONPATH": path})

    def job(self, job: str, cage: int | None = None, **options: Any) -> dict[str, Any]:
        """The report of a job, in a cage of so many bytes if that is given. Raises SystemExit if it fails."""
        outcome = self.outcome(job, cage, caged=cage is not None, **options)
        if outcome.report is None:
            raise SystemExit(f"{self.name}: {job}: {outcome.error}")
        return outcome.report
