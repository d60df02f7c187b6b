"""Write the Hugging Face folder of a checkpoint: weights, configuration, tokenizer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tools.train.data import END_OF_TEXT
from tools.train.model import Config, Model, to_hf_state


def load_checkpoint(path: Path) -> tuple[Model, dict[str, Any]]:
    """The model of a checkpoint, and what else the checkpoint tells (``step``, ``tokens_seen``)."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such checkpoint")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = Model(Config(**state["config"]))
    model.load_state_dict(state["model"])
    return model, {"step": state["step"], "tokens_seen": state["tokens_seen"]}


def export(model: Model, tokenizer: bytes, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json``, ``generation_config.json``, the tokenizer's two files and ``model.safetensors``.

    ``tokenizer``: the content of ``tokenizer.json``; ``dtype``: of the weights.
    """
    out.mkdir(parents=True, exist_ok=True)

    def write(name: str, content: dict[str, Any]) -> None:
        (out / name).write_text(json.dumps(content, indent=1) + "\n")

    write("config.json", model.config.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")})
    write(
        "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.8, "top_p": 0.95},
    )
    write(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
        },
    )
    (out / "tokenizer.json").write_bytes(tokenizer)
    weights = {name: tensor.to(dtype) for name, tensor in to_hf_state(model).items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read it


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.train.export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="OUT/last.pt of tools.train.train")
    parser.add_argument("--data", type=Path, required=True, help="folder with the tokenizer.json it was trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    model, told = load_checkpoint(args.checkpoint)
    export(model, (args.data / "tokenizer.json").read_bytes(), args.out)
    print(f"{args.out}: step {told['step']}, {told['tokens_seen']:,} tokens seen")


if __name__ == "__main__":
    main()
