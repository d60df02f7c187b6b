"""Folders that transformers itself wrote, in both forms it has for experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgemoe.convert import convert
from edgemoe.formats.pack import Pack
from edgemoe.source import SourceModel

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


@pytest.mark.parametrize("tied", [False, True])
def test_qwen3_moe(tmp_path: Path, tied: bool) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    forms = {"one by one": {}, "stacked": {"save_original_format": False}, "shards": {"max_shard_size": "20KB"}}
    packs = []
    for form, options in forms.items():
        folder = tmp_path / form / "model"
        model.save_pretrained(folder, **options)
        convert(folder, tmp_path / f"{form}.emoe", 32)
        pack = Pack.open(tmp_path / f"{form}.emoe")
        assert pack.unused == []
        packs.append((tmp_path / f"{form}.emoe").read_bytes())
    names = set(SourceModel.open(tmp_path / "stacked" / "model").folder.names())
    assert "model.layers.0.mlp.experts.gate_up_proj" in names  # else this test tests less than it says
    assert packs[1:] == packs[:1] * 2
    assert pack.index.spec.tied_embeddings == tied
    rope = pack.index.spec.layers[0].attention.rope
    assert rope is not None
    inverse = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(rope.inverse_frequencies, inverse, rtol=1e-6)
    parameters, _ = pack.index.spec.parameters()
    assert parameters == model.num_parameters()
    assert json.loads((folder / "config.json").read_text())["model_type"] == pack.index.spec.family
