"""Makes tiny Hugging Face folders by hand: numpy only, every byte of a safetensors file is written here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgemoe.serving.generation import Generation, GenerationResult


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """The values as parameters of a test, all slow but those named, or the first if there is none."""
    import pytest

    values = list(values)
    fast = fast or (values[0],)
    return [pytest.param(value, marks=[] if value in fast else [pytest.mark.slow]) for value in values]


WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. 0123456789 naïve café\n"

TINY_QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": 0,
    "decoder_sparse_step": 1,
    "eos_token_id": 0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 72,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "mlp_only_layers": [],
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 320,
}


def finished(generation: Generation) -> GenerationResult:
    """The result of a generation that is read to its end."""
    for _ in generation:
        pass
    return generation.result


def to_dtype(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """float32 as it lies in a file: bfloat16 (cut off, not rounded) as uint16."""
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype])


def from_dtype(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """What `to_dtype` kept."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def safetensors_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A file with this header, given as JSON or as its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]], dtypes: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in sorted(tensors):
        raw = to_dtype(tensors[name], dtypes[name]).tobytes()
        header[name] = {
            "dtype": dtypes[name],
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    path.write_bytes(safetensors_bytes(header, data))


def tiny_weights(config: Mapping[str, Any], seed: int = 0, stacked: bool = False) -> dict[str, npt.NDArray[np.float32]]:
    """Random weights under transformers' names; stacked: the experts as transformers 5 has them in memory."""
    rng = np.random.default_rng(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    head, heads, kv = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    tensors: dict[str, npt.NDArray[np.float32]] = {}

    def matrix(name: str, *shape: int) -> None:
        tensors[name] = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def norm(name: str, size: int) -> None:
        tensors[name] = (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    matrix("model.embed_tokens.weight", vocab, hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", vocab, hidden)
    norm("model.norm.weight", hidden)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        norm(p + "input_layernorm.weight", hidden)
        norm(p + "post_attention_layernorm.weight", hidden)
        norm(p + "self_attn.q_norm.weight", head)
        norm(p + "self_attn.k_norm.weight", head)
        matrix(p + "self_attn.q_proj.weight", heads * head, hidden)
        matrix(p + "self_attn.k_proj.weight", kv * head, hidden)
        matrix(p + "self_attn.v_proj.weight", kv * head, hidden)
        matrix(p + "self_attn.o_proj.weight", hidden, heads * head)
        if layer in config["mlp_only_layers"] or (layer + 1) % config["decoder_sparse_step"]:
            size = config["intermediate_size"]
            matrix(p + "mlp.gate_proj.weight", size, hidden)
            matrix(p + "mlp.up_proj.weight", size, hidden)
            matrix(p + "mlp.down_proj.weight", hidden, size)
            continue
        matrix(p + "mlp.gate.weight", config["num_experts"], hidden)
        size = config["moe_intermediate_size"]
        gate_up, down = [], []
        for expert in range(config["num_experts"]):
            e = f"{p}mlp.experts.{expert}."
            matrix(e + "gate_proj.weight", size, hidden)
            matrix(e + "up_proj.weight", size, hidden)
            matrix(e + "down_proj.weight", hidden, size)
            if stacked:
                gate_up.append(np.concatenate([tensors.pop(e + "gate_proj.weight"), tensors.pop(e + "up_proj.weight")]))
                down.append(tensors.pop(e + "down_proj.weight"))
        if stacked:
            tensors[p + "mlp.experts.gate_up_proj"] = np.stack(gate_up)
            tensors[p + "mlp.experts.down_proj"] = np.stack(down)
    return tensors


def write_tiny_qwen3_moe(
    folder: Path,
    *,
    dtype: str = "BF16",
    shards: int = 1,
    seed: int = 0,
    stacked: bool = False,
    tokenizer: bytes | None = None,
    chat_template: str | None = None,
    generation: Mapping[str, Any] | None = None,
    extra: Mapping[str, npt.NDArray[np.float32]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    **config: Any,
) -> Path:
    """A folder that transformers loads too. extra: tensors more; dtypes: of single tensors; config: changed options."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**TINY_QWEN3_MOE, **config}
    (folder / "config.json").write_text(json.dumps(values))
    defaults = {"bos_token_id": 0, "eos_token_id": [0], "do_sample": True, "temperature": 0.7, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(defaults if generation is None else generation))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer)
        special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(special))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    tensors = {**tiny_weights(values, seed, stacked), **(extra or {})}
    types = {name: (dtypes or {}).get(name, dtype) for name in tensors}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, types)
        return folder
    weight_map = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        write_safetensors(folder / file, part, types)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def byte_level_tokenizer(vocab_size: int = 320) -> bytes:
    """tokenizer.json of a byte-level BPE; id 0 is <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer.to_str().encode()
