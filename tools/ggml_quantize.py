"""Quantizes weights to the block types of ggml, also those for which the `gguf` package has no function.

    python -m tools.ggml_quantize SOURCE.gguf TARGET.gguf TYPE

These are Q2_K to Q6_K, IQ4_NL and IQ4_XS. For tests and measurements: the simplest choice of scales, where
llama-quantize searches for better ones. `edgemoe/formats/ggml_blocks.py` says what the bytes mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.errors import EdgemoeError
from edgemoe.formats.ggml_blocks import TYPES as GGML_TYPES
from edgemoe.formats.gguf import GgufModel

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
TYPES = (
    *("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4"),
)
"""Names that `quantize` takes."""


def quantize(kind: str, weights: Floats) -> Bytes:
    """float32 [..., columns] -> uint8 [..., bytes of a row]; columns must be whole blocks. kind: one of TYPES."""
    own = _QUANTIZERS.get(kind)
    if own is None:
        import gguf

        rows = gguf.quantize(np.ascontiguousarray(weights), gguf.GGMLQuantizationType[kind.upper()])
        return np.ascontiguousarray(rows).view(np.uint8)
    size, quantizer = own
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, size)
    return np.concatenate([np.atleast_2d(part) for part in quantizer(blocks)], axis=1).reshape(*weights.shape[:-1], -1)


def _half(values: Floats) -> tuple[Bytes, Floats]:
    """[blocks] as float16: their bytes [blocks, 2], and what they mean."""
    halves = values.astype("<f2")
    return halves.view(np.uint8).reshape(-1, 2), halves.astype(np.float32)


def _ratio(values: Floats, units: Floats) -> Floats:
    """values / units, and 0 where the unit is."""
    return np.divide(values, units, out=np.zeros(np.broadcast(values, units).shape, np.float32), where=units != 0)


def _codes(values: Floats, units: Floats, low: int, high: int) -> npt.NDArray[np.int32]:
    return np.clip(np.rint(_ratio(values, units)), low, high).astype(np.int32)


def _nibbles(codes: npt.NDArray[Any]) -> Bytes:
    """[..., 2 n] -> [..., n]: the first half in the low four bits."""
    half = codes.shape[-1] // 2
    return (codes[..., :half] | codes[..., half:] << 4).astype(np.uint8)


def _pairs(codes: npt.NDArray[Any]) -> Bytes:
    """Two bits of 256 codes, [blocks, 256] -> [blocks, 64]: 128 codes share 32 bytes."""
    quarters = (codes & 3).reshape(len(codes), 2, 4, 32)
    return (quarters << np.arange(0, 8, 2)[:, None]).sum(2).astype(np.uint8).reshape(len(codes), 64)


def _fifth_bits(codes: npt.NDArray[Any]) -> Bytes:
    """One bit (0 or 1) of 256 codes -> [blocks, 32]: bit i of the bytes for codes 32 i and following."""
    return (codes.reshape(len(codes), 8, 32) << np.arange(8)[:, None]).sum(1).astype(np.uint8)


def _ranges(x: Floats, sub: int, levels: int, steps: int) -> tuple[Any, ...]:
    """Scales and minima of sub-blocks in `steps` units each, and codes up to `levels`."""
    parts = x.reshape(len(x), -1, sub)
    minima = np.maximum(-parts.min(-1), 0)
    scales = (np.maximum(parts.max(-1), 0) + minima) / levels
    d_bytes, d = _half(scales.max(-1) / steps)
    m_bytes, m = _half(minima.max(-1) / steps)
    sc, mn = _codes(scales, d[:, None], 0, steps), _codes(minima, m[:, None], 0, steps)
    codes = _codes(parts + (m[:, None] * mn)[..., None], (d[:, None] * sc)[..., None].astype(np.float32), 0, levels)
    return d_bytes, m_bytes, sc, mn, codes.reshape(len(x), 256)


def _signed(x: Floats, sub: int, reach: float, steps: int, low: int, high: int) -> tuple[Any, ...]:
    """Scales of sub-blocks in `steps` units, and signed codes."""
    parts = x.reshape(len(x), -1, sub)
    scales = np.abs(parts).max(-1) / np.float32(reach)
    d_bytes, d = _half(scales.max(-1) / steps)
    sc = _codes(scales, d[:, None], 0, steps)
    codes = _codes(parts, (d[:, None] * sc)[..., None].astype(np.float32), low, high)
    return d_bytes, sc, codes.reshape(len(x), 256)


def _q2_k(x: Floats) -> tuple[Bytes, ...]:
    d, m, scales, minima, codes = _ranges(x, 16, 3, 15)
    return (scales | minima << 4).astype(np.uint8), _pairs(codes), d, m


def _q3_k(x: Floats) -> tuple[Bytes, ...]:
    d, scales, codes = _signed(x, 16, 3.5, 31, -4, 3)
    scales, codes = scales + 32, codes + 4
    tops = (scales.reshape(-1, 4, 4) >> 4 << np.arange(0, 8, 2)[:, None]).sum(1).astype(np.uint8)
    return _fifth_bits(codes >> 2), _pairs(codes), _nibbles(scales & 15), tops, d


def _six_bits(scales: npt.NDArray[Any], minima: npt.NDArray[Any]) -> Bytes:
    first, second = scales[:, :4] | scales[:, 4:] >> 4 << 6, minima[:, :4] | minima[:, 4:] >> 4 << 6
    third = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1).astype(np.uint8)


def _q4_k(x: Floats) -> tuple[Bytes, ...]:
    d, m, scales, minima, codes = _ranges(x, 32, 15, 63)
    return d, m, _six_bits(scales, minima), _nibbles(codes.reshape(-1, 4, 64)).reshape(-1, 128)


def _q5_k(x: Floats) -> tuple[Bytes, ...]:
    d, m, scales, minima, codes = _ranges(x, 32, 31, 63)
    low = _nibbles((codes & 15).reshape(-1, 4, 64)).reshape(-1, 128)
    return d, m, _six_bits(scales, minima), _fifth_bits(codes >> 4), low


def _q6_k(x: Floats) -> tuple[Bytes, ...]:
    d, scales, codes = _signed(x, 16, 31.5, 127, -32, 31)
    codes = codes + 32
    low = _nibbles((codes & 15).reshape(-1, 2, 128)).reshape(-1, 128)
    return low, _pairs(codes >> 4), scales.astype(np.uint8), d


def _nearest(values: Floats) -> npt.NDArray[np.int32]:
    """The number of the nearest of _IQ4_VALUES."""
    return np.searchsorted((_IQ4_VALUES[1:] + _IQ4_VALUES[:-1]) / 2, values).astype(np.int32)


def _iq4_nl(x: Floats) -> tuple[Bytes, ...]:
    d_bytes, d = _half(np.abs(x).max(-1) / 113)
    return d_bytes, _nibbles(_nearest(_ratio(x, d[:, None])))


def _iq4_xs(x: Floats) -> tuple[Bytes, ...]:
    parts = x.reshape(len(x), 8, 32)
    scales = np.abs(parts).max(-1) / 113
    d_bytes, d = _half(scales.max(-1) / 31)
    units = _codes(scales, d[:, None], 0, 31)
    codes = _nearest(_ratio(parts, (d[:, None] * units)[..., None].astype(np.float32)))
    units = units + 32
    high = (units >> 4 << np.arange(0, 16, 2)).sum(1).astype("<u2").view(np.uint8).reshape(-1, 2)
    low = (units[:, 0::2] & 15 | (units[:, 1::2] & 15) << 4).astype(np.uint8)
    return d_bytes, high, low, _nibbles(codes).reshape(-1, 128)


_QUANTIZERS: dict[str, tuple[int, Callable[[Floats], tuple[Bytes, ...]]]] = {
    "q2_k": (256, _q2_k),
    "q3_k": (256, _q3_k),
    "q4_k": (256, _q4_k),
    "q5_k": (256, _q5_k),
    "q6_k": (256, _q6_k),
    "iq4_nl": (32, _iq4_nl),
    "iq4_xs": (256, _iq4_xs),
}
"""Type -> weights of a block, and the parts of the blocks of float32 [blocks, weights]."""


def quantize_gguf(source: Path, target: Path, kind: str) -> None:
    """Writes the GGUF file `source` anew with all matrices but the routers as `kind`, which may be "f32"; those without
    whole blocks, and what is a vector, stay float32. Needs the `gguf` package."""

    def choose(name: str, shape: tuple[int, ...]) -> str:
        return "f32" if "ffn_gate_inp" in name or shape[-1] % GGML_TYPES[kind].weights else kind

    rewrite_gguf(source, target, choose, quantize)


def rewrite_gguf(
    source: Path,
    target: Path,
    choose: Callable[[str, tuple[int, ...]], str],
    quantizer: Callable[[str, Floats], Bytes],
) -> None:
    """Writes the GGUF file `source` anew with matrices in other types; vectors stay float32. Needs the `gguf` package.

    choose: the type for a tensor's name and shape. quantizer: as `quantize`, of one matrix.
    """
    import gguf

    model = GgufModel.open(source)
    writer = gguf.GGUFWriter(target, model.metadata["general.architecture"])
    for name, field in gguf.GGUFReader(source).fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    chosen = {}
    for name, info in model.tensors.items():
        block = GGML_TYPES["f32" if len(info.shape) == 1 else choose(name, info.shape)]
        chosen[name] = block.name
        nbytes = int(np.prod(info.shape)) // block.weights * block.nbytes
        number = gguf.GGMLQuantizationType(block.code)
        writer.add_tensor_info(name, info.shape, np.dtype(np.float32), nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for name, block_name in chosen.items():
        # One expert at a time: a stack of all of them may be as large as the machine's memory.
        stacked = len(model.info(name).shape) == 3
        written = 0
        for index in range(model.info(name).shape[0]) if stacked else (None,):
            values = model.read(name, index)
            made = quantize("f32", values) if block_name == "f32" else quantizer(block_name, values)
            written += file.write(made.tobytes())
        writer.write_padding(file, written)
    writer.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.ggml_quantize", description=quantize_gguf.__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("kind", choices=TYPES)
    options = parser.parse_args(argv)
    try:
        quantize_gguf(options.source, options.target, options.kind)
    except (EdgemoeError, OSError) as error:
        raise SystemExit(f"ggml_quantize: {error}") from None


if __name__ == "__main__":
    main()
