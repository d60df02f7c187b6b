"""Does edgemoe compute what llama.cpp computes, for every family that both know?

    python -m bench.compare_families --peer-python PYTHON [--only NAME] [--markdown FILE]

The tiny models of the tests (tests/families), random weights, each as a float32 GGUF file with llama.cpp's names; the
same random tokens go through both, and the measure is the mean Kullback-Leibler divergence after each token, keys and
values as float16 in both. Random routers are often undecided: where a rounding changes a choice, one token makes up the
mean, so the median stands beside it. Cases that llama.cpp does not load, or computes otherwise by design
(docs/families.md), are shown, not left out. PYTHON has xllamacpp; this one needs torch, transformers and gguf.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "families")]

import edgemoe  # noqa: E402
from bench.compare_llama_cpp import LIMIT, divergence, log_softmax, theirs  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    from family_table import CASES as FAMILY_CASES
    from family_table import VOCABULARY, write_folder, write_gguf
    from gguf_writer import byte_level_metadata
    from mixer_table import CASES as MIXER_CASES

    parser = argparse.ArgumentParser(prog="python -m bench.compare_families", description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has xllamacpp")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp (default: 1)")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    letter = byte_level_metadata()["tokenizer.ggml.tokens"].index("a")
    lines = ["| case | mean KL | median | same best token | verdict |", "|---|---|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    for name, case in {**FAMILY_CASES, **MIXER_CASES}.items():
        if options.only not in name or not case.architecture:
            continue
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "hf"
            write_folder(folder, case)
            path = write_gguf(Path(work) / "model.gguf", folder, case)
            tokens = np.random.default_rng(1).integers(2, VOCABULARY, case.positions).tolist()
            with edgemoe.load(path, context=case.context) as model:
                own = log_softmax(model.logits(tokens))
            try:
                peer = theirs(path, tokens, VOCABULARY, options, sampled=letter)
            except SystemExit as failure:
                row = f"| {name} | - | - | - | llama.cpp does not run it ({str(failure)[:90]}) |"
            else:
                kl, best = divergence(peer, own), (own.argmax(-1) == peer.argmax(-1)).mean()
                verdict = f"{'<=' if kl.mean() <= LIMIT else '>'} {LIMIT:g}"
                row = f"| {name} | {kl.mean():.2e} | {np.median(kl):.2e} | {best:.1%} | {verdict} |"
        lines.append(row)
        print(row, flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
