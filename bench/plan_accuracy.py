"""How far from what happens is the speed that `edgemoe plan` foretells?

    python -m bench.plan_accuracy MODEL [--limits 25,50,75] [--rounds 3] [--json FILE] [--markdown FILE]

Method:

* The routing is traced on one text of the model's own; what is measured runs on another.
* Right before the runs disk and memory are timed: the rate at which edgemoe reads while it computes 16 tokens of the
  traced text (probes of a virtual disk found 1.3 GB/s where the runs had 1.8), and `edgemoe doctor`'s measure of the
  memory. The predictions are made and written down: `plan_model` with that trace, for a context of the runs, at each
  limit.
* Then come the runs, interleaved (25, 50, 75, 25, ... %): a process of its own in a memory cgroup of exactly that size,
  swap off, computes a prompt and then tokens one by one, as bench/offload.py does.
* The error of a run is (measured - predicted) / measured; the result is the median of its absolute values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench._cage import drop_cache  # noqa: E402
from bench._command import Children, can_cage, percentages, publish  # noqa: E402
from bench._command import parser as command_line  # noqa: E402
from bench._machine import machine, say  # noqa: E402
from bench.offload import seconds_per_token  # noqa: E402
from edgemoe import _core  # noqa: E402
from edgemoe.errors import EdgemoeError  # noqa: E402
from edgemoe.planning import plan_model  # noqa: E402
from edgemoe.profiling import read_trace  # noqa: E402

TRACED_TEXT = "To install the program, you need"
MEASURED_TEXT = "The old man looked at the sea and"
PROBE_TOKENS = 16


class Bench:
    def __init__(self, options: argparse.Namespace, caged: bool) -> None:
        self.options = options
        self.context = options.prompt_tokens + options.tokens + 8
        self.children = Children("plan_accuracy", options.threads, self.context, caged)

    def job(self, name: str, cage: int | None = None, **options: Any) -> dict[str, Any]:
        """Of the model, in a cage of so many bytes if that is given. Raises SystemExit if it fails."""
        return self.children.job(name, cage, path=str(self.options.model), **options)

    def sequence(self, text: str, trace: Path) -> list[int]:
        count = self.options.prompt_tokens + self.options.tokens
        tokens: list[int] = self.job("sequence", text=text, tokens=count, trace=str(trace))["tokens"]
        return tokens

    def speeds(self, tokens: Sequence[int], limit: int) -> tuple[float, float]:
        """Bytes per second of the disk and of the memory, now."""
        prompt, rest = tokens[: self.options.prompt_tokens], tokens[self.options.prompt_tokens :][:PROBE_TOKENS]
        how = {"memory": limit, "eviction": "next_use", "prefetch": True, "prompt": prompt, "tokens": rest}
        drop_cache(self.options.model)
        decode = self.job("decode", cage=limit, **how)["decode"]
        done, seconds = _core.profiling.memory_read_speed(256 << 20, self.options.threads, 1.0)
        return decode["bytes_read"] / decode["read_seconds"], done / seconds

    def measure(self, folder: Path) -> dict[str, Any]:
        other = self.sequence(TRACED_TEXT, folder / "trace")
        trace = read_trace(folder / "trace", weights=False)
        tokens = self.sequence(MEASURED_TEXT, folder / "other")
        everything = plan_model(self.options.model, memory=1 << 50, context=self.context)
        limits = [
            everything.everything - int((1 - percent / 100) * everything.experts) for percent in self.options.limits
        ]
        disk, bandwidth = self.speeds(other, limits[len(limits) // 2])
        predictions = []
        for limit in limits:
            plan = plan_model(
                self.options.model, memory=limit, context=self.context, trace=trace, disk=disk, bandwidth=bandwidth
            )
            predictions.append(next(speed for speed in plan.speeds if speed.memory == limit))
        facts = {
            "machine": machine() | {"caged": self.children.caged, "threads": self.options.threads},
            "model": self.options.model.name,
            "disk_bytes_per_second": disk,
            "memory_bytes_per_second": bandwidth,
            "predictions": [
                {
                    "percent": percent,
                    "limit": limit,
                    "hit_rate": speed.hit_rate[0],
                    "bytes_per_token": speed.bytes_per_token[0],
                    "tokens_per_second": speed.expected,
                }
                for percent, limit, speed in zip(self.options.limits, limits, predictions, strict=True)
            ],
        }
        # Written before the first run.
        say(json.dumps(facts["predictions"]))
        if self.options.json:
            self.options.json.write_text(json.dumps(facts, indent=1) + "\n")
        prompt, rest = tokens[: self.options.prompt_tokens], tokens[self.options.prompt_tokens :]
        runs = []
        for number in range(self.options.rounds):
            for percent, limit, speed in zip(self.options.limits, limits, predictions, strict=True):
                drop_cache(self.options.model)
                how = {"memory": limit, "eviction": "next_use", "prefetch": True, "prompt": prompt, "tokens": rest}
                outcome = self.job("decode", cage=limit, **how)
                measured = 1 / seconds_per_token(outcome)
                decode = outcome["decode"]
                hit_rate = decode["experts_hit"] / decode["experts_requested"]
                assert speed.expected is not None
                error = (measured - speed.expected) / measured
                runs.append(
                    {
                        "round": number,
                        "percent": percent,
                        "tokens_per_second": measured,
                        "hit_rate": hit_rate,
                        "error": error,
                    }
                )
                say(f"  {percent:g} %: {measured:.2f} tok/s, foretold {speed.expected:.2f} ({error:+.0%})")
        return facts | {
            "runs": runs,
            "median_absolute_error": statistics.median(abs(entry["error"]) for entry in runs),
        }


def report(result: dict[str, Any]) -> str:
    facts = result["machine"]
    lines = [
        "# How far the plan is from what happens",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['threads']} threads, {facts['system']}; {result['model']}, "
        f"disk {result['disk_bytes_per_second'] / 1e6:.0f} MB/s, "
        f"memory {result['memory_bytes_per_second'] / 1e9:.1f} GB/s, "
        "both measured right before the predictions and these before the runs. "
        + ("Runs are caged, swap off." if facts["caged"] else "**Runs are not caged.**"),
        "",
        "| held | limit | foretold: hit rate | MB/token | tok/s | measured: hit rate | tok/s of each run | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for foretold in result["predictions"]:
        runs = [entry for entry in result["runs"] if entry["percent"] == foretold["percent"]]
        lines.append(
            f"| {foretold['percent']:g} % | {foretold['limit'] / 1e9:.2f} GB | {foretold['hit_rate']:.1%} | "
            f"{foretold['bytes_per_token'] / 1e6:.0f} | {foretold['tokens_per_second']:.2f} | "
            f"{statistics.fmean(entry['hit_rate'] for entry in runs):.1%} | "
            f"{', '.join(format(entry['tokens_per_second'], '.2f') for entry in runs)} | "
            f"{', '.join(format(entry['error'], '+.0%') for entry in runs)} |"
        )
    lines += [
        "",
        f"Median of the absolute errors of {len(result['runs'])} runs: {result['median_absolute_error']:.1%}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("plan_accuracy", __doc__)
    parser.add_argument("model", type=Path, help="a pack or a GGUF file, on the disk to measure")
    parser.add_argument("--limits", type=percentages, default="25,50,75", help="of the experts (default: 25,50,75)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args(argv)
    bench = Bench(options, can_cage())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            result = bench.measure(Path(folder))
        except (EdgemoeError, OSError) as error:
            raise SystemExit(f"plan_accuracy: {error}") from None
    publish(options, report(result), result)


if __name__ == "__main__":
    main()
