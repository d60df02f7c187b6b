"""How fast does a model generate that is in memory, beside the memory's bandwidth and llama.cpp?

    python -m bench.decode [--model GGUF | --layers 12] [--peer-python PYTHON] [--json FILE] [--markdown FILE]

llama-bench's tg128: from an empty context 128 tokens one by one, mean and deviation of 5 rounds. Both generate
greedily from the same file, with the same number of threads, in turns; llama.cpp with its weights repacked for its
fastest kernels and with those of the file, and the better of the two is what edgemoe is compared with. Its times are
its own, of computing alone; edgemoe's hold all that its caller waits for.

The bandwidth is that of reading memory with as many threads, before and after. A token's information bytes are the
weights that work on it, as they lie in the file: what must be read for it from a memory larger than the caches.
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
    read_bandwidth,
    spread,
    subject,
    take_turns,
)
from edgemoe.errors import EdgemoeError


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parse(parser("decode", __doc__, 128), argv)
    try:
        with subject(options) as path:
            before = busy()
            bandwidths = [read_bandwidth(options.threads)]
            with contenders(options, path, options.tokens + 8) as found:
                take_turns(found, options.repetitions, 2, generate=options.tokens)
            bandwidths.append(read_bandwidth(options.threads))
            size, weights = information(path)
            lines = ["# Generation with everything in memory", "", *preface(options, path, before), ""]
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"decode: {error}") from None
    bandwidth = statistics.mean(bandwidths)
    peer = best_peer(found)
    lines += [
        f"A token's information bytes: {size / 1e6:.0f} MB ({8 * size / weights:.2f} bits a weight). Memory: "
        f"{' and '.join(f'{value / 1e9:.1f}' for value in bandwidths)} GB/s (before, after), so at most "
        f"{bandwidth / size:.1f} tok/s.",
        "",
        f"| tg{options.tokens} | tok/s | GB/s of information | share of the bandwidth | edgemoe is faster by |",
        "|---|---|---|---|---|",
    ]
    ours = statistics.mean(found[0].rates)
    for one in found:
        rate = statistics.mean(one.rates)
        ratio = "" if one.name == OURS else f"{ours / rate:.2f}" + (" (best mode)" if one is peer else "")
        lines.append(
            f"| {one.name} | {spread(one.rates)} | {rate * size / 1e9:.1f} | {100 * rate * size / bandwidth:.0f} % "
            f"| {ratio} |"
        )
    results = {
        "tokens": options.tokens,
        "busy_percent_before": before,
        "information_bytes": size,
        "weights": weights,
        "bandwidths": bandwidths,
        "share_of_bandwidth": ours * size / bandwidth,
        "ratio": ours / statistics.mean(peer.rates) if peer else None,
        "tokens_per_second": {one.name: one.rates for one in found},
    }
    publish(options, lines, results)


if __name__ == "__main__":
    main()
