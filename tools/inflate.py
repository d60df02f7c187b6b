"""Makes a model of real byte counts, with real routing, from a trained small one: it computes the same function.

    python -m tools.inflate FOLDER TARGET [--hidden-times 16] [--ffn-times 40] [--bits 4] [--dense-bits 8]
                            [--levels-of PACK]

FOLDER: a Hugging Face folder of a Qwen3-MoE. TARGET: NAME.emoe (a pack) or NAME.gguf (for llama.cpp).
PACK: FOLDER converted with `edgemoe convert --levels`; its experts' codes are repeated, and what was measured of its
levels and modes holds for the large model too.

The residual stream is repeated: where the small model has x, the large one has [x|x|...|x], r times. RMSNorm divides
by the same root mean square. Matrices that read the stream repeat their columns, those that write it repeat their rows,
and the r-fold sums are undone by the norms in front of them, whose weights are divided by r. (They could as well be
undone in the matrices; this way their quantized codes and scales are those of the small model.) The units of a
feed-forward part are repeated too, f times, and its output matrix is divided by f. With powers of two the divisions are
exact, and logits and routing differ from the small model's by the rounding of longer sums only. Attention heads stay as
they are.

Nothing else is repeated: layers or experts with copied routers would make the routing easier to predict than it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.errors import EdgemoeError, OptionError
from edgemoe.formats.index import MeasuredQuality
from edgemoe.formats.layouts import (
    BLOCK,
    GROUP,
    QUANTIZED,
    SUPER_GROUP,
    bf16_to_f32,
    pack,
    pack_level,
    packed_size,
    unpack_level,
)
from edgemoe.formats.pack import Bytes, Pack
from edgemoe.formats.read import TOKENIZER_FILES
from edgemoe.formats.safetensors import read_json
from edgemoe.quantize.rtn import quantize
from edgemoe.source import SourceModel
from edgemoe.spec import ModelSpec
from tools.model_files import GGUF_BLOCKS, print_progress, write_gguf, write_pack

_READS_STREAM = ("embedding", "head", "q", "k", "v", "router")
_NORMS = ("attention_norm", "ffn_norm", "final_norm")


class InflatedModel:
    """The widened model: `tools.model_files.Model` on top of a small one's folder.

    hidden_times: a power of two. ffn_times: any number from 1 on; unless it is a power of two, the weights of the
    output matrices are rounded. levels_of: a nested pack of the same folder, to repeat its codes (ffn_times must be a
    power of two then). Raises OptionError, and what reading the folder and the pack raises.
    """

    def __init__(self, folder: Path, hidden_times: int, ffn_times: int, levels_of: Path | None = None) -> None:
        if hidden_times < 1 or hidden_times & (hidden_times - 1):
            raise OptionError(f"{hidden_times} copies of the stream are not a power of two")
        if ffn_times < 1:
            raise OptionError(f"{ffn_times} copies of the feed-forward units")
        self._small = SourceModel.open(folder)
        if self._small.spec.family != "qwen3_moe":
            raise OptionError(f"{folder}: a {self._small.spec.family}; only qwen3_moe can be widened")
        self._dtypes = {name: dtype for name, _, dtype in self._small.tensors()}
        self._times = (hidden_times, ffn_times)
        small = self._small.spec
        layers = tuple(dataclasses.replace(layer, ffn_dim=layer.ffn_dim * ffn_times) for layer in small.layers)
        self.spec = dataclasses.replace(small, hidden_size=small.hidden_size * hidden_times, layers=layers)
        self.rope_base = _rope_base(read_json(folder / "config.json"))
        self.generation = self._small.generation
        self.blobs = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
        self.name = f"{folder.resolve().name} x{hidden_times} x{ffn_times}"
        digest = hashlib.sha256(self._small.folder.fingerprint().encode())
        for data in self.blobs.values():
            digest.update(data)
        self.fingerprint = f"{digest.hexdigest()} {hidden_times} {ffn_times}"
        self.levels: tuple[int, ...] = ()
        self.quality: MeasuredQuality | None = None
        self._nested: Pack | None = None
        if levels_of is not None:
            self._open_nested(levels_of, small)

    def _open_nested(self, path: Path, small: ModelSpec) -> None:
        nested = Pack.open(path)
        ladders = {tuple(level.bits for level in layer.levels) for layer in nested.index.experts.values()}
        if nested.index.spec != small or len(ladders) != 1:
            raise OptionError(f"{path}: not this model with the same levels in every layer")
        (self.levels,) = ladders
        if any(
            len(sections) < len(self.levels) for layer in nested.index.experts.values() for sections in layer.sections
        ):
            raise OptionError(f"{path}: some experts have fewer levels than others")
        if len(self.levels) < 2 or self._times[1] & (self._times[1] - 1):
            raise OptionError(f"{path}: {len(self.levels)} levels, {self._times[1]} copies of the feed-forward units")
        self._nested, self.quality = nested, nested.index.quality
        self.fingerprint += f" {path.resolve()} {path.stat().st_mtime_ns}"

    def packed(self, name: str, layout: str, level: int = 0) -> Iterator[Bytes]:
        if self._nested is not None and ".experts." in name:
            yield self._repeated_level(self._nested, name, level).data
            return
        weights, row_times, column_times = self._widening(name)
        if weights.ndim == 1:
            yield pack("vector", weights).data
            return
        # Whole blocks of a repeated matrix are repeated blocks: quantizing and interleaving the small one is enough.
        if (row_times > 1 and weights.shape[0] % BLOCK) or (column_times > 1 and weights.shape[1] % GROUP):
            weights, row_times, column_times = np.tile(weights, (row_times, column_times)), 1, 1
        data = pack(layout, *quantize(weights, QUANTIZED[layout])) if layout in QUANTIZED else pack(layout, weights)
        wide = np.tile(data.reshape(-(-weights.shape[0] // BLOCK), -1), (1, column_times))
        for _ in range(row_times):
            yield wide.reshape(-1).data

    def _repeated_level(self, nested: Pack, name: str, level: int) -> npt.NDArray[np.uint8]:
        """One level of an expert's matrix: codes and parameters repeated like the weights."""
        hidden_times, ffn_times = self._times
        _, layer, _, expert, part = name.split(".")
        experts = nested.index.experts[int(layer)]
        place = experts.levels[level].parts[part]
        section = nested.read_section(experts.sections[int(expert)][level])
        data = section[place.offset : place.offset + packed_size(place.layout, *place.shape)]
        codes, parameters = unpack_level(place.layout, data, *place.shape)
        rows, columns = (hidden_times, ffn_times) if part == "down" else (ffn_times, hidden_times)
        width = place.shape[1]
        if columns > 1 and (width % GROUP or (SUPER_GROUP % width and width % SUPER_GROUP)):
            raise OptionError(f"{name}: {width} columns, repeated, do not share scales as they do alone")
        wide = [np.tile(values, (rows, columns)) for values in parameters]
        if level == 0:
            scales, steps, offsets, ratios, shifts = wide
            if part == "down":  # the other parameters are relative to the scales
                scales = (scales / np.float16(ffn_times)).astype(np.float16)
            kept = np.s_[..., : -(-columns * width // SUPER_GROUP)]  # several narrow copies share one super group
            wide = [scales[kept], steps, offsets, ratios[kept], shifts[kept]]
        return pack_level(place.layout, np.tile(codes, (rows, columns)), wide)

    def blocks(self, name: str, kind: str) -> Iterator[Bytes]:
        import gguf

        weights, row_times, column_times = self._widening(name)
        if column_times > 1 and weights.shape[1] % GGUF_BLOCKS[kind][0]:
            weights, column_times = np.tile(weights, (1, column_times)), 1
        rows = gguf.quantize(weights, gguf.GGMLQuantizationType[kind]).view(np.uint8)
        wide = np.ascontiguousarray(np.tile(rows, (1, column_times)) if rows.ndim == 2 else rows)
        for _ in range(row_times):
            yield wide.reshape(-1).data

    def _widening(self, name: str) -> tuple[npt.NDArray[np.float32], int, int]:
        """The weights to repeat, and how often their rows and columns are to be; a vector is given at full length."""
        hidden_times, ffn_times = self._times
        source = self._small.sources[name]
        values: npt.NDArray[Any] = self._small.folder.read(source.name, source.rows, source.index)
        weights = bf16_to_f32(values) if self._dtypes[name] == "bf16" else values.astype(np.float32)
        if source.transpose:
            weights = np.ascontiguousarray(weights.T)
        part = name.rsplit(".", 1)[-1]
        if part in _NORMS:
            return np.tile(weights / np.float32(hidden_times), hidden_times), 1, 1
        if part in _READS_STREAM:
            return weights, 1, hidden_times
        if part in ("gate", "up"):
            return weights, ffn_times, hidden_times
        if part == "down":
            return weights / np.float32(ffn_times), hidden_times, ffn_times
        if part == "o":
            return weights, hidden_times, 1
        assert part in ("q_norm", "k_norm")
        return weights, 1, 1


def _rope_base(config: dict[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or parameters.get("rope_theta") or 10000.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.inflate", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Hugging Face folder of a trained Qwen3-MoE")
    parser.add_argument("target", type=Path, help="NAME.emoe or NAME.gguf")
    parser.add_argument("--hidden-times", type=int, default=16, help="copies of the residual stream (default: 16)")
    parser.add_argument("--ffn-times", type=int, default=40, help="copies of the feed-forward units (default: 40)")
    parser.add_argument("--bits", type=int, default=4, help="of the experts: 32, 8 or 4 (default: 4)")
    parser.add_argument("--dense-bits", type=int, default=8, help="of the other matrices (default: 8)")
    parser.add_argument(
        "--levels-of", type=Path, metavar="PACK", help="a nested pack of FOLDER, for a pack with levels"
    )
    options = parser.parse_args(argv)
    write = {".emoe": write_pack, ".gguf": write_gguf}.get(options.target.suffix)
    if write is None:
        parser.error(f"{options.target}: neither .emoe nor .gguf")
    try:
        if options.levels_of and options.target.suffix == ".gguf":
            raise OptionError("a GGUF file holds one width of each expert")
        model = InflatedModel(options.folder, options.hidden_times, options.ffn_times, options.levels_of)
        total, active = model.spec.parameters()
        print(f"{model.name}: {total / 1e9:.2f} G weights, {active / 1e9:.2f} G of them work on a token")
        write(model, options.target, options.bits, options.dense_bits, print_progress)
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"inflate: {error}") from None
    print(f"{options.target}: {options.target.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
