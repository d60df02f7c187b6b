"""How long does it take to quantize one layer of a large model at several widths?

    python -m bench.quantize_layer [--share 1] [--levels 2,3,4] [--threads N] [--memory 4GB] [--work FOLDER]

The layer has the shape of Qwen3-30B-A3B's: hidden size 2048, 128 experts of size 768, 8 for a token; its weights are
random bfloat16, read from a safetensors file. 65536 random tokens go through it in windows of 512, attention included,
and every expert is quantized with the Hessians that follow, packed and thrown away. That is what `edgemoe convert
--levels` does to a layer, except that the packed levels are not written.

--share 0.125 takes an eighth of the experts and of the tokens: as many tokens per expert, an eighth of the work. The
time of the whole layer is then extrapolated. The limit is 10 minutes on 2 cores; memory is the process's own
(anonymous) at its peak, temporary files that the system may write out not counted. Exit status 1 if a whole layer takes
more than 600 s.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from edgemoe.errors import EdgemoeError  # noqa: E402
from edgemoe.memory import RESERVE, format_size, used_now  # noqa: E402
from edgemoe.options import parse_size  # noqa: E402
from edgemoe.quantize.calibration import WINDOW, Statistics  # noqa: E402
from edgemoe.quantize.layerwise import LayerwiseModel, original_index, temporary_array  # noqa: E402
from edgemoe.quantize.nested_experts import NestedExperts, NestedOptions  # noqa: E402
from edgemoe.source import SourceModel  # noqa: E402

HIDDEN, FFN, EXPERTS, TOP_K, TOKENS = 2048, 768, 128, 8, 65536
VOCABULARY = 4096
LIMIT = 600


def write_layer(folder: Path, experts: int) -> None:
    """A Hugging Face folder of a Qwen3-MoE of one layer."""
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "moe_intermediate_size": FFN,
        "num_experts": experts,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    here = "model.layers.0."
    shapes |= {here + name: (HIDDEN,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    shapes |= {here + f"self_attn.{name}_norm.weight": (128,) for name in "qk"}
    for name, rows in (("q", 4096), ("k", 512), ("v", 512)):
        shapes[here + f"self_attn.{name}_proj.weight"] = (rows, HIDDEN)
    shapes[here + "self_attn.o_proj.weight"] = (HIDDEN, 4096)
    shapes[here + "mlp.gate.weight"] = (experts, HIDDEN)
    for expert in range(experts):
        for name, shape in (("gate", (FFN, HIDDEN)), ("up", (FFN, HIDDEN)), ("down", (HIDDEN, FFN))):
            shapes[here + f"mlp.experts.{expert}.{name}_proj.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = np.ones(shape, np.float32)
            if len(shape) > 1:
                values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The largest anonymous memory of this process in bytes, as the only element of the list (Linux)."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak[0] = max([peak[0], *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantize_layer", description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the experts and tokens (default: 1)")
    parser.add_argument("--levels", default="2,3,4")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--work", type=Path, help="folder for the files (default: a temporary one)")
    options = parser.parse_args(argv)
    experts, windows = max(TOP_K, round(EXPERTS * options.share)), max(1, round(TOKENS * options.share / WINDOW))
    try:
        seconds = run(options, experts, windows)
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"quantize_layer: {error}") from None
    raise SystemExit(0 if seconds <= LIMIT else 1)


def run(options: argparse.Namespace, experts: int, windows: int) -> float:
    """Prints the figures; the seconds of a whole layer."""
    levels = tuple(int(width) for width in options.levels.split(","))
    memory = parse_size(options.memory)
    assert memory is not None
    settings = NestedOptions(levels, threads=options.threads, memory=memory)
    print(
        f"{experts} of {EXPERTS} experts, {windows * WINDOW} of {TOKENS} tokens, {options.threads} threads", flush=True
    )
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder = Path(work)
        write_layer(folder, experts)
        with peak_memory() as peak:
            begin, processor = time.perf_counter(), time.process_time()
            model = SourceModel.open(folder)
            free = memory - used_now() - RESERVE
            original = LayerwiseModel(
                original_index(folder, folder),
                WINDOW,
                threads=options.threads,
                memory=free,
                work=folder,
            )
            tokens = np.random.default_rng(1).integers(0, VOCABULARY, (windows, WINDOW)).astype(np.int32)
            residual = temporary_array(folder, (windows, WINDOW, HIDDEN), np.float32)
            statistics = Statistics.empty(model.spec.layers[0], HIDDEN, tokens.size, folder)
            for _ in original.run(0, tokens, residual, statistics.observe):
                pass
            forward, forward_processor = time.perf_counter() - begin, time.process_time() - processor
            quantizer = NestedExperts(folder, model, settings, folder)
            stored = sum(
                len(data) for packed, _ in quantizer.quantized(0, statistics, range(experts)) for data in packed
            )
            seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    whole = seconds * EXPERTS / experts
    weights = 3 * HIDDEN * FFN * experts
    print(f"forward {forward:.1f} s, experts {seconds - forward:.1f} s ({(seconds - forward) / experts:.2f} s each)")
    busy = f"forward {forward_processor:.1f} s, experts {processor - forward_processor:.1f} s"
    print(f"processor time: {busy}; it had {processor / seconds:.2f} processors on average")
    print(f"peak memory {format_size(peak[0])}, {8 * stored / weights:.3f} bits per weight")
    print(f"a whole layer: {whole:.0f} s{'' if experts == EXPERTS else ' (extrapolated)'}, limit {LIMIT} s")
    return whole


if __name__ == "__main__":
    main()
