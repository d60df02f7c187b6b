"""What do a nested pack's levels and modes cost, beside separate packs of each width and llama.cpp's types?

    python -m bench.quality FOLDER --text FILE [--peer-python PYTHON] [--levels 2,3,4] [--tokens 32768]
                            [--calibration FILE] [--markdown FILE]

FOLDER: a Hugging Face folder of a trained Qwen3-MoE. FILE: a text that is neither the calibration text nor the one that
modes were found on (both are those of `edgemoe convert`).

Perplexity is llama-perplexity's (windows of 512, second halves); the KL divergence, in nats, is the mean of
KL(original || quantized) over the same positions, the original being the folder's own weights. Everything runs in
edgemoe, so the weights make the difference and nothing else: llama.cpp's blocks are run where they lie in a GGUF
(bench/compare_llama_cpp.py shows that both compute the same).

llama.cpp's types are made from the same weights by its own functions, without an importance matrix, in the mixture that
llama-quantize has for the experts of each file type; matrices without whole blocks of 256 get what it falls back to.
The dense part has 8 bits everywhere (Q8_0 there, q8g64 here), routers are float32. Bits per weight are those of the
routed experts' tensors with scales, and with the padding of a pack's sections and of a GGUF's tensors.

After each of llama.cpp's types comes a pack of the same bits per weight (`edgemoe convert --target-bpw`): finer levels
only for the experts that need them most, in as many bytes as the type takes. Where that is more than all levels of all
experts take, by less than a bit, it is of a pack with one more level.

PYTHON: an interpreter with `pip install xllamacpp`; without it there are no rows of llama.cpp, nor of their sizes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from edgemoe.convert import convert  # noqa: E402
from edgemoe.errors import EdgemoeError, OptionError  # noqa: E402
from edgemoe.formats.ggml_blocks import TYPES  # noqa: E402
from edgemoe.formats.gguf import GgufModel  # noqa: E402
from edgemoe.formats.gguf_index import GgufSource, build_index  # noqa: E402
from edgemoe.formats.index import ModelIndex  # noqa: E402
from edgemoe.formats.pack import Pack, align  # noqa: E402
from edgemoe.formats.read import load_tokenizer  # noqa: E402
from edgemoe.memory import automatic_budget, used_now  # noqa: E402
from edgemoe.options import Quality  # noqa: E402
from edgemoe.quantize.calibration import HELD_OUT, WINDOW, windows  # noqa: E402
from edgemoe.quantize.layerwise import LayerwiseModel, original_index  # noqa: E402
from edgemoe.quantize.nested_experts import NestedOptions  # noqa: E402
from edgemoe.quantize.quality import Reference, evaluate  # noqa: E402
from edgemoe.source import SourceModel  # noqa: E402
from tools.ggml_quantize import Bytes, Floats, rewrite_gguf  # noqa: E402
from tools.inflate import InflatedModel  # noqa: E402
from tools.model_files import write_gguf  # noqa: E402

PEER = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q8_0")
_GGUF_ALIGNMENT = 32
_BASE = {"Q2_K": "q2_k", "Q3_K_M": "q3_k", "Q4_K_M": "q4_k", "Q8_0": "q8_0"}
_FALLBACK = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def expert_type(file_type: str, name: str, columns: int, layers: int) -> str:
    """The type of an expert tensor in llama-quantize's file of this type."""
    kind, layer = _BASE[file_type], int(name.split(".")[1])
    if "ffn_down" in name:
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        if file_type == "Q2_K":
            kind = "q3_k"
        elif file_type == "Q3_K_M":
            kind = "q5_k" if layer < layers // 16 else "q4_k"
        elif file_type == "Q4_K_M":
            kind = "q6_k" if more else "q4_k"
    return _FALLBACK[kind] if columns % TYPES[kind].weights else kind


@contextmanager
def peer_quantizer(python: str) -> Iterator[Any]:
    """A function (type, float32 [rows, columns]) -> blocks of llama.cpp."""
    command = [python, str(ROOT / "bench" / "_llama_cpp_quantize.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None

        def quantize(kind: str, values: Floats) -> Bytes:
            assert child.stdin is not None and child.stdout is not None
            block = TYPES[kind]
            nbytes = values.size // block.weights * block.nbytes
            request = {"type": block.code, "rows": len(values), "columns": values.shape[1], "nbytes": nbytes}
            child.stdin.write(json.dumps(request).encode() + b"\n" + np.ascontiguousarray(values, "<f4").tobytes())
            child.stdin.flush()
            answer = child.stdout.read(nbytes)
            if len(answer) != nbytes:
                raise SystemExit("llama.cpp's quantizer failed")
            return np.frombuffer(answer, np.uint8)

        yield quantize
        child.stdin.close()


class Bench:
    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.spec = SourceModel.open(options.folder).spec
        self.window = min(WINDOW, self.spec.context)
        tokens = windows(load_tokenizer(options.folder), options.text, self.window, options.tokens)
        self.reference = Reference(tokens, self.spec.vocab_size, work)
        original = self.model(original_index(options.folder, work))
        residual = np.zeros((*tokens.shape, self.spec.hidden_size), np.float32)
        for number in range(len(self.spec.layers)):
            for logits in original.run(number, tokens, residual, None, self.reference.positions):
                self.reference.add(logits)
        self.perplexity = self.reference.perplexity()
        self.rows: list[str] = []

    def model(self, index: ModelIndex, **options: Any) -> LayerwiseModel:
        memory = automatic_budget() - used_now()
        return LayerwiseModel(
            index,
            self.window,
            threads=self.options.threads,
            memory=memory,
            work=self.work,
            quality=Quality(**options),
        )

    def print(self, line: str) -> None:
        self.rows.append(line)
        print(line, flush=True)

    def row(self, name: str, bits: float, index: ModelIndex, **options: Any) -> None:
        perplexity, kl = evaluate(self.model(index, **options), self.reference)
        change = 100 * (perplexity / self.perplexity - 1)
        self.print(f"| {name} | {bits:.3f} | {perplexity:.3f} | {change:+.2f} % | {kl:.5f} |")

    def weights(self) -> int:
        return sum(
            layer.experts * sum(rows * columns for rows, columns in self.spec.expert_tensors(number).values())
            for number, layer in enumerate(self.spec.layers)
        )

    def pack(self, name: str, options: NestedOptions) -> Pack:
        target = self.work / name
        convert(self.options.folder, target, nested=options)
        return Pack.open(target)

    def stored_bits(self, pack: Pack, level: int) -> float:
        """Bits per weight of the experts up to this level, padding included."""
        sizes = [
            pack.index.sections[number].length
            for layer in pack.index.experts.values()
            for sections in layer.sections
            for number in sections[: level + 1]
        ]
        return 8 * sum(sizes) / self.weights()

    def peer_bits(self, path: Path) -> float:
        """Bits per weight of the experts in a GGUF, padding included."""
        tensors = GgufModel.open(path).tensors
        size = sum(align(info.nbytes, _GGUF_ALIGNMENT) for name, info in tensors.items() if "_exps" in name)
        return 8 * size / self.weights()


def run(options: argparse.Namespace, levels: tuple[int, ...], work: Path) -> list[str]:
    """Prints the table as it comes, and gives it back."""
    bench = Bench(options, work)
    bench.print(f"{options.folder.name} on {options.text.name}: {bench.reference.tokens} tokens predicted,")
    bench.print(f"perplexity {bench.perplexity:.3f} before quantization.")
    bench.print("")
    bench.print("| | bits per weight | perplexity | change | KL divergence |")
    bench.print("|---|---|---|---|---|")
    settings: dict[str, Any] = {"calibration": options.calibration, "threads": options.threads}
    nested = bench.pack("nested.emoe", NestedOptions(levels, quality_text=HELD_OUT, **settings))
    index = nested.index
    for level, bits in enumerate(levels):
        bench.row(f"nested, level of {bits} bits", bench.stored_bits(nested, level), index, level_cap=level)
    for bits in levels:
        single = bench.pack(f"{bits}.emoe", NestedOptions((bits,), **settings))
        bench.row(f"{bits} bits alone", bench.stored_bits(single, 0), single.index)
    assert index.quality is not None
    for name, mode in index.quality.modes.items():
        what = f"nested, mode {name} ({mode.mean_bits:.2f} of {levels[-1]} bits used)"
        bench.row(what, bench.stored_bits(nested, len(levels) - 1), index, thresholds=mode.thresholds)
    if options.peer_python is not None:
        largest = bench.stored_bits(nested, len(levels) - 1)
        for target in peer_rows(bench, options):
            ladder = levels if target < largest else (*levels, levels[-1] + 1)
            if ladder[-1] > 8 or target >= largest + 1:
                continue
            name = f"nested, --levels {','.join(map(str, ladder))} --target-bpw {target:.3f}"
            try:
                sized = bench.pack("sized.emoe", NestedOptions(ladder, target_bits=target, **settings))
            except OptionError as error:  # level 0 with its padding takes more
                bench.print(f"| {name}: {error} | - | - | - | - |")
                continue
            bench.row(name, bench.stored_bits(sized, len(ladder) - 1), sized.index)
            sized.index.path.unlink()
    return bench.rows


def peer_rows(bench: Bench, options: argparse.Namespace) -> Iterator[float]:
    """Prints the row of each of llama.cpp's types, and gives the bits per weight that its experts take."""
    plain, target = bench.work / "plain.gguf", bench.work / "peer.gguf"
    write_gguf(InflatedModel(options.folder, 1, 1), plain, 32, 32)
    with peer_quantizer(options.peer_python) as quantizer:
        for file_type in PEER:
            used: dict[str, None] = {}

            def choose(name: str, shape: tuple[int, ...], file_type: str = file_type, used: Any = used) -> str:
                if "ffn_gate_inp" in name:
                    return "f32"
                if "_exps" not in name:
                    return "f32" if shape[-1] % TYPES["q8_0"].weights else "q8_0"
                kind = expert_type(file_type, name, shape[-1], len(bench.spec.layers))
                used[kind] = None
                return kind

            rewrite_gguf(plain, target, choose, quantizer)
            name, bits = f"llama.cpp {file_type} ({', '.join(sorted(used))})", bench.peer_bits(target)
            bench.row(name, bits, build_index(GgufSource.open(target)))
            yield bits


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face folder of a Qwen3-MoE")
    parser.add_argument("--text", type=Path, required=True, help="what is measured on")
    parser.add_argument("--tokens", type=int, default=32768, help="of the text, at most (default: 32768)")
    parser.add_argument("--levels", default="2,3,4")
    parser.add_argument("--calibration", type=Path, help="another text than edgemoe convert's own")
    parser.add_argument("--peer-python", help="an interpreter that has xllamacpp")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="folder for the models (default: a temporary one)")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    try:
        levels = tuple(int(width) for width in options.levels.split(","))
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            rows = run(options, levels, Path(work))
    except (EdgemoeError, OSError, ValueError) as error:
        raise SystemExit(f"quality: {error}") from None
    if options.markdown:
        options.markdown.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
