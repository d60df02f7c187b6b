"""Writes small GGUF files by hand, right ones and wrong ones; shares no code with the reader."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

# name -> (code, weights, bytes, offsets of the float16 values) of a block
BLOCKS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "f32": (0, 1, 4, ()),
    "f16": (1, 1, 2, ()),
    "bf16": (30, 1, 2, ()),
    "q4_0": (2, 32, 18, (0,)),
    "q4_1": (3, 32, 20, (0, 2)),
    "q5_0": (6, 32, 22, (0,)),
    "q5_1": (7, 32, 24, (0, 2)),
    "q8_0": (8, 32, 34, (0,)),
    "q2_k": (10, 256, 84, (80, 82)),
    "q3_k": (11, 256, 110, (108,)),
    "q4_k": (12, 256, 144, (0, 2)),
    "q5_k": (13, 256, 176, (0, 2)),
    "q6_k": (14, 256, 210, (208,)),
    "iq4_nl": (20, 32, 18, (0,)),
    "iq4_xs": (23, 256, 136, (0,)),
    "mxfp4": (39, 32, 17, ()),
}


@dataclass(frozen=True)
class Value:
    """A metadata value with its type; for arrays, `element` is the type of the elements."""

    kind: int
    value: Any
    element: int = STRING


@dataclass(frozen=True)
class Tensor:
    """shape: rows first. offset: into the data, where it is not to follow the tensor before."""

    shape: tuple[int, ...]
    code: int
    data: bytes
    offset: int | None = None


def typed(value: Any) -> Value:
    """The value in the type that the usual tools give it."""
    if isinstance(value, Value):
        return value
    if isinstance(value, bool):
        return Value(BOOL, value)
    if isinstance(value, int):
        return Value(U32 if 0 <= value < 1 << 32 else I64, value)
    if isinstance(value, float):
        return Value(F32, value)
    if isinstance(value, str):
        return Value(STRING, value)
    first = value[0] if len(value) else ""
    kinds = {bool: BOOL, int: I32, float: F32, str: STRING}
    return Value(ARRAY, value, kinds[type(first)])


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def encoded(value: Value) -> bytes:
    """Type and value."""
    if value.kind == STRING:
        return struct.pack("<I", STRING) + string(value.value)
    if value.kind != ARRAY:
        return struct.pack("<I" + FORMS[value.kind], value.kind, value.value)
    head = struct.pack("<IIQ", ARRAY, value.element, len(value.value))
    if value.element == STRING:
        return head + b"".join(string(item) for item in value.value)
    return head + struct.pack(f"<{len(value.value)}{FORMS[value.element]}", *value.value)


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """counts: of tensors and keys, where they are to be wrong."""
    tensors = tensors or {}
    tensor_count, key_count = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count)
    head += b"".join(string(key) + encoded(typed(value)) for key, value in metadata.items())
    data = b""
    for name, tensor in tensors.items():
        data += bytes(-len(data) % alignment)
        offset = len(data) if tensor.offset is None else tensor.offset
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        head += string(name) + dimensions + struct.pack("<IQ", tensor.code, offset)
        data += tensor.data
    return head + bytes(-len(head) % alignment) + data


def random_blocks(kind: str, weights: int, seed: int = 0) -> bytes:
    """Random blocks with scales of reasonable size."""
    _, per_block, size, halves = BLOCKS[kind]
    random = np.random.default_rng(seed)
    count = weights // per_block
    if kind == "f32":
        return random.standard_normal(count).astype("<f4").tobytes()
    if kind == "f16":
        return random.standard_normal(count).astype("<f2").tobytes()
    blocks: npt.NDArray[np.uint8] = random.integers(0, 256, (count, size), dtype=np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = random.standard_normal(count).astype("<f2").view(np.uint8).reshape(-1, 2)
    if kind == "bf16":
        blocks[:, 1] = blocks[:, 1] & 0x80 | 0x3E  # around 0.1
    if kind == "mxfp4":
        blocks[:, 0] = 120 + blocks[:, 0] % 16
    return blocks.tobytes()


def random_tensor(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return Tensor(shape, BLOCKS[kind][0], random_blocks(kind, int(np.prod(shape)), seed))


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


def byte_level_metadata(
    pre: str = "qwen2", words: Iterable[str] = ("the", "hello", "123"), **more: Any
) -> dict[str, Any]:
    """A BPE vocabulary: all bytes, the words with the merges that build them from the left, two control tokens, one
    user-defined one."""
    tokens, merges = byte_characters(), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    types = [1] * len(tokens) + [3, 3, 4]
    tokens += ["<|im_start|>", "<|im_end|>", "<tool>"]
    return {
        "general.architecture": "qwen3moe",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        **{f"tokenizer.{key}": value for key, value in more.items()},
    }


def sentencepiece_metadata(pieces: Iterable[str] = ("\u2581the", "\u2581", "he", "ll"), **more: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: <unk>, <s>, </s>, the bytes, some letters, the pieces by falling score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    scores = [0.0] * len(tokens)
    pieces = list(pieces)
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in pieces]
    prefixes = [piece[:end] for piece in pieces for end in range(2, len(piece))]
    for number, piece in enumerate(dict.fromkeys([*pieces, *prefixes, *letters])):
        tokens.append(piece)
        types.append(1)
        scores.append(-1.0 - number)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.{key}": value for key, value in more.items()},
    }


def tiny_qwen3_moe_gguf(
    *, layers: int = 2, experts: int = 4, hidden: int = 64, ffn: int = 32, kind: str = "q8_0", seed: int = 0
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, tensors) of a Qwen3-MoE with random weights, 4 heads of 16, 2 of them for keys and values."""
    metadata = {
        **byte_level_metadata(),
        "qwen3moe.block_count": layers,
        "qwen3moe.context_length": 512,
        "qwen3moe.embedding_length": hidden,
        "qwen3moe.feed_forward_length": 4 * ffn,
        "qwen3moe.attention.head_count": 4,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": 16,
        "qwen3moe.attention.value_length": 16,
        "qwen3moe.rope.freq_base": 1000000.0,
        "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3moe.expert_count": experts,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": ffn,
    }
    vocabulary = len(metadata["tokenizer.ggml.tokens"])
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"token_embd.weight": (kind, (vocabulary, hidden))}
    for layer in range(layers):
        here = f"blk.{layer}."
        shapes |= {
            here + "attn_norm.weight": ("f32", (hidden,)),
            here + "attn_q.weight": (kind, (64, hidden)),
            here + "attn_k.weight": (kind, (32, hidden)),
            here + "attn_v.weight": (kind, (32, hidden)),
            here + "attn_output.weight": (kind, (hidden, 64)),
            here + "attn_q_norm.weight": ("f32", (16,)),
            here + "attn_k_norm.weight": ("f32", (16,)),
            here + "ffn_norm.weight": ("f32", (hidden,)),
            here + "ffn_gate_inp.weight": ("f32", (experts, hidden)),
            here + "ffn_gate_exps.weight": (kind, (experts, ffn, hidden)),
            here + "ffn_up_exps.weight": (kind, (experts, ffn, hidden)),
            here + "ffn_down_exps.weight": (kind, (experts, hidden, ffn)),
        }
    shapes |= {"output_norm.weight": ("f32", (hidden,)), "output.weight": (kind, (vocabulary, hidden))}
    tensors = {name: random_tensor(kind, shape, seed + i) for i, (name, (kind, shape)) in enumerate(shapes.items())}
    return metadata, tensors


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None, **options: Any) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path
