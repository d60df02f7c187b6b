"""How fast does a model generate in a fraction of the memory it needs, beside the hardware's limit and llama.cpp?

    python -m bench.offload --work DIR [--synthetic LAYERS] [--inflate FOLDER] [--existing PACK[,GGUF]]
                            [--peer-python PYTHON] [--json FILE] [--markdown FILE]

Method (docs/benchmarks.md has the reasons):

* For each limit a process of its own runs in a memory cgroup of exactly that size, swap off. A limit of 25 % is what
  the planner of edgemoe asks for to hold everything, less three quarters of the experts.
* The tokens are the model's own, generated once; every run computes the same prompt in one call and then the same
  tokens, one at a time. Sampling is not part of it. Files are taken out of the page cache before each run. Where
  everything is held, all of it is computed once before, so that the experts in use are in memory.
* llama.cpp runs on a GGUF of equal bits per weight, mapped, in a cage of the same size.
* The roofline of generation in a limit is the slower of: the bytes that a cache of the same slots misses (least
  recently used out, nothing read ahead), at the bandwidth of random direct reads of one section, measured right before
  and after; the time per token when everything is held. The bound of a prompt: the slower of one pass over all experts,
  and the prompt when everything is held.
* A machine that does something else besides distorts all of it, llama.cpp's threads, which wait spinning, most: how
  busy it was before each run is noted, and pointed out.

Needs Linux; the cgroup needs root (v1) or a delegated group (v2). Without it runs are not caged; the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench._bounds import belady_misses, lru_misses  # noqa: E402
from bench._cage import Outcome, drop_cache, readahead, run  # noqa: E402
from bench._command import Children, can_cage, percentages, publish  # noqa: E402
from bench._command import parser as command_line  # noqa: E402
from bench._disk import random_read_bandwidth  # noqa: E402
from bench._machine import machine, peer_version, say  # noqa: E402
from edgemoe.disk import reading_threads  # noqa: E402
from edgemoe.errors import EdgemoeError  # noqa: E402
from edgemoe.formats.index import Extent  # noqa: E402
from edgemoe.formats.pack import BLOCK, Pack  # noqa: E402
from edgemoe.formats.read import read_index  # noqa: E402
from edgemoe.model_files import default_cache_dir  # noqa: E402
from edgemoe.profiling import read_trace  # noqa: E402

MB = 1e6
MIB = 1 << 20
TEXT = "The old man looked at the sea and"
# The program's own size differs by some MB from process to process; a cage for everything must not lack one expert.
SLACK = 32 * 10**6
# Percent of the processors that others may take.
QUIET = 5.0


@dataclass(slots=True)
class Subject:
    """A model under test. pack: what edgemoe runs (a GGUF, too). made: files to delete in the end."""

    name: str
    pack: Path
    gguf: Path | None
    made: list[Path] = field(default_factory=list)


@dataclass(slots=True)
class Row:
    """One limit. ours, demand (our cache without look-ahead, least recently used out), peer: outcomes of the runs.

    bandwidths: bytes per second of the disk before and after. busy: percent of the processors that others took before.
    lru_bytes, belady_bytes: per token. roofline: tokens per second. prompt_bound: seconds.
    """

    percent: float
    limit: int
    slots: int
    ours: Outcome
    demand: Outcome | None
    peer: Outcome | None
    bandwidths: tuple[float, float]
    busy: float
    lru_bytes: float | None = None
    belady_bytes: float | None = None
    roofline: float | None = None
    prompt_bound: float | None = None


class Bench:
    def __init__(self, options: argparse.Namespace, caged: bool) -> None:
        self.options = options
        self.caged = caged
        self.context = options.prompt_tokens + options.tokens + 8
        self.children = Children("offload", options.threads, self.context, caged)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Everything about one model, as it goes into the JSON file."""
        index = read_index(subject.pack)
        sections = [index.sections[numbers[0]] for layer in index.experts.values() for numbers in layer.sections]
        extents = [extent for section in sections for extent in section.extents]
        size = sum(extent.length for extent in sections[0].extents)
        plan = self.children.job("plan", path=str(subject.pack))
        say(
            f"{subject.name}: {subject.pack.stat().st_size / 1e9:.2f} GB, {plan['experts']} experts of "
            f"{size / MIB:.2f} MiB, {plan['top_k']} per token; everything fits into {limit_of(plan, 100) / 1e9:.2f} GB"
        )
        trace = Path(self.options.work) / "trace.msgpack"
        try:
            asked = {"path": str(subject.pack), "text": TEXT, "tokens": self._tokens, "trace": str(trace)}
            sequence = self.children.job("sequence", **asked)["tokens"]
            groups, first = decode_groups(trace, plan["layer_experts"], self.options.prompt_tokens, self._tokens)
        finally:
            trace.unlink(missing_ok=True)
        result: dict[str, Any] = {
            "model": subject.name,
            "pack_bytes": subject.pack.stat().st_size,
            "gguf_bytes": subject.gguf.stat().st_size if subject.gguf else None,
            "section_bytes": size,
            "plan": plan,
            "prompt_tokens": self.options.prompt_tokens,
            "tokens": self.options.tokens,
        }
        rows: list[Row] = []
        resident: dict[str, Any] | None = None
        # Everything held comes first: its time per token is half of the roofline of the others.
        for percent in sorted(self.options.limits, reverse=True):
            limit = limit_of(plan, percent)
            row = self._row(subject, percent, limit, sequence, extents)
            report = row.ours.report
            if percent == 100 and report:
                resident = report
            elif row.slots:
                row.lru_bytes = lru_misses(groups, row.slots, first) * size / self.options.tokens
                row.belady_bytes = belady_misses(groups, row.slots, first) * size / self.options.tokens
            self._bounds(row, plan["experts"] * size, resident)
            rows.append(row)
            say("  " + " | ".join(self._cells(row)))
        rows.reverse()
        result["rows"] = [self._as_json(row) for row in rows]
        hashes = {row.ours.report["logits_sha256"] for row in rows if row.ours.report}
        result["logits_identical"] = len(hashes) == 1
        result["markdown"] = self._table(subject, result, rows)
        return result

    # -- runs -------------------------------------------------------------------------------------------------------

    @property
    def _tokens(self) -> int:
        return int(self.options.prompt_tokens + self.options.tokens)

    def _row(self, subject: Subject, percent: float, limit: int, sequence: list[int], extents: list[Extent]) -> Row:
        prompt, tokens = sequence[: self.options.prompt_tokens], sequence[self.options.prompt_tokens :]
        work = {"path": str(subject.pack), "memory": limit, "prompt": prompt, "tokens": tokens}
        warm = percent == 100
        cage = None if self.options.free else limit

        def ours(**how: Any) -> Outcome:
            drop_cache(subject.pack)
            return self.children.outcome("decode", cage, caged=True, **work, **how)

        drop_cache(subject.pack)
        busy = psutil.cpu_percent(interval=2.0)
        before = self._bandwidth(subject.pack, extents, 1)
        outcome = ours(eviction=self.options.eviction, prefetch=not self.options.no_prefetch, warm=warm)
        after = self._bandwidth(subject.pack, extents, 2)
        demand = ours(eviction="lru", prefetch=False) if self.options.demand and not warm else None
        peer = None
        if subject.gguf and self.options.peer_python:
            drop_cache(subject.gguf)
            arguments = {"path": str(subject.gguf), "threads": self.options.threads, "context": self.context}
            arguments |= {"prompt": prompt, "tokens": tokens, "warm": warm}
            command = [self.options.peer_python, str(ROOT / "bench" / "_llama_cpp.py"), json.dumps(arguments)]
            peer = run(command, limit, caged=self.caged, environment=dict(os.environ))
            drop_cache(subject.gguf)
        slots = outcome.report["expert_slots"] if outcome.report else 0
        return Row(percent, limit, slots, outcome, demand, peer, (before, after), busy)

    def _bandwidth(self, path: Path, extents: list[Extent], seed: int) -> float:
        """Of random reads of what edgemoe reads at once: an expert of a pack, one of its matrices in a GGUF."""
        offsets = [extent.offset // BLOCK * BLOCK for extent in extents]
        size, seconds = extents[0].length, self.options.disk_seconds
        threads = reading_threads(path, size, default_cache_dir())
        return random_read_bandwidth(path, size, offsets, threads=threads, seconds=seconds, seed=seed)

    def _bounds(self, row: Row, all_experts: int, resident: dict[str, Any] | None) -> None:
        """What can hardly be exceeded. all_experts: their bytes; resident: the report where everything was held."""
        if resident is None:
            return
        bandwidth = statistics.mean(row.bandwidths)
        disk = (row.lru_bytes or 0.0) / bandwidth
        row.roofline = 1 / max(disk, seconds_per_token(resident))
        row.prompt_bound = resident["prompt_seconds"]
        if row.percent < 100:
            row.prompt_bound = max(row.prompt_bound, all_experts / bandwidth)

    # -- reports ----------------------------------------------------------------------------------------------------

    def _cells(self, row: Row) -> list[str]:
        ours, peer = row.ours.report, row.peer.report if row.peer else None
        speed = 1 / seconds_per_token(ours) if ours else None
        peer_speed = 1 / seconds_per_token(peer) if peer else None
        decode = ours["decode"] if ours else {}
        busy = decode.get("read_seconds", 0.0)
        charge = row.ours.charge
        per_token = decode.get("bytes_read", 0.0) / self.options.tokens
        return [
            f"{row.percent:g} %",
            f"{row.limit / 1e9:.2f} GB",
            f"{speed:.2f}" if speed else row.ours.error,
            f"{row.roofline:.2f}" if row.roofline else "-",
            f"{speed / row.roofline:.0%}" if speed and row.roofline else "-",
            f"{peer_speed:.2f}" if peer_speed else row.peer.error if row.peer else "not run",
            f"{speed / peer_speed:.2f}" if speed and peer_speed else "-",
            f"{per_token / MIB:.0f}" if ours else "-",
            f"{row.lru_bytes / MIB:.0f}" if row.lru_bytes is not None else "-",
            f"{row.belady_bytes / MIB:.0f}" if row.belady_bytes is not None else "-",
            f"{peer['storage_bytes'] / self.options.tokens / MIB:.0f}" if peer else "-",
            f"{decode['bytes_read'] / busy / MB:.0f}" if busy else "-",
            " / ".join(f"{bandwidth / MB:.0f}" for bandwidth in row.bandwidths),
            f"{decode['stall_ms'] / 10 / sum(ours['token_seconds']):.0f} %" if ours else "-",
            f"{ours['prompt_seconds']:.2f}" if ours else "-",
            f"{row.prompt_bound:.2f}" if row.prompt_bound else "-",
            f"{peer['prompt_seconds']:.2f}" if peer else "-",
            f"{charge.peak / 1e9:.3f} GB" if charge and charge.peak else "-",
            f"{charge.failures}" if charge and charge.failures is not None else "-",
        ]

    def _table(self, subject: Subject, result: dict[str, Any], rows: list[Row]) -> str:
        names = ["experts held", "limit", "tok/s", "roofline tok/s", "of it", "llama.cpp tok/s", "ratio", "MiB/token"]
        names += ["LRU MiB/token", "Belady MiB/token", "llama.cpp MiB/token", "MB/s while reading"]
        names += ["disk MB/s before / after", "stall", "prompt s", "its bound s", "llama.cpp prompt s"]
        names += ["peak charge", "failures"]
        lines = [
            f"## {subject.name}",
            "",
            f"{result['pack_bytes'] / 1e9:.2f} GB, {result['plan']['experts']} experts of "
            f"{result['section_bytes'] / MIB:.2f} MiB, {result['plan']['top_k']} per token. A prompt of "
            f"{result['prompt_tokens']} tokens, then {result['tokens']} tokens one by one. "
            + (
                "Runs are caged, swap off."
                if self.caged
                else "**Runs are not caged**: no right to make a memory cgroup."
            )
            + f" Logits of all runs of edgemoe {'have the same bits' if result['logits_identical'] else '**DIFFER**'}.",
            "",
            "| " + " | ".join(names) + " |",
            "|" + "---|" * len(names),
        ]
        lines += ["| " + " | ".join(self._cells(row)) + " |" for row in rows]
        busiest = max(row.busy for row in rows)
        if busiest > QUIET:
            lines += ["", f"**Not a quiet machine**: others took up to {busiest:.0f} % of the processors before a run."]
        return "\n".join(lines) + "\n"

    def _as_json(self, row: Row) -> dict[str, Any]:
        def outcome(result: Outcome | None) -> dict[str, Any] | None:
            if result is None:
                return None
            charge = result.charge
            return {
                "report": result.report,
                "error": result.error,
                "charge": {"peak": charge.peak, "failures": charge.failures, "kills": charge.kills} if charge else None,
                "tokens_per_second": 1 / seconds_per_token(result.report) if result.report else None,
            }

        return {
            "percent": row.percent,
            "limit": row.limit,
            "expert_slots": row.slots,
            "ours": outcome(row.ours),
            "demand_lru": outcome(row.demand),
            "peer": outcome(row.peer),
            "disk_bytes_per_second": row.bandwidths,
            "busy_percent_before": row.busy,
            "lru_bytes_per_token": row.lru_bytes,
            "belady_bytes_per_token": row.belady_bytes,
            "roofline_tokens_per_second": row.roofline,
            "prompt_bound_seconds": row.prompt_bound,
        }


def limit_of(plan: dict[str, Any], percent: float) -> int:
    """Bytes that hold so many percent of the experts. plan: the report of that job."""
    everything = plan["rest"] + plan["experts"] * plan["slot"] + SLACK
    return int(everything - int((1 - percent / 100) * plan["experts"]) * plan["slot"])


def seconds_per_token(report: dict[str, Any]) -> float:
    """The mean: a token that waits for the disk counts in full."""
    return statistics.fmean(report["token_seconds"])


def decode_groups(trace: Path, layer_experts: Sequence[int], prompt: int, tokens: int) -> tuple[list[list[int]], int]:
    """What each layer asks for in the first `tokens` tokens, experts numbered through, the prompt as one pass; the
    number of the first group after it."""
    recorded = read_trace(trace, weights=False)
    first_expert = [sum(layer_experts[:layer]) for layer in recorded.layers]
    picks = [recorded.layer_picks(layer).astype(int) for layer in recorded.layers]
    groups = [
        sorted({offset + int(expert) for expert in layer[:prompt].ravel()})
        for offset, layer in zip(first_expert, picks, strict=True)
    ]
    first = len(groups)
    for token in range(prompt, tokens):
        groups += [(offset + layer[token]).tolist() for offset, layer in zip(first_expert, picks, strict=True)]
    return groups, first


def subjects(options: argparse.Namespace) -> list[Subject]:
    """The models, made where they do not exist yet."""
    from tools.inflate import InflatedModel
    from tools.model_files import Model, write_gguf, write_pack
    from tools.synthesize import SyntheticModel

    found = []
    for existing in options.existing:
        pack, _, gguf = existing.partition(",")
        found.append(Subject(Path(pack).stem, Path(pack), Path(gguf) if gguf else None))
    wanted: list[tuple[str, Model, int]] = []
    if options.synthetic:
        wanted.append(("synthetic", SyntheticModel(layers=options.synthetic), 4))
    if options.inflate:
        wanted.append(("inflated", InflatedModel(options.inflate, options.hidden_times, options.ffn_times), 8))
    for name, model, dense_bits in wanted:
        subject = Subject(name, options.work / f"{name}.emoe", None)
        found.append(subject)
        try:
            if not subject.pack.exists():
                say(f"writing {subject.pack}")
                subject.made.append(subject.pack)
                write_pack(model, subject.pack, 4, dense_bits)
            elif Pack.open(subject.pack).index.spec != model.spec:
                raise SystemExit(f"offload: {subject.pack} is there and holds another model")
            if options.peer_python:
                subject.gguf = options.work / f"{name}.gguf"
                if not subject.gguf.exists():
                    say(f"writing {subject.gguf}")
                    subject.made.append(subject.gguf)
                    write_gguf(model, subject.gguf, 4, dense_bits)
        except BaseException:
            clean(found)
            raise
    return found


def clean(found: Sequence[Subject]) -> None:
    for subject in found:
        for path in subject.made:
            path.unlink(missing_ok=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("offload", __doc__)
    parser.add_argument("--work", type=Path, help="folder for large files, on the disk to measure (default: a new one)")
    parser.add_argument("--synthetic", type=int, metavar="LAYERS", help="a model of Qwen3-30B-A3B's layers; 23: 8.2 GB")
    parser.add_argument("--inflate", type=Path, metavar="FOLDER", help="a trained small model, widened")
    parser.add_argument("--hidden-times", type=int, default=16, help="for --inflate (default: 16)")
    parser.add_argument("--ffn-times", type=int, default=40, help="for --inflate (default: 40)")
    parser.add_argument("--existing", action="append", default=[], metavar="PACK[,GGUF]", help="a model that is there")
    parser.add_argument(
        "--limits", type=percentages, default="25,50,75,100", help="of the experts (default: 25,50,75,100)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--eviction", default="next_use", help="our policy (default: next_use)")
    parser.add_argument("--no-prefetch", action="store_true", help="our runs without look-ahead")
    parser.add_argument(
        "--demand", action="store_true", help="also run ours without look-ahead, with lru, at each limit"
    )
    parser.add_argument("--peer-python", help="an interpreter that has xllamacpp")
    parser.add_argument("--read-ahead", type=int, default=128, help="kB, of the disk during the runs (default: 128)")
    parser.add_argument("--free", action="store_true", help="our runs in groups that only count, without a limit")
    parser.add_argument("--disk-seconds", type=float, default=4.0, help="of each bandwidth measurement (default: 4)")
    options = parser.parse_args(argv)
    if not (options.synthetic or options.inflate or options.existing):
        parser.error("name a model: --synthetic, --inflate or --existing")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is put back
    version = peer_version(options.peer_python)
    if version is None:
        say("llama.cpp is not run: --peer-python names no interpreter that has xllamacpp")
        options.peer_python = None
    caged = can_cage()
    with contextlib.ExitStack() as stack:
        if options.work is None:
            options.work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd())))
        options.work.mkdir(parents=True, exist_ok=True)
        try:
            found = subjects(options)
            stack.callback(clean, found)
            done = stack.enter_context(readahead(found[0].pack, options.read_ahead))
            facts = machine() | {"read_ahead": done, "threads": options.threads, "caged": caged, "xllamacpp": version}
            bench = Bench(options, caged)
            results = [bench.measure(subject) for subject in found]
        except (EdgemoeError, OSError) as error:
            raise SystemExit(f"offload: {error}") from None
    lines = [
        "# Generation in less memory than the model",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['processors']} processors ({options.threads} threads), "
        f"{facts['memory'] / 1e9:.0f} GB of memory, {facts['system']}; {facts['read_ahead']}; "
        + (f"llama.cpp of xllamacpp {version}, mmap, weights not repacked." if version else "llama.cpp was not run."),
        "",
        *[result.pop("markdown") for result in results],
    ]
    publish(options, "\n".join(lines), {"machine": facts, "results": results})


if __name__ == "__main__":
    main()
