"""How fast are several streams side by side, beside the same streams one after the other?

    python -m bench.streams [--model FILE | --layers 12] [--streams 1,2,4,8,16,32] [--percents 25,100] [--tokens 24]
                            [--alone 2] [--rounds 3] [--warm 6] [--json FILE] [--markdown FILE]

Method: streams of random tokens, each with a sequence of its own, are generated token by token. *Side by side*: every
pass has a row of each stream. *One after the other*: the first of these streams alone, each to its end, on the same
engine with the same memory for experts; their rate does not depend on how many more would follow. In each round one
after the other is measured, then every number of streams; a ratio is to the same round's figure, and what is printed is
the median of the rounds. Before each measurement some passes are not counted, so that the memory for experts is in the
state that such passes leave. Experts that are read, and those found in memory, are the engine's own counts. The logits
of the streams that were measured alone must have the same bits in all runs.

At 100 % everything is in memory, and what is measured is arithmetic. Without a model, one of Qwen3-30B-A3B's shape but
for the number of layers is made (tools/synthesize.py), whose routing is nearly uniform: the worst case for a cache.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench._command import parser as command_line  # noqa: E402
from bench._command import percentages, publish  # noqa: E402
from bench._machine import machine, say  # noqa: E402
from bench._rates import subject  # noqa: E402
from edgemoe.disk import reading_threads  # noqa: E402
from edgemoe.engine import Engine, plan_memory  # noqa: E402
from edgemoe.errors import EdgemoeError  # noqa: E402
from edgemoe.formats.index import ModelIndex  # noqa: E402
from edgemoe.formats.read import read_index  # noqa: E402
from edgemoe.model_files import default_cache_dir  # noqa: E402
from edgemoe.options import EngineOptions  # noqa: E402

PROMPT = 8  # tokens of each stream before the first that is measured


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one measurement. reads: experts read for a token. gap: seconds of the longest pass."""

    rate: float
    reads: float
    bytes_per_token: float
    hit_rate: float
    stall: float
    gap: float


class Streams:
    """Sequences of one engine that are generated with given tokens."""

    def __init__(self, engine: Engine, tokens: NDArray[np.int32], warm: int) -> None:
        """tokens: [streams, prompt + warm + counted]."""
        self._engine = engine
        self._tokens = tokens
        self._warm = warm
        self._ids = np.array([0, *(engine.add_sequence() for _ in range(len(tokens) - 1))], np.int32)
        self.digests: dict[int, set[str]] = {}

    def measure(self, groups: Sequence[Sequence[int]], kept: int) -> Figures:
        """Generates groups of streams one after the other, those of a group side by side. Logits of the first `kept`
        streams are remembered."""
        engine, end = self._engine, self._tokens.shape[1]
        seconds, longest, counted, total = 0.0, 0.0, 0, None
        for group in groups:
            streams = np.array(group)
            for id in self._ids[streams]:
                engine.truncate(int(id), 0)
            rows = np.repeat(self._ids[streams], PROMPT)
            places = np.tile(np.arange(PROMPT), len(streams))
            engine.forward(self._tokens[streams, :PROMPT].reshape(-1), places, rows, [])
            digests = {stream: hashlib.sha256() for stream in group if stream < kept}
            wanted = np.arange(len(streams))
            for place in range(PROMPT, end):
                if place == PROMPT + self._warm:
                    before = engine.counters()
                begin = time.perf_counter()
                logits = engine.forward(
                    self._tokens[streams, place], np.full(len(streams), place), self._ids[streams], wanted
                )
                passed = time.perf_counter() - begin
                for row, stream in enumerate(group):
                    if stream in digests:
                        digests[stream].update(logits[row].tobytes())
                if place >= PROMPT + self._warm:
                    seconds += passed
                    counted += len(streams)
                    longest = max(longest, passed)
            change = engine.counters() - before
            total = change if total is None else total + change
            for stream, digest in digests.items():
                self.digests.setdefault(stream, set()).add(digest.hexdigest())
        assert total is not None
        return Figures(
            rate=counted / seconds,
            reads=total.sections_read / counted,
            bytes_per_token=total.bytes_read / counted,
            hit_rate=total.experts_hit / max(total.experts_requested, 1),
            stall=total.stall_seconds / seconds,
            gap=longest,
        )


def measure(options: argparse.Namespace, index: ModelIndex, percent: float) -> list[dict[str, Any]]:
    """One entry for each number of streams."""
    most, length = max(options.streams), PROMPT + options.warm + options.tokens
    chosen = EngineOptions(
        threads=options.threads, context=length, sequences=most, positions=most * length, chunk=max(64, most)
    )
    experts = plan_memory(index, chosen).experts
    slots = max(int(experts * percent / 100), plan_memory(index, chosen).minimum_slots)
    readers = reading_threads(index.path, plan_memory(index, chosen).slot, default_cache_dir())
    chosen = replace(chosen, expert_slots=slots, readers=readers, prefetch=options.prefetch, eviction=options.eviction)
    index = replace(index, spec=index.spec.for_context(length))
    engine = Engine(index, chosen)
    with contextlib.closing(engine):
        tokens = np.random.default_rng(1).integers(0, index.spec.vocab_size, (most, length)).astype(np.int32)
        streams = Streams(engine, tokens, options.warm)
        alone = min(options.alone, most)
        streams.measure([range(most)], 0)  # every expert is read, and memory for the widest pass is there
        rounds: list[dict[int, Figures]] = []
        for number in range(options.rounds):
            found = {0: streams.measure([[stream] for stream in range(alone)], alone)}
            for count in options.streams:
                found[count] = streams.measure([range(count)], alone)
            rounds.append(found)
            rates = ", ".join(f"{count or 'alone'}: {one.rate:.2f}" for count, one in found.items())
            say(f"  {percent:g} %, round {number + 1}: tok/s {rates}")
        if any(len(digests) > 1 for digests in streams.digests.values()):
            raise SystemExit("streams: logits depend on who else is computed")

    def median(count: int, name: str) -> float:
        return statistics.median(getattr(found[count], name) for found in rounds)

    entries = []
    for count in (0, *options.streams):
        ratios = [found[count].rate / found[0].rate for found in rounds]
        reads = [found[count].reads / found[0].reads if found[0].reads else 1.0 for found in rounds]
        entry: dict[str, Any] = {"percent": percent, "slots": slots, "streams": count, "readers": readers}
        for name in Figures.__slots__:
            entry[name] = median(count, name)
        entry["ratio"], entry["reads_ratio"] = statistics.median(ratios), statistics.median(reads)
        entry["ratios"] = ratios
        entries.append(entry)
    return entries


def report(facts: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Streams side by side",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['processors']} processors ({facts['threads']} threads), "
        f"{facts['system']}; {facts['model']}: {facts['shape']}. {facts['tokens']} tokens of each stream after "
        f"{facts['warm']} that do not count, {facts['rounds']} rounds, medians.",
        "",
        "| experts held | streams | tok/s together | beside one after the other | reads a token | beside | hits "
        "| MB a token | stall | longest pass |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        spread = f" ({min(e['ratios']):.2f} to {max(e['ratios']):.2f})" if e["streams"] else ""
        lines.append(
            f"| {e['percent']:g} % ({e['slots']}) | {e['streams'] or 'one after the other'} | {e['rate']:.2f} "
            f"| {e['ratio']:.2f}{spread} | {e['reads']:.1f} | {e['reads_ratio']:.2f} | {e['hit_rate']:.1%} "
            f"| {e['bytes_per_token'] / 1e6:.1f} | {e['stall']:.0%} | {e['gap'] * 1e3:.0f} ms |"
        )
    return "\n".join(lines) + "\n"


def counts(text: str) -> list[int]:
    """The type of an option such as "1,2,4"."""
    values = [int(value) for value in text.split(",")]
    if not values or min(values) < 1:
        raise ValueError(text)
    return values


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("streams", __doc__)
    parser.add_argument("--model", type=Path, help="a pack or a GGUF file (default: a synthetic one is made)")
    parser.add_argument("--layers", type=int, default=12, help="of the synthetic model (default: 12)")
    parser.add_argument("--work", type=Path, help="folder for the synthetic model (default: this one)")
    parser.add_argument("--streams", type=counts, default="1,2,4,8,16,32", help="default: 1,2,4,8,16,32")
    parser.add_argument("--percents", type=percentages, default="25,100", help="of the experts (default: 25,100)")
    parser.add_argument("--tokens", type=int, default=24, help="of each stream (default: 24)")
    parser.add_argument("--warm", type=int, default=6, help="tokens that do not count (default: 6)")
    parser.add_argument("--alone", type=int, default=2, help="streams that are measured alone (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--eviction", default="next_use", help="default: next_use")
    parser.add_argument("--no-prefetch", dest="prefetch", action="store_false", help="no look-ahead")
    options = parser.parse_args(argv)
    for name in ("layers", "tokens", "alone", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be positive")
    entries: list[dict[str, Any]] = []
    try:
        with subject(options, "emoe") as path:
            index = read_index(path)
            layer = max(index.spec.layers, key=lambda layer: layer.experts)
            facts = machine() | {
                "model": path.name,
                "shape": f"{len(index.spec.layers)} layers, {layer.experts} experts, {layer.top_k} of them for a token",
                **{name: getattr(options, name) for name in ("threads", "tokens", "warm", "rounds")},
            }
            for percent in options.percents:
                entries += measure(options, index, percent)
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"streams: {error}") from None
    publish(options, report(facts, entries), {"machine": facts, "results": entries})


if __name__ == "__main__":
    main()
