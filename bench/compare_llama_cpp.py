"""Does edgemoe compute the logits that llama.cpp computes from the same GGUF file?

    python -m bench.compare_llama_cpp MODEL [--peer-python PYTHON] [--types q4_k,q6_k] [--positions 256]
                                            [--markdown FILE]

MODEL: a GGUF file; or a Hugging Face folder of a trained Qwen3-MoE, from which a GGUF of every block type is made.

The tokens are the model's own, and after each of them both give a distribution of the next. The measure is the mean
Kullback-Leibler divergence in nats, KL(llama.cpp || edgemoe). Both round the inputs of a product to 8 bits, each in its
own way (llama.cpp in groups of 32, or of 256 for the K types; edgemoe of 64), so they differ from each other as from
what no rounding gives. That is the third, for files that are made here: the same blocks as float32 numbers, multiplied
by inputs as they are. Now and then rounding makes a router that is nearly undecided choose another expert; a few such
tokens can make up most of the mean, so the median stands beside it.

PYTHON: an interpreter with `pip install xllamacpp`; default: this one. Exit status 1 if a type exceeds the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import edgemoe  # noqa: E402
from edgemoe.errors import EdgemoeError  # noqa: E402
from edgemoe.formats.gguf_index import GgufSource  # noqa: E402
from edgemoe.source import SourceModel  # noqa: E402
from tools.ggml_quantize import TYPES, quantize_gguf  # noqa: E402
from tools.inflate import InflatedModel  # noqa: E402
from tools.model_files import write_gguf  # noqa: E402

TEXT = "The old man looked at the sea and"
LIMIT = 1e-3
"""Mean divergence, in nats, that counts as the same."""
BLOCK = 256
"""Sizes must be multiples of it for all types."""

Array = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.float32]) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def divergence(first: Array, second: Array) -> Array:
    """KL(first || second) of each row of log probabilities."""
    return np.asarray((np.exp(first) * (first - second)).sum(-1))


def own_text(path: Path, positions: int) -> list[int]:
    """Token ids of a text that the model writes."""
    with edgemoe.load(path, gpu="none") as model:
        begin = model.tokenizer.encode(TEXT)
        generation = model.generate(begin, max_tokens=max(1, positions - len(begin)), seed=1, ignore_eos=True)
        for _ in generation:
            pass
        return [*begin, *generation.result.tokens][:positions]


def ours(path: Path, tokens: Sequence[int]) -> Array:
    with edgemoe.load(path, gpu="none") as model:
        return log_softmax(model.logits(tokens))


def theirs(
    path: Path,
    tokens: Sequence[int],
    vocabulary: int,
    options: argparse.Namespace,
    sampled: int | None = None,
    context: int = 0,
    exact: bool = False,
) -> Array:
    """Log probabilities by llama.cpp, [tokens, vocabulary]. The other arguments are those of the child."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "log_probabilities"
        arguments = {
            "path": str(path.resolve()),
            "tokens": [int(token) for token in tokens],
            "vocabulary": vocabulary,
            "threads": options.threads,
            "target": str(target),
            "sampled": sampled,
            "context": context,
            "exact": exact,
        }
        command = [options.peer_python, str(ROOT / "bench" / "_llama_cpp_logits.py"), json.dumps(arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        if result.returncode:
            said = result.stderr.strip().splitlines() or ["?"]
            loading = [line.partition("error loading model: ")[2] for line in said if "error loading model: " in line]
            raise SystemExit(f"llama.cpp failed: {(loading or said[-1:])[0]}")
        values = np.fromfile(target, np.float32).reshape(len(tokens), vocabulary).astype(np.float64)
    if np.isnan(values).any():
        raise SystemExit(f"{path}: llama.cpp gave no probability for {np.isnan(values).sum()} tokens")
    return values


def compare(path: Path, tokens: Sequence[int], exact: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    vocabulary = GgufSource.open(path).spec.vocab_size
    own, peer = ours(path, tokens), theirs(path, tokens, vocabulary, options)
    kl = divergence(peer, own)
    row = {"kl": kl.mean(), "kl_median": np.median(kl), "kl_max": kl.max()}
    row["same_best"] = (own.argmax(-1) == peer.argmax(-1)).mean()
    if exact is not None:
        unrounded = ours(exact, tokens)
        row |= {"exact_ours": divergence(unrounded, own).mean(), "exact_peer": divergence(unrounded, peer).mean()}
    return {name: float(value) for name, value in row.items()}


def small_gguf(folder: Path, target: Path) -> None:
    """The folder's model in float32, widened until every type fits."""
    spec = SourceModel.open(folder).spec
    times = {size: next(n for n in range(1, BLOCK + 1) if size * n % BLOCK == 0) for size in
             {spec.hidden_size, *(layer.ffn_dim for layer in spec.layers)}}  # fmt: skip
    hidden_times = times[spec.hidden_size]
    while hidden_times & (hidden_times - 1):
        hidden_times += times[spec.hidden_size]
    model = InflatedModel(folder, hidden_times, max(times[layer.ffn_dim] for layer in spec.layers))
    write_gguf(model, target, 32, 32)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare_llama_cpp", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file, or a Hugging Face folder of a Qwen3-MoE")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has xllamacpp")
    parser.add_argument("--types", default=",".join(TYPES), help="of a folder: block types (default: all)")
    parser.add_argument("--positions", type=int, default=256, help="tokens of the text (default: 256)")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp (default: 1)")
    parser.add_argument("--work", type=Path, help="folder for the GGUF files (default: a temporary one)")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    kinds = [kind for kind in options.types.split(",") if kind]
    for kind in kinds:
        if kind not in TYPES:
            parser.error(f"{kind} is not one of {', '.join(TYPES)}")
    try:
        rows = run(options, kinds)
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"compare_llama_cpp: {error}") from None
    if options.markdown:
        options.markdown.write_text("\n".join(HEAD + [line(name, row) for name, row in rows.items()]) + "\n")
    raise SystemExit(0 if all(row["kl"] <= LIMIT for row in rows.values()) else 1)


HEAD = [
    "| type | mean KL | median | largest | same best token | edgemoe to unrounded | llama.cpp to unrounded | verdict |",
    "|---|---|---|---|---|---|---|---|",
]


def line(name: str, row: dict[str, Any]) -> str:
    exact = [f"{row[key]:.2e}" if key in row else "-" for key in ("exact_ours", "exact_peer")]
    verdict = f"{'<=' if row['kl'] <= LIMIT else '>'} {LIMIT:g}"
    between = [f"{row[key]:.2e}" for key in ("kl", "kl_median", "kl_max")]
    same = f"{100 * row['same_best']:.1f} %"
    return f"| {' | '.join([name, *between, same, *exact, verdict])} |"


def run(options: argparse.Namespace, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Prints the table as it comes; type -> its figures."""
    rows: dict[str, dict[str, Any]] = {}
    print(*HEAD, sep="\n", flush=True)
    if not options.model.is_dir():
        rows[options.model.name] = compare(options.model, own_text(options.model, options.positions), None, options)
        print(line(options.model.name, rows[options.model.name]))
        return rows
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        plain, quantized, exact = (Path(work) / f"{name}.gguf" for name in ("plain", "quantized", "exact"))
        small_gguf(options.model, plain)
        tokens = own_text(plain, options.positions)
        for kind in kinds:
            quantize_gguf(plain, quantized, kind)
            quantize_gguf(quantized, exact, "f32")
            rows[kind] = compare(quantized, tokens, exact, options)
            print(line(kind, rows[kind]), flush=True)
    return rows


if __name__ == "__main__":
    main()
