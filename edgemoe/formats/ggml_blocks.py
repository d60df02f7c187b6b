"""The block formats of ggml tensors: their sizes, and the float32 values of their blocks.

A row of a tensor is a sequence of blocks, each with a fixed number of weights in a fixed number of bytes. Bits that
belong together are spread over a block in the order that suited ggml's first kernels; each function below says how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgemoe.errors import SourceError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class BlockType(NamedTuple):
    """code: the number in a GGUF file. weights, nbytes: of one block."""

    name: str
    code: int
    weights: int
    nbytes: int


_TYPES = (
    ("f32", 0, 1, 4),
    ("f16", 1, 1, 2),
    ("q4_0", 2, 32, 18),
    ("q4_1", 3, 32, 20),
    ("q5_0", 6, 32, 22),
    ("q5_1", 7, 32, 24),
    ("q8_0", 8, 32, 34),
    ("q2_k", 10, 256, 84),
    ("q3_k", 11, 256, 110),
    ("q4_k", 12, 256, 144),
    ("q5_k", 13, 256, 176),
    ("q6_k", 14, 256, 210),
    ("iq2_xxs", 16, 256, 66),
    ("iq2_xs", 17, 256, 74),
    ("iq3_xxs", 18, 256, 98),
    ("iq1_s", 19, 256, 50),
    ("iq4_nl", 20, 32, 18),
    ("iq3_s", 21, 256, 110),
    ("iq2_s", 22, 256, 82),
    ("iq4_xs", 23, 256, 136),
    ("i8", 24, 1, 1),
    ("i16", 25, 1, 2),
    ("i32", 26, 1, 4),
    ("i64", 27, 1, 8),
    ("f64", 28, 1, 8),
    ("iq1_m", 29, 256, 56),
    ("bf16", 30, 1, 2),
    ("tq1_0", 34, 256, 54),
    ("tq2_0", 35, 256, 66),
    ("mxfp4", 39, 32, 17),
    ("nvfp4", 40, 64, 36),
    ("q1_0", 41, 128, 18),
)
TYPES: dict[str, BlockType] = {entry[0]: BlockType(*entry) for entry in _TYPES}
"""Every type that a file may name; only those of `READABLE` can be read."""
TYPES_BY_CODE: dict[int, BlockType] = {kind.code: kind for kind in TYPES.values()}

# The 16 values of IQ4_NL and IQ4_XS, and twice those of a 4-bit float (E2M1) of MXFP4.
_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_FP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def dequantize(type_name: str, data: Bytes) -> Floats:
    """The weights of whole blocks, one after the other: uint8 [blocks * nbytes] -> float32 [blocks * weights].

    Raises SourceError for a type that is not in `READABLE`.
    """
    read = READABLE.get(type_name)
    if read is None:
        raise SourceError(f"tensors of type {type_name} cannot be read (known: {', '.join(READABLE)})")
    if not len(data):
        return np.empty(0, np.float32)
    # A damaged file may hold infinite scales; that is no reason for a warning on the terminal.
    with np.errstate(all="ignore"):
        return read(np.ascontiguousarray(data).reshape(-1, TYPES[type_name].nbytes)).reshape(-1)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[..., n] -> [..., 2 n]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _bits(packed: Bytes) -> Bytes:
    """Little-endian bits, [blocks, n] -> [blocks, 8 n]."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    """Scale; 16 bytes: weights 0-15 in the low nibbles, 16-31 in the high ones, minus 8."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    """Scale, minimum; nibbles as in Q4_0."""
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    """Scale; 32 fifth bits; nibbles as in Q4_0; minus 16."""
    codes = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return _half(blocks, 0) * (codes.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    """Scale, minimum; 32 fifth bits; nibbles as in Q4_0."""
    codes = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    """Scale; 32 signed bytes."""
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _pairs_of_bits(packed: Bytes) -> Bytes:
    """[blocks, 32 n] -> [blocks, n, 4, 32]: of 32 bytes first the lowest two bits of all, then the next two, ..."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (packed.reshape(len(packed), -1, 1, 32) >> shifts) & np.uint8(3)


def _q2_k(blocks: Bytes) -> Floats:
    """16 bytes of scales (low nibble) and minima (high) of 16 weights each; 64 bytes of codes; their two scales."""
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    minima = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    codes = _pairs_of_bits(blocks[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
    return scales[:, :, None] * codes - minima[:, :, None]


def _q3_k(blocks: Bytes) -> Floats:
    """32 bytes of third bits (bit i for weights 32 i and following); 64 bytes of codes; 12 bytes of 16 scales; scale.

    A code without its third bit is 4 lower. The scales' low nibbles lie in the first 8 bytes, their high pairs of bits
    in the last 4.
    """
    low = _pairs_of_bits(blocks[:, 32:96]).reshape(-1, 8, 32)
    high = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = low.astype(np.int8) - ((high ^ 1) << 2).astype(np.int8)
    scales = blocks[:, 96:108]
    tops = (scales[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scale = (_nibbles(scales[:, :8]) | tops.reshape(-1, 16) << 4).astype(np.float32) - 32
    return (_half(blocks, 108) * scale)[:, :, None] * codes.reshape(-1, 16, 16).astype(np.float32)


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """The 6-bit scales and minima of Q4_K and Q5_K, 8 of each in 12 bytes, as float32 [blocks, 8].

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minima 0-3 in their low 6 bits; bytes 8-11 the low nibbles of scales and
    minima 4-7, whose upper two bits are the uppermost of bytes 0-3 and 4-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(blocks: Bytes) -> Floats:
    """Scales of scales and minima; 12 bytes of them; 4 x 32 bytes: 32 weights in the low nibbles, 32 in the high."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32).astype(np.float32)
    return (_half(blocks, 0) * scales)[:, :, None] * codes - (_half(blocks, 2) * minima)[:, :, None]


def _q5_k(blocks: Bytes) -> Floats:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit i for weights 32 i and following."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = (low | high << 4).astype(np.float32)
    return (_half(blocks, 0) * scales)[:, :, None] * codes - (_half(blocks, 2) * minima)[:, :, None]


def _q6_k(blocks: Bytes) -> Floats:
    """2 x 64 bytes of low nibbles; 2 x 32 of upper pairs of bits; 16 signed scales of 16 weights; scale; minus 32."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    codes = (low | _pairs_of_bits(blocks[:, 128:192]) << 4).astype(np.float32) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scales[:, :, None] * codes.reshape(-1, 16, 16)


def _iq4_nl(blocks: Bytes) -> Floats:
    """As Q4_0, the nibbles being indices of a table."""
    return _half(blocks, 0) * _IQ4_VALUES[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: Bytes) -> Floats:
    """Scale; upper pairs of bits, then low nibbles of 8 scales minus 32; 8 x 16 bytes of nibbles as in IQ4_NL."""
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales = (low | (high & 3).astype(np.uint8) << 4).astype(np.float32) - 32
    values = _IQ4_VALUES[_nibbles(blocks[:, 8:].reshape(-1, 8, 16))]
    weights: Floats = (_half(blocks, 0) * scales)[:, :, None] * values
    return weights


def _mxfp4(blocks: Bytes) -> Floats:
    """An exponent without sign (E8M0); nibbles as in Q4_0, each a 4-bit float. The table holds twice their values."""
    scales = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    values: Floats = scales.astype(np.float32) * _FP4_VALUES[_nibbles(blocks[:, 1:])]
    return values


def mxfp4_blocks(nibbles: Bytes, exponents: Bytes) -> Bytes:
    """Blocks of type mxfp4 of weights as Hugging Face folders hold them, where a byte has two neighbours, the first in
    its low bits: uint8 [..., 16] and [...] -> uint8 [..., 17]."""
    codes = np.stack((nibbles & np.uint8(15), nibbles >> np.uint8(4)), axis=-1).reshape(*nibbles.shape[:-1], 32)
    packed = codes[..., :16] | (codes[..., 16:] << np.uint8(4))
    return np.concatenate((exponents[..., None], packed), axis=-1)


READABLE: dict[str, Callable[[Bytes], npt.NDArray[Any]]] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "mxfp4": _mxfp4,
}
