"""Traces of models that transformers runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import slow_except

from edgemoe.errors import TraceError
from edgemoe.profiling import trace_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


def models() -> dict[str, Any]:
    return {
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **SIZES, num_experts=8, moe_intermediate_size=16, head_dim=16, mlp_only_layers=[1]
        ),
        "olmoe": transformers.OlmoeConfig(**SIZES, num_experts=8),
        "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=8),
        "deepseek_v3": transformers.DeepseekV3Config(
            **SIZES,
            n_routed_experts=8,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(models()))
def test_choices_are_caught(kind: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(models()[kind]).eval()
    texts = {"a": [[1, 2, 3, 4, 5], [6, 7]], "b": [range(10, 20)]}
    trace = trace_transformers(model, texts)
    dense = {"qwen3_moe": (1,), "deepseek_v3": (0,)}.get(kind, ())
    assert trace.experts == tuple(0 if layer in dense else 8 for layer in range(3))
    assert trace.starts.tolist() == [0, 5, 7, 17]
    assert trace.parts == ("a", "b")
    if kind != "deepseek_v3":  # whose choice does not follow from the logits alone (bias, groups)
        with torch.no_grad():
            out = model(input_ids=torch.arange(10, 20)[None], output_router_logits=True)
        assert len(out.router_logits) == len(trace.layers)
        for layer, logits in zip(trace.layers, out.router_logits, strict=True):
            expected = np.argsort(-logits.float().numpy().reshape(-1, 8), axis=1, kind="stable")[:, :2]
            np.testing.assert_array_equal(trace.layer_picks(layer)[7:], expected)
    assert trace.weights is not None
    assert (np.diff(trace.weights.reshape(17, -1, 2).astype(np.float32), axis=2) <= 0).all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_experts_is_refused() -> None:
    dense = transformers.LlamaConfig(**{name: value for name, value in SIZES.items() if "experts" not in name})
    model = transformers.AutoModelForCausalLM.from_config(dense)
    with pytest.raises(TraceError, match="no layers with experts"):
        trace_transformers(model, [[1, 2, 3]])


def test_strings_need_a_tokenizer() -> None:
    model = transformers.AutoModelForCausalLM.from_config(models()["olmoe"])
    with pytest.raises(ValueError, match="tokenizer"):
        trace_transformers(model, ["hello"])
