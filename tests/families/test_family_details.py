"""What single families have and others do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import slow_except

import edgemoe
from edgemoe.convert import convert
from edgemoe.errors import ReadError, SourceError, StateError, UnsupportedModelError
from edgemoe.families import family_for
from edgemoe.formats.ggml_blocks import dequantize, mxfp4_blocks
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.pack import Pack
from edgemoe.source import SourceModel
from edgemoe.spec import ModelSpec

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from family_table import (
    CASES,
    VOCABULARY,
    Case,
    expected_logits,
    read_folder,
    with_options,
    write_folder,
    write_gguf,
)

TOKENS = np.random.default_rng(2).integers(0, VOCABULARY, 150).astype(np.int32)
F32_STATE: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "context": 512}


def folder_of(path: Path, name: str) -> Path:
    write_folder(path / "hf", CASES[name])
    return path / "hf"


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def change(folder: Path, **options: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **options}))


def logits(path: Path, **options: Any) -> np.ndarray:
    with edgemoe.load(path, **{**F32_STATE, **options}) as model:
        return model.logits(TOKENS)


@pytest.mark.parametrize("name", slow_except([name for name in CASES if "," not in name], "qwen2_moe", "gpt_oss"))
def test_the_names_transformers_saves_by_itself(tmp_path: Path, name: str) -> None:
    """Experts stacked, some tensors renamed: the pack is the same."""
    for original in (True, False):
        write_folder(tmp_path / str(original), CASES[name], original)
        convert(tmp_path / str(original), tmp_path / f"{original}.emoe", 32)
    packs = [Pack.open(tmp_path / f"{original}.emoe") for original in (True, False)]
    assert [section.checksum for section in packs[0].index.sections] == [
        section.checksum for section in packs[1].index.sections
    ]
    assert packs[0].unused == packs[1].unused == []


# -- MXFP4 ----------------------------------------------------------------------------------------------------------


def to_mxfp4(folder: Path) -> None:
    """Replaces the experts of a gpt-oss folder by random MXFP4 blocks, as the released folders have them."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(4)
    tensors = {}
    for name, values in read_folder(folder).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = values.shape
            tensors[name + "_blocks"] = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
            tensors[name + "_scales"] = rng.integers(122, 126, (experts, rows, columns // 32), dtype=np.uint8)
        else:
            tensors[name] = values
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change(folder, quantization_config={"quant_method": "mxfp4"})


def test_mxfp4_blocks_are_read_as_transformers_reads_them() -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = rng.integers(118, 130, (2, 6, 3), dtype=np.uint8)
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    ours = dequantize("mxfp4", mxfp4_blocks(blocks, scales).reshape(-1)).reshape(2, 6, 96)
    np.testing.assert_array_equal(ours, expected.numpy().swapaxes(1, 2))


def test_mxfp4_experts_stay_what_they_are(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "gpt_oss")
    to_mxfp4(folder)
    for bits in (None, 8, 32):
        convert(folder, tmp_path / f"{bits}.emoe", bits, 32)
    packs = {bits: Pack.open(tmp_path / f"{bits}.emoe") for bits in (None, 8, 32)}
    for bits, layouts in ((None, {"ggml.mxfp4"}), (8, {"ggml.mxfp4"}), (32, {"f32"})):
        assert set(packs[bits].layout_bytes()["experts"]) == layouts
    assert packs[8].index.experts[0].levels[0].bits == 4

    case = CASES["gpt_oss"]

    def weights(tensors: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
        """The blocks become the float weights that the folder of other cases has."""
        result = {}
        for name, values in tensors.items():
            if name.endswith("_blocks"):
                plain = name.removesuffix("_blocks")
                blocks = mxfp4_blocks(values, tensors[plain + "_scales"])
                shape = (*values.shape[:2], values.shape[2] * 32)
                result[plain] = dequantize("mxfp4", blocks.reshape(-1)).reshape(shape).swapaxes(1, 2)
            elif not name.endswith("_scales"):
                result[name] = values
        return case.convert(result, config)

    gguf = Case(case.config, case.options, case.architecture, case.metadata, weights)
    expected = logits(tmp_path / "32.emoe")
    np.testing.assert_allclose(
        logits(write_gguf(tmp_path / "f32.gguf", folder, gguf)), expected, atol=1e-4 * np.ptp(expected)
    )
    # Products of MXFP4 read int8 activations; the same blocks give the same bits wherever they come from.
    kept = logits(tmp_path / "None.emoe")
    path = write_gguf(tmp_path / "mxfp4.gguf", folder, gguf, lambda name: "mxfp4" if "_exps.weight" in name else "f32")
    assert logits(path).tobytes() == kept.tobytes()
    assert np.abs(kept - expected).mean() < 0.02 * np.ptp(expected)


def test_mxfp4_of_another_shape_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder = folder_of(tmp_path, "gpt_oss")
    to_mxfp4(folder)
    tensors = read_folder(folder)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    for wrong, error in (
        (tensors[name][:, :-1], SourceError),
        (tensors[name].astype(np.float32), UnsupportedModelError),
    ):
        save_file({**tensors, name: np.ascontiguousarray(wrong)}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(error, match="down_proj_blocks"):
            convert(folder, tmp_path / "a.emoe")


def test_experts_of_another_method_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "gpt_oss")
    change(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match="quant_method = 'fp8'"):
        SourceModel.open(folder)


# -- windows --------------------------------------------------------------------------------------------------------


def test_a_window_takes_the_memory_of_a_window(tmp_path: Path) -> None:
    """And says so where it cannot go back."""
    folder = folder_of(tmp_path, "mixtral, with a window")
    change(folder, max_position_embeddings=8192)
    convert(folder, tmp_path / "window.emoe", 32)
    change(folder, sliding_window=None)
    convert(folder, tmp_path / "all.emoe", 32)
    state = {}
    for name in ("window", "all"):
        with edgemoe.load(tmp_path / f"{name}.emoe", context=8192, parallel=1) as model:
            state[name] = model.budget.state
    # 8192 positions are 128 blocks; a window of 70 and a chunk of 512 lie in 11.
    assert state["window"] * 128 == state["all"] * 11
    with edgemoe.load(tmp_path / "window.emoe", context=8192, parallel=1) as model:
        tokens = np.resize(TOKENS, 1500)
        model.logits(tokens)
        engine = model.engine
        with pytest.raises(StateError, match="window of 70"):
            engine.truncate(0, 700)
        assert engine.length(0) == 1500
        engine.truncate(0, 1400)
        assert engine.length(0) == 1400
        reused = model.next_logits([*tokens[:700].tolist(), 3]).tobytes()
        assert model.logits([*tokens[:700].tolist(), 3])[-1].tobytes() == reused


def test_a_failed_chunk_costs_a_window_nothing(tmp_path: Path) -> None:
    """Some layers have stored a chunk's keys, over older ones, when an expert of another layer cannot be read."""
    folder = folder_of(tmp_path, "mixtral, with a window")
    pack = tmp_path / "a.emoe"
    convert(folder, pack, 32)

    whole = pack.read_bytes()
    last = Pack.open(pack)
    sections = [last.index.sections[numbers[0]].extents[0] for numbers in last.index.experts[1].sections]
    with edgemoe.load(pack, chunk=64, expert_slots=3, parallel=1, **F32_STATE) as model:
        tokens = np.resize(TOKENS, 300)
        expected = model.logits(tokens)[-1].tobytes()
        model.logits(tokens[:200])
        damaged = bytearray(whole)
        for extent in sections:
            damaged[extent.offset] ^= 1
        pack.write_bytes(damaged)
        steps = np.arange(200, 300, dtype=np.int32)
        with pytest.raises(ReadError):
            model.forward(tokens[200:], steps, np.zeros_like(steps), [99])
        pack.write_bytes(whole)
        assert model.engine.length(0) == 200
        assert model.forward(tokens[200:], steps, np.zeros_like(steps), [99])[0].tobytes() == expected


# -- Gemma 4 --------------------------------------------------------------------------------------------------------


def test_gemma4_within_a_model_for_images(tmp_path: Path) -> None:
    """The text part of a whole model, whose other tensors are listed as unused."""
    from safetensors.numpy import save_file

    folder = folder_of(tmp_path, "gemma4")
    convert(folder, tmp_path / "text.emoe", 32)
    tensors = {
        name.replace("model.", "model.language_model.", 1): values for name, values in read_folder(folder).items()
    }
    vision = {"model.vision_tower.patch.weight": np.zeros((3, 4), np.float32)}
    whole = tmp_path / "whole"
    folder.rename(whole)
    save_file({**tensors, **vision}, whole / "model.safetensors", {"format": "pt"})
    config = config_of(whole)
    (whole / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": config, "vision_config": {}}))
    convert(whole, tmp_path / "whole.emoe", 32)
    assert Pack.open(tmp_path / "whole.emoe").unused == list(vision)
    assert logits(tmp_path / "whole.emoe").tobytes() == logits(tmp_path / "text.emoe").tobytes()


def test_gemma4_as_it_was_released(configurations: Callable[[str], dict[str, Any]]) -> None:
    """Sizes of global layers by names of their own instead of layer by layer."""
    new = configurations("gemma4")
    released = {**new, "global_head_dim": 32, "num_global_key_value_heads": 1}
    del released["per_layer_config"]
    assert family_for(new).spec(new) == family_for(released).spec(released)


# -- LongRoPE -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_longrope_is_chosen_by_the_context(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "phimoe")
    convert(folder, tmp_path / "a.emoe", 32)
    tokens = TOKENS[:60]
    for context, oracle in ((64, {}), (65, CASES["phimoe"].oracle)):
        expected = expected_logits(with_options(folder, oracle), tokens)
        with edgemoe.load(tmp_path / "a.emoe", **{**F32_STATE, "context": context}) as model:
            assert np.abs(model.logits(tokens) - expected).max() <= 2e-3 * np.ptp(expected)


def test_phi_files_of_different_conversions(tmp_path: Path) -> None:
    """With the type of scaling stated or not, with a window that is none or longer than the context."""
    folder, case = folder_of(tmp_path, "phimoe"), CASES["phimoe"]
    specs = []
    for number, more in enumerate(({}, {"rope.scaling.type": "longrope", "attention.sliding_window": 7})):
        changed = dataclasses.replace(case, metadata={**case.metadata, **more})
        specs.append(GgufSource.open(write_gguf(tmp_path / f"{number}.gguf", folder, changed)).spec)
    first, second = (spec.layers[0].attention for spec in specs)
    assert (first.window, second.window) == (None, 7)
    assert first.rope == second.rope
    # Not what the file says, which follows from its context lengths.
    assert first.rope is not None
    assert (first.rope.attention_factor, first.rope.long_attention_factor) == (1.243163121016122, 1.243163121016122)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "quoted"),
    [
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen2_moe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen2_moe", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
        ("olmoe", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("olmoe", {"clip_qkv": -1}, "clip_qkv = -1"),
        ("mixtral", {"num_experts_per_tok": 5}, "top_k = 5"),
        ("mixtral", {"sliding_window": -4}, "sliding_window = -4"),
        ("gpt_oss", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "'linear_attention'"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "list of 3 names"),
        ("gpt_oss", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type = 'llama3'"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit = 0"),
        ("glm4_moe", {"n_group": 3}, "8 experts in 3 groups"),
        ("glm4_moe", {"n_group": 8}, "8 experts in 8 groups have no two largest scores"),
        ("glm4_moe", {"topk_group": 5}, "groups_kept = 5"),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor = 1.5"),
        ("ernie4_5_moe", {"moe_norm_min": 0}, "moe_norm_min = 0"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list"),
        ("gemma4", {"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input"),
        ("gemma4", {"per_layer_config": {"1": {"sliding_window": 7}}}, "sliding_window = 7"),
        ("gemma4", {"per_layer_config": {"full_attention": {"head_dim": 8}}}, "full_attention"),
        ("gemma4", {"num_kv_shared_layers": 2}, "num_kv_shared_layers = 2"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
        ("phimoe", {"num_experts_per_tok": 3}, "sparsemixer chooses 2 experts, not 3"),
        ("phimoe", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor has 1 numbers"),
        ("granitemoe", {"residual_multiplier": 0}, "residual_multiplier = 0"),
        ("granitemoe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    configurations: Callable[[str], dict[str, Any]], name: str, changes: dict[str, Any], quoted: str
) -> None:
    config = {**configurations(name), **changes}
    with pytest.raises((UnsupportedModelError, SourceError)) as error:
        family_for(config).spec(config)
    assert quoted in str(error.value)


@pytest.mark.parametrize("name", slow_except(CASES))
def test_specifications_survive_packs(configurations: Callable[[str], dict[str, Any]], name: str) -> None:
    config = configurations(name)
    spec = family_for(config).spec(config)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.fixture(scope="module")
def configurations() -> Callable[[str], dict[str, Any]]:
    """The config.json of a case."""
    import transformers
    from family_table import SIZES

    def make(name: str) -> dict[str, Any]:
        case = CASES[name]
        return dict(json.loads(getattr(transformers, case.config)(**{**SIZES, **case.options}).to_json_string(False)))

    return make
