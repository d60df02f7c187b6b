"""Writes a Qwen3-MoE model, tensor by tensor, as a pack or as a GGUF file.

What the tools that make models for measurements share. A model is whatever can give the bytes of one of its tensors in
a layout of packs and in a type of GGUF; no more than one matrix is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from edgemoe.errors import OptionError, SourceError
from edgemoe.formats.index import PARTS, DenseTensor, ExpertLayer, Level, MeasuredQuality, Part
from edgemoe.formats.layouts import tensor_size
from edgemoe.formats.pack import ALIGNMENT, Blob, Bytes, PackContents, PackWriter, align
from edgemoe.quantize.nested_experts import level_layouts
from edgemoe.spec import ModelSpec

LAYOUTS = {32: "f32", 8: "q8g64", 4: "q4g64"}
GGUF_TYPES = {32: "F32", 8: "Q8_0", 4: "Q4_0"}
"""The type of GGUF that takes as many bits: a pack of 4 (4.5) bits and a GGUF of 4 (4.5) bits are equally large."""
GGUF_BLOCKS = {"F32": (1, 4), "Q8_0": (32, 34), "Q4_0": (32, 18)}
"""Weights and bytes of a block."""

Progress = Callable[[int, int], None]


class Model(Protocol):
    """A model whose tensors are made when they are asked for.

    rope_base: of the rotary embedding. generation: as in a pack's index. blobs: name -> contents (tokenizer.json, ...).
    name: for people. fingerprint: of everything the bytes depend on. levels: widths of nested experts; quality: what
    was measured of them; empty and None for experts of one width.
    """

    spec: ModelSpec
    rope_base: float
    generation: dict[str, Any]
    blobs: dict[str, bytes]
    name: str
    fingerprint: str
    levels: tuple[int, ...]
    quality: MeasuredQuality | None

    def packed(self, name: str, layout: str, level: int = 0) -> Iterable[Bytes]:
        """The tensor of this engine name ("layers.0.experts.1.gate"), or one level of it, in a layout of packs, in
        pieces."""

    def blocks(self, name: str, kind: str) -> Iterable[Bytes]:
        """The same in a type of GGUF, row after row."""


def write_pack(model: Model, target: Path, bits: int, dense_bits: int, progress: Progress | None = None) -> None:
    """bits: 32, 8 or 4, of the experts, unless the model has levels; dense_bits: of the other matrices. Routers and
    vectors are float32."""
    _check_target(target, bits, dense_bits)
    spec = model.spec
    widths = model.levels or (bits,)
    expert_layouts = level_layouts(widths) if model.levels else [LAYOUTS[bits]]
    provenance = {"source": model.name, "source_format": "generated", "bits": widths[-1], "dense_bits": dense_bits}
    contents = PackContents(spec, model.generation, provenance, {}, {}, {}, [], model.quality)
    sections: list[dict[str, tuple[str, int]] | bytes] = []  # tensor -> layout and offset; the sections' lengths follow
    lengths: list[int] = []
    level_of: list[int] = []

    def add(shapes: Mapping[str, tuple[int, ...]], of_matrices: str, level: int = 0) -> int:
        tensors, end = {}, 0
        for name, shape in shapes.items():
            layout = "vector" if len(shape) == 1 else "f32" if name.endswith(".router") else of_matrices
            offset = align(end, ALIGNMENT)
            tensors[name] = (layout, offset)
            end = offset + tensor_size(layout, shape)
        sections.append(tensors)
        lengths.append(end)
        level_of.append(level)
        return len(sections) - 1

    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in spec.dense_tensors().items():
        group = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
        groups.setdefault(group, {})[name] = shape
    for shapes in groups.values():
        number = add(shapes, LAYOUTS[dense_bits])
        for name, (layout, offset) in sections[number].items():  # type: ignore[union-attr]
            contents.dense[name] = DenseTensor(number, offset, layout, shapes[name])
    for name, data in model.blobs.items():
        contents.blobs[name] = Blob(len(sections), len(data))
        sections.append(data)
        lengths.append(len(data))
        level_of.append(0)
    for layer, layer_spec in enumerate(spec.layers):
        if not layer_spec.experts:
            continue
        matrices = spec.expert_tensors(layer)
        numbers = []
        for expert in range(layer_spec.experts):
            prefix = f"layers.{layer}.experts.{expert}."
            named = {prefix + part: matrices[part] for part in PARTS}
            numbers.append(tuple(add(named, layout, level) for level, layout in enumerate(expert_layouts)))
        levels = []
        for width, number in zip(widths, numbers[-1], strict=True):
            places = sections[number]
            assert isinstance(places, dict)
            parts = {
                part: Part(places[prefix + part][0], 0, places[prefix + part][1], matrices[part]) for part in PARTS
            }
            levels.append(Level(width, parts))
        contents.experts[layer] = ExpertLayer(tuple(levels), tuple(numbers))

    def chunks(section: dict[str, tuple[str, int]] | bytes, level: int) -> Iterator[Bytes]:
        if isinstance(section, bytes):
            yield section
            return
        end = 0
        for name, (layout, offset) in section.items():
            yield bytes(offset - end)
            end = offset
            for chunk in model.packed(name, layout, level):
                yield chunk
                end += len(chunk)

    with PackWriter.create(target, f"{model.fingerprint} {widths} {dense_bits}") as writer:
        for number in range(writer.done, len(sections)):
            writer.add(chunks(sections[number], level_of[number]))
            if progress:
                progress(writer.bytes_done, sum(lengths))
        writer.finish(contents)


def write_gguf(model: Model, target: Path, bits: int, dense_bits: int, progress: Progress | None = None) -> None:
    """A GGUF of architecture qwen3moe, as llama.cpp reads it. bits, dense_bits: as for `write_pack`. Needs `gguf`."""
    import gguf

    _check_target(target, bits, dense_bits)
    spec, layer = model.spec, model.spec.layers[0]
    attention = layer.attention
    if any(other != layer for other in spec.layers) or layer.router is None or not layer.router.renormalize:
        raise OptionError("a qwen3moe GGUF has experts in every layer, all alike, and weights that sum to one")
    partial = target.with_name(target.name + ".partial")
    writer: Any = gguf.GGUFWriter(partial, "qwen3moe")
    writer.add_name(model.name)
    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(layer.ffn_dim)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.value_dim)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_layer_norm_rms_eps(spec.norm_epsilon)
    writer.add_expert_count(layer.experts)
    writer.add_expert_used_count(layer.top_k)
    writer.add_expert_feed_forward_length(layer.ffn_dim)
    _add_tokenizer(writer, model)
    # GGUF name -> engine names (of all experts of the layer, for a stack), type, bytes
    tensors: dict[str, tuple[list[str], str, int]] = {}

    def add(name: str, engine_names: list[str], shape: tuple[int, ...], width: int) -> None:
        kind = "F32" if len(shape) == 1 or name.endswith("ffn_gate_inp.weight") else GGUF_TYPES[width]
        weights, size = GGUF_BLOCKS[kind]
        if shape[-1] % weights:
            raise OptionError(f"{name}: rows of {shape[-1]} weights are not whole blocks of {weights} ({kind})")
        stack = (len(engine_names), *shape) if "_exps." in name else shape
        nbytes = math.prod(stack) // weights * size
        tensors[name] = (engine_names, kind, nbytes)
        writer.add_tensor_info(name, stack, None, nbytes, gguf.GGMLQuantizationType[kind])

    for name, shape in spec.dense_tensors().items():
        add(gguf_name(name), [name], shape, dense_bits)
    for number, layer_spec in enumerate(spec.layers):
        for part, matrix in spec.expert_tensors(number).items():
            names = [f"layers.{number}.experts.{expert}.{part}" for expert in range(layer_spec.experts)]
            add(f"blk.{number}.ffn_{part}_exps.weight", names, matrix, bits)
    total, done = sum(nbytes for _, _, nbytes in tensors.values()), 0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for name, (engine_names, kind, nbytes) in tensors.items():
            written = 0
            for engine_name in engine_names:
                for chunk in model.blocks(engine_name, kind):
                    file.write(chunk)
                    written += len(chunk)
                if progress:
                    progress(done + written, total)
            if written != nbytes:
                raise SourceError(f"{name}: {written} bytes where {nbytes} were announced")
            done += written
            writer.write_padding(file, written)
        writer.close()
        partial.replace(target)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise


_GGUF_NAMES = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "router": "ffn_gate_inp",
}


def gguf_name(name: str) -> str:
    """The name of a dense tensor in a GGUF file, by its engine name."""
    *layer, part = name.split(".")
    return f"{f'blk.{layer[1]}.' if layer else ''}{_GGUF_NAMES[part]}.weight"


def _add_tokenizer(writer: Any, model: Model) -> None:
    """The byte-level BPE of a tokenizer.json in GGUF's terms; rows of the embedding without a token are padding."""
    import gguf

    backend = json.loads(model.blobs["tokenizer.json"])
    if backend["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(backend["pre_tokenizer"]):
        raise OptionError("only byte-level BPE tokenizers can be written to a GGUF")
    tokens = [f"[PAD{i}]" for i in range(model.spec.vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * len(tokens)
    for token, number in backend["model"]["vocab"].items():
        tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for added in backend["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    # GPT-2's expression is what a ByteLevel pre-tokenizer splits by when it is alone.
    writer.add_tokenizer_pre("gpt-2" if backend["pre_tokenizer"]["type"] == "ByteLevel" else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name in ("bos", "eos"):
        for number in model.generation.get(f"{name}_token_ids", [])[:1]:
            getattr(writer, f"add_{name}_token_id")(number)
    config = json.loads(model.blobs.get("tokenizer_config.json", b"{}"))
    writer.add_add_bos_token(bool(config.get("add_bos_token", False)))


def _check_target(target: Path, bits: int, dense_bits: int) -> None:
    for width in (bits, dense_bits):
        if width not in LAYOUTS:
            raise OptionError(f"{width} bits are not one of {', '.join(map(str, LAYOUTS))}")
    if target.exists():
        raise OptionError(f"{target}: exists already")


def print_progress(done: int, total: int) -> None:
    """A line on a terminal's standard error that is written over."""
    import sys

    if sys.stderr.isatty():
        print(f"\r{done / 1e9:6.2f} of {total / 1e9:.2f} GB", end="\n" if done >= total else "", file=sys.stderr)
