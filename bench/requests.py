"""How fast are requests that come at once, beside the same requests one after the other?

    python -m bench.requests [--model FILE] [--streams 1,2,4,8,16,32] [--percent 25] [--tokens 64] [--rounds 3]
                             [--prompt 512] [--json FILE] [--markdown FILE]

Everything goes through `edgemoe.load` and asynchronous generations, as a server does it; bench/streams.py measures the
engine alone. Method:

* Requests are prompts of 8 random tokens, each with its own seed, TOKENS tokens long. *At once*: N of them on one event
  loop. *One after the other*: the first of these, each alone to its end, in the same model with the same memory for
  experts. The rate is all tokens by the time from the first request's begin to the last one's end, prompts included. In
  each round one after the other is measured, then every N; a ratio is to the same round's figure, and the median of the
  rounds is printed. A first round is not counted: the scheduler measures then whether streams go faster side by side.
* Experts read for a token are the engine's own counts.
* The time to the first token of a request with a prompt of PROMPT tokens is taken alone and while another one decodes;
  median of the rounds.
* A request's text must be the same in all runs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import edgemoe  # noqa: E402
from bench._command import parser as command_line  # noqa: E402
from bench._command import publish  # noqa: E402
from bench._machine import machine, say  # noqa: E402
from bench.streams import counts  # noqa: E402
from edgemoe.errors import EdgemoeError  # noqa: E402
from edgemoe.model_files import bundled_model  # noqa: E402

BEGIN = 8
"""Tokens of a prompt."""


class Requests:
    """What is asked of a model, and what came of it."""

    def __init__(self, model: edgemoe.Model, tokens: int) -> None:
        self._model = model
        self._tokens = tokens
        self._texts: dict[int, str] = {}

    def _prompt(self, number: int, length: int = BEGIN) -> list[int]:
        rng = np.random.default_rng(number)
        return [int(token) for token in rng.integers(0, self._model.spec.vocab_size, length)]

    async def _one(self, number: int) -> None:
        options: dict[str, Any] = {"max_tokens": self._tokens, "seed": number, "ignore_eos": True}
        generation = self._model.generate(self._prompt(number), **options)
        text = "".join([piece async for piece in generation])
        if self._texts.setdefault(number, text) != text:
            raise SystemExit(f"requests: the text of request {number} depends on the others")

    def run(self, groups: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Tokens per second, and experts read for a token, of groups one after the other."""
        before, begin = self._model.engine.counters(), time.perf_counter()
        total = 0
        for group in groups:

            async def together(group: Sequence[int] = group) -> None:
                await asyncio.gather(*(self._one(number) for number in group))

            asyncio.run(together())
            total += len(group) * self._tokens
        seconds = time.perf_counter() - begin
        return total / seconds, (self._model.engine.counters() - before).sections_read / total

    def first_token(self, length: int, number: int, beside: bool) -> float:
        """Seconds to the first token of a request, alone or while another one decodes."""

        async def measure() -> float:
            other = None
            if beside:
                other = self._model.generate(self._prompt(number + 1), ignore_eos=True, max_tokens=10_000)

                async def read(generation: edgemoe.Generation) -> None:
                    async for _ in generation:
                        pass

                reader = asyncio.create_task(read(other))
                while other.result.generated_tokens < BEGIN:  # of a synthetic model, few tokens have a text
                    await asyncio.sleep(0.01)
            begin = time.perf_counter()
            generation = self._model.generate(self._prompt(number, length), ignore_eos=True, max_tokens=1)
            async for _ in generation:
                pass
            seconds = time.perf_counter() - begin
            if other is not None:
                other.close()
                await reader
            return seconds

        return asyncio.run(measure())


def measure(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    most = max(options.streams)
    context = max(most * (BEGIN + options.tokens + 64), 2 * options.prompt + 512)
    loading: dict[str, Any] = {"threads": options.threads, "parallel": most, "queue": most}
    with edgemoe.load(path, gpu="none", threads=options.threads, context=256) as model:
        slots = max(int(model.budget.all_slots * options.percent / 100), 1)
        context = min(context, model.spec.context)
    with edgemoe.load(path, gpu="none", context=context, expert_slots=slots, **loading) as model:
        requests = Requests(model, options.tokens)
        rounds: list[dict[int, tuple[float, float]]] = []
        for number in range(options.rounds + 1):
            found = {0: requests.run([[one] for one in range(min(options.alone, most))])}
            for count in options.streams:
                found[count] = requests.run([range(count)])
            rates = ", ".join(f"{count or 'alone'}: {rate:.2f}" for count, (rate, _) in found.items())
            say(f"  round {number}: tok/s {rates}")
            if number:
                rounds.append(found)
        waits: dict[bool, list[float]] = {False: [], True: []}
        for number in range(options.rounds):
            for beside in waits:
                waits[beside].append(requests.first_token(options.prompt, 100 * (number + 1) + 10 * beside, beside))
    entries = []
    for count in (0, *options.streams):
        ratios = [found[count][0] / found[0][0] for found in rounds]
        reads = [found[count][1] / found[0][1] if found[0][1] else 1.0 for found in rounds]
        entries.append(
            {
                "streams": count,
                "rate": statistics.median(found[count][0] for found in rounds),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "reads": statistics.median(found[count][1] for found in rounds),
                "reads_ratio": statistics.median(reads),
            }
        )
    alone, beside = (statistics.median(waits[kind]) for kind in (False, True))
    return {"entries": entries, "slots": slots, "first_token": {"alone": alone, "beside": beside}}


def report(facts: dict[str, Any], found: dict[str, Any]) -> str:
    first = found["first_token"]
    lines = [
        "# Requests at once",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['processors']} processors ({facts['threads']} threads), "
        f"{facts['system']}; {facts['model']}, {facts['percent']:g} % of its experts in memory ({found['slots']}). "
        f"{facts['tokens']} tokens a request, {facts['rounds']} rounds, medians.",
        "",
        "| requests at once | tok/s together | beside one after the other | experts read a token | beside |",
        "|---|---|---|---|---|",
    ]
    for e in found["entries"]:
        spread = f" ({min(e['ratios']):.2f} to {max(e['ratios']):.2f})" if e["streams"] else ""
        lines.append(
            f"| {e['streams'] or 'one after the other'} | {e['rate']:.2f} | {e['ratio']:.2f}{spread} "
            f"| {e['reads']:.1f} | {e['reads_ratio']:.2f} |"
        )
    lines += [
        "",
        f"First token after a prompt of {facts['prompt']} tokens: {first['alone']:.2f} s alone, "
        f"{first['beside']:.2f} s while another request decodes ({first['beside'] / first['alone']:.2f}x).",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("requests", __doc__)
    parser.add_argument("--model", type=Path, help="a pack or a GGUF file (default: the bundled model)")
    parser.add_argument("--streams", type=counts, default="1,2,4,8,16,32", help="default: 1,2,4,8,16,32")
    parser.add_argument("--percent", type=float, default=25.0, help="of the experts in memory (default: 25)")
    parser.add_argument("--tokens", type=int, default=64, help="of each request (default: 64)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens, for the first token (default: 512)")
    parser.add_argument("--alone", type=int, default=4, help="requests one after the other (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    options = parser.parse_args(argv)
    path = options.model or bundled_model()
    names = ("threads", "percent", "tokens", "prompt", "rounds")
    facts = machine() | {"model": path.name, **{name: getattr(options, name) for name in names}}
    try:
        found = measure(options, path)
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"requests: {error}") from None
    publish(options, report(facts, found), {"machine": facts, **found})


if __name__ == "__main__":
    main()
