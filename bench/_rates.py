"""Tokens per second of edgemoe and of llama.cpp on one GGUF, in turns: what decode, prefill and contention share.

Every contender is a process that has loaded the model and answers requests (`bench/_serve.py`,
`bench/_llama_cpp_serve.py`); while one computes the others wait. So rounds alternate without a reload, and what
disturbs the machine for a while disturbs all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench import _command
from bench._machine import machine, peer_version, say
from edgemoe import _core
from edgemoe.formats.gguf_index import GgufSource, build_index
from tools.model_files import write_gguf, write_pack
from tools.synthesize import SyntheticModel

ROOT = Path(__file__).resolve().parents[1]
OURS = "edgemoe"
REPACKED = "llama.cpp, repacked"
MAPPED = "llama.cpp, as in the file"
# Percent of the processors that others may take.
QUIET = 5.0


@dataclass(slots=True)
class Contender:
    """A process with the model loaded."""

    name: str
    process: subprocess.Popen[str]
    rates: list[float] = field(default_factory=list)  # tokens per second, a figure a round

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("@"):
                return dict(json.loads(line[1:]))
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")

    def rate(self, **request: Any) -> float:
        answer = self.ask(**request)
        return float(answer["tokens"] / answer["seconds"])


@contextlib.contextmanager
def contenders(options: argparse.Namespace, path: Path, context: int) -> Iterator[list[Contender]]:
    """Ours, and llama.cpp's modes where there is a peer interpreter; all loaded."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    base = {"path": str(path.resolve()), "threads": options.threads, "context": context}
    started = [(OURS, [sys.executable, "-m", "bench._serve", json.dumps(base)])]
    if options.peer_python:
        script = str(ROOT / "bench" / "_llama_cpp_serve.py")
        for name, repack in ((REPACKED, True), (MAPPED, False)):
            started.append((name, [options.peer_python, script, json.dumps(base | {"repack": repack})]))
    with contextlib.ExitStack() as stack:
        found = []
        for name, command in started:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                cwd=ROOT,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            found.append(Contender(name, process))
            found[-1].ask()
            say(f"{name} is loaded")
        yield found


def take_turns(found: Sequence[Contender], repetitions: int, decimals: int, **request: int) -> None:
    """Measures the contenders in turns, after a request of each that does not count."""
    for contender in found:
        contender.rate(**request)
    for number in range(repetitions):
        for contender in found:
            contender.rates.append(contender.rate(**request))
            say(f"{number + 1}: {contender.name} {contender.rates[-1]:.{decimals}f} tok/s")


@contextlib.contextmanager
def subject(options: argparse.Namespace, kind: str = "gguf") -> Iterator[Path]:
    """The model: the one named, or a synthetic one ("gguf", or a pack: "emoe") that is deleted in the end."""
    if options.model:
        yield options.model
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.work or Path.cwd()) as folder:
        path = Path(folder) / f"synthetic-{options.layers}.{kind}"
        say(f"writing {path}")
        (write_gguf if kind == "gguf" else write_pack)(SyntheticModel(layers=options.layers), path, 4, 4)
        yield path


def parser(name: str, description: str | None, tokens: int) -> argparse.ArgumentParser:
    """The options that the three benchmarks have."""
    result = _command.parser(name, description)
    result.add_argument("--model", type=Path, help="a GGUF file; it stays (default: a synthetic one is made)")
    result.add_argument("--layers", type=int, default=12, help="of the synthetic model (default: 12)")
    result.add_argument("--tokens", type=int, default=tokens, help=f"default: {tokens}")
    result.add_argument("--repetitions", type=int, default=5, help="rounds (default: 5)")
    result.add_argument("--peer-python", help="an interpreter that has xllamacpp")
    result.add_argument("--work", type=Path, help="folder for the synthetic model (default: this one)")
    return result


def parse(result: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    options = result.parse_args(argv)
    for name in ("layers", "tokens", "repetitions", "threads"):
        if getattr(options, name) < 1:
            result.error(f"--{name} must be positive")
    options.version = peer_version(options.peer_python)
    if options.version is None:
        say("llama.cpp is not run: --peer-python names no interpreter that has xllamacpp")
        options.peer_python = None
    return options


def information(path: Path) -> tuple[int, int]:
    """(bytes, weights) that work on one token: all of the dense part (of an embedding that is not the head too, nothing
    to speak of), and the experts of the layers' top k."""
    index = build_index(GgufSource.open(path))
    total = 0
    for name, tensor in index.dense.items():
        if name != "embedding" or index.spec.tied_embeddings:
            total += sum(extent.length for extent in index.sections[tensor.section].extents)
    for number, experts in index.experts.items():
        section = index.sections[experts.sections[0][0]]
        total += index.spec.layers[number].top_k * sum(extent.length for extent in section.extents)
    return total, index.spec.parameters()[1]


def read_bandwidth(threads: int, seconds: float = 0.5) -> float:
    """Bytes per second at which so many threads read memory, by the best of some orders."""
    speeds = (_core.profiling.memory_read_speed(256 << 20, threads, seconds, streams) for streams in (1, 2, 4, 8))
    return max(done / taken for done, taken in speeds)


def busy() -> float:
    """Percent of the processors that others take now."""
    return float(psutil.cpu_percent(interval=2.0))


def spread(rates: Sequence[float]) -> str:
    """Mean and deviation."""
    return f"{statistics.mean(rates):.2f} ± {statistics.stdev(rates) if len(rates) > 1 else 0:.2f}"


def best_peer(found: Sequence[Contender]) -> Contender | None:
    return max((one for one in found if one.name != OURS), key=lambda one: statistics.mean(one.rates), default=None)


def preface(options: argparse.Namespace, path: Path, before: float) -> list[str]:
    facts = machine()
    lines = [
        f"{facts['date']}, {facts['processor']}, {facts['processors']} processors ({options.threads} threads), "
        f"{facts['memory'] / 1e9:.0f} GB of memory, {facts['system']}; edgemoe {_core.__version__}, "
        + (f"llama.cpp of xllamacpp {options.version}." if options.version else "llama.cpp was not run."),
        "",
        f"{path.name}, {path.stat().st_size / 1e9:.2f} GB, the same file for all; {options.repetitions} rounds, in "
        "each all contenders in turn, after one that does not count; mean ± standard deviation.",
    ]
    if before > QUIET:
        lines += ["", f"**Not a quiet machine: others took {before:.0f} % of the processors before.**"]
    return lines


def publish(options: argparse.Namespace, lines: Sequence[str], results: Mapping[str, Any]) -> None:
    _command.publish(options, "\n".join(lines) + "\n", {"machine": machine(), **results})
