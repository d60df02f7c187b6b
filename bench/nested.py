"""What do fewer bits for less important experts bring, and what do they cost?

    python -m bench.nested FOLDER --text FILE [--hidden-times 8] [--ffn-times 16] [--limits 25,50] [--rounds 5]
                           [--work DIR] [--json FILE] [--markdown FILE]

FOLDER: a trained small Qwen3-MoE in Hugging Face form. Method:

* FOLDER is converted to nested levels of 2, 3 and 4 bits, calibrated and measured on the shipped texts, and widened
  (tools/inflate.py): the same function and routing, with experts of a real size. The rival is the same model with
  experts of one width, 4 bits (q4g64, 4.5 with scale and offset), widened likewise.
* A limit of 25 % is what the rival's planner asks for to hold everything, less three quarters of its experts. All
  contenders get the same bytes: each run is a process of its own in a memory cgroup of exactly that size, swap off.
* Each run computes the same prompt and then the same tokens one by one (bench/offload.py). The contenders take turns,
  in every other round the other way round, because a machine's disk and memory are not equally fast at all times.
  Figures are medians, and so is the ratio to the rival: of the ratios within each round.
* Perplexity is measured by the engine itself in each mode of the small nested pack (windows of 512, second halves): the
  widened one computes the same function. Cost is the change from the pack's own exact mode, on FILE, which the model
  should not know the like of, and on the shipped held-out text, whose beginning the modes were set on.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import edgemoe  # noqa: E402
from bench._cage import drop_cache  # noqa: E402
from bench._command import Children, can_cage, percentages, publish  # noqa: E402
from bench._command import parser as command_line  # noqa: E402
from bench._machine import machine, say  # noqa: E402
from bench.offload import limit_of, seconds_per_token  # noqa: E402
from edgemoe.convert import convert  # noqa: E402
from edgemoe.errors import EdgemoeError  # noqa: E402
from edgemoe.quantize.calibration import HELD_OUT  # noqa: E402
from edgemoe.quantize.nested_experts import NestedOptions  # noqa: E402
from edgemoe.text.perplexity import perplexity  # noqa: E402
from tools.inflate import InflatedModel  # noqa: E402
from tools.model_files import write_pack  # noqa: E402

LEVELS = (2, 3, 4)
MODES = ("exact", "high", "balanced", "fast")
RIVAL = "one width"
TEXT = "The old man looked at the sea and"


class Bench:
    def __init__(self, options: argparse.Namespace, caged: bool) -> None:
        self.options = options
        self.children = Children("nested", options.threads, options.prompt_tokens + options.tokens + 8, caged)

    def perplexities(self, pack: Path) -> list[dict[str, Any]]:
        """Of each mode, on both texts."""
        texts: list[dict[str, Any]] = []
        for text in (self.options.text, HELD_OUT):
            found = {}
            for mode in MODES:
                with edgemoe.load(pack, gpu="none", quality=mode, threads=self.options.threads) as model:
                    tokens = model.tokenizer.encode(text.read_text("utf-8"))[: self.options.text_tokens]
                    *_, last = perplexity(tokens, model.logits, min(512, model.context), *model.tokenizer.bos_ids[:1])
                    found[mode] = last.perplexity
            texts.append({"name": text.name, "tokens": last.tokens, "perplexity": found})
        return texts

    def speeds(self, nested: Path, rival: Path, folder: Path) -> list[dict[str, Any]]:
        plan = self.children.job("plan", path=str(rival))
        count = self.options.prompt_tokens + self.options.tokens
        tokens = self.children.job("sequence", path=str(rival), text=TEXT, tokens=count, trace=str(folder / "trace"))[
            "tokens"
        ]
        prompt, rest = tokens[: self.options.prompt_tokens], tokens[self.options.prompt_tokens :]
        contenders = [(RIVAL, rival, "exact"), *((mode, nested, mode) for mode in MODES)]
        rows = []
        for percent in self.options.limits:
            limit = limit_of(plan, percent)
            reports: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in contenders}
            for number in range(self.options.rounds):
                for name, path, quality in contenders[:: -1 if number % 2 else 1]:
                    drop_cache(path)
                    how = {"path": str(path), "memory": limit, "eviction": "next_use", "prefetch": True}
                    how |= {"prompt": prompt, "tokens": rest, "quality": quality}
                    reports[name].append(self.children.job("decode", cage=limit, **how))
                    rate = 1 / seconds_per_token(reports[name][-1])
                    say(f"  {percent:g} %, round {number + 1}, {name}: {rate:.2f} tok/s")
            for name, found in reports.items():
                decode = found[0]["decode"]
                rows.append(
                    {
                        "percent": percent,
                        "limit": limit,
                        "contender": name,
                        "tokens_per_second": [1 / seconds_per_token(report) for report in found],
                        "bytes_per_token": decode["bytes_read"] / self.options.tokens,
                        "hit_rate": decode["experts_hit"] / decode["experts_requested"],
                        "mean_bits": found[0]["mean_bits"],
                        "logits_sha256": sorted({report["logits_sha256"] for report in found}),
                    }
                )
        return rows


def table(result: dict[str, Any]) -> str:
    facts, texts = result["machine"], result["texts"]
    names = [f"{text['name']} ({text['tokens']} tokens predicted)" for text in texts]
    lines = [
        "# Nested experts in less memory than the model",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['threads']} threads, {facts['system']}. {result['model']}: "
        f"nested pack {result['nested_bytes'] / 1e9:.2f} GB, one width {result['rival_bytes'] / 1e9:.2f} GB; "
        f"medians of {result['rounds']} rounds in turns; costs in perplexity on {' and '.join(names)}. "
        + ("Runs are caged, swap off." if facts["caged"] else "**Runs are not caged.**"),
        "",
        "| held | limit | contender | bits used | MB/token | hit rate | tok/s | of one width | "
        + " | ".join(f"cost on {text['name']}" for text in texts)
        + " |",
        "|---" * (8 + len(texts)) + "|",
    ]
    rival: dict[float, list[float]] = {}
    for row in result["rows"]:
        rate = statistics.median(row["tokens_per_second"])
        name, percent = row["contender"], row["percent"]
        if name == RIVAL:
            rival[percent] = row["tokens_per_second"]
        ratio = statistics.median(
            ours / theirs for ours, theirs in zip(row["tokens_per_second"], rival[percent], strict=True)
        )
        found = [text["perplexity"] for text in texts]
        costs = [f"{one[name] / one['exact'] - 1:+.2%}" if name in one else "-" for one in found]
        lines.append(
            f"| {percent:g} % | {row['limit'] / 1e9:.2f} GB | {name} | {row['mean_bits']:.2f} | "
            f"{row['bytes_per_token'] / 1e6:.1f} | {row['hit_rate']:.1%} | {rate:.2f} | {ratio:.2f} | "
            f"{' | '.join(costs)} |"
        )
    same = all(len(row["logits_sha256"]) == 1 for row in result["rows"])
    by_mode = {name: {row["logits_sha256"][0] for row in result["rows"] if row["contender"] == name} for name in MODES}
    same = same and all(len(found) == 1 for found in by_mode.values())
    lines += ["", f"Logits of each mode {'have the same bits' if same else '**DIFFER**'} in all rounds and limits."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("nested", __doc__)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of a trained Qwen3-MoE")
    parser.add_argument("--text", type=Path, required=True, help="of which perplexity is measured, too")
    parser.add_argument("--text-tokens", type=int, default=131072, help="of each text, at most (default: 131072)")
    parser.add_argument("--hidden-times", type=int, default=8)
    parser.add_argument("--ffn-times", type=int, default=16)
    parser.add_argument("--limits", type=percentages, default="25,50", help="of the experts (default: 25,50)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--work", type=Path, help="folder for large files, on the disk to measure (default: a new one)")
    options = parser.parse_args(argv)
    caged = can_cage()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=options.work or Path.cwd())))
        small, nested, rival = folder / "small.emoe", folder / "nested.emoe", folder / "one-width.emoe"
        bench = Bench(options, caged)
        try:
            say("converting")
            convert(options.folder, small, nested=NestedOptions(levels=LEVELS, quality_text=HELD_OUT))
            write_pack(InflatedModel(options.folder, options.hidden_times, options.ffn_times, small), nested, 4, 8)
            write_pack(InflatedModel(options.folder, options.hidden_times, options.ffn_times), rival, 4, 8)
            texts = bench.perplexities(small)
            rows = bench.speeds(nested, rival, folder)
        except (EdgemoeError, OSError) as error:
            raise SystemExit(f"nested: {error}") from None
        result = {
            "machine": machine() | {"caged": caged, "threads": options.threads},
            "model": f"{options.folder.resolve().name} x{options.hidden_times} x{options.ffn_times}",
            "texts": texts,
            "rounds": options.rounds,
            "nested_bytes": nested.stat().st_size,
            "rival_bytes": rival.stat().st_size,
            "rows": rows,
        }
    publish(options, table(result), result)


if __name__ == "__main__":
    main()
