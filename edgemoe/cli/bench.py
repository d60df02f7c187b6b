"""Measure how fast a model computes prompts and generates."""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli._terminal import note
from edgemoe.cli.options import model_options, open_model

if TYPE_CHECKING:
    from edgemoe.model import Model

MIB = 1 << 20


def counts(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """Callback of an option that lists numbers of tokens: 512 or 128,512; 0 for none."""
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise click.BadParameter(f"{value!r} is not a number of tokens, or several separated by commas", ctx, param)
    return list(dict.fromkeys(number for number in numbers if number))


@click.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="PATH", help="The same as MODEL.")
@click.option(
    "-p",
    "--n-prompt",
    "prompts",
    default="512",
    show_default=True,
    callback=counts,
    metavar="N,...",
    help="Tokens of a prompt; 0 for no such test.",
)
@click.option(
    "-n",
    "--n-gen",
    "generations",
    default="128",
    show_default=True,
    callback=counts,
    metavar="N,...",
    help="Tokens to generate; 0 for no such test.",
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(min=1), default=5, show_default=True, metavar="N", help="Runs of a test."
)
@model_options
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "json", "csv"]),
    default="md",
    show_default=True,
    help="The form of the results, on stdout.",
)
def command(
    model: str | None,
    model_option: str | None,
    prompts: list[int],
    generations: list[int],
    repetitions: int,
    output: str,
    **options: Any,
) -> None:
    """Measure how fast a model computes prompts (pp) and generates (tg), as llama-bench does.

    pp512: 512 random tokens in one call, into an empty context. tg128: 128 random tokens one by one, from an empty
    context. Nothing is sampled. Before the runs that count there is one that does not: of a prompt all of it, of
    generation one token. Given are mean and standard deviation; where experts are read from disk, also the share of
    those that were in memory and what was read for a token.
    """
    if model is not None and model_option is not None:
        raise click.UsageError("the model is given twice, as MODEL and with -m")
    tests = [("pp", count) for count in prompts] + [("tg", count) for count in generations]
    if not tests:
        raise click.UsageError("there is nothing to measure: -p and -n are both 0")
    with open_model(model or model_option, context=max(count for _, count in tests), **options) as engine:
        results = []
        for kind, count in tests:
            note(f"{kind}{count}: one run that does not count, then {repetitions}")
            results.append(_measure(engine, kind, count, repetitions))
        facts = _facts(engine)
    rows = [facts | result for result in results]
    click.echo({"md": _markdown, "json": _json, "csv": _csv}[output](rows), nl=False)


def _measure(model: Model, kind: str, count: int, repetitions: int) -> dict[str, Any]:
    import numpy as np

    tokens = np.random.default_rng(count).integers(0, model.spec.vocab_size, count, np.int32)
    places = np.arange(count, dtype=np.int32)
    zeros = np.zeros(count, np.int32)

    def prompt(_: int) -> None:
        model.forward(tokens, places, zeros, [count - 1])

    def generate(limit: int) -> None:
        for place in range(limit):
            model.forward(tokens[place : place + 1], places[place : place + 1], [0], [0])

    run: Callable[[int], None] = prompt if kind == "pp" else generate
    empty = model.snapshot()
    run(1)
    before, seconds = model.counters(), []
    for _ in range(repetitions):
        model.restore(empty)
        begin = time.perf_counter()
        run(count)
        seconds.append(time.perf_counter() - begin)
    model.restore(empty)
    stats = model.counters()
    requested, hit, read = (stats[key] - before[key] for key in ("experts_requested", "experts_hit", "bytes_read"))
    rates = [count / value for value in seconds]
    return {
        "test": f"{kind}{count}",
        "repetitions": repetitions,
        "avg_ts": statistics.mean(rates),
        "stddev_ts": statistics.stdev(rates) if repetitions > 1 else 0.0,
        "samples_ts": rates,
        "hit_rate": hit / requested if requested else None,
        "mib_per_token": read / (count * repetitions) / MIB,
    }


def _facts(model: Model) -> dict[str, Any]:
    path = Path(model.path)
    return {
        "model": path.stem,
        "model_size": path.stat().st_size,
        "model_n_params": model.spec.parameters()[0],
        "isa": model.isa,
        "threads": model.threads,
        "memory": model.budget.limit,
        "quality": model.quality,
        "device": "" if model.device is None else model.device.name,
        "gpu_layers": 0 if model.device is None else model.device.budget.layers,
        "gpu_experts": 0 if model.device is None else model.device.budget.slots,
    }


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    streamed = any(row["mib_per_token"] for row in rows)
    lossy = any(row["quality"] != "exact" for row in rows)
    placed = any(row.get("device") for row in rows)
    texts = ["model", "size", "params", "isa", "threads", "memory", *(["quality"] if lossy else [])]
    texts += ["device", "ngl", "experts on it"] if placed else []
    numbers = ["test", "t/s", *(["experts in memory", "MiB/token"] if streamed else [])]
    lines = [f"| {' | '.join(texts + numbers)} |", "|---" * len(texts) + "|---:" * len(numbers) + "|"]
    for row in rows:
        cells = [
            row["model"],
            f"{row['model_size'] / (1 << 30):.2f} GiB",
            f"{row['model_n_params'] / 1e9:.2f} B",
            row["isa"],
            str(row["threads"]),
            f"{row['memory'] / 1e9:.2f} GB",
            *([row["quality"]] if lossy else []),
            *([row["device"], str(row["gpu_layers"]), str(row["gpu_experts"])] if placed else []),
            row["test"],
            f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
        ]
        if streamed:
            cells += ["-" if row["hit_rate"] is None else f"{100 * row['hit_rate']:.1f} %"]
            cells += [f"{row['mib_per_token']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _json(rows: Sequence[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=1) + "\n"


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name != "samples_ts"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
