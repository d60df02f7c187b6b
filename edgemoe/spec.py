"""ModelSpec: every fact the engine needs about a model.

A family (`edgemoe/families/`) turns a configuration into a `ModelSpec`; the pack stores it; the C++ engine reads its
fields and knows nothing else about the model. `None`, `False`, `0` and `1.0` mean "the model has no such thing".
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgemoe.errors import UnsupportedModelError, quote

MAX_DIMENSION = 1 << 24
MAX_LAYERS = 1024
# Endings of the names of matrices that conversions do not quantize: small ones, whose errors would go far.
FLOAT_TENSORS = (".router", ".conv")
# Of those that the engine computes with in float32 only.
FLOAT_ONLY = (".conv",)

# What the engine implements of each choice. A spec may name more (a newer file); it is refused by name.
ATTENTION_KINDS = ("full", "mla", "gated_delta", "short_conv")
ROUTER_SCORES = ("softmax", "softmax_topk", "sigmoid", "sparsemixer")
GROUP_SCORES = ("largest", "two_largest")
ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu")
QK_NORMS = ("none", "head", "full")
NORMS = ("rms", "layer")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of one attention layer.

    inverse_frequencies: radians per position, one per rotated pair; scaling (YaRN, LongRoPE, ...) is already in them.
    interleaved: pairs are (2i, 2i+1) instead of (i, i + half).
    attention_factor: multiplies cosine and sine (YaRN's mscale).
    long_inverse_frequencies, long_attention_factor: take their places where the context that a model is loaded with
        exceeds original_context (LongRoPE, Ding et al. 2024); empty for none.
    """

    inverse_frequencies: tuple[float, ...]
    interleaved: bool = False
    attention_factor: float = 1.0
    long_inverse_frequencies: tuple[float, ...] = ()
    long_attention_factor: float = 1.0
    original_context: int = 0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One token-mixing layer.

    kind: "full" (grouped-query attention over a key/value cache); "mla" (multi-head latent attention, DeepSeek-V2,
        section 2.1); "gated_delta" (Gated DeltaNet, Yang et al. 2024); "short_conv" (LFM2's gated short convolution).
    heads, kv_heads: query heads and key/value heads; heads is a multiple of kv_heads. Of mla, whose heads share one
        latent, kv_heads is 1; of gated_delta they are value heads and query/key heads; a short_conv has one head.
    head_dim, value_dim: size of one query/key head and of one value head; of a short_conv, its channels.
    scale: multiplies q.k before the softmax.
    qk_norm: RMSNorm on queries and keys before RoPE: "none", "head" (per head) or "full" (over all heads).
    window: positions a token sees, itself included; None for all.
    sinks: a learned logit per head joins the softmax's denominator (gpt-oss).
    bias: query, key and value projections have a bias; output_bias: the output projection has one.
    value_norm: RMSNorm without weights on each value head (Gemma 4).
    values_are_keys: there is no value projection, values are what the key projection gives, before norms and RoPE.
    output_gate: a sigmoid gate on the attention output (Qwen3-Next); the query projection gives each head's query and,
        behind it, its gate.
    softcap: scores become softcap * tanh(score / softcap); 0 for none.
    clip_qkv: queries, keys and values are clamped to +-clip_qkv (OLMoE); 0 for none.
    q_rank, kv_rank: sizes of the latents of mla that queries (0: of none) and keys and values are made of. rope_dim:
        elements at the end of its query and key heads that RoPE turns; those of the key are shared by all heads.
    latent_norm_epsilon: of the norms of those latents.
    conv_size: taps of the convolution of a gated_delta or short_conv layer.
    tiled_heads: value head i of gated_delta goes with key head i % kv_heads (GGUF's order), not with
        i // (heads / kv_heads).
    fused_beta_alpha: one projection of gated_delta gives, for each key head, beta and then alpha of its value heads.
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
    value_norm: bool = False
    values_are_keys: bool = False
    output_gate: bool = False
    softcap: float = 0.0
    clip_qkv: float = 0.0
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    latent_norm_epsilon: float = 0.0
    conv_size: int = 0
    tiled_heads: bool = False
    fused_beta_alpha: bool = False

    @property
    def channels(self) -> int:
        """Of the convolution of a gated_delta or short_conv layer."""
        if self.kind == "short_conv":
            return self.heads * self.head_dim
        return 2 * self.kv_heads * self.head_dim + self.heads * self.value_dim


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How a token's experts and their weights follow from the router's logits.

    scores: "softmax" (over all experts, then top-k), "softmax_topk" (top-k, then softmax), "sigmoid" or "sparsemixer"
        (two experts; each one's weight is its share among the experts whose logits come near it, and the second is
        chosen among the others; Liu et al. 2023). Reserved: "sqrt_softplus".
    renormalize: the chosen weights are divided by their sum, or by renormalize_least if that is more, plus
        renormalize_epsilon.
    selection_bias: a learned bias per expert that counts for the choice only (DeepSeek-V3).
    bias: the router projection has a bias.
    groups, groups_kept: experts are chosen within the best groups only; 1, 1 for no groups. group_score: a group counts
        by its "largest" score (DeepSeek-V2) or by the sum of its "two_largest" (DeepSeek-V3).
    weight_scale: multiplies the weights at the end.
    mask_threshold: of sparsemixer: experts whose logits are further from the best one's, relative to the larger of the
        two, have no share.
    input_norm: the router does not read what the experts read, but the residual stream after an RMSNorm of its own,
        times input_scale (Gemma 4).
    expert_scale: a learned factor per expert multiplies its weight.
    """

    scores: str = "softmax"
    renormalize: bool = True
    renormalize_epsilon: float = 0.0
    renormalize_least: float = 0.0
    selection_bias: bool = False
    bias: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_score: str = "two_largest"
    weight_scale: float = 1.0
    mask_threshold: float = 0.0
    input_norm: bool = False
    input_scale: float = 1.0
    expert_scale: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: attention, then a feed-forward part that is dense (`experts == 0`) or a mixture of experts.

    ffn_dim: hidden size of the dense feed-forward part, or of one expert.
    experts, top_k: routed experts of the layer and how many of them work on a token.
    shared_dim: hidden size of the shared expert, 0 for none; shared_gate: its output has a sigmoid gate.
    ffn_bias: the projections of a dense feed-forward part or of the shared expert have biases; expert_bias: those of
        the routed experts have.
    activation: "silu": silu(gate) * up; "gelu_tanh": gelu(gate) * up, in its tanh form; "clamped_swiglu" (gpt-oss):
        g * sigmoid(swiglu_alpha * g) * (u + 1) with g = min(gate, swiglu_limit) and u = up limited to +-swiglu_limit.
    output_norms: norms on the outputs of attention and of the feed-forward part, before they join the residual stream.
    branch_norms: the routed experts read the residual stream through a norm of their own, and their sum and the shared
        expert's output are normed before they are added up (Gemma 4, whose dense part beside the experts is the
        shared expert).
    output_scale: a learned number multiplies the residual stream after the layer.
    """

    attention: AttentionSpec
    ffn_dim: int
    experts: int = 0
    top_k: int = 0
    router: RouterSpec | None = None
    shared_dim: int = 0
    shared_gate: bool = False
    ffn_bias: bool = False
    expert_bias: bool = False
    activation: str = "silu"
    swiglu_alpha: float = 1.0
    swiglu_limit: float = 0.0
    output_norms: bool = False
    branch_norms: bool = False
    output_scale: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole model.

    family: model_type of the configuration it came from (for messages; the engine does not read it).
    vocab_size: rows of the embedding; hidden_size: size of the residual stream; context: positions it was made for.
    tied_embeddings: the output head is the embedding.
    norm_epsilon: of every norm.
    norm: "rms", or "layer" for LayerNorm with a bias (not for norms of queries, keys, values and routers).
    norm_offset: added to every norm weight (1 for zero-centred norms).
    head_bias: the output head has a bias.
    embedding_multiplier, residual_multiplier, logits_divisor: Granite's multipliers, 1.0 for none.
    logits_softcap: as AttentionSpec.softcap, on the logits; 0 for none.
    """

    family: str
    vocab_size: int
    hidden_size: int
    context: int
    layers: tuple[LayerSpec, ...]
    norm_epsilon: float
    norm: str = "rms"
    tied_embeddings: bool = False
    head_bias: bool = False
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

        def norm(name: str) -> None:
            shapes[name] = (hidden,)
            if self.norm == "layer":
                shapes[name + "_bias"] = (hidden,)

        def feed_forward(prefix: str, size: int, bias: bool) -> None:
            shapes[prefix + "gate"] = shapes[prefix + "up"] = (size, hidden)
            shapes[prefix + "down"] = (hidden, size)
            if bias:
                shapes[prefix + "gate_bias"] = shapes[prefix + "up_bias"] = (size,)
                shapes[prefix + "down_bias"] = (hidden,)

        for number, layer in enumerate(self.layers):
            prefix = f"layers.{number}."
            norm(prefix + "attention_norm")
            for name, shape in _attention_tensors(layer.attention, hidden).items():
                shapes[prefix + name] = shape
            norm(prefix + "ffn_norm")
            if layer.output_norms:
                norm(prefix + "attention_output_norm")
                norm(prefix + "ffn_output_norm")
            if layer.branch_norms:
                norm(prefix + "expert_norm")
                norm(prefix + "expert_output_norm")
                norm(prefix + "shared_output_norm")
            if layer.output_scale:
                shapes[prefix + "output_scale"] = (1,)
            if layer.router is None:
                feed_forward(prefix + "ffn.", layer.ffn_dim, layer.ffn_bias)
                continue
            shapes[prefix + "router"] = (layer.experts, hidden)
            if layer.router.bias:
                shapes[prefix + "router_bias"] = (layer.experts,)
            if layer.router.selection_bias:
                shapes[prefix + "selection_bias"] = (layer.experts,)
            if layer.router.input_norm:
                shapes[prefix + "router_norm"] = (hidden,)
            if layer.router.expert_scale:
                shapes[prefix + "expert_scale"] = (layer.experts,)
            if layer.shared_dim:
                feed_forward(prefix + "shared.", layer.shared_dim, layer.ffn_bias)
            if layer.shared_gate:
                shapes[prefix + "shared_gate"] = (hidden,)
            if layer.expert_bias:
                shapes[prefix + "expert_gate_bias"] = (layer.experts * layer.ffn_dim,)
                shapes[prefix + "expert_up_bias"] = (layer.experts * layer.ffn_dim,)
                shapes[prefix + "expert_down_bias"] = (layer.experts * hidden,)
        norm("final_norm")
        if not self.tied_embeddings:
            shapes["head"] = (self.vocab_size, hidden)
        if self.head_bias:
            shapes["head_bias"] = (self.vocab_size,)
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

    def for_context(self, context: int) -> ModelSpec:
        """The model as it is loaded with this many positions: LongRoPE's choice of frequencies is made, which the
        engine asks for."""

        def attention(spec: AttentionSpec) -> AttentionSpec:
            rope = spec.rope
            if rope is None or not rope.long_inverse_frequencies:
                return spec
            frequencies, factor = rope.inverse_frequencies, rope.attention_factor
            if context > rope.original_context:
                frequencies, factor = rope.long_inverse_frequencies, rope.long_attention_factor
            return dataclasses.replace(spec, rope=RopeSpec(frequencies, rope.interleaved, factor))

        layers = tuple(dataclasses.replace(layer, attention=attention(layer.attention)) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    # -- the pack's form ----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ModelSpec:
        """The spec written by `to_dict`; unknown keys are ignored. Raises UnsupportedModelError naming the field."""
        return typing.cast(ModelSpec, _decode(cls, data, "spec"))


def _attention_tensors(attention: AttentionSpec, hidden: int) -> dict[str, tuple[int, ...]]:
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    values = attention.kv_heads * attention.value_dim
    shapes: dict[str, tuple[int, ...]]
    if attention.kind == "mla":
        rank, heads = attention.kv_rank, attention.heads
        shapes = {"q": (queries, hidden)}
        if attention.q_rank:
            shapes = {"q_down": (attention.q_rank, hidden), "q_norm": (attention.q_rank,)}
            shapes["q"] = (queries, attention.q_rank)
        shapes |= {"kv_down": (rank + attention.rope_dim, hidden), "kv_norm": (rank,)}
        shapes["k_up"] = (heads * rank, attention.head_dim - attention.rope_dim)
        return shapes | {"v_up": (heads * attention.value_dim, rank), "o": (hidden, heads * attention.value_dim)}
    if attention.kind == "gated_delta":
        heads, values = attention.heads, attention.heads * attention.value_dim
        shapes = {"mixed": (attention.channels, hidden), "output_gate": (values, hidden)}
        if attention.fused_beta_alpha:
            shapes["beta_alpha"] = (2 * heads, hidden)
        else:
            shapes["beta"] = shapes["alpha"] = (heads, hidden)
        shapes |= {"conv": (attention.channels, attention.conv_size), "decay_rate": (heads,), "step_bias": (heads,)}
        return shapes | {"head_norm": (attention.value_dim,), "o": (hidden, values)}
    if attention.kind == "short_conv":
        channels = attention.channels
        shapes = {"mixed": (3 * channels, hidden), "conv": (channels, attention.conv_size)}
        return shapes | {"o": (hidden, channels)}
    shapes = {"q": (queries * (2 if attention.output_gate else 1), hidden), "k": (keys, hidden)}
    if not attention.values_are_keys:
        shapes["v"] = (values, hidden)
    shapes["o"] = (hidden, attention.heads * attention.value_dim)
    if attention.bias:
        shapes |= {"q_bias": (queries,), "k_bias": (keys,)}
        if not attention.values_are_keys:
            shapes["v_bias"] = (values,)
    if attention.output_bias:
        shapes["o_bias"] = (hidden,)
    if attention.qk_norm == "head":
        shapes["q_norm"] = shapes["k_norm"] = (attention.head_dim,)
    elif attention.qk_norm == "full":
        shapes |= {"q_norm": (queries,), "k_norm": (keys,)}
    if attention.sinks:
        shapes["sinks"] = (attention.heads,)
    return shapes


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Checks `value` against the annotation `kind` and builds the dataclasses in it (the file is not trusted)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in arguments if option is not types.NoneType]
        return None if value is None else _decode(options[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMENSION:
            raise UnsupportedModelError(f"{where}: a list was expected, not {quote(value)}")
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UnsupportedModelError(f"{where}: a map was expected, not {quote(value)}")
        hints = _hints(typing.cast(type, kind))
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
        raise UnsupportedModelError(f"{where}: {kind.__name__} was expected, not {quote(value)}")
    return value


_FULL = ("qk_norm", "window", "sinks", "bias", "value_norm", "values_are_keys", "clip_qkv", "output_gate")
_LATENT = ("q_rank", "kv_rank", "rope_dim", "latent_norm_epsilon")
_RECURRENT = ("tiled_heads", "fused_beta_alpha")
# Fields of AttentionSpec that mean nothing to a kind of layer.
_ABSENT: dict[str, tuple[str, ...]] = {
    "full": (*_LATENT, "conv_size", *_RECURRENT),
    "mla": (*_FULL, "conv_size", *_RECURRENT),
    "gated_delta": (*_FULL, *_LATENT),
    "short_conv": (*_FULL, *_LATENT, *_RECURRENT),
}


def _validate_mixer(
    attention: AttentionSpec, where: str, require: Callable[[bool, str], None], size: Callable[[str, int, int], None]
) -> None:
    """What the kinds of AttentionSpec demand of its sizes."""
    if attention.kind == "full":
        require(attention.value_dim == attention.head_dim, where + "value_dim differs from head_dim")
        require(attention.head_dim % 2 == 0, f"{where}head_dim = {attention.head_dim} is odd")
        size(where + "width of the heads", attention.heads * attention.head_dim, MAX_DIMENSION)
        require(not (attention.output_gate and attention.bias), where + "an output gate with a bias is not supported")
        return
    if attention.kind == "mla":
        width = attention.heads * max(attention.head_dim, attention.value_dim, attention.kv_rank)
        size(where + "width of the heads", width, MAX_DIMENSION)
        require(attention.kv_heads == 1, f"{where}kv_heads = {attention.kv_heads} of latent attention is not 1")
        size(where + "kv_rank", attention.kv_rank, 1 << 14)
        size(where + "rope_dim", attention.rope_dim, attention.head_dim - 1)
        require(0 <= attention.q_rank <= MAX_DIMENSION, f"{where}q_rank = {attention.q_rank}")
        epsilon = attention.latent_norm_epsilon
        require(0 < epsilon < 1, f"{where}latent_norm_epsilon = {epsilon} is not between 0 and 1")
        whole: tuple[str, ...] = ("kv_rank", "value_dim")
    else:
        require(attention.rope is None, f"{where}a rope in a layer of kind {attention.kind}")
        size(where + "conv_size", attention.conv_size, 64)
        size(where + "channels", attention.channels, MAX_DIMENSION)
        whole = ("value_dim",) if attention.kind == "gated_delta" else ()
    if attention.kind == "short_conv":
        require(attention.heads == 1, f"{where}heads = {attention.heads} of a convolution is not 1")
        require(attention.value_dim == attention.head_dim, where + "value_dim differs from head_dim")
    for name in whole:  # of a head, whose rows must be whole blocks
        value = getattr(attention, name)
        require(value % 16 == 0, f"{where}{name} = {value} of {attention.kind} is not a multiple of 16")


def _validate(spec: ModelSpec) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UnsupportedModelError(f"{spec.family}: {message}")

    def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
        if value not in known:
            require(False, f"{name} = {quote(value)} is not supported (known: {', '.join(known)})")

    def size(name: str, value: int, limit: int = MAX_DIMENSION) -> None:
        require(1 <= value <= limit, f"{name} = {value} is not between 1 and {limit}")

    def absent(holder: Any, where: str, *names: str) -> None:
        """Fields laid out for families to come: anything but the default is refused, never silently ignored."""
        defaults = {field.name: field.default for field in dataclasses.fields(holder)}
        for name in names:
            value = getattr(holder, name)
            if value != defaults[name]:
                require(False, f"{where}{name} = {quote(value)} is not supported")

    size("vocab_size", spec.vocab_size)
    size("hidden_size", spec.hidden_size)
    size("context", spec.context, 1 << 30)
    size("number of layers", len(spec.layers), MAX_LAYERS)
    require(0 < spec.norm_epsilon < 1, f"norm_epsilon = {spec.norm_epsilon} is not between 0 and 1")
    one_of("norm", spec.norm, NORMS)
    for name in ("embedding_multiplier", "residual_multiplier", "logits_divisor"):
        require(getattr(spec, name) != 0, f"{name} = 0")
    require(spec.logits_softcap >= 0, f"logits_softcap = {spec.logits_softcap} is negative")
    for number, layer in enumerate(spec.layers):
        where, attention = f"layer {number}: ", layer.attention
        one_of(where + "attention kind", attention.kind, ATTENTION_KINDS)
        one_of(where + "qk_norm", attention.qk_norm, QK_NORMS)
        one_of(where + "activation", layer.activation, ACTIVATIONS)
        size(where + "heads", attention.heads, 1 << 16)
        size(where + "kv_heads", attention.kv_heads, attention.heads)
        size(where + "head_dim", attention.head_dim, 1 << 14 if attention.kind != "short_conv" else MAX_DIMENSION)
        size(where + "value_dim", attention.value_dim, 1 << 14 if attention.kind != "short_conv" else MAX_DIMENSION)
        require(
            attention.heads % attention.kv_heads == 0,
            f"{where}{attention.heads} heads cannot share {attention.kv_heads} key/value heads evenly",
        )
        require(math.isfinite(attention.scale) and attention.scale > 0, f"{where}scale = {attention.scale}")
        if attention.window is not None:
            size(where + "window", attention.window, 1 << 30)
        require(attention.clip_qkv >= 0, f"{where}clip_qkv = {attention.clip_qkv} is negative")
        if attention.rope is not None:
            rope = attention.rope
            pairs = len(rope.inverse_frequencies)
            turning = attention.rope_dim if attention.kind == "mla" else attention.head_dim
            require(1 <= pairs <= turning // 2, f"{where}{pairs} rotary pairs in a head of {turning}")
            require(
                len(rope.long_inverse_frequencies) in (0, pairs),
                f"{where}{len(rope.long_inverse_frequencies)} long rotary pairs for {pairs} short ones",
            )
        absent(attention, where + "attention ", "softcap", *_ABSENT[attention.kind])
        _validate_mixer(attention, where, require, size)
        size(where + "ffn_dim", layer.ffn_dim)
        if layer.activation == "clamped_swiglu":
            require(layer.swiglu_limit > 0, f"{where}swiglu_limit = {layer.swiglu_limit} is not positive")
        router = layer.router
        if router is None:
            require(layer.experts == 0 and layer.top_k == 0, where + "a mixture of experts without a router")
            absent(layer, where, "shared_dim", "shared_gate", "expert_bias", "branch_norms")
            continue
        require(layer.experts > 0, where + "a dense layer with a router")
        size(where + "experts", layer.experts, 1 << 16)
        size(where + "top_k", layer.top_k, min(layer.experts, 256))
        if layer.shared_dim or layer.shared_gate or layer.branch_norms:
            size(where + "shared_dim", layer.shared_dim)
        one_of(where + "router scores", router.scores, ROUTER_SCORES)
        one_of(where + "router group_score", router.group_score, GROUP_SCORES)
        if router.scores == "sparsemixer":
            require(layer.top_k == 2, f"{where}sparsemixer chooses 2 experts, not {layer.top_k}")
            require(not router.renormalize, where + "sparsemixer does not renormalize")
            absent(router, where + "router ", "selection_bias", "groups", "groups_kept")
        size(where + "router groups", router.groups, layer.experts)
        size(where + "router groups_kept", router.groups_kept, router.groups)
        require(
            router.groups == 1 or router.group_score == "largest" or layer.experts >= 2 * router.groups,
            f"{where}{layer.experts} experts in {router.groups} groups have no two largest scores",
        )
        require(
            layer.experts % router.groups == 0 and layer.top_k <= layer.experts // router.groups * router.groups_kept,
            f"{where}{layer.experts} experts in {router.groups} groups, {router.groups_kept} of them kept, do not give "
            f"{layer.top_k}",
        )
        require(router.renormalize_epsilon >= 0 and router.renormalize_least >= 0, where + "a negative renormalization")
