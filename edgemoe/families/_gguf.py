"""How a family's models are named in GGUF files, as tables, and what follows from them.

A GGUF file describes a model with its own names for what a config.json says. A family gives one `GgufNames`; its
metadata become a configuration of that family, so that there is one place that makes a `ModelSpec` of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgemoe.errors import SourceError, UnsupportedModelError, quote
from edgemoe.families import TensorSource
from edgemoe.families._names import first_of, stacked
from edgemoe.spec import MAX_LAYERS, ModelSpec

# What changes a model's arithmetic, if a family does not know it.
_MEANINGFUL = ("attention.", "rope.", "expert_", "ssm.", "shortconv.", "altup.")
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"

CONFIG = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts_per_tok": "expert_used_count",
}
"""Keys that nearly all families have."""

LAYER = {
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "sinks": "attn_sinks.weight",
    "ffn_norm": "ffn_norm.weight",
    "router": "ffn_gate_inp.weight",
    "router_bias": "ffn_gate_inp.bias",
    "selection_bias": "exp_probs_b.bias",
    **{
        f"{engine}.{part}{bias}": f"ffn_{part}{ending}.{'bias' if bias else 'weight'}"
        for engine, ending in (("ffn", ""), ("shared", "_shexp"))
        for part in ("gate", "up", "down")
        for bias in ("", "_bias")
    },
    "shared_gate": "ffn_gate_inp_shexp.weight",
    **{f"expert_{part}_bias": f"ffn_{part}_exps.bias" for part in ("gate", "up", "down")},
}
"""Tensors of a layer as nearly all families name them."""

EXPERTS = {part: f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")}
_SCALING = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


@dataclass(frozen=True, slots=True)
class GgufNames:
    """The names of one family. Keys stand without the architecture in front ("block_count").

    architecture: value of `general.architecture`.
    config: name in config.json -> key. constants: configuration values that no file states.
    allowed: keys that a file may have, with the only values that are supported (an empty tuple: any, it has no effect).
    per_layer: configuration values that may be lists, with an entry for each layer. scaling: values of
    "rope.scaling.type" that become `rope_scaling`.
    layer: every engine tensor that a layer may have -> tensor, after "blk.N."; where kinds of layers differ, a tuple of
    the possible ones. experts: part -> tensor of all experts
    of a layer; gate_up: the tensor of their gates above their ups, where a file has them so. known: tensors of layers
    and "rope_" tensors that a file may have without effect.
    """

    architecture: str
    config: Mapping[str, str]
    layer: Mapping[str, str | tuple[str, ...]] = field(default_factory=lambda: LAYER)
    experts: Mapping[str, str] = field(default_factory=lambda: EXPERTS)
    gate_up: str = "ffn_gate_up_exps.weight"
    per_layer: frozenset[str] = frozenset()
    scaling: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    model: Mapping[str, str] = field(
        default_factory=lambda: {
            "embedding": _EMBEDDING,
            "final_norm": "output_norm.weight",
            "head": _HEAD,
            "head_bias": "output.bias",
        }
    )

    def configuration(self, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The metadata as a config.json. shapes: of all tensors, rows first.

        Raises UnsupportedModelError for keys that would change the model in a way the family does not know.
        """
        prefix = self.architecture + "."
        values = {key[len(prefix) :]: _plain(key, value) for key, value in metadata.items() if key.startswith(prefix)}
        # In metadata, as `Family.GGUF_VALUES` asks for them.
        factors = {key: value for key, value in metadata.items() if key.startswith("rope_factors_")}
        known = set(self.config.values())
        config = dict(self.constants)
        rope = values.pop("rope.scaling.type", "none")
        if rope in self.scaling:
            scaling = {name: values[key] for name, key in _SCALING.items() if key in values}
            config["rope_scaling"] = {"rope_type": rope, **scaling, **config.get("rope_scaling", {})}
            if rope == "longrope" and "rope.scaling.attn_factor" in values:
                config["rope_scaling"]["attention_factor"] = values["rope.scaling.attn_factor"]
            for kind in ("short", "long"):
                if f"rope_factors_{kind}.weight" in factors:
                    config["rope_scaling"][f"{kind}_factor"] = factors[f"rope_factors_{kind}.weight"]
            known |= set(_SCALING.values())
        elif rope != "none":
            only = ", ".join(("none", *self.scaling))
            raise UnsupportedModelError(f"{prefix}rope.scaling.type = {quote(rope)} is not supported (only {only})")
        else:
            config.pop("rope_scaling", None)
        heads = values.get("attention.key_length")
        allowed = {
            "rope.scaling.finetuned": (),
            "rope.scaling.original_context_length": (),
            "attention.value_length": (heads,),
            "rope.dimension_count": (heads,),
            "attention.causal": (True,),
            **self.allowed,
        }
        for key, value in values.items():
            if key in known:
                continue
            if key in allowed:
                if allowed[key] and value not in allowed[key]:
                    raise UnsupportedModelError(f"{prefix}{key} = {quote(value)} is not supported")
            elif key.startswith(_MEANINGFUL):
                raise UnsupportedModelError(f"{prefix}{key} = {quote(value)} is not supported")
        for name, key in self.config.items():
            if key in values:
                config[name] = values[key] if name in self.per_layer else _single(prefix + key, values[key])
        if _EMBEDDING not in shapes:
            raise SourceError(f"tensor {_EMBEDDING} is missing")
        config["vocab_size"] = shapes[_EMBEDDING][0]
        config["tie_word_embeddings"] = _HEAD not in shapes
        return config

    def sources(self, spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
        """Engine tensor name -> tensor of the file. `names` are all tensors of the file.

        Raises UnsupportedModelError for a tensor of a layer that the model has no use for: a bias, say, that would be
        left out without a word.
        """
        sources = {}
        for name in spec.dense_tensors():
            if name in self.model:
                sources[name] = TensorSource(self.model[name])
            else:
                _, layer_number, part = name.split(".", 2)
                sources[name] = TensorSource(first_of(names, f"blk.{layer_number}.", self.layer[part]))
        for number, layer in enumerate(spec.layers):
            here, gate_up = f"layers.{number}.experts.", f"blk.{number}.{self.gate_up}"
            for expert in range(layer.experts):
                if gate_up in names:
                    down = f"blk.{number}.{self.experts['down']}"
                    sources |= stacked(f"{here}{expert}.", layer.ffn_dim, expert, gate_up, down)
                    continue
                for part, tensor in self.experts.items():
                    sources[f"{here}{expert}.{part}"] = TensorSource(f"blk.{number}.{tensor}", index=expert)
        used = {source.name for source in sources.values()}
        for name in names:
            if name in self.known:
                continue
            if name not in used and (_layer(name) < len(spec.layers) or name.startswith("rope_")):
                raise UnsupportedModelError(
                    f"tensor {quote(name)} is not part of {self.architecture} as it is known here"
                )
        return sources


def layers_used(count: int, further: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many of a file's `count` layers make up the model, where up to `further` of them at the end may be there to
    predict more tokens: some files do not count them, others do, with their tensors or without."""
    for last in range(count - 1, max(count - 1 - further, 0), -1):
        here = f"blk.{last}."
        if here + "attn_norm.weight" in shapes and here + "nextn.eh_proj.weight" not in shapes:
            return last + 1
        count = last
    return count


def _layer(name: str) -> int:
    """The layer of a tensor; a number beyond all layers for one outside of them."""
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if first == "blk" and number.isdecimal() and len(number) < 6 else MAX_LAYERS


def _plain(key: str, value: Any) -> Any:
    """Arrays of numbers as lists."""
    if not isinstance(value, np.ndarray):
        return value
    if len(value) > MAX_LAYERS:
        raise UnsupportedModelError(f"{key} has {len(value)} entries (at most {MAX_LAYERS} layers are supported)")
    return value.tolist()


def _single(key: str, value: Any) -> Any:
    """A value given for every layer, where it is the same for all."""
    if not isinstance(value, list):
        return value
    if not value or any(item != value[0] for item in value):
        raise UnsupportedModelError(f"{key} = {quote(value)}: layers that differ are not supported")
    return value[0]
