"""ModelSpec: every fact the engine needs about a model.

A family (`edgemoe/families/`) turns a configuration into a `ModelSpec`; the pack stores it; the C++ engine reads its
fields and knows nothing else about the model. `None`, `False`, `0` and `1.0` mean "the model has no such thing".
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgemoe.errors import UnsupportedModelError

MAX_DIMENSION = 1 << 24
MAX_LAYERS = 1024

# What the engine implements of each choice. A spec may name more (a newer file); it is refused by name.
ATTENTION_KINDS = ("full",)
ROUTER_SCORES = ("softmax",)
ACTIVATIONS = ("silu",)
QK_NORMS = ("none", "head")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of one attention layer.

    inverse_frequencies: radians per position, one per rotated pair; scaling (YaRN, LongRoPE, ...) is already in them.
    interleaved: pairs are (2i, 2i+1) instead of (i, i + half).
    attention_factor: multiplies cosine and sine (YaRN's mscale).
    """

    inverse_frequencies: tuple[float, ...]
    interleaved: bool = False
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One token-mixing layer.

    kind: "full" (grouped-query attention over a key/value cache). Reserved: "mla", "gated_delta", "short_conv".
    heads, kv_heads: query heads and key/value heads; heads is a multiple of kv_heads.
    head_dim, value_dim: size of one query/key head and of one value head.
    scale: multiplies q.k before the softmax.
    qk_norm: RMSNorm on queries and keys before RoPE: "none", "head" (per head) or "full" (over all heads).
    window: positions a token sees, itself included; None for all.
    sinks: a learned logit per head joins the softmax's denominator (gpt-oss).
    bias: query, key and value projections have a bias; output_bias: the output projection has one.
    output_gate: a sigmoid gate on the attention output (Qwen3-Next).
    softcap: scores become softcap * tanh(score / softcap); 0 for none.
    clip_qkv: queries, keys and values are clamped to +-clip_qkv (OLMoE); 0 for none.
    q_rank, kv_rank, rope_dim: latent sizes of multi-head latent attention (DeepSeek-V2, section 2.1).
    conv_size: taps of the short convolution of a linear-attention or convolution layer.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    rope: RopeSpec | None
    qk_norm: str = "none"
    window: int | None = None
    sinks: bool = False
    bias: bool = False
    output_bias: bool = False
    output_gate: bool = False
    softcap: float = 0.0
    clip_qkv: float = 0.0
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    conv_size: int = 0


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How a token's experts and their weights follow from the router's logits.

    scores: "softmax" (over all experts, then top-k). Reserved: "softmax_topk" (top-k, then softmax), "sigmoid",
        "sparsemixer", "sqrt_softplus".
    renormalize: the chosen weights are divided by their sum (plus renormalize_epsilon).
    selection_bias: a learned bias per expert that counts for the choice only (DeepSeek-V3).
    bias: the router projection has a bias.
    groups, groups_kept: experts are chosen within the best groups only; 1, 1 for no groups.
    weight_scale: multiplies the weights at the end.
    """

    scores: str = "softmax"
    renormalize: bool = True
    renormalize_epsilon: float = 0.0
    selection_bias: bool = False
    bias: bool = False
    groups: int = 1
    groups_kept: int = 1
    weight_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: attention, then a feed-forward part that is dense (`experts == 0`) or a mixture of experts.

    ffn_dim: hidden size of the dense feed-forward part, or of one expert.
    experts, top_k: routed experts of the layer and how many of them work on a token.
    shared_dim: hidden size of the shared expert, 0 for none; shared_gate: its output has a sigmoid gate.
    ffn_bias: the feed-forward projections have biases.
    activation: "silu": silu(gate) * up. Reserved: "gelu_tanh", "swiglu_clamped" (gpt-oss, limit swiglu_limit).
    """

    attention: AttentionSpec
    ffn_dim: int
    experts: int = 0
    top_k: int = 0
    router: RouterSpec | None = None
    shared_dim: int = 0
    shared_gate: bool = False
    ffn_bias: bool = False
    activation: str = "silu"
    swiglu_limit: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole model.

    family: model_type of the configuration it came from (for messages; the engine does not read it).
    vocab_size: rows of the embedding; hidden_size: size of the residual stream; context: positions it was made for.
    tied_embeddings: the output head is the embedding.
    norm_epsilon: of every RMSNorm.
    norm_offset: added to every norm weight (1 for zero-centred norms).
    embedding_multiplier, residual_multiplier, logits_divisor: Granite's multipliers, 1.0 for none.
    logits_softcap: as AttentionSpec.softcap, on the logits; 0 for none.
    """

    family: str
    vocab_size: int
    hidden_size: int
    context: int
    layers: tuple[LayerSpec, ...]
    norm_epsilon: float
    tied_embeddings: bool = False
    norm_offset: float = 0.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float = 0.0

    def __post_init__(self) -> None:
        _validate(self)

    # -- tensors ------------------------------------------------------------------------------------------------

    def dense_tensors(self) -> dict[str, tuple[int, ...]]:
        """Engine name -> shape of every tensor that is not a routed expert's; matrices are [output, input]."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocab_size, hidden)}
        for number, layer in enumerate(self.layers):
            prefix, attention = f"layers.{number}.", layer.attention
            queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
            values = attention.kv_heads * attention.value_dim
            shapes[prefix + "attention_norm"] = (hidden,)
            shapes[prefix + "q"] = (queries, hidden)
            shapes[prefix + "k"] = (keys, hidden)
            shapes[prefix + "v"] = (values, hidden)
            shapes[prefix + "o"] = (hidden, attention.heads * attention.value_dim)
            if attention.qk_norm == "head":
                shapes[prefix + "q_norm"] = shapes[prefix + "k_norm"] = (attention.head_dim,)
            shapes[prefix + "ffn_norm"] = (hidden,)
            if layer.experts:
                shapes[prefix + "router"] = (layer.experts, hidden)
            else:
                shapes[prefix + "ffn.gate"] = shapes[prefix + "ffn.up"] = (layer.ffn_dim, hidden)
                shapes[prefix + "ffn.down"] = (hidden, layer.ffn_dim)
        shapes["final_norm"] = (hidden,)
        if not self.tied_embeddings:
            shapes["head"] = (self.vocab_size, hidden)
        return shapes

    def expert_tensors(self, layer: int) -> dict[str, tuple[int, int]]:
        """Part name -> shape [output, input] of one routed expert of the layer; empty for a dense layer."""
        spec, hidden = self.layers[layer], self.hidden_size
        if not spec.experts:
            return {}
        return {"gate": (spec.ffn_dim, hidden), "up": (spec.ffn_dim, hidden), "down": (hidden, spec.ffn_dim)}

    def parameters(self) -> tuple[int, int]:
        """(total, active per token). The embedding counts as active only where it is the output head too."""
        dense = sum(math.prod(shape) for shape in self.dense_tensors().values())
        total, active = dense, dense - (0 if self.tied_embeddings else self.vocab_size * self.hidden_size)
        for number, layer in enumerate(self.layers):
            expert = sum(math.prod(shape) for shape in self.expert_tensors(number).values())
            total += layer.experts * expert
            active += layer.top_k * expert
        return total, active

    # -- the pack's form ----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ModelSpec:
        """The spec written by `to_dict`; unknown keys are ignored. Raises UnsupportedModelError naming the field."""
        return typing.cast(ModelSpec, _decode(cls, data, "spec"))


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Checks `value` against the annotation `kind` and builds the dataclasses in it (the file is not trusted)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in arguments if option is not types.NoneType]
        return None if value is None else _decode(options[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMENSION:
            raise UnsupportedModelError(f"{where}: a list was expected, not {_short(value)}")
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UnsupportedModelError(f"{where}: a map was expected, not {_short(value)}")
        hints = typing.get_type_hints(kind)
        arguments_by_name: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            if field.name in value:
                arguments_by_name[field.name] = _decode(hints[field.name], value[field.name], f"{where}.{field.name}")
            elif field.default is dataclasses.MISSING:
                raise UnsupportedModelError(f"{where}.{field.name} is missing")
        return typing.cast(Any, kind)(**arguments_by_name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UnsupportedModelError(f"{where}: {kind.__name__} was expected, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _validate(spec: ModelSpec) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UnsupportedModelError(f"{spec.family}: {message}")

    def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
        require(value in known, f"{name} = {value!r} is not supported (known: {', '.join(known)})")

    def size(name: str, value: int, limit: int = MAX_DIMENSION) -> None:
        require(1 <= value <= limit, f"{name} = {value} is not between 1 and {limit}")

    def absent(holder: Any, where: str, *names: str) -> None:
        """Fields laid out for families to come: anything but the default is refused, never silently ignored."""
        defaults = {field.name: field.default for field in dataclasses.fields(holder)}
        for name in names:
            value = getattr(holder, name)
            require(value == defaults[name], f"{where}{name} = {value!r} is not supported")

    size("vocab_size", spec.vocab_size)
    size("hidden_size", spec.hidden_size)
    size("context", spec.context, 1 << 30)
    size("number of layers", len(spec.layers), MAX_LAYERS)
    require(0 < spec.norm_epsilon < 1, f"norm_epsilon = {spec.norm_epsilon} is not between 0 and 1")
    absent(
        spec,
        "",
        "norm_offset",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_divisor",
        "logits_softcap",
    )
    for number, layer in enumerate(spec.layers):
        where, attention = f"layer {number}: ", layer.attention
        one_of(where + "attention kind", attention.kind, ATTENTION_KINDS)
        one_of(where + "qk_norm", attention.qk_norm, QK_NORMS)
        one_of(where + "activation", layer.activation, ACTIVATIONS)
        size(where + "heads", attention.heads, 1 << 16)
        size(where + "kv_heads", attention.kv_heads, attention.heads)
        size(where + "head_dim", attention.head_dim, 1 << 14)
        require(attention.value_dim == attention.head_dim, where + "value_dim differs from head_dim")
        require(attention.head_dim % 2 == 0, f"{where}head_dim = {attention.head_dim} is odd")
        require(
            attention.heads % attention.kv_heads == 0,
            f"{where}{attention.heads} heads cannot share {attention.kv_heads} key/value heads evenly",
        )
        require(math.isfinite(attention.scale) and attention.scale > 0, f"{where}scale = {attention.scale}")
        if attention.rope is not None:
            pairs = len(attention.rope.inverse_frequencies)
            require(
                1 <= pairs <= attention.head_dim // 2,
                f"{where}{pairs} rotary pairs in a head of {attention.head_dim}",
            )
            absent(attention.rope, where + "rope ", "interleaved")
        absent(
            attention,
            where + "attention ",
            *("window", "sinks", "bias", "output_bias", "output_gate", "softcap", "clip_qkv"),
            *("q_rank", "kv_rank", "rope_dim", "conv_size"),
        )
        size(where + "ffn_dim", layer.ffn_dim)
        absent(layer, where, "shared_dim", "shared_gate", "ffn_bias", "swiglu_limit")
        if layer.experts:
            size(where + "experts", layer.experts, 1 << 16)
            size(where + "top_k", layer.top_k, min(layer.experts, 256))
            router = layer.router
            if router is None:
                raise UnsupportedModelError(f"{spec.family}: {where}a mixture of experts without a router")
            one_of(where + "router scores", router.scores, ROUTER_SCORES)
            absent(
                router,
                where + "router ",
                *("renormalize_epsilon", "selection_bias", "bias", "groups", "groups_kept", "weight_scale"),
            )
        else:
            require(layer.top_k == 0 and layer.router is None, where + "a dense layer with a router")
