"""How close do the kernels come to the limits of memory and processor, and an expert layer to others'?

    python -m bench.kernels [--layouts q4g64,ggml.q4_k] [--isas avx2,avx512vnni] [--peer-python PYTHON]
                            [--json FILE] [--markdown FILE]

One token: matrices of more than the caches hold, one after the other, GB/s of their bytes (codes, scales and offsets:
the information; of nested ones in all levels) and their share of the bandwidth of reading memory, measured with as many
threads before each line.
More tokens: one matrix, GOP/s (two operations a weight and token) and their share of what the processor's byte products
reach in registers, of the instruction that the kernels of that set use; float layouts use others and have no share.
The shape is that of an expert of Qwen3-30B-A3B, 768 x 2048.

The expert layer: router, 8 of 128 such experts, 4 bits. edgemoe and llama.cpp run a model of layers whose attention is
next to nothing (one head of 64), the same GGUF file, and a layer is their time divided by the layers; of a prompt by
one less, as both compute the last layer's experts for the last token only. onnxruntime runs its `com.microsoft.QMoE`
alone, with 4-bit codes and a scale for 64 of them, which gets the router's logits as an input.
PYTHON: an interpreter with xllamacpp and onnxruntime; what it lacks is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench import _command  # noqa: E402
from bench._machine import machine, peer_version, say  # noqa: E402
from bench._rates import OURS, QUIET, busy, contenders, publish, read_bandwidth  # noqa: E402
from edgemoe import _core  # noqa: E402
from edgemoe.errors import EdgemoeError  # noqa: E402
from tools.model_files import write_gguf  # noqa: E402
from tools.synthesize import SyntheticModel  # noqa: E402

# The levels of a nested matrix are joined by +: 2, 3 and 4 bits.
NESTED = ("base2r2", "base2r2+refine1", "base2r2+refine1+refine1")
GGML = tuple(f"ggml.{name}" for name in ("q4_0", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "mxfp4"))
LAYOUTS = ("q4g64", "q8g64", *GGML, *NESTED, "bf16", "f32")
FLOATS = ("f32", "bf16", "f16")
ROWS, COLS, EXPERTS, TOP_K = 768, 2048, 128, 8
TILES = (4, 32, 512)


def kernel_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for isa in options.isas:
        limit = _core.kernels.byte_product_speed(isa, options.threads, options.seconds)
        peak = limit["operations"] / limit["seconds"] if limit["operations"] else None
        for layout in options.layouts:
            arguments = (isa, layout, ROWS, COLS)
            bandwidth = read_bandwidth(options.threads, options.seconds / 4)
            read = _core.kernels.product_speed(*arguments, 1, options.threads, options.memory, options.seconds)
            row = {
                "isa": isa,
                "layout": layout,
                "bandwidth": bandwidth,
                "bytes_per_second": read["bytes"] / read["seconds"],
                "peak": None if layout in FLOATS else peak,
                "operations_per_second": {},
            }
            for tokens in TILES:
                done = _core.kernels.product_speed(*arguments, tokens, options.threads, 1, options.seconds)
                row["operations_per_second"][tokens] = done["operations"] / done["seconds"]
            rows.append(row)
            say(kernel_line(row))
    return rows


def kernel_line(row: dict[str, Any]) -> str:
    cells = [row["isa"], row["layout"], f"{row['bytes_per_second'] / 1e9:.1f}"]
    cells.append(f"{100 * row['bytes_per_second'] / row['bandwidth']:.0f} %")
    for done in row["operations_per_second"].values():
        share = f" ({100 * done / row['peak']:.0f} %)" if row["peak"] else ""
        cells.append(f"{done / 1e9:.0f}{share}")
    return f"| {' | '.join(cells)} |"


def layer_times(options: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """Contender -> tokens -> seconds of one expert layer, a figure a round."""
    times: dict[str, dict[int, list[float]]] = {}
    model = SyntheticModel(layers=options.layers, heads=1, kv_heads=1, head_dim=64, vocabulary=320)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.work or Path.cwd()) as folder:
        path = Path(folder) / "experts.gguf"
        say(f"writing {path}")
        write_gguf(model, path, 4, 4)
        with contenders(options, path, 520) as found:
            for number in range(options.repetitions + 1):
                for one in found:
                    for tokens, request in ((1, {"generate": 64}), (512, {"prompt": 512})):
                        answer = one.ask(**request)
                        calls = answer["tokens"] if tokens == 1 else 1
                        if number:  # the first round does not count
                            values = times.setdefault(one.name, {}).setdefault(tokens, [])
                            layers = options.layers - (tokens > 1)
                            values.append(answer["seconds"] / calls / layers)
    if options.onnx:
        command = [options.onnx_python, str(ROOT / "bench" / "_qmoe.py")]
        shape = {"hidden": COLS, "ffn": ROWS, "experts": EXPERTS, "top_k": TOP_K, "threads": options.threads}
        arguments = shape | {"tokens": [1, 512], "repetitions": options.repetitions}
        done = subprocess.run([*command, json.dumps(arguments)], capture_output=True, text=True)
        if done.returncode:
            say(f"onnxruntime's QMoE does not run: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        else:
            answer = json.loads(done.stdout.splitlines()[-1])
            times["onnxruntime, QMoE"] = {int(tokens): values for tokens, values in answer.items()}
    return times


def onnx_version(python: str | None) -> str | None:
    if not python:
        return None
    code = "import onnx, onnxruntime; print(onnxruntime.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    isas = [str(isa) for isa in _core.kernels.available_isas() if isa != "scalar"]
    parser = _command.parser("kernels", __doc__)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"default: {','.join(LAYOUTS)}")
    parser.add_argument("--isas", default=",".join(isas), help="default: all that this processor has but scalar")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement (default: 0.5)")
    parser.add_argument("--memory", type=int, default=256 << 20, help="bytes at one token (default: 256 MiB)")
    parser.add_argument("--layers", type=int, default=4, help="of the expert layer's model; 0: none (default: 4)")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds of the expert layer (default: 5)")
    parser.add_argument("--peer-python", help="an interpreter that has xllamacpp, onnxruntime and onnx")
    parser.add_argument("--work", type=Path, help="folder for the expert layer's model (default: this one)")
    options = parser.parse_args(argv)
    options.layouts, options.isas = options.layouts.split(","), options.isas.split(",")
    for name, known in (("layouts", LAYOUTS), ("isas", isas)):
        for value in getattr(options, name):
            if value not in known:
                parser.error(f"--{name}: {value} is not one of {', '.join(known)}")
    if options.layers == 1 or min(options.layers, options.repetitions - 1, options.threads - 1) < 0:
        parser.error("--layers must be 0 or at least 2, --repetitions and --threads at least 1")
    options.onnx_python, options.onnx = options.peer_python, onnx_version(options.peer_python)
    version = peer_version(options.peer_python)
    if version is None:
        options.peer_python = None
    before = busy()
    facts = machine()
    lines = [
        "# Kernels",
        "",
        f"{facts['date']}, {facts['processor']}, {facts['processors']} processors ({options.threads} threads), "
        f"{facts['memory'] / 1e9:.0f} GB of memory, {facts['system']}; edgemoe {_core.__version__}.",
        "",
    ]
    if before > QUIET:
        lines += [f"**Not a quiet machine: others took {before:.0f} % of the processors before.**", ""]
    try:
        rows = kernel_rows(options)
        times = layer_times(options) if options.layers else {}
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"kernels: {error}") from None
    bandwidths = [row["bandwidth"] for row in rows]
    lines += [
        f"Matrices of {ROWS} x {COLS}. Memory is read at {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} "
        "GB/s (before each line). In brackets: of the byte products in registers.",
        "",
        "| instructions | layout | 1 token, GB/s | of the bandwidth | "
        + " | ".join(f"{tokens} tokens, GOP/s" for tokens in TILES)
        + " |",
        "|---|---|" + "---|" * (2 + len(TILES)),
        *map(kernel_line, rows),
    ]
    if times:
        ours = {tokens: statistics.mean(values) for tokens, values in times[OURS].items()}
        peers = f"xllamacpp {version}" if version else "no llama.cpp"
        peers += f", onnxruntime {options.onnx}" if options.onnx else ", no onnxruntime"
        lines += [
            "",
            f"One expert layer: {TOP_K} of {EXPERTS} experts of 3 x {ROWS} x {COLS}, 4 bits; {peers}; "
            f"{options.repetitions} rounds, mean.",
            "",
            "| | 1 token, ms | edgemoe is faster by | 512 tokens, ms | edgemoe is faster by |",
            "|---|---|---|---|---|",
        ]
        for name, found in times.items():
            cells = [name]
            for tokens, values in found.items():
                mean = statistics.mean(values)
                cells += [f"{1e3 * mean:.2f}", "" if name == OURS else f"{mean / ours[tokens]:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    publish(options, lines, {"busy_percent_before": before, "kernels": rows, "expert_layer_seconds": times})


if __name__ == "__main__":
    main()
