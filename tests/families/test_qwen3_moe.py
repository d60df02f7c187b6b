"""The Qwen3-MoE family: the spec of a real configuration, tensor names, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.errors import EdgemoeError, SourceError, UnsupportedModelError
from edgemoe.families import TensorSource, family_for, family_names
from edgemoe.spec import ModelSpec

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def spec_with(**changes: Any) -> ModelSpec:
    config = {key: value for key, value in {**QWEN3_30B_A3B, **changes}.items() if value != "absent"}
    return family_for(config).spec(config)


def sources_of(spec: ModelSpec, names: set[str]) -> dict[str, TensorSource]:
    return family_for(QWEN3_30B_A3B).tensor_sources(spec, QWEN3_30B_A3B, names)


def test_families_are_found_by_their_files() -> None:
    assert "qwen3_moe" in family_names()
    assert not any(name.startswith("_") for name in family_names())
    for name in family_names():
        family = family_for({"model_type": name})
        assert name == family.MODEL_TYPE


@pytest.mark.parametrize("model_type", ["qwen9_moe", None, "_config", "../errors", ["qwen3_moe"], {}])
def test_unknown_family(model_type: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model_type = .* is not supported \(known: .*qwen3_moe"):
        family_for({"model_type": model_type})


def test_spec_of_qwen3_30b_a3b() -> None:
    spec = spec_with()
    assert spec.parameters() == (30_532_122_624, 3_041_867_776)
    assert (spec.vocab_size, spec.hidden_size, spec.context, len(spec.layers)) == (151936, 2048, 40960, 48)
    assert (spec.norm_epsilon, spec.tied_embeddings) == (1e-6, False)
    layer = spec.layers[47]
    assert (layer.experts, layer.top_k, layer.ffn_dim, layer.activation) == (128, 8, 768, "silu")
    assert layer.router is not None
    assert (layer.router.scores, layer.router.renormalize) == ("softmax", True)
    attention = layer.attention
    assert (attention.kind, attention.heads, attention.kv_heads, attention.head_dim) == ("full", 32, 4, 128)
    assert (attention.qk_norm, attention.window) == ("head", None)
    assert attention.scale == 128**-0.5
    assert attention.rope is not None
    assert len(attention.rope.inverse_frequencies) == 64
    assert attention.rope.inverse_frequencies[0] == 1.0
    assert attention.rope.inverse_frequencies[1] == pytest.approx(1e6 ** (-1 / 64), rel=1e-12)
    assert ModelSpec.from_dict(spec.to_dict()) == spec


def test_defaults() -> None:
    spec = spec_with(norm_topk_prob="absent", head_dim="absent", tie_word_embeddings="absent", decoder_sparse_step=None)
    assert spec.layers[0].router is not None
    assert spec.layers[0].router.renormalize is False
    assert spec.layers[0].attention.head_dim == 64
    assert spec.tied_embeddings is False
    assert spec_with(tie_word_embeddings=True).tied_embeddings is True
    assert "head" not in spec_with(tie_word_embeddings=True).dense_tensors()


def test_dense_layers() -> None:
    spec = spec_with(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [layer.experts for layer in spec.layers] == [0, 128, 0, 0, 0, 128]
    assert spec.layers[3].ffn_dim == 6144
    assert spec.layers[3].router is None
    assert sources_of(spec, set())["layers.3.ffn.up"] == TensorSource("model.layers.3.mlp.up_proj.weight")
    assert not any(layer.experts for layer in spec_with(num_experts=0).layers)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"type": "default"}},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_old_and_new_rope(changes: dict[str, Any]) -> None:
    rope = spec_with(**changes).layers[0].attention.rope
    assert rope is not None
    assert rope.inverse_frequencies[63] == pytest.approx(5e5 ** (-63 / 64), rel=1e-12)


def test_expert_count_under_its_other_name() -> None:
    assert spec_with(num_experts="absent", num_local_experts=64).layers[0].experts == 64


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling: rope_type = 'dynamic'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling: type = 'su'"),
        ({"rope_scaling": {"type": "yarn", "factor": -4.0}}, "factor = -4.0"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters: rope_type = 'llama3'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn'"),
        ({"rope_theta": -1}, "rope_theta = -1"),
        ({"rope_theta": float("nan")}, "rope_theta = nan"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_qk_norm": False}, "use_qk_norm = False"),
        ({"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size = 512"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {'quant_method': 'fp8'}"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"hidden_size": 2048.0}, "hidden_size = 2048.0"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"head_dim": 10**9}, "head_dim = 1000000000"),
        ({"head_dim": 127}, "head_dim = 127"),
        ({"num_key_value_heads": 5}, "32 heads cannot share 5"),
        ({"num_experts_per_tok": 129}, "top_k = 129"),
        ({"num_experts": 10**7}, "experts = 10000000"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob = 'yes'"),
        ({"mlp_only_layers": 3}, "mlp_only_layers = 3"),
        ({"rms_norm_eps": 2.0}, "norm_epsilon = 2.0"),
        ({"max_position_embeddings": "4k"}, "max_position_embeddings = '4k'"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], quoted: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_with(**changes)
    assert quoted in str(caught.value)
    assert "qwen3_moe" in str(caught.value)
    assert "\n" not in str(caught.value)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "rope_theta", "factor"]), st.integers() | st.text(max_size=3)
    ),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(QWEN3_30B_A3B.keys() - {"model_type"})), ODD, min_size=1, max_size=4))
def test_odd_values_give_a_spec_or_a_refusal(changes: dict[str, Any]) -> None:
    try:
        spec = family_for(QWEN3_30B_A3B).spec({**QWEN3_30B_A3B, "num_hidden_layers": 3, **changes})
    except EdgemoeError as error:
        assert len(str(error)) < 400
    else:
        assert ModelSpec.from_dict(spec.to_dict()) == spec


def test_missing_value() -> None:
    with pytest.raises(SourceError, match="qwen3_moe: num_experts is missing"):
        spec_with(num_experts=None)


def test_sources_name_every_tensor() -> None:
    spec = spec_with(num_hidden_layers=2, mlp_only_layers=[0])
    sources = sources_of(spec, set())
    expected = set(spec.dense_tensors())
    expected |= {f"layers.1.experts.{e}.{part}" for e in range(128) for part in ("gate", "up", "down")}
    assert set(sources) == expected
    assert sources["embedding"].name == "model.embed_tokens.weight"
    assert sources["head"].name == "lm_head.weight"
    assert sources["layers.1.ffn_norm"].name == "model.layers.1.post_attention_layernorm.weight"
    assert sources["layers.1.experts.17.up"] == TensorSource("model.layers.1.mlp.experts.17.up_proj.weight")


def test_sources_of_stacked_experts() -> None:
    spec = spec_with(num_hidden_layers=1)
    sources = sources_of(spec, {"model.layers.0.mlp.experts.gate_up_proj"})
    stacked = "model.layers.0.mlp.experts.gate_up_proj"
    assert sources["layers.0.experts.5.gate"] == TensorSource(stacked, index=5, rows=(0, 768))
    assert sources["layers.0.experts.5.up"] == TensorSource(stacked, index=5, rows=(768, 1536))
    assert sources["layers.0.experts.5.down"] == TensorSource("model.layers.0.mlp.experts.down_proj", index=5)
