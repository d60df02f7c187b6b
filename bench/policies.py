"""Which expert should leave a full memory first?

    python -m bench.policies MODEL -f TEXT [-f TEXT ...] [--tokens 700] [--percents 25,50,75] [--json FILE]
                             [--markdown FILE]

Method: the first tokens of each text are computed one by one, as if they were generated, with room for 25, 50 and 75 %
of the experts, once for each policy, without look-ahead: what is read is what the policy lacks. The hit rate is the
engine's own count, the first read of every expert included. *Belady* is the bound: a cache of the same size that knows
the future, on the same routing. Logits must have the same bits in all runs. Tokens per second are of the same runs;
they tell policies apart only where reads take long enough, and nothing else may run besides.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import edgemoe  # noqa: E402
from bench._bounds import belady_misses  # noqa: E402
from bench._command import parser as command_line  # noqa: E402
from bench._command import percentages, publish  # noqa: E402
from bench._machine import machine, say  # noqa: E402
from bench.offload import decode_groups  # noqa: E402
from edgemoe.errors import EdgemoeError  # noqa: E402
from edgemoe.options import EVICTION_POLICIES  # noqa: E402


def with_room_for(path: Path, slots: int, context: int, **options: Any) -> edgemoe.Model:
    """The model with exactly so many expert slots, however much memory they take."""
    return edgemoe.load(path, gpu="none", memory=1 << 50, expert_slots=slots, context=context, **options)


def walk(model: edgemoe.Model, tokens: Sequence[int]) -> tuple[dict[str, float], float, str]:
    """Computes `tokens` one by one: the engine's counters, seconds, and a digest of all logits."""
    digest = hashlib.sha256()
    before, begin = model.counters(), time.perf_counter()
    for position, token in enumerate(tokens):
        digest.update(model.forward([token], [position], [0], [0]).tobytes())
    seconds, after = time.perf_counter() - begin, model.counters()
    counted = {name: after[name] - before[name] for name in ("experts_requested", "experts_hit", "bytes_read")}
    return counted, seconds, digest.hexdigest()


def measure(options: argparse.Namespace, name: str, tokens: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """One entry per percentage: hit rate and tokens per second of every policy, and Belady's hit rate."""
    path, threads, context = options.model, options.threads, len(tokens) + 1
    trace = folder / f"{name}.trace"
    with edgemoe.load(path, gpu="none", memory=1 << 50, threads=threads, context=context) as model:
        layers = [layer.experts for layer in model.spec.layers]
        with model.trace(trace):
            model.logits(tokens, len(tokens) - 1)
    with edgemoe.load(path, gpu="none", memory=1 << 50, threads=threads, context=context) as model:
        _, _, expected = walk(model, tokens)
    groups, _ = decode_groups(trace, layers, 0, len(tokens))
    requested = sum(map(len, groups))
    entries = []
    for percent in options.percents:
        slots = int(sum(layers) * percent / 100)
        entry: dict[str, Any] = {"text": name, "percent": percent, "slots": slots, "policies": {}}
        for policy in EVICTION_POLICIES:
            with with_room_for(path, slots, context, threads=threads, eviction=policy, prefetch=False) as model:
                counted, seconds, digest = walk(model, tokens)
            if digest != expected:
                raise SystemExit(f"policies: {name}, {percent:g} %, {policy}: logits differ from the resident model's")
            entry["policies"][policy] = {
                "hit_rate": counted["experts_hit"] / counted["experts_requested"],
                "bytes_read_per_token": counted["bytes_read"] / len(tokens),
                "tokens_per_second": len(tokens) / seconds,
            }
        entry["belady"] = 1 - belady_misses(groups, slots) / requested
        say(f"  {name}, {percent:g} %: " + ", ".join(f"{p} {e['hit_rate']:.1%}" for p, e in entry["policies"].items()))
        entries.append(entry)
    return entries


def report(facts: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    names = list(EVICTION_POLICIES)
    lines = [
        "# Which expert leaves first",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['processors']} processors, {facts['system']}; "
        f"{facts['model']}, {facts['tokens']} tokens of each text "
        "one by one, no look-ahead. Hit rates; *tok/s* of the same runs.",
        "",
        "| text | experts held | " + " | ".join(names) + " | Belady | tok/s: " + ", ".join(names) + " |",
        "|---|---|" + "---|" * (len(names) + 2),
    ]
    for entry in entries:
        policies = entry["policies"]
        lines.append(
            f"| {entry['text']} | {entry['percent']:g} % ({entry['slots']}) | "
            + " | ".join(f"{policies[name]['hit_rate']:.1%}" for name in names)
            + f" | {entry['belady']:.1%} | "
            + ", ".join(f"{policies[name]['tokens_per_second']:.1f}" for name in names)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("policies", __doc__)
    parser.add_argument("model", type=Path, help="a pack or a GGUF file")
    parser.add_argument("-f", "--text", type=Path, action="append", required=True, dest="texts")
    parser.add_argument("--tokens", type=int, default=700, help="of each text (default: 700)")
    parser.add_argument("--percents", type=percentages, default="25,50,75", help="of the experts (default: 25,50,75)")
    options = parser.parse_args(argv)
    facts = machine() | {"model": options.model.name, "tokens": options.tokens}
    entries: list[dict[str, Any]] = []
    try:
        tokenizer = edgemoe.load_tokenizer(options.model)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            for text in options.texts:
                tokens = tokenizer.encode(text.read_text("utf-8"))[: options.tokens]
                entries += measure(options, text.stem, tokens, Path(folder))
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"policies: {error}") from None
    publish(options, report(facts, entries), {"machine": facts, "results": entries})


if __name__ == "__main__":
    main()
