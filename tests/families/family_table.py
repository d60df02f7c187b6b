"""Tiny models of every family with random weights, as Hugging Face folders and as the GGUF files that llama.cpp's
conversion would make of them.

Names in GGUF files come from the `gguf` package's own table, not from the code under test.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf_writer import BLOCKS, Tensor, byte_level_metadata, write

from edgemoe.convert import convert

Array = npt.NDArray[np.float32]
Arrays = dict[str, Array]

VOCABULARY = len(byte_level_metadata()["tokenizer.ggml.tokens"])
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """One configuration of a family.

    config: the name of transformers' class; options: of it. architecture: of GGUF files; metadata: their keys after the
    architecture. convert: what llama.cpp's converter does to tensors before they are named. oracle: the options that
    transformers must have to compute what the model is meant to compute, where it does not. adjust: changes parameters
    (name -> tensor) after their random values.
    """

    config: str
    options: Mapping[str, Any]
    architecture: str
    metadata: Mapping[str, Any]
    convert: Callable[[Arrays, Any], Arrays] = lambda tensors, config: tensors
    oracle: Mapping[str, Any] = field(default_factory=dict)
    adjust: Callable[[dict[str, Any]], None] = lambda parameters: None
    positions: int = 96
    context: int = 512


def stack_experts(tensors: Arrays) -> Arrays:
    """Experts that lie one by one become one tensor for each part of a layer."""
    result: Arrays = {}
    experts: dict[str, dict[int, Array]] = {}
    for name, values in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+\.weight)", name)
        if found:
            experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = values
        else:
            result[name] = values
    return result | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()}


def neighbours(tensors: Arrays, config: Any) -> Arrays:
    """Rows of queries and keys so that the two of a rotary pair are neighbours (llama.cpp's order for Llama)."""

    def permute(values: Array, heads: int) -> Array:
        split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)

    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return {
        name: permute(values, counts[name.split(".")[-2]]) if re.search(r"\.[qk]_proj\.", name) else values
        for name, values in tensors.items()
    }


def further_layer(tensors: Arrays, config: Any) -> Arrays:
    """A layer more, which predicts a token more: as the last one, with norms and a projection of its own."""
    last, count, hidden = config.num_hidden_layers - 1, config.num_hidden_layers, config.hidden_size
    copies = {
        name.replace(f"model.layers.{last}.", f"model.layers.{count}."): values
        for name, values in tensors.items()
        if name.startswith(f"model.layers.{last}.")
    }
    norms = {f"blk.{count}.nextn.{part}.weight": np.ones(hidden, np.float32) for part in ("enorm", "hnorm")}
    projection = {f"blk.{count}.nextn.eh_proj.weight": np.zeros((hidden, 2 * hidden), np.float32)}
    return {**tensors, **copies, **norms, **projection}


def split_gates(tensors: Arrays, config: Any) -> Arrays:
    """gpt-oss: the alternating columns of gate and up apart, matrices as [experts, output, input]."""
    result = {}
    for name, values in tensors.items():
        name = name.replace("self_attn.sinks", "self_attn.sinks.weight")
        bias = name.endswith("_bias")
        name = name.removesuffix("_bias") + (".bias" if bias else ".weight") if ".experts." in name else name
        if ".experts." in name and not bias:
            values = values.swapaxes(1, 2)
        if "gate_up_proj" in name:
            result[name.replace("gate_up_proj", "gate_proj")] = np.ascontiguousarray(values[:, 0::2])
            result[name.replace("gate_up_proj", "up_proj")] = np.ascontiguousarray(values[:, 1::2])
        else:
            result[name] = np.ascontiguousarray(values)
    return result


def gemma_names(tensors: Arrays, config: Any) -> Arrays:
    """Gemma 4: tensors that are no weights of matrices, and the frequencies' factors."""
    result = {}
    for name, values in tensors.items():
        name = re.sub(r"model\.layers\.(\d+)\.router\.scale", r"blk.\1.ffn_gate_inp.scale", name)
        name = re.sub(r"model\.layers\.(\d+)\.router\.per_expert_scale", r"blk.\1.ffn_down_exps.scale", name)
        result[name + ".weight" if name.endswith(("layer_scalar", "gate_up_proj", "down_proj")) else name] = values
    number = config.layer_types.index("full_attention")
    pairs = config.per_layer_config[number].head_dim // 2
    turning = int(config.rope_parameters["full_attention"]["partial_rotary_factor"] * 2 * pairs // 2)
    result["rope_freqs.weight"] = np.array([1.0] * turning + [1e30] * (pairs - turning), np.float32)
    return result


def long_rope(tensors: Arrays, config: Any) -> Arrays:
    """Phi: LongRoPE's divisors are tensors."""
    scaling = config.rope_parameters
    return tensors | {
        f"rope_factors_{kind}.weight": np.array(scaling[f"{kind}_factor"], np.float32) for kind in ("short", "long")
    }


def split_stacked(tensors: Arrays, config: Any) -> Arrays:
    """Granite: gates and ups apart, rows of queries and keys in Llama's order."""
    result = {}
    for name, values in neighbours(tensors, config).items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.input_linear\.weight", name)
        if found:
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                result[f"blk.{found[1]}.ffn_{part}_exps.weight"] = half
        else:
            result[name] = values
    return result


def write_folder(folder: Path, case: Case, original: bool = True) -> Any:
    """Random weights that are large enough for the routers to have opinions; returns transformers' model of them.
    original: under the names of released models, otherwise under transformers' own."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, case.config)(**{**SIZES, **case.options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32).eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or "embed_scale" in name:
                continue
            noise = torch.randn(values.shape)
            if ("norm" in name and not name.endswith("bias")) or "scal" in name:
                values.copy_(1 + 0.3 * noise)
            elif values.dim() == 1 or name.endswith("_bias"):
                values.copy_(0.5 * noise)
            else:
                fan = values.shape[-2] if config.model_type == "gpt_oss" and values.dim() == 3 else values.shape[-1]
                values.copy_(noise * 2.0 * fan**-0.5)
        case.adjust(dict(model.named_parameters()))
    model.save_pretrained(folder, save_original_format=original)
    vocabulary = {f"<{i}>": i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<1>"}))
    return model


def pack_maker(cases: Mapping[str, Case], bits: int, folders: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the pack of a case by its name, made when it is asked for first; its folder lies beside it as "hf"."""

    @functools.cache
    def pack(name: str) -> Path:
        folder = folders.mktemp("pack")
        write_folder(folder / "hf", cases[name])
        convert(folder / "hf", folder / "model.emoe", bits)
        return folder / "model.emoe"

    return pack


def read_folder(folder: Path) -> Arrays:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def expected_logits(model: Any, tokens: npt.NDArray[np.int32]) -> Array:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor(tokens[None].astype(np.int64)), use_cache=False).logits[0].numpy()
    return np.asarray(logits)


def with_options(folder: Path, options: Mapping[str, Any]) -> Any:
    """Transformers' model of a folder, with other options than its configuration has."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in options.items():
        setattr(config, name, value)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )


def write_gguf(path: Path, folder: Path, case: Case, kind: Callable[[str], str] = lambda name: "f32") -> Path:
    """The folder's weights as llama.cpp names and orders them. kind: the type of a tensor by its name."""
    import gguf
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[case.architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers + 1)
    tensors = {}
    for name, values in case.convert(stack_experts(read_folder(folder)), config).items():
        name = name.replace("_correction_bias", "_correction.bias")
        known = name if name.startswith(("blk.", "rope_")) else names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, f"{case.architecture} has no name for {name}"
        values = values.astype(np.float32)
        if values.shape[0] == 1 and values.ndim == 2:
            values = values[0]
        chosen = kind(known)
        data = values.tobytes()
        if chosen != "f32":
            data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[chosen.upper()]).tobytes()
        tensors[known] = Tensor(values.shape, BLOCKS[chosen][0], data)
    metadata = byte_level_metadata()
    metadata["general.architecture"] = case.architecture
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": SIZES["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None) or config.norm_eps,
        **case.metadata,
    }
    metadata |= {f"{case.architecture}.{key}": value for key, value in keys.items() if value is not None}
    return write(path, metadata, tensors)


_QWEN2 = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}
_QWEN2_KEYS = {
    "expert_count": 6,
    "expert_used_count": 2,
    "expert_feed_forward_length": 48,
    "expert_shared_feed_forward_length": 80,
    "rope.freq_base": 10000.0,
}

_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 150000.0}
_GPT_OSS = {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64}
_GPT_OSS_KEYS = {
    "expert_count": 6,
    "expert_used_count": 2,
    "expert_feed_forward_length": 64,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "rope.freq_base": 150000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 64,
}
_GLM = {"moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 3}
_GLM_KEYS = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 48,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
    "expert_gating_func": 2,
    "leading_dense_block_count": 1,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 8,
    "nextn_predict_layers": 0,
}
_ERNIE_KEYS = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 48,
    "expert_shared_count": 2,
    "expert_shared_feed_forward_length": 96,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 1,
    "rope.freq_base": 500000.0,
}
_MINIMAX = {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 24, "intermediate_size": 48}
_MINIMAX_KEYS = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 48,
    "expert_gating_func": 2,
    "attention.key_length": 24,
    "attention.value_length": 24,
    "rope.freq_base": 5e6,
}

_GEMMA = {
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
    "enable_moe_block": True,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "pad_token_id": 0,
}
_GEMMA_KEYS = {
    "expert_count": 6,
    "expert_used_count": 2,
    "expert_feed_forward_length": 48,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
}
_PHI = {"num_local_experts": 6}
_PHI_KEYS = {"expert_count": 6, "expert_used_count": 2, "rope.freq_base": 1e6, "rope.dimension_count": 16}
_LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e6,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    # As all released models have them.
    "short_mscale": 1.243163121016122,
    "long_mscale": 1.243163121016122,
    "original_max_position_embeddings": 64,
}
# The converter writes no type. Its factor is the one of LongRoPE, sqrt(1 + ln 8 / ln 64), not the model's.
_LONG_ROPE_KEYS = {
    "rope.scaling.original_context_length": 64,
    "rope.scaling.attn_factor": 1.2247449,
    "attention.sliding_window": 0,
}

CASES: dict[str, Case] = {
    "qwen2_moe": Case(
        "Qwen2MoeConfig",
        {**_QWEN2, "num_experts": 6, "num_experts_per_tok": 2, "tie_word_embeddings": True},
        "qwen2moe",
        _QWEN2_KEYS,
    ),
    "qwen2_moe, renormalized, without biases": Case(
        "Qwen2MoeConfig",
        {**_QWEN2, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True, "qkv_bias": False},
        "qwen2moe",
        {**_QWEN2_KEYS, "expert_weights_norm": True},
    ),
    "qwen2_moe, YaRN": Case(
        "Qwen2MoeConfig",
        {**_QWEN2, "num_experts": 6, "num_experts_per_tok": 2, "rope_parameters": {**_YARN, "rope_theta": 1e4}},
        "qwen2moe",
        {
            **_QWEN2_KEYS,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 8.0,
            "rope.scaling.original_context_length": 64,
        },
        positions=150,
    ),
    "olmoe": Case(
        "OlmoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3},
        "olmoe",
        {"expert_count": 8, "expert_used_count": 3, "rope.freq_base": 10000.0},
    ),
    "olmoe, clipped, renormalized, one key for each query": Case(
        "OlmoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "clip_qkv": 0.8,
            "norm_topk_prob": True,
            "num_key_value_heads": 4,
            "hidden_size": 80,
        },
        "olmoe",
        {
            "attention.head_count_kv": 4,
            "expert_count": 8,
            "expert_used_count": 3,
            "expert_weights_norm": True,
            "attention.clamp_kqv": 0.8,
            "rope.freq_base": 10000.0,
        },
    ),
    "mixtral": Case(
        "MixtralConfig",
        {"num_local_experts": 4},
        "llama",
        {"expert_count": 4, "expert_used_count": 2, "rope.dimension_count": 16, "rope.freq_base": 1e6},
        neighbours,
    ),
    "mixtral, with a window": Case(
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 70, "head_dim": 32},
        "llama",
        {
            "expert_count": 4,
            "expert_used_count": 3,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "rope.dimension_count": 32,
            "rope.freq_base": 1e6,
            "attention.sliding_window": 70,
        },
        neighbours,
        positions=200,
    ),
    "gpt_oss": Case(
        "GptOssConfig",
        {**_GPT_OSS, "sliding_window": 70, "rope_parameters": {**_YARN, "truncate": False, "beta_fast": 4.0}},
        "gpt-oss",
        {**_GPT_OSS_KEYS, "attention.sliding_window": 70, "rope.scaling.yarn_beta_fast": 4.0},
        split_gates,
        positions=200,
    ),
    "gpt_oss, other layers, low limit": Case(
        "GptOssConfig",
        {
            **_GPT_OSS,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_experts_per_tok": 3,
            "swiglu_limit": 7.0,
            "rope_parameters": {**_YARN, "truncate": False},
        },
        "gpt-oss",
        {**_GPT_OSS_KEYS, "attention.sliding_window": 9, "expert_used_count": 3},
        split_gates,
    ),
    "glm4_moe": Case(
        "Glm4MoeConfig",
        {
            **_GLM,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.8,
        },
        "glm4moe",
        {
            **_GLM_KEYS,
            "expert_shared_count": 2,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_weights_scale": 1.8,
        },
    ),
    "glm4_moe, plain": Case(
        "Glm4MoeConfig",
        {**_GLM, "norm_topk_prob": False, "first_k_dense_replace": 2},
        "glm4moe",
        {
            **_GLM_KEYS,
            "expert_weights_norm": False,
            "leading_dense_block_count": 2,
            "block_count": 4,
            "nextn_predict_layers": 1,
        },
        further_layer,
    ),
    "ernie4_5_moe": Case(
        "Ernie4_5_MoeConfig",
        {"moe_intermediate_size": 48, "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2},
        "ernie4_5-moe",
        _ERNIE_KEYS,
    ),
    "ernie4_5_moe, no shared experts, biases, own head": Case(
        "Ernie4_5_MoeConfig",
        {
            "moe_intermediate_size": 48,
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_num_shared_experts": 0,
            "use_bias": True,
            "tie_word_embeddings": False,
            "moe_layer_interval": 2,
        },
        "ernie4_5-moe",
        {
            **_ERNIE_KEYS,
            "expert_shared_count": 0,
            "expert_shared_feed_forward_length": None,
            "interleave_moe_layer_step": 2,
        },
    ),
    "minimax_m2": Case(
        "MiniMaxM2Config",
        {**_MINIMAX, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}},
        "minimax-m2",
        {**_MINIMAX_KEYS, "rope.dimension_count": 12},
    ),
    "minimax_m2, whole heads turn": Case(
        "MiniMaxM2Config",
        {**_MINIMAX, "num_experts_per_tok": 4},
        "minimax-m2",
        {**_MINIMAX_KEYS, "expert_used_count": 4, "rope.dimension_count": 24},
    ),
    "gemma4": Case(
        "Gemma4TextConfig",
        {
            **_GEMMA,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 5.0,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_hidden_layers": 4,
        },
        "gemma4",
        {
            **_GEMMA_KEYS,
            "attention.head_count_kv": [2, 1, 2, 1],
            "attention.sliding_window": 40,
            "attention.sliding_window_pattern": [True, False, True, False],
            "final_logit_softcapping": 5.0,
        },
        gemma_names,
        positions=170,
    ),
    "gemma4, values of their own, half of the pairs turn": Case(
        "Gemma4TextConfig",
        {
            **_GEMMA,
            "sliding_window": 12,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "rope_theta": 3e5, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
        "gemma4",
        {
            **_GEMMA_KEYS,
            "attention.sliding_window": 12,
            "attention.sliding_window_pattern": [True, True, False],
            "rope.freq_base": 3e5,
            "rope.freq_base_swa": 5e3,
        },
        gemma_names,
    ),
    "gemma4, without experts": Case(
        "Gemma4TextConfig",
        {**_GEMMA, "enable_moe_block": False, "num_hidden_layers": 2},
        "gemma4",
        {
            **{key: value for key, value in _GEMMA_KEYS.items() if not key.startswith("expert")},
            "attention.sliding_window": 512,
            "attention.sliding_window_pattern": [True, False],
        },
        gemma_names,
    ),
    "phimoe": Case(
        "PhimoeConfig",
        {**_PHI, "attention_bias": True, "lm_head_bias": True, "rope_parameters": _LONG_ROPE},
        "phimoe",
        {**_PHI_KEYS, **_LONG_ROPE_KEYS},
        long_rope,
        # transformers 5 never takes the long factors; the model's authors take them for long sequences.
        oracle={"rope_parameters": {**_LONG_ROPE, "short_factor": _LONG_ROPE["long_factor"]}},
        positions=200,
    ),
    "phimoe, within the original context": Case(
        "PhimoeConfig",
        {**_PHI, "attention_bias": True, "rope_parameters": _LONG_ROPE},
        "phimoe",
        {**_PHI_KEYS, **_LONG_ROPE_KEYS},
        long_rope,
        positions=62,
        context=64,
    ),
    "phimoe, plain": Case("PhimoeConfig", {**_PHI, "router_jitter_noise": 0.3, "sliding_window": 30}, "", {}),
    "granitemoe": Case(
        "GraniteMoeConfig",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
        "granitemoe",
        {
            "expert_count": 6,
            "expert_used_count": 3,
            "rope.freq_base": 10000.0,
            "rope.dimension_count": 16,
            "embedding_scale": 3.0,
            "residual_scale": 0.4,
            "attention.scale": 0.1,
            "logit_scale": 2.5,
        },
        split_stacked,
    ),
    "granitemoe, plain": Case(
        "GraniteMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.25},
        "granitemoe",
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "rope.freq_base": 10000.0,
            "rope.dimension_count": 16,
            "embedding_scale": 1.0,
            "residual_scale": 1.0,
            "attention.scale": 0.25,
            "logit_scale": 1.0,
        },
        split_stacked,
    ),
}
