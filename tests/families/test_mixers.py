"""Latent attention, the gated delta rule and short convolutions: their states, their families' sizes and refusals."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import slow_except

import edgemoe
from edgemoe import _core
from edgemoe.convert import convert
from edgemoe.errors import StateError, UnsupportedModelError
from edgemoe.families import family_for
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.pack import Pack
from edgemoe.spec import ModelSpec

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from family_table import VOCABULARY, Case, pack_maker, read_folder, write_folder, write_gguf
from mixer_table import CASES

LATENT: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
}
DELTA: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "max_position_embeddings": 262144,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT,
    "deepseek_v3": {
        **LATENT,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "q_lora_rank": 1536,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
    },
    "glm4_moe_lite": {
        **LATENT,
        "vocab_size": 154880,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
    },
    "qwen3_next": DELTA,
    "qwen3_5_moe": {
        "tie_word_embeddings": False,
        "vision_config": {"depth": 27},
        "text_config": {
            **DELTA,
            "vocab_size": 248320,
            "num_hidden_layers": 40,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10]},
        },
    },
    "lfm2_moe": {
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "full_attn_idxs": [2, 6, 10, 14, 18, 21],
        "max_position_embeddings": 128000,
    },
}


def spec_of(family: str, **changes: Any) -> ModelSpec:
    config = {"model_type": family, **CONFIGURATIONS[family], **changes}
    return family_for(config).spec(config)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("deepseek_v2", 15_706_484_224),
        ("deepseek_v3", 671_026_419_200),
        ("glm4_moe_lite", 29_943_393_920),
        ("qwen3_next", 79_674_391_296),
        ("qwen3_5_moe", 34_660_610_688),
        ("lfm2_moe", 8_339_930_560),
    ],
)
def test_released_models_have_the_parameters_they_are_said_to_have(family: str, parameters: int) -> None:
    spec = spec_of(family)
    assert spec.parameters()[0] == parameters
    assert ModelSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("family", "changes", "quoted"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias = True"),
        ("deepseek_v2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type = 'dynamic'"),
        ("deepseek_v2", {"num_key_value_heads": 4}, "num_key_value_heads = 4"),
        ("deepseek_v2", {"kv_lora_rank": 500}, "kv_rank = 500 of mla is not a multiple of 16"),
        ("deepseek_v2", {"v_head_dim": 100}, "value_dim = 100 of mla is not a multiple of 16"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quant_method': 'fp8'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse"] * 46 + ["odd"]}, "mlp_layer_types: 'odd'"),
        ("qwen3_next", {"attn_output_gate": False}, "attn_output_gate = False"),
        ("qwen3_next", {"layer_types": ["mamba"] * 48}, "layer_types: 'mamba'"),
        ("qwen3_next", {"linear_value_head_dim": 120}, "value_dim = 120 of gated_delta is not a multiple of 16"),
        ("qwen3_next", {"linear_num_key_heads": 12}, "32 heads cannot share 12"),
        ("qwen3_next", {"linear_conv_kernel_dim": 100}, "conv_size = 100"),
        ("qwen3_5_moe", {"quantization_config": {"quant_method": "fp8"}}, "quant_method': 'fp8'"),
        ("qwen3_5_moe", {"text_config": {**DELTA, "norm_topk_prob": False}}, "norm_topk_prob = False"),
        (
            "qwen3_next",
            {"linear_num_key_heads": 1 << 12, "linear_key_head_dim": 1 << 14, "linear_num_value_heads": 1 << 15},
            "channels",
        ),
        ("deepseek_v2", {"num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16}, "width of the heads"),
        ("lfm2_moe", {"conv_bias": True}, "conv_bias = True"),
        ("lfm2_moe", {"layer_types": ["conv"] * 23 + ["ssm"]}, "layer_types: 'ssm'"),
    ],
)
def test_refused_by_name(family: str, changes: dict[str, Any], quoted: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of(family, **changes)
    assert quoted in str(caught.value)
    assert family in str(caught.value)
    assert "\n" not in str(caught.value)


PLAIN = [name for name in CASES if "," not in name or name.startswith("deepseek_v2, scaled")]
RECURRENT = ("qwen3_next", "qwen3_5_moe", "lfm2_moe")
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, 130).astype(np.int32)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The pack of a case at 32 bits; the folder it is made of lies beside it as "hf"."""
    return pack_maker(CASES, 32, tmp_path_factory)


def load(path: Path, chunk: int = 512, slots: int | None = None, **options: Any) -> edgemoe.Model:
    return edgemoe.load(path, chunk=chunk, expert_slots=slots, **{"context": 256, "parallel": 1, **options})


# -- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_bits_are_those_of_every_instruction_set(
    packs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for options in ({"cache_type_k": "f16"}, {"cache_type_k": "q8_0"}):
        if "q8_0" in options.values() and CASES[name].options.get("kv_lora_rank") != 32:
            continue
        found = set()
        for isa in _core.kernels.available_isas():
            monkeypatch.setenv("EDGEMOE_ISA", isa)
            try:
                with load(packs(name), threads=2, chunk=50, **options) as model:
                    found.add(model.logits(TOKENS[:90]).tobytes())
            except edgemoe.OptionError as error:  # a latent of 32 + 8
                assert "multiple of 32, not 40" in str(error)
        assert len(found) == ("q8_0" not in options.values())


@pytest.mark.parametrize("name", PLAIN)
def test_several_sequences_in_one_pass(packs: Callable[[str], Path], name: str) -> None:
    with load(packs(name), parallel=2) as model:
        first, second = model.logits(TOKENS[:40]), model.logits(TOKENS[50:87])
        other = 1
        model.engine.truncate(other, 0)
        model.logits(TOKENS[:3])
        sequences = [*[0, other] * 34, *[other] * 3, *[0] * 3]
        lengths, tokens, positions = {0: 3, other: 0}, [], []
        for sequence in sequences:
            tokens.append(TOKENS[lengths[sequence] + (0 if sequence == 0 else 50)])
            positions.append(lengths[sequence])
            lengths[sequence] += 1
        together = model.forward(tokens, positions, sequences, np.arange(len(tokens)))
    mine = np.asarray(sequences) == 0
    assert together[mine].tobytes() == first[3:].tobytes()
    assert together[~mine].tobytes() == second.tobytes()


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrence_goes_back_to_its_mark_only(packs: Callable[[str], Path], name: str) -> None:
    with load(packs(name), chunk=32) as model:
        expected = model.logits(TOKENS)
        engine = model.engine
        model.logits(TOKENS[:60])
        with pytest.raises(StateError, match=r"no state at 40: layer 0 keeps a (recurrence|convolution)"):
            engine.truncate(0, 40)
        assert engine.length(0) == 60
        engine.truncate(0, 60)
        engine.mark(0)
        steps = np.arange(60, 130, dtype=np.int32)
        for _ in range(2):
            after = model.forward(TOKENS[60:], steps, np.zeros_like(steps), np.arange(70))
            assert after.tobytes() == expected[60:].tobytes()
            engine.truncate(0, 60)
        held = engine.snapshot(0)
        engine.truncate(0, 0)
        assert (engine.length(0), engine.marked(0)) == (0, 0)
        model.forward(TOKENS[:5], np.arange(5), np.zeros(5), [])
        engine.restore(0, held)
        after = model.forward(TOKENS[60:], steps, np.zeros_like(steps), np.arange(70))
        assert after.tobytes() == expected[60:].tobytes()


@pytest.mark.parametrize("name", ["deepseek_v3", *RECURRENT])
def test_a_prompt_is_kept_for_another_answer(packs: Callable[[str], Path], name: str) -> None:
    with load(packs(name)) as model:
        prompt = TOKENS[:80].tolist()

        def computed(tokens: list[int]) -> int:
            before = model.engine.counters().tokens
            reused = model.next_logits(tokens).tobytes()
            done = int(model.engine.counters().tokens - before)
            held = model.snapshot()
            assert model.logits(tokens)[-1].tobytes() == reused
            model.restore(held)
            return done

        assert computed(prompt) == 80
        assert computed([*prompt, 5]) == 1
        assert computed([*prompt, 5, 6]) == 1

        model.next_logits(TOKENS[:3].tolist())
        model.next_logits(prompt)
        for token in (7, 8, 9):
            prompt_and_answer = [*prompt, token, token + 1]
            before = model.engine.counters().tokens
            model.next_logits(prompt_and_answer[:-1])
            model.next_logits(prompt_and_answer)
            assert model.engine.counters().tokens - before <= 4


@pytest.mark.parametrize("layer, kept", [(-2, 49), (-1, 129)])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_failed_pass_leaves_no_trace(
    tmp_path: Path, packs: Callable[[str], Path], name: str, layer: int, kept: int
) -> None:
    """An expert of a later layer cannot be read when the layers before have gone on. The last layer's are not read
    before the last chunk, which is the one that fails then."""
    whole = packs(name).read_bytes()
    path = tmp_path / "model.emoe"
    path.write_bytes(whole)
    pack = Pack.open(path)
    damaged = pack.index.experts[sorted(pack.index.experts)[layer]].sections
    with load(path, chunk=16, slots=3) as model:
        expected = model.logits(TOKENS)[-1].tobytes()
        model.next_logits(TOKENS[:50].tolist())
        assert model.engine.marked(0) == 49
        with path.open("r+b") as file:
            for sections in damaged:
                file.seek(pack.index.sections[sections[0]].extents[0].offset)
                file.write(bytes(64))
        with pytest.raises(edgemoe.ReadError, match="damaged"):
            model.next_logits(TOKENS.tolist())
        assert model.engine.length(0) == kept
        assert model.snapshot()[0] == tuple(TOKENS[:kept].tolist())
        path.write_bytes(whole)
        assert model.next_logits(TOKENS.tolist()).tobytes() == expected


def test_memory_counts_each_kind_of_state(packs: Callable[[str], Path]) -> None:
    def state(name: str, context: int) -> int:
        with edgemoe.load(packs(name), context=context, parallel=1) as model:
            return model.budget.state

    # Latents of 32 and rotated keys of 8, in float16, in blocks of 64 positions, for 3 layers.
    assert state("deepseek_v3", 64) == 3 * 40 * 64 * 2
    assert state("deepseek_v3", 65) == 2 * state("deepseek_v3", 64)
    # One layer of keys and values of 2 heads; 3 of 6 matrices and 4 inputs of 192 channels, in float32 and twice.
    keys = 2 * 2 * 32 * 64 * 2
    assert state("qwen3_next", 64) == keys + 3 * 2 * 4 * (6 * 24 * 16 + 4 * (2 * 2 * 24 + 6 * 16))
    assert state("qwen3_next", 128) - state("qwen3_next", 64) == keys
    assert state("lfm2_moe", 64) == 2 * 2 * 16 * 64 * 2 + 2 * 2 * 4 * 3 * 64


def test_a_dense_layer_has_no_experts_in_memory(packs: Callable[[str], Path]) -> None:
    with load(packs("deepseek_v3")) as model:
        model.logits(TOKENS)
        layers = Pack.open(model.path).index.spec.layers
        levels, reads = model.engine.residency()
        for layer, spec in enumerate(layers):
            assert set(levels[layer, spec.experts :].tolist()) <= {255} and 255 not in levels[layer, : spec.experts]
            assert bool(reads[layer].any()) == (spec.experts > 0)
        assert {spec.experts > 0 for spec in layers} == {False, True}


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_the_names_transformers_saves_by_itself(tmp_path: Path, packs: Callable[[str], Path], name: str) -> None:
    write_folder(tmp_path / "hf", CASES[name], False)
    convert(tmp_path / "hf", tmp_path / "model.emoe", 32)
    both = [Pack.open(packs(name)), Pack.open(tmp_path / "model.emoe")]
    checksums = [[section.checksum for section in pack.index.sections] for pack in both]
    assert checksums[0] == checksums[1]
    assert both[0].unused == both[1].unused == []


def test_vision_and_further_predictions_are_not_used(tmp_path: Path, packs: Callable[[str], Path]) -> None:
    from safetensors.numpy import save_file

    folder = packs("qwen3_5_moe").parent / "hf"
    config = json.loads((folder / "config.json").read_text())
    nested = {"model_type": "qwen3_5_moe", "text_config": config, "vision_config": {"depth": 1}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tensors = {re.sub(r"^model\.", "model.language_model.", name): v for name, v in read_folder(folder).items()}
    others = {
        "model.visual.blocks.0.norm1.weight": np.ones(4, np.float32),
        "mtp.fc.weight": np.ones((2, 2), np.float32),
    }
    save_file({**tensors, **others}, tmp_path / "model.safetensors", {"format": "pt"})
    convert(tmp_path, tmp_path / "model.emoe", 32)
    pack, plain = Pack.open(tmp_path / "model.emoe"), Pack.open(packs("qwen3_5_moe"))
    assert sorted(pack.unused) == sorted(others)
    checksums = {name: pack.index.sections[tensor.section].checksum for name, tensor in pack.index.dense.items()}
    assert checksums == {
        name: plain.index.sections[tensor.section].checksum for name, tensor in plain.index.dense.items()
    }


def test_old_files_of_latent_attention_are_refused(tmp_path: Path, packs: Callable[[str], Path]) -> None:
    name = "deepseek_v3"
    case = dataclasses.replace(CASES[name], convert=lambda tensors, config: tensors)
    path = write_gguf(tmp_path / "old.gguf", packs(name).parent / "hf", case)
    with pytest.raises(UnsupportedModelError, match=r"attn_kv_b\.weight: the file is of an old form"):
        edgemoe.load(path)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_5_moe"])
@pytest.mark.parametrize("form", ["left out", "counted", "counted, without tensors"])
def test_files_with_layers_for_further_predictions(
    tmp_path: Path, packs: Callable[[str], Path], name: str, form: str
) -> None:
    case, folder = CASES[name], packs(name).parent / "hf"
    layers = len(Pack.open(packs(name)).index.spec.layers)

    def convert_all(tensors: dict[str, Any], config: Any) -> dict[str, Any]:
        further = {f"blk.{layers}.{part}.weight": np.ones(64, np.float32) for part in ("attn_norm", "nextn.eh_proj")}
        return {**case.convert(tensors, config), **(further if form == "counted" else {})}

    keys = {**case.metadata, "nextn_predict_layers": 1, "block_count": layers + (form != "left out")}
    path = write_gguf(
        tmp_path / "a.gguf", folder, Case(case.config, case.options, case.architecture, keys, convert_all)
    )
    source = GgufSource.open(path)
    assert len(source.spec.layers) == layers
    assert len(source.unused) == 2 * (form == "counted")


QUANTIZED = {
    "deepseek_v3": {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "q_lora_rank": 64},
    "qwen3_next": {},
    "qwen3_5_moe": {},
    "lfm2_moe": {},
}
KEYS = {
    "attention.key_length": 48,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
    "attention.q_lora_rank": 64,
    "rope.dimension_count": 16,
}


@pytest.mark.parametrize("name", slow_except(["qwen3_next", "lfm2_moe"], "qwen3_next"))
def test_convolutions_are_computed_in_float32(tmp_path: Path, name: str) -> None:
    """So a file with others does not run where it lies; a pack made of it does, also one that keeps its blocks."""
    plain = CASES[name]
    write_folder(tmp_path / "hf", plain)

    def convert_rounded(tensors: dict[str, Any], config: Any) -> dict[str, Any]:
        found = plain.convert(tensors, config)
        return {key: values.astype(np.float16) if "conv" in key else values for key, values in found.items()}

    case, paths = dataclasses.replace(plain, convert=convert_rounded), []
    for kind in ("f16", "f32"):

        def type_of(tensor: str, kind: str = kind) -> str:
            return kind if re.search(r"conv1d|shortconv\.conv\.", tensor) else "f32"

        paths.append(write_gguf(tmp_path / f"{kind}.gguf", tmp_path / "hf", case, type_of))
    with pytest.raises(UnsupportedModelError, match=r"f16\.gguf: tensor blk\.\d\..*conv.*: a convolution of type f16"):
        edgemoe.load(paths[0])
    convert(paths[0], tmp_path / "a.emoe")
    assert Pack.open(tmp_path / "a.emoe").index.dense["layers.0.conv"].layout == "f32"
    with load(tmp_path / "a.emoe") as pack, load(paths[1]) as whole:
        assert pack.logits(TOKENS[:30]).tobytes() == whole.logits(TOKENS[:30]).tobytes()


@pytest.mark.parametrize("name", slow_except(QUANTIZED, "qwen3_next"))
def test_quantized_mixers(tmp_path: Path, name: str) -> None:
    """Blocks of a GGUF file, where they lie and in a pack; and folders at 8 and 4 bits."""
    plain = CASES[name]
    keys = {**plain.metadata, **(KEYS if QUANTIZED[name] else {})}
    case = Case(plain.config, {**plain.options, **QUANTIZED[name]}, plain.architecture, keys, plain.convert)
    write_folder(tmp_path / "hf", case)

    def logits(path: Path) -> np.ndarray:
        with load(path, chunk=40) as model:
            return model.logits(TOKENS[:60])

    def kind(tensor: str) -> str:
        mixing = re.search(
            r"\.(attn_(q|k|v|kv)\w*|attn_gate|attn_output|ssm_out|ssm_[ab]\w+|shortconv\.\w+_proj)\.", tensor
        )
        return "q8_0" if mixing and "norm" not in tensor else "f32"

    convert(tmp_path / "hf", tmp_path / "32.emoe", 32)
    exact = logits(tmp_path / "32.emoe")
    path = write_gguf(tmp_path / "q8.gguf", tmp_path / "hf", case, kind)
    convert(path, tmp_path / "q8.emoe")
    assert "ggml.q8_0" in Pack.open(tmp_path / "q8.emoe").layout_bytes()["dense"]
    found = logits(path)
    assert logits(tmp_path / "q8.emoe").tobytes() == found.tobytes()

    def error(actual: np.ndarray) -> float:
        """Of most positions: at some, a router that is nearly undecided chooses otherwise."""
        return float(np.median(np.abs(actual - exact).mean(1)) / np.ptp(exact))

    assert 0 < error(found) < 0.03
    convert(tmp_path / "hf", tmp_path / "8.emoe", 32, 8)
    assert 0 < error(logits(tmp_path / "8.emoe")) < 0.03
    convert(tmp_path / "hf", tmp_path / "4.emoe", 32, 4)
    assert 0 < error(logits(tmp_path / "4.emoe")) < 0.15
