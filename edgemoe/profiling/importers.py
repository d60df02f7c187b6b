"""Traces from elsewhere: dumped router logits, and models run by transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import TraceError
from edgemoe.formats.safetensors import SafetensorsFolder, _read_header
from edgemoe.profiling.trace import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K, Trace

_LAYER_FILE = re.compile(r"(?P<model>.+)_(?P<layer>\d{2,4})\.safetensors")


def import_router_logits(
    folder: str | os.PathLike[str],
    top_k: int,
    *,
    model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """A trace from router logits in the layout of moe-lrc (arXiv 2505.16056).

    folder: holds `{model}_{layer:02d}.safetensors`, one file per layer with experts; the tensors in it are named after
    the kinds of text and are `[sequence, token, expert]` (float32, float16, bfloat16). A layer without a file is dense.
    top_k: experts per token; equal logits go to the lower expert. Weights are the softmax over all experts, not
    renormalized. model: whose files, where the folder holds several models'.

    Raises TraceError, SourceError.
    """
    place = Path(folder)
    files: dict[str, dict[int, Path]] = {}
    for file in sorted(place.glob("*.safetensors")):
        if match := _LAYER_FILE.fullmatch(file.name):
            files.setdefault(match["model"], {})[int(match["layer"])] = file
    if not files:
        raise TraceError(f"{place}: no files like MODEL_00.safetensors")
    if model is None and len(files) > 1:
        raise TraceError(f"{place}: logits of several models ({', '.join(files)}); name one")
    name = model or next(iter(files))
    if name not in files:
        raise TraceError(f"{place}: no logits of {name}, only of {', '.join(files)}")
    layers = files[name]
    if max(layers) >= MAX_LAYERS:
        raise TraceError(f"{layers[max(layers)]}: layer {max(layers)} is beyond {MAX_LAYERS}")

    folders = {layer: SafetensorsFolder(place, _read_header(file)) for layer, file in layers.items()}
    first = folders[min(folders)]
    parts = tuple(sorted(first.names()))
    shapes = {part: first.info(part).shape for part in parts}
    experts = [0] * (max(layers) + 1)
    for layer, tensors in folders.items():
        if sorted(tensors.names()) != list(parts):
            raise TraceError(f"{layers[layer]}: tensors {tensors.names()} where the first layer has {list(parts)}")
        for part in parts:
            info = tensors.info(part)
            if len(info.shape) != 3 or info.shape[:2] != shapes[part][:2]:
                raise TraceError(f"{layers[layer]}: {part} is {list(info.shape)}, not [sequence, token, expert]")
            if info.dtype not in ("f32", "f16", "bf16"):
                raise TraceError(f"{layers[layer]}: {part} is {info.dtype}; router logits are f32, f16 or bf16")
            count = info.shape[2]
            if experts[layer] not in (0, count) or not 1 <= top_k <= min(count, MAX_TOP_K) or count > MAX_EXPERTS:
                raise TraceError(f"{layers[layer]}: {part}: {top_k} of {count} experts")
            experts[layer] = count

    tokens = sum(shape[0] * shape[1] for shape in shapes.values())
    if not tokens:
        raise TraceError(f"{place}: no tokens")
    width = top_k * len(layers)
    ids = np.empty((tokens, width), np.uint8 if max(experts) <= 256 else np.uint16)
    weights = np.empty((tokens, width), np.float16)
    for done, layer in enumerate(sorted(layers)):
        if progress:
            progress(done, len(layers))
        begin = 0
        for part in parts:
            for sequence in range(shapes[part][0]):
                logits = _as_float(folders[layer].read(part, index=sequence), folders[layer].info(part).dtype)
                end = begin + len(logits)
                columns = slice(done * top_k, (done + 1) * top_k)
                ids[begin:end, columns], weights[begin:end, columns] = top_of(logits, top_k)
                begin = end
    lengths = [shapes[part][0] * shapes[part][1] for part in parts]
    return Trace(
        name,
        f"router logits in {place.resolve().name}",
        tuple(experts),
        tuple(top_k if count else 0 for count in experts),
        parts,
        np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        np.concatenate([np.tile(np.arange(shapes[part][1], dtype=np.int32), shapes[part][0]) for part in parts]),
        ids,
        weights,
    )


def top_of(logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids of the k largest of `[tokens, experts]`, descending, equal ones by ascending id; their softmax weights."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return order, np.take_along_axis(shares, order, axis=1)


def _as_float(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def trace_transformers(
    model: Any,
    texts: Mapping[str, Iterable[Any]] | Iterable[Any],
    *,
    tokenizer: Any = None,
    name: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """A trace of a model that transformers (5.0 or later) runs, by hooks on what its experts are called with.

    model: a transformers model for causal language modelling. texts: sequences of token ids, or strings where a
    `tokenizer` is given; or a mapping from the name of a part to such sequences. Every text runs by itself.
    progress: called with the number of tokens done.

    Raises TraceError where no layer has a module `experts` that is given the chosen experts and their weights.
    """
    import torch

    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    label = str(name or getattr(config, "_name_or_path", "") or config.model_type)
    modules = _expert_modules(model)
    if not modules:
        raise TraceError(f"{label}: {type(model).__name__} has no layers with experts that are known")
    experts = [0] * (max(modules) + 1)
    for layer, module in modules.items():
        experts[layer] = _expert_count(module, f"{label}: layer {layer}")

    caught: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}

    def hook(layer: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def catch(_module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            caught[layer] = _choice([*given, *named.values()], experts[layer], f"{label}: layer {layer}")

        return catch

    parts: list[str] = []
    part_of: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int32]] = []
    ids: list[NDArray[np.uint16]] = []
    weights: list[NDArray[np.float16]] = []
    top_k: list[int] = []
    done = 0
    handles = [
        module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, module in sorted(modules.items())
    ]
    try:
        for part, sequences in (texts if isinstance(texts, Mapping) else {"text": texts}).items():
            parts.append(part)
            for text in sequences:
                tokens = _token_ids(text, tokenizer)
                if not tokens:
                    continue
                caught.clear()
                with torch.no_grad():
                    model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
                for layer in modules:
                    if layer not in caught or len(caught[layer][0]) != len(tokens):
                        raise TraceError(f"{label}: layer {layer} did not choose experts for all {len(tokens)} tokens")
                order = sorted(caught)
                top_k = [caught[layer][0].shape[1] if layer in caught else 0 for layer in range(len(experts))]
                ids.append(np.concatenate([caught[layer][0] for layer in order], axis=1).astype(np.uint16))
                weights.append(np.concatenate([caught[layer][1] for layer in order], axis=1).astype(np.float16))
                part_of.append(np.full(len(tokens), len(parts) - 1, np.int32))
                positions.append(np.arange(len(tokens), dtype=np.int32))
                done += len(tokens)
                if progress:
                    progress(done)
    finally:
        for handle in handles:
            handle.remove()
    if not ids:
        raise TraceError(f"{label}: the texts have no tokens")
    return Trace(
        label,
        "transformers",
        tuple(experts),
        tuple(top_k),
        tuple(parts),
        np.concatenate(part_of),
        np.concatenate(positions),
        np.concatenate(ids),
        np.concatenate(weights),
    )


def _token_ids(text: Any, tokenizer: Any) -> list[int]:
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("a text is a string; give the tokenizer, or token ids")
        encoded = tokenizer.encode(text)
        return list(getattr(encoded, "ids", encoded))
    return [int(token) for token in text]


def _expert_modules(model: Any) -> dict[int, Any]:
    """Layer number -> the module that holds the layer's routed experts."""
    found: dict[int, Any] = {}
    for path, module in model.named_modules():
        match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(?:.+\.)?experts$", path)
        if match:
            found[int(match[1])] = module
    return found


def _expert_count(module: Any, where: str) -> int:
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int):
        count = next((value.shape[0] for value in module.parameters() if value.ndim == 3), 0)
    if not 1 <= count <= MAX_EXPERTS:
        raise TraceError(f"{where}: {count} experts")
    return int(count)


def _choice(given: list[Any], experts: int, where: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and weights `[tokens, k]`, by descending weight, of what the experts were called with."""
    tensors = [item for item in given if hasattr(item, "is_floating_point") and item.ndim >= 2]
    chosen = next((item for item in tensors if not item.is_floating_point() and item.dtype.itemsize > 1), None)
    if chosen is None:
        raise TraceError(f"{where}: the experts are not told which of them a token chose")
    ids = chosen.detach().cpu().numpy().reshape(-1, chosen.shape[-1]).astype(np.int64)
    k = ids.shape[1]
    if ids.size == 0 or int(ids.min()) < 0 or int(ids.max()) >= experts or k > MAX_TOP_K:
        raise TraceError(f"{where}: {k} choices per token, not all of them one of {experts} experts")
    for item in tensors[1:]:  # the first one is the hidden state
        if item.is_floating_point() and item.shape[-1] in (k, experts) and item.numel() == len(ids) * item.shape[-1]:
            shares = item.detach().float().cpu().numpy().reshape(len(ids), -1)
            if shares.shape[1] != k:
                shares = np.take_along_axis(shares, ids, axis=1)
            order = np.argsort(-shares, axis=1, kind="stable")
            return np.take_along_axis(ids, order, axis=1), np.take_along_axis(shares, order, axis=1)
    raise TraceError(f"{where}: the experts are not told the weights of their outputs")
