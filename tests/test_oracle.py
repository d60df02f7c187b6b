"""The engine against `transformers`, family by family, on random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from helpers import slow_except

import edgemoe
from edgemoe.convert import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

POSITIONS = 64

# Options of Qwen3MoeConfig; each shape switches on something the others do not have.
SHAPES: dict[str, dict[str, Any]] = {
    "renormalized": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "tied_not_renormalized": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "moe_intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "dense_layers": {
        "hidden_size": 80,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 24,
        "intermediate_size": 112,
        "moe_intermediate_size": 40,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": True,
    },
}


def write_folder(folder: Path, options: dict[str, Any], dtype: str = "float32") -> None:
    """A Hugging Face folder with random weights that are large enough for the routers to have opinions."""
    torch.manual_seed(7)
    config = transformers.Qwen3MoeConfig(
        **{"vocab_size": 320, "num_hidden_layers": 3, "max_position_embeddings": 512, **options}
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in name else 2.5 * parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape) * scale
            parameter.copy_(noise + 1 if "norm" in name else noise)
    model.save_pretrained(folder)
    vocabulary = {f"<{i}>": i for i in range(config.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<1>"}))


def expected_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """From the stored weights in float32, so that only the engine's own rounding is left to differ."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    return np.asarray(logits)


@pytest.mark.slow
@pytest.mark.parametrize("shape", slow_except(SHAPES))
@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16), ("float16", 16)])
def test_logits_equal_transformers(tmp_path: Path, shape: str, dtype: str, bits: int) -> None:
    write_folder(tmp_path / "hf", SHAPES[shape], dtype)
    convert(tmp_path / "hf", tmp_path / "model.emoe", bits)
    tokens = np.random.default_rng(1).integers(0, 320, POSITIONS).astype(np.int32)
    expected = expected_logits(tmp_path / "hf", tokens)
    tolerance = 2e-3 * (expected.max() - expected.min())
    with edgemoe.load(tmp_path / "model.emoe", cache_type_k="f32", cache_type_v="f32") as engine:
        assert np.abs(engine.logits(tokens) - expected).max() <= tolerance
        steps = []
        for position in range(POSITIONS):
            steps.append(engine.forward([tokens[position]], [position], [0], [0])[0])
        assert np.abs(np.stack(steps) - expected).max() <= tolerance
