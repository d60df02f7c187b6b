"""How a family's tensors are named in Hugging Face folders, as tables, and what follows from them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from edgemoe.families import TensorSource
from edgemoe.spec import ModelSpec

ATTENTION = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
}
"""Attention and norms as nearly all families name them."""

MODEL = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}

EXPERTS = {part: f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")}
STACKED = (("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),)

MIXTRAL_EXPERTS = {
    part: f"block_sparse_moe.experts.{{}}.{name}.weight"
    for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}
"""Experts as Mixtral names them, and families that followed it."""


def gated(engine: str, name: str) -> dict[str, str]:
    """The names of a feed-forward part and its biases: "shared", "mlp.shared_expert"."""
    return {
        f"{engine}.{part}{ending}": f"{name}.{part}_proj.{kind}"
        for part in ("gate", "up", "down")
        for ending, kind in (("", "weight"), ("_bias", "bias"))
    }


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one family; where a tensor has had several names, a tuple of them.

    model: engine tensor outside the layers -> name. layer: every engine tensor that a layer may have -> name after
    "model.layers.N.". experts: part -> name after that, "{}" for the expert's number. stacked: the names of all
    experts' gates above their ups, and of their downs, where a folder has them so; the first that is there counts.
    """

    layer: Mapping[str, str | tuple[str, ...]]
    experts: Mapping[str, str] = field(default_factory=lambda: EXPERTS)
    stacked: tuple[tuple[str, str], ...] = STACKED
    model: Mapping[str, str] = field(default_factory=lambda: MODEL)

    def sources(self, spec: ModelSpec, names: Collection[str], root: str = "model.") -> dict[str, TensorSource]:
        """Engine tensor name -> source. names: all tensors of the folder. root: stands for "model." in every name."""
        names = frozenset(names)
        sources = {}
        for name in spec.dense_tensors():
            if name in self.model:
                sources[name] = TensorSource(re.sub("^model\\.", root, self.model[name]))
            else:
                _, layer_number, part = name.split(".", 2)
                sources[name] = TensorSource(first_of(names, f"{root}layers.{layer_number}.", self.layer[part]))
        for number, layer in enumerate(spec.layers):
            here, there = f"layers.{number}.experts.", f"{root}layers.{number}."
            pairs = [(there + gate_up, there + down) for gate_up, down in self.stacked]
            together = next((pair for pair in pairs if pair[0] in names), None)
            for expert in range(layer.experts):
                if together:
                    sources |= stacked(f"{here}{expert}.", layer.ffn_dim, expert, *together)
                else:
                    for part, form in self.experts.items():
                        sources[f"{here}{expert}.{part}"] = TensorSource(there + form.format(expert))
        return sources


def first_of(names: Collection[str], prefix: str, known: str | tuple[str, ...]) -> str:
    """The first of the known names, with the prefix, that is one of `names`; the very first if none is."""
    found = [prefix + name for name in ([known] if isinstance(known, str) else known)]
    return next((name for name in found if name in names), found[0])


def flat(sources: Mapping[str, TensorSource], *parts: str) -> dict[str, TensorSource]:
    """The same sources; those of these tensors of layers are of more than two axes."""
    return {
        name: replace(source, flat=True) if name.rpartition(".")[2] in parts else source
        for name, source in sources.items()
    }


def stacked(expert_name: str, size: int, expert: int, gate_up: str, down: str) -> dict[str, TensorSource]:
    """The parts of one expert of tensors of all of them, [experts, 2 * size, hidden] and [experts, hidden, size]."""
    return {
        expert_name + "gate": TensorSource(gate_up, index=expert, rows=(0, size)),
        expert_name + "up": TensorSource(gate_up, index=expert, rows=(size, 2 * size)),
        expert_name + "down": TensorSource(down, index=expert),
    }
