"""Tell what a model is: its family, sizes, precision and origin.

edgemoe show model.emoe
edgemoe show qwen3-30b-q4_k_m.gguf
edgemoe show Qwen3-30B-A3B/ --json
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.errors import TokenizerError
from edgemoe.printable import printable

if TYPE_CHECKING:
    from edgemoe.spec import ModelSpec

_UNUSED_SHOWN = 8


@click.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes are bytes.")
def command(model: Path | None, as_json: bool) -> None:
    """Tell what MODEL is, a pack (.emoe), a GGUF file or a Hugging Face folder; without MODEL, the bundled one.

    Only the index or the headers are read, no weights.
    """
    from edgemoe.formats.gguf import is_gguf
    from edgemoe.model_files import bundled_model

    path = model or bundled_model()
    facts = _folder_facts(path) if path.is_dir() else _gguf_facts(path) if is_gguf(path) else _pack_facts(path)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        for label, text in _lines(facts):
            click.echo(f"{label:<14}{printable(text)}")


def _pack_facts(path: Path) -> dict[str, Any]:
    from edgemoe.formats.pack import Pack

    pack = Pack.open(path)
    index, sizes = pack.index, pack.layout_bytes()
    levels: list[dict[str, Any]] = []
    for layer in index.experts.values():
        for level in layer.levels:
            facts = {"bits": level.bits, "layouts": sorted({part.layout for part in level.parts.values()})}
            if facts not in levels:
                levels.append(facts)
    counts: dict[str, int] = {}
    for layer in index.experts.values():
        for sections in layer.sections:
            width = str(layer.levels[len(sections) - 1].bits)
            counts[width] = counts.get(width, 0) + 1
    return {
        **_spec_facts(path, "pack", index.spec, index.generation),
        "levels": levels,
        "experts_by_bits": dict(sorted(counts.items(), key=lambda item: int(item[0]))),
        "dense_layouts": sizes["dense"],
        "expert_layouts": sizes["experts"],
        **_size_facts(index.spec, sum(sizes["dense"].values()), sum(sizes["experts"].values()), path.stat().st_size),
        "provenance": pack.provenance,
        "quality": index.quality.to_dict() if index.quality else None,
        "unused": pack.unused,
    }


def _folder_facts(path: Path) -> dict[str, Any]:
    from edgemoe.formats.ggml_blocks import TYPES
    from edgemoe.source import SourceModel

    model = SourceModel.open(path)
    sizes: dict[str, dict[str, int]] = {"dense": {}, "experts": {}}
    for name, shape, dtype in model.tensors():
        kind = sizes["experts" if ".experts." in name else "dense"]
        block = TYPES[dtype]
        kind[dtype] = kind.get(dtype, 0) + math.prod(shape) * block.nbytes // block.weights
    dense, experts = sum(sizes["dense"].values()), sum(sizes["experts"].values())
    return {
        **_spec_facts(path, "safetensors", model.spec, model.generation),
        "levels": [],
        "dense_layouts": sizes["dense"],
        "expert_layouts": sizes["experts"],
        **_size_facts(model.spec, dense, experts, model.folder.nbytes()),
        "provenance": {},
        "unused": model.unused,
    }


def _gguf_facts(path: Path) -> dict[str, Any]:
    from edgemoe.formats.gguf_index import GgufSource, build_index

    source = GgufSource.open(path)
    index = build_index(source)
    sizes: dict[str, dict[str, int]] = {"dense": {}, "experts": {}}
    for name, tensor in source.sources.items():
        info = source.model.info(tensor.name)
        kind = sizes["experts" if ".experts." in name else "dense"]
        kind[info.type] = kind.get(info.type, 0) + source.model.extent(tensor.name, tensor.index, tensor.rows).length
    levels: list[dict[str, Any]] = []
    for layer in index.experts.values():
        layouts = sorted({part.layout.removeprefix("ggml.") for part in layer.levels[0].parts.values()})
        facts = {"bits": layer.levels[0].bits, "layouts": layouts}
        if facts not in levels:
            levels.append(facts)
    dense, experts = sum(sizes["dense"].values()), sum(sizes["experts"].values())
    return {
        **_spec_facts(path, "gguf", source.spec, source.generation),
        "levels": levels,
        "dense_layouts": sizes["dense"],
        "expert_layouts": sizes["experts"],
        **_size_facts(source.spec, dense, experts, sum(file.stat().st_size for file in source.model.files)),
        "provenance": {},
        "unused": source.unused,
    }


def _spec_facts(path: Path, form: str, spec: ModelSpec, generation: Mapping[str, Any]) -> dict[str, Any]:
    total, active = spec.parameters()
    routed = [layer for layer in spec.layers if layer.experts]
    return {
        "path": str(path),
        "format": form,
        "family": spec.family,
        "parameters": total,
        "active_parameters": active,
        "layers": len(spec.layers),
        "dense_layers": len(spec.layers) - len(routed),
        "hidden_size": spec.hidden_size,
        "experts": max((layer.experts for layer in routed), default=0),
        "top_k": max((layer.top_k for layer in routed), default=0),
        "expert_dim": max((layer.ffn_dim for layer in routed), default=0),
        "context": spec.context,
        "tokenizer": _tokenizer_facts(path),
        "generation": dict(generation),
    }


def _tokenizer_facts(path: Path) -> dict[str, Any] | None:
    from edgemoe.formats.read import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except TokenizerError:
        return None
    return {"vocab_size": tokenizer.vocab_size, "chat_template": tokenizer.chat_template is not None}


def _size_facts(spec: ModelSpec, dense: int, experts: int, file: int) -> dict[str, Any]:
    total, _ = spec.parameters()
    routed = sum(
        layer.experts * sum(math.prod(shape) for shape in spec.expert_tensors(number).values())
        for number, layer in enumerate(spec.layers)
    )
    return {
        "bytes": {"dense": dense, "experts": experts, "total": file},
        "bits_per_weight": {
            "dense": round(8 * dense / (total - routed), 3),
            "experts": round(8 * experts / routed, 3) if routed else None,
            "total": round(8 * (dense + experts) / total, 3),
        },
    }


def _lines(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The facts for people: labels and texts."""
    from edgemoe.memory import format_count, format_size

    sizes, bits = facts["bytes"], facts["bits_per_weight"]
    yield "model", f"{facts['path']} ({facts['format']}, {format_size(sizes['total'])})"
    yield "family", facts["family"]
    yield (
        "parameters",
        f"{format_count(facts['parameters'])}, {format_count(facts['active_parameters'])} active per token",
    )
    dense = f", {facts['dense_layers']} of them dense" if facts["dense_layers"] else ""
    yield "layers", f"{facts['layers']}{dense}, hidden size {facts['hidden_size']}"
    yield "experts", f"{facts['experts']} per layer, top {facts['top_k']}, expert size {facts['expert_dim']}"
    yield "context", f"{facts['context']} positions"
    if facts["levels"]:
        yield "levels", "; ".join(f"{level['bits']} bits ({', '.join(level['layouts'])})" for level in facts["levels"])
    counts = facts.get("experts_by_bits", {})
    if len(facts["levels"]) > 1:
        yield "", "; ".join(f"{count} experts have up to {width} bits" for width, count in counts.items())
    for kind in ("dense", "experts"):
        if sizes[kind]:
            layouts = ", ".join(facts["dense_layouts" if kind == "dense" else "expert_layouts"])
            yield f"{kind} part", f"{format_size(sizes[kind])}, {bits[kind]:.2f} bits per weight ({layouts})"
    yield "weights", f"{format_size(sizes['dense'] + sizes['experts'])}, {bits['total']:.2f} bits per weight"
    tokenizer = facts["tokenizer"]
    template = "with" if tokenizer and tokenizer["chat_template"] else "no"
    yield "tokenizer", f"{tokenizer['vocab_size']} entries, {template} chat template" if tokenizer else "none"
    yield "generation", _map(facts["generation"])
    if facts["provenance"]:
        yield "made from", _map(facts["provenance"])
    if facts.get("quality"):
        yield from _quality_lines(facts["quality"])
    unused = facts["unused"]
    more = f", and {len(unused) - _UNUSED_SHOWN} more" if len(unused) > _UNUSED_SHOWN else ""
    yield "unused", (", ".join(unused[:_UNUSED_SHOWN]) + more) if unused else "nothing"


def _quality_lines(quality: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """A table: perplexity relative to the unquantized model, and mean KL divergence from it, per level and mode."""
    reference = quality["reference"]["perplexity"]
    yield "quality", f"on {quality['text']}, {quality['tokens']} tokens: perplexity {reference:.4g} unquantized"

    def figures(name: str, entry: dict[str, Any]) -> str:
        change = 100 * (entry["perplexity"] / reference - 1) if reference else math.nan
        return f"{name:<22}perplexity {change:+.2f} %, KL divergence {entry['kl']:.5f}"

    for level in quality["levels"]:
        yield "", figures(f"{level['bits']} bits", level)
    for name, mode in quality["modes"].items():
        yield "", figures(f"{name} ({mode['mean_bits']:.2f} bits)", mode)


def _map(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "nothing"
