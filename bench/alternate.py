"""Is one state of the program as fast as another?

    python -m bench.alternate OLD_CHECKOUT NEW_CHECKOUT [--models DIR] [--inflate FOLDER] [--rounds 15] [--only TEXT]
                              [--json FILE] [--markdown FILE]

Both are checkouts that are built in place. Method:

* Every measurement is a process of its own that imports one checkout's package (bench/_side.py). In each round each
  measurement runs in both checkouts, one right after the other; in every other round the other one comes first. What
  disturbs the machine for a while disturbs both.
* The figure is the ratio new / old of the rates within a round; its median over all rounds, and a 95 % interval of that
  median by the bootstrap (10,000 samples of the rounds, with replacement). More than 1: the new one is faster.
* What was computed (the text, the last logits) must be the same in all runs of a measurement, unless --changed says
  that bits may differ.
* Measured are: generation, of the bundled model, of a synthetic one (layers of Qwen3-30B-A3B's shape) and of a nested
  pack in exact mode, everything in memory; prompts of 512 tokens of the synthetic model and of the nested pack; the
  generation of an inflated model with 25 % of its experts in memory, in the same number of bytes for both; the time to
  import the package, and from the start of `edgemoe run -n 1` to its first character.

FOLDER: a trained small Qwen3-MoE in Hugging Face form, which is widened (tools/inflate.py) for the measurements of an
inflated model and of a nested pack; without it the bundled model, which is small, stands in for both. DIR: models that
are made stay there; without it they are deleted in the end.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench._cage import drop_cache  # noqa: E402
from bench._command import parser as command_line  # noqa: E402
from bench._command import publish  # noqa: E402
from bench._machine import machine, say  # noqa: E402
from edgemoe.convert import convert  # noqa: E402
from edgemoe.errors import EdgemoeError  # noqa: E402
from edgemoe.quantize.nested_experts import NestedOptions  # noqa: E402
from tools.inflate import InflatedModel  # noqa: E402
from tools.model_files import write_pack  # noqa: E402
from tools.synthesize import SyntheticModel  # noqa: E402

LEVELS = (2, 3, 4)
HIDDEN_TIMES, FFN_TIMES = 8, 8
SHARE = 0.25
"""Of the experts, where they are read from disk."""
CONTEXT = 640
SAMPLES = 10_000
QUIET = 5.0
"""Percent of the processors that others may take."""


@dataclass(slots=True)
class Measurement:
    """job: what `bench/_side.py` is asked for. rates: of each round, (old, new)."""

    name: str
    job: dict[str, Any]
    rates: list[tuple[float, float]] = field(default_factory=list)
    results: set[str] = field(default_factory=set)

    @property
    def ratios(self) -> list[float]:
        return [new / old for old, new in self.rates]


@dataclass(frozen=True, slots=True)
class Models:
    bundled: Path
    synthetic: Path
    inflated: Path
    nested: Path


def make_models(folder: Path, inflate: Path | None) -> Models:
    """Those that are not there yet."""
    bundled = next((ROOT / "models").glob("*.emoe"))
    synthetic, inflated, nested = (folder / f"{name}.emoe" for name in ("synthetic", "inflated", "nested"))
    if not synthetic.exists():
        say(f"writing {synthetic}")
        write_pack(SyntheticModel(layers=4), synthetic, 4, 4)
    if inflate is None:
        return Models(bundled, synthetic, bundled, bundled)
    if not inflated.exists():
        say(f"writing {inflated}")
        write_pack(InflatedModel(inflate, HIDDEN_TIMES, FFN_TIMES), inflated, 4, 8)
    if not nested.exists():
        small = folder / "small.emoe"
        say(f"quantizing {inflate}, and writing {nested}")
        if not small.exists():
            # Without calibration, which takes minutes and changes no speed.
            convert(inflate, small, nested=NestedOptions(levels=LEVELS, calibrate=False))
        write_pack(InflatedModel(inflate, HIDDEN_TIMES, FFN_TIMES, small), nested, 4, 8)
    return Models(bundled, synthetic, inflated, nested)


def measurements(models: Models, options: argparse.Namespace) -> list[Measurement]:
    common = {"threads": options.threads, "context": CONTEXT}

    def of(name: str, path: Path, job: str, **more: Any) -> Measurement:
        return Measurement(name, {"job": job, "path": str(path), **common, **more})

    held: dict[str, Any] = {"memory": None, "repeats": 3}
    found = [
        of("generation, bundled model", models.bundled, "generate", tokens=256, **held),
        of("generation, synthetic model", models.synthetic, "generate", tokens=64, **held),
        of("generation, nested pack, exact", models.nested, "generate", tokens=96, **held),
        of("prompt of 512, synthetic model", models.synthetic, "prompt", tokens=512, repeats=2),
        of("prompt of 512, nested pack, exact", models.nested, "prompt", tokens=512, repeats=2),
        of("generation, 25 % of the experts", models.inflated, "generate", tokens=96, repeats=1),
        of("import edgemoe", models.bundled, "start", repeats=5),
        of("edgemoe run -n 1, to the first character", models.bundled, "first_token", repeats=5),
    ]
    found = [one for one in found if options.only in one.name]
    for one in found:
        if one.job["job"] == "generate" and "memory" not in one.job:
            asked = {"job": "limit", "path": one.job["path"], **common, "share": SHARE}
            one.job["memory"] = side(options.old, asked)["limit"]
    return found


def side(checkout: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a job with a checkout's package. Raises SystemExit if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, str(ROOT / "bench" / "_side.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir())
    if done.returncode:
        raise SystemExit(f"alternate: {checkout}: {job['job']}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if Path(found["package"]) != checkout:
        raise SystemExit(f"alternate: {checkout} holds no package that is built: {found['package']} was run")
    return found


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median and the bounds of its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(np.asarray(ratios), (SAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return statistics.median(ratios), float(low), float(high)


def table(result: Mapping[str, Any]) -> str:
    facts = result["machine"]
    lines = [
        "# Two states of the program, in turns",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['processors']} processors ({facts['threads']} threads), "
        f"{facts['system']}. {result['new']} beside {result['old']}, {result['rounds']} rounds. In each round every "
        "measurement ran in both, one right after the other, each in a process of its own, the order changing from "
        "round to round. The ratio is new / old within a round: its median, and the median's 95 % bootstrap interval. "
        "More than 1: the new one is faster.",
        "",
        "| | old | new | ratio | interval | rounds from ... to |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        old, new = (statistics.median(pair[i] for pair in row["rates"]) for i in (0, 1))
        figures = [f"{old:.2f} tok/s", f"{new:.2f} tok/s"]
        if row["job"] in ("start", "first_token"):
            figures = [f"{1000 / old:.0f} ms", f"{1000 / new:.0f} ms"]
        median, low, high = row["ratio"]
        ratios = [new / old for old, new in row["rates"]]
        lines.append(
            f"| {row['name']} | {' | '.join(figures)} | **{median:.3f}** | {low:.3f} to {high:.3f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    if result["busy"] > QUIET:
        lines += ["", f"**Not a quiet machine**: others took {result['busy']:.0f} % of the processors before."]
    return "\n".join(lines) + "\n"


def commit(checkout: Path) -> str:
    """Its name in git, or its path."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=7"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else str(checkout)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("alternate", __doc__)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where models are kept (default: a new folder)")
    parser.add_argument("--inflate", type=Path, metavar="FOLDER", help="a trained small Qwen3-MoE")
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--only", default="", metavar="TEXT", help="measurements whose names contain it")
    parser.add_argument("--changed", action="store_true", help="what is computed may differ")
    options = parser.parse_args(argv)
    options.old, options.new = options.old.resolve(), options.new.resolve()
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    with contextlib.ExitStack() as stack:
        folder = options.models
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd())))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = measurements(make_models(folder.resolve(), options.inflate), options)
        except (EdgemoeError, OSError) as error:
            raise SystemExit(f"alternate: {error}") from None
        busy = float(psutil.cpu_percent(interval=2.0))
        for number in range(options.rounds):
            for one in found:
                rates = {}
                for checkout in (options.old, options.new)[:: -1 if number % 2 else 1]:
                    drop_cache(Path(one.job["path"]))
                    report = side(checkout, one.job)
                    rates[checkout] = float(report["rate"])
                    one.results.add(report["result"])
                if len(one.results) > 1 and not options.changed:
                    raise SystemExit(f"alternate: {one.name}: the two do not compute the same")
                one.rates.append((rates[options.old], rates[options.new]))
                old, new = one.rates[-1]
                say(f"{number + 1}: {one.name}: {old:.2f}, {new:.2f}: {new / old:.3f}")
    result = {
        "machine": machine() | {"threads": options.threads},
        "old": commit(options.old),
        "new": commit(options.new),
        "rounds": options.rounds,
        "busy": busy,
        "rows": [
            {"name": one.name, "job": one.job["job"], "rates": one.rates, "ratio": interval(one.ratios)}
            for one in found
        ],
    }
    publish(options, table(result), result)


if __name__ == "__main__":
    main()
