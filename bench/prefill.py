"""How fast is a prompt computed by a model that is in memory, beside the processor's limit and llama.cpp?

    python -m bench.prefill [--model GGUF | --layers 12] [--peer-python PYTHON] [--json FILE] [--markdown FILE]

llama-bench's pp512: 512 random tokens into an empty context, the logits of the last one, mean and deviation of 5
rounds. The same file, the same number of threads, in turns; llama.cpp with its weights repacked for its fastest kernels
and with those of the file, and the better of the two is what edgemoe is compared with. Its times are its own, of
computing alone.

The processor's limit is the rate of its byte products in registers, of the instruction that edgemoe's kernels use: two
operations for each weight that works on a token. Attention and everything else that is not a product with weights comes
on top of that.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench._rates import (
    OURS,
    best_peer,
    busy,
    contenders,
    information,
    parse,
    parser,
    preface,
    publish,
    spread,
    subject,
    take_turns,
)
from edgemoe import _core
from edgemoe.errors import EdgemoeError


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parse(parser("prefill", __doc__, 512), argv)
    isa = _core.kernels.selected_isa()
    try:
        with subject(options) as path:
            before = busy()
            with contenders(options, path, options.tokens + 8) as found:
                take_turns(found, options.repetitions, 1, prompt=options.tokens)
            speed = _core.kernels.byte_product_speed(isa, options.threads, 0.5)
            _, weights = information(path)
            lines = ["# Prompts with everything in memory", "", *preface(options, path, before), ""]
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"prefill: {error}") from None
    limit = speed["operations"] / speed["seconds"]
    peer = best_peer(found)
    lines += [
        f"{weights / 1e6:.0f} million weights work on a token. Byte products in registers ({isa}): "
        f"{limit / 1e9:.0f} GOP/s.",
        "",
        f"| pp{options.tokens} | tok/s | GOP/s | share of the processor's limit | edgemoe is faster by |",
        "|---|---|---|---|---|",
    ]
    ours = statistics.mean(found[0].rates)
    for one in found:
        rate = statistics.mean(one.rates)
        done = 2 * weights * rate
        share = f"{100 * done / limit:.0f} %" if limit else "-"
        ratio = "" if one.name == OURS else f"{ours / rate:.2f}" + (" (best mode)" if one is peer else "")
        lines.append(f"| {one.name} | {spread(one.rates)} | {done / 1e9:.0f} | {share} | {ratio} |")
    results = {
        "tokens": options.tokens,
        "busy_percent_before": before,
        "weights": weights,
        "isa": isa,
        "byte_products_per_second": limit / 2,
        "ratio": ours / statistics.mean(peer.rates) if peer else None,
        "tokens_per_second": {one.name: one.rates for one in found},
    }
    publish(options, lines, results)


if __name__ == "__main__":
    main()
