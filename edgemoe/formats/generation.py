"""What a source says about generation, as a pack keeps it: `bos_token_ids` and `eos_token_ids`, lists, and sampling
defaults under their names in generation_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemoe.errors import SourceError, quote
from edgemoe.sampling_names import SAMPLING_NAMES
from edgemoe.text.gguf_tokenizer import read_special_ids


def folder_generation(config: Mapping[str, Any], generation: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of a config.json and a generation_config.json. Raises SourceError that names `folder`."""
    result: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id"):
        ids = generation.get(name, config.get(name))
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if any(type(token) is not int or not 0 <= token < 1 << 31 for token in ids):
            raise SourceError(f"{folder}: {name} = {quote(ids)} is not a token id or a list of them")
        result[name + "s"] = ids
    for name in ("do_sample", *(sampling.config for sampling in SAMPLING_NAMES)):
        value = generation.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            raise SourceError(f"{folder / 'generation_config.json'}: {name} = {quote(value)} is not a number")
        result[name] = value
    return result


def gguf_generation(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of a GGUF file's metadata. Raises TokenizerError that names `name`."""
    bos, eos = read_special_ids(metadata, name)
    generation: dict[str, Any] = {"bos_token_ids": list(bos), "eos_token_ids": list(eos)}
    for sampling in SAMPLING_NAMES:
        value = metadata.get(f"general.sampling.{sampling.gguf}") if sampling.gguf else None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            generation[sampling.config] = value
    return generation
