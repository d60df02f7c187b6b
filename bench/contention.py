"""What is left of the rate of generation when another process wants a processor?

    python -m bench.contention [--model GGUF | --layers 4] [--peer-python PYTHON] [--json FILE] [--markdown FILE]

As many threads as processors generate while one more process runs an empty loop. A share of n / (n + 1) is what a fair
system leaves to n threads of n + 1; a pool whose threads wait for each other spinning keeps far less. Quiet rounds and
rounds beside the loop take turns, and so do edgemoe and llama.cpp's modes.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench._machine import say
from bench._rates import busy, contenders, parse, parser, preface, publish, spread, subject
from edgemoe.errors import EdgemoeError


@contextlib.contextmanager
def busy_loop() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it runs
        yield
    finally:
        process.kill()
        process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parser("contention", __doc__, 64)
    options.set_defaults(layers=4)
    options = parse(options, argv)
    beside: dict[str, list[float]] = {}
    try:
        with subject(options) as path:
            before = busy()
            with contenders(options, path, options.tokens + 8) as found:
                for contender in found:
                    contender.rate(generate=options.tokens)
                for number in range(options.repetitions):
                    for contender in found:
                        contender.rates.append(contender.rate(generate=options.tokens))
                        with busy_loop():
                            beside.setdefault(contender.name, []).append(contender.rate(generate=options.tokens))
                        say(
                            f"{number + 1}: {contender.name} {contender.rates[-1]:.2f} tok/s, "
                            f"{beside[contender.name][-1]:.2f} beside a loop"
                        )
            lines = ["# Generation beside a busy process", "", *preface(options, path, before), ""]
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"contention: {error}") from None
    fair = options.threads / (options.threads + 1)
    lines += [
        f"{options.threads} threads and one busy loop: a fair share is {100 * fair:.0f} %.",
        "",
        f"| tg{options.tokens} | quiet, tok/s | beside a loop, tok/s | kept |",
        "|---|---|---|---|",
    ]
    kept = {}
    for one in found:
        kept[one.name] = statistics.mean(beside[one.name]) / statistics.mean(one.rates)
        lines.append(
            f"| {one.name} | {spread(one.rates)} | {spread(beside[one.name])} | {100 * kept[one.name]:.0f} % |"
        )
    results = {
        "tokens": options.tokens,
        "busy_percent_before": before,
        "fair_share": fair,
        "kept": kept,
        "tokens_per_second": {one.name: one.rates for one in found},
        "tokens_per_second_beside": beside,
    }
    publish(options, lines, results)


if __name__ == "__main__":
    main()
