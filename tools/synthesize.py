"""Makes a model of a true shape with random weights whose routing is nearly uniform: the worst case for a cache.

    python -m tools.synthesize TARGET [--layers 23] [--bits 4] [--dense-bits 4] [--check 64]

TARGET: NAME.emoe (a pack) or NAME.gguf (for llama.cpp). The shape is Qwen3-30B-A3B's unless options say otherwise:
layers with 128 experts of 3 x 2048 x 768, 8 of them for a token. A pack and a GGUF of the same options and seed hold
the same weights, to the bit.

A code is a random nibble or byte, written as it is drawn; no quantizer runs. Two things freeze the routing of random
models, so that all tokens take the same experts after a few layers. Codes are not symmetric about zero (a nibble less 8
is -0.5 on average), and such a mean sends every token's stream in one direction: so every group of 64 weights gets a
random sign. And random attention looks everywhere: what it adds is nearly the same for all tokens, and each layer
passes it on undiminished: so its output is made small and that of the experts large. `--check N` generates N tokens
with the pack and says how many distinct experts they took.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.errors import EdgemoeError, OptionError
from edgemoe.formats.index import MeasuredQuality
from edgemoe.formats.layouts import GROUP, pack
from edgemoe.formats.pack import Bytes
from edgemoe.spec import AttentionSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec
from tools.model_files import print_progress, write_gguf, write_pack

ROPE_BASE = 1e6
# Weights made at once: rows of a matrix are drawn in pieces of so many.
_AT_ONCE = 1 << 22
# Standard deviation of codes in steps: 16 levels and 255 levels, half a step off the middle or on it.
_DEVIATION = {4: np.sqrt((16**2 - 1) / 12 + 0.25), 8: np.sqrt((255**2 - 1) / 12)}
# Matrices that are not of standard deviation 1 / sqrt(inputs), by how much.
_GAINS = {"o": 0.125, "down": 4.0}
_BITS = {"q4g64": 4, "q8g64": 8, "Q4_0": 4, "Q8_0": 8}


class SyntheticModel:
    """Random weights, of standard deviation 1 / sqrt(inputs) for the most part: `tools.model_files.Model`.

    Raises OptionError where rows are not whole groups of 64 weights.
    """

    def __init__(
        self,
        *,
        layers: int = 23,
        hidden: int = 2048,
        ffn: int = 768,
        experts: int = 128,
        top_k: int = 8,
        heads: int = 32,
        kv_heads: int = 4,
        head_dim: int = 128,
        vocabulary: int = 32768,
        seed: int = 0,
    ) -> None:
        for size in (hidden, ffn, heads * head_dim):
            if size % GROUP:
                raise OptionError(f"rows of {size} weights are not whole groups of {GROUP}")
        if vocabulary < 320:
            raise OptionError(f"a vocabulary of {vocabulary} is smaller than 320")
        frequencies = ROPE_BASE ** (-np.arange(0, head_dim, 2) / head_dim)
        attention = AttentionSpec(
            kind="full",
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=head_dim**-0.5,
            rope=RopeSpec(tuple(frequencies.tolist())),
            qk_norm="head",
        )
        layer = LayerSpec(attention, ffn, experts, top_k, RouterSpec(renormalize=True))
        self.spec = ModelSpec("qwen3_moe", vocabulary, hidden, 40960, (layer,) * layers, 1e-6)
        self.rope_base = ROPE_BASE
        self.generation = {"bos_token_ids": [], "eos_token_ids": [0]}
        self.blobs = {"tokenizer.json": _tokenizer()}
        self.name = f"synthetic-{layers}x{experts}x{ffn}"
        self.levels: tuple[int, ...] = ()
        self.quality: MeasuredQuality | None = None
        self.fingerprint = f"{self.name} {self.spec} {seed}"
        self._seed = seed

    def packed(self, name: str, layout: str, level: int = 0) -> Iterator[Bytes]:
        if layout in ("vector", "f32"):
            yield pack(layout, self._floats(name)).data
            return
        for codes, step, negative in self._codes(name, _BITS[layout]):
            # A negative group is written as its mirror image with a positive scale.
            groups = negative.repeat(GROUP, axis=1)
            if layout == "q4g64":
                codes = np.where(groups, np.uint8(15) - codes, codes)
                offsets = np.where(negative, np.float16(-7 * step), np.float16(-8 * step))
            else:
                codes = np.where(groups, np.uint8(0) - codes, codes) + np.uint8(128)
                offsets = np.full(negative.shape, -128 * step)
            scales = np.full(negative.shape, step)
            yield pack(layout, codes, scales, offsets.astype(np.float16)).data

    def blocks(self, name: str, kind: str) -> Iterator[Bytes]:
        if kind == "F32":
            yield np.ascontiguousarray(self._floats(name)).reshape(-1).view(np.uint8).data
            return
        for codes, step, negative in self._codes(name, _BITS[kind]):
            # A block is a float16 scale and 32 codes; two blocks make one of our groups.
            blocks = codes.reshape(-1, 32)
            if kind == "Q4_0":
                blocks = blocks[:, :16] | (blocks[:, 16:] << np.uint8(4))
            out = np.empty((len(blocks), 2 + blocks.shape[1]), np.uint8)
            scales = np.where(negative, -step, step).repeat(2, axis=1).reshape(-1, 1)
            out[:, :2] = scales.view(np.uint8)
            out[:, 2:] = blocks
            yield out.reshape(-1).data

    def _shape(self, name: str) -> tuple[int, ...]:
        if ".experts." not in name:
            return self.spec.dense_tensors()[name]
        _, layer, _, _, part = name.split(".")
        return self.spec.expert_tensors(int(layer))[part]

    def _random(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self._seed, zlib.crc32(name.encode())]))

    def _floats(self, name: str) -> npt.NDArray[np.float32]:
        """Norms of ones; the router's matrix with logits of standard deviation 1."""
        shape = self._shape(name)
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return self._random(name).standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))

    def _codes(self, name: str, bits: int) -> Iterator[tuple[npt.NDArray[np.uint8], np.float16, npt.NDArray[np.bool_]]]:
        """Some rows at a time: codes uint8 [rows, columns], a step, and [rows, columns / 64]: is the group's sign -1?

        A weight is sign * step * (code - 8) at 4 bits, sign * step * code (an int8's bits, not -128) at 8 bits.
        """
        rows, columns = self._shape(name)
        random = self._random(name)
        gain = _GAINS.get(name.rsplit(".", 1)[-1], 1.0)
        # The embedding is not summed over its columns: its weights are of order one.
        step = np.float16(gain / (_DEVIATION[bits] * (1 if name == "embedding" else np.sqrt(columns))))
        step = (step.view(np.uint16) & np.uint16(0xFFF8)).view(np.float16)  # so that 7 steps are a float16 too
        at_once = max(16, _AT_ONCE // columns // 16 * 16)
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            drawn = np.frombuffer(random.bytes(count * columns * bits // 8), np.uint8).reshape(count, -1)
            if bits == 4:
                halves = drawn.reshape(count, -1, 16)
                codes = np.stack((halves & np.uint8(15), halves >> np.uint8(4)), axis=2).reshape(count, columns)
            else:
                codes = np.where(drawn == 128, np.uint8(0), drawn)
            yield codes, step, random.random((count, columns // GROUP), np.float32) < 0.5


def _tokenizer() -> bytes:
    """A byte-level BPE: the end of text at 0, a token per byte, and one merge (llama.cpp wants some)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
    end = {"id": 0, "content": "<|endoftext|>", "special": True, "normalized": False}
    vocabulary = ["<|endoftext|>", *characters, "\u0120t"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {token: number for number, token in enumerate(vocabulary)},
                "merges": [["\u0120", "t"]],
            },
        }
    ).encode()


def check_routing(path: Path, tokens: int, memory: str | int | None = None) -> tuple[float, float]:
    """Generates `tokens` tokens: (distinct experts they took per layer on average, as many by chance alone).

    With everything held and nothing read ahead, an expert is read when it is first taken: the reads are the distinct
    experts. Even a single layer with frozen routing shows in their mean. Needs memory for the whole model.
    """
    import edgemoe

    with edgemoe.load(path, gpu="none", memory=memory, context=2 * tokens, prefetch=False) as model:
        sampling: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
        generation = model.generate([1], max_tokens=tokens, ignore_eos=True, **sampling)
        for _ in generation:
            pass
        counters, layers = generation.result.counters, [layer for layer in model.spec.layers if layer.experts]
    if counters.evictions:
        raise OptionError(f"{path}: {counters.evictions} experts gave way; the check needs memory for all")
    chance = sum(layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens) for layer in layers)
    return counters.sections_read / len(layers), chance / len(layers)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.synthesize", description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="NAME.emoe or NAME.gguf")
    shape = {"layers": 23, "hidden": 2048, "ffn": 768, "experts": 128, "top_k": 8, "heads": 32, "kv_heads": 4}
    for name, default in {**shape, "head_dim": 128, "vocabulary": 32768, "seed": 0}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8), help="of the experts (default: 4)")
    parser.add_argument("--dense-bits", type=int, default=4, choices=(4, 8), help="of other matrices (default: 4)")
    parser.add_argument(
        "--check", type=int, metavar="N", help="generate N tokens with the pack and count their experts"
    )
    options = vars(parser.parse_args(argv))
    target, bits, dense_bits, check = (options.pop(name) for name in ("target", "bits", "dense_bits", "check"))
    write = {".emoe": write_pack, ".gguf": write_gguf}.get(target.suffix)
    if write is None or (check and target.suffix != ".emoe"):
        parser.error(f"{target}: neither .emoe nor .gguf" if write is None else "--check needs a pack")
    try:
        model = SyntheticModel(**options)
        total, active = model.spec.parameters()
        print(f"{model.name}: {total / 1e9:.2f} G weights, {active / 1e9:.2f} G of them work on a token")
        write(model, target, bits, dense_bits, print_progress)
        print(f"{target}: {target.stat().st_size / 1e9:.2f} GB")
        if check:
            found, chance = check_routing(target, check)
            print(
                f"{check} tokens took {found:.1f} distinct experts per layer on average (uniform routing: "
                f"{chance:.1f}, frozen routing: {options['top_k']})"
            )
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"synthesize: {error}") from None


if __name__ == "__main__":
    main()
