"""What the configurations of most families have in common. What a family has besides is added with
`dataclasses.replace`."""

from __future__ import annotations

from collections.abc import Sequence

from edgemoe.families._config import Config
from edgemoe.spec import AttentionSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec


def head_size(c: Config) -> int:
    """Elements of a head: what is stated, or an equal share of the hidden size."""
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    return c.integer("head_dim", default=max(1, hidden // heads), most=1 << 14)


def grouped_attention(c: Config, head_dim: int, rope: RopeSpec) -> AttentionSpec:
    """Grouped-query attention to all positions."""
    heads = c.integer("num_attention_heads")
    return AttentionSpec(
        kind="full",
        heads=heads,
        kv_heads=c.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        value_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope,
    )


def window(c: Config) -> int | None:
    """Positions that a token sees; None for all."""
    return c.integer("sliding_window", most=1 << 30) if c.has("sliding_window") else None


def mixture_layers(c: Config) -> list[bool]:
    """Which layers are a mixture of experts, by `mlp_only_layers` and `decoder_sparse_step`."""
    dense, step = set(c.integers("mlp_only_layers")), c.integer("decoder_sparse_step", default=1)
    return [number not in dense and (number + 1) % step == 0 for number in range(c.layers())]


def sigmoid_router(c: Config, weight_scale: float) -> RouterSpec:
    """DeepSeek-V3's: a bias for the choice, groups of experts. weight_scale: where the configuration has none."""
    return RouterSpec(
        scores="sigmoid",
        renormalize=c.flag("norm_topk_prob", default=True),
        renormalize_epsilon=1e-20,
        selection_bias=True,
        groups=c.integer("n_group", default=1),
        groups_kept=c.integer("topk_group", default=1),
        weight_scale=c.number("routed_scaling_factor", default=weight_scale),
    )


def model(
    c: Config,
    family: str,
    layers: Sequence[LayerSpec],
    *,
    norm_epsilon: float,
    tied: bool = False,
    context: int | None = None,
) -> ModelSpec:
    """A model of these layers. norm_epsilon, tied, context: where the configuration does not state `rms_norm_eps`,
    `tie_word_embeddings` and `max_position_embeddings`, which must be stated if there is no context."""
    return ModelSpec(
        family=family,
        vocab_size=c.integer("vocab_size"),
        hidden_size=c.integer("hidden_size"),
        context=c.integer("max_position_embeddings", default=context, most=1 << 30),
        layers=tuple(layers),
        norm_epsilon=c.number("rms_norm_eps", default=norm_epsilon),
        tied_embeddings=c.flag("tie_word_embeddings", default=tied),
    )
