"""What messages quote."""

from __future__ import annotations

import pytest

from edgemoe.errors import QUOTED, UnsupportedModelError, quote, shorten
from edgemoe.families import family_for


@pytest.mark.parametrize("value", ["half", 3, None, ["qwen3_moe"], {"type": "yarn"}, b"\x00"])
def test_small_values_are_quoted_whole(value: object) -> None:
    assert quote(value) == repr(value)


@pytest.mark.parametrize(
    "value", ["\n" * 10**6, b"\x00" * 10**7, [[["x" * 10**4] * 10**4] * 10**4] * 10**4, {1: {2: ["\u2028"] * 10**6}}]
)
def test_large_values_are_cut(value: object) -> None:
    text = quote(value)
    assert len(text) <= QUOTED
    assert text.isprintable()
    assert "..." in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("blk.0.attn_q.weight", "blk.0.attn_q.weight"),
        ("", "''"),
        ("a\n  b\t", "a b"),
        ("\x1b[2J\u202ea", "?[2J?a"),
        ("x" * 10**6, "x" * (QUOTED - 3) + "..."),
    ],
)
def test_names_are_printable_and_short(name: str, shown: str) -> None:
    assert shorten(name) == shown


@pytest.mark.parametrize("name", ["vocab_size", "rms_norm_eps", "norm_topk_prob", "rope_theta"])
def test_a_configuration_cannot_make_a_message_long(name: str) -> None:
    config = {"model_type": "qwen3_moe", "hidden_size": 8, "num_attention_heads": 1, "num_experts": 0}
    config |= {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8, "max_position_embeddings": 8}
    config |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, name: ["x" * 100] * 10**5}
    with pytest.raises(UnsupportedModelError, match=name) as failure:
        family_for(config).spec(config)
    assert len(str(failure.value)) < 200
