"""Write the Hugging Face folder of a pack of this recipe's models: what its weights stand for, in float32.

It takes the place of weights that are lost: ``tools.train.train --start`` goes on from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgemoe.formats.index import PARTS, DenseTensor
from edgemoe.formats.layouts import NESTED, packed_size, unpack, unpack_level
from edgemoe.formats.pack import Pack
from edgemoe.quantize.nested import Nested
from edgemoe.spec import ModelSpec
from tools.train.export import export
from tools.train.model import Config, Model

Floats = NDArray[np.float32]

# Of a layer: our name, the pack's.
_DENSE = {
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate.weight": "router",
}


def config_of(spec: ModelSpec) -> Config:
    """The sizes of a pack's model. Raises SystemExit if it is no model of this recipe."""
    first = spec.layers[0]
    attention, router = first.attention, first.router
    if spec.family != "qwen3_moe" or not spec.tied_embeddings or router is None or attention.rope is None:
        raise SystemExit(f"a model of this recipe is a qwen3_moe with tied embeddings, not a {spec.family}")
    # The second frequency is theta ^ (-2 / head_dim).
    theta = attention.rope.inverse_frequencies[1] ** (-attention.head_dim / 2)
    return Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_hidden_layers=len(spec.layers),
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        num_experts=first.experts,
        num_experts_per_tok=first.top_k,
        moe_intermediate_size=first.ffn_dim,
        max_position_embeddings=spec.context,
        rope_theta=round(theta, 3),
        rms_norm_eps=spec.norm_epsilon,
    )


def _dense(pack: Pack, tensor: DenseTensor) -> Floats:
    data = np.frombuffer(pack.read_section(tensor.section), np.uint8)[tensor.offset :]
    rows, columns = (*tensor.shape, 1)[:2]
    return unpack(tensor.layout, data[: packed_size(tensor.layout, rows, columns)], rows, columns).reshape(tensor.shape)


def _expert(pack: Pack, layer: int, expert: int, name: str) -> Floats:
    """``gate``, ``up`` or ``down`` of an expert at the largest width it is stored at, float32 [rows, columns]."""
    numbers = pack.index.experts[layer].sections[expert]
    places = [level.parts[name] for level in pack.index.experts[layer].levels[: len(numbers)]]
    rows, columns = places[0].shape
    stored = [
        np.frombuffer(pack.read_section(number), np.uint8)[place.offset :][: packed_size(place.layout, rows, columns)]
        for number, place in zip(numbers, places, strict=True)
    ]
    if places[0].layout not in NESTED:
        return unpack(places[0].layout, stored[0], rows, columns)
    bits = [level.bits for level in pack.index.experts[layer].levels[: len(numbers)]]
    levels = [unpack_level(place.layout, data, rows, columns) for place, data in zip(places, stored, strict=True)]
    return Nested.of_levels(bits, levels).weights(len(numbers) - 1, columns)


def read_model(pack: Pack) -> Model:
    """The model of a pack, in float32: dense part and experts as the largest stored width has them."""
    config = config_of(pack.index.spec)
    model = Model(config)
    state = model.state_dict()

    def put(name: str, values: Floats) -> None:
        state[name].copy_(torch.from_numpy(values))

    put("embed_tokens.weight", _dense(pack, pack.index.dense["embedding"]))
    put("norm.weight", _dense(pack, pack.index.dense["final_norm"]))
    for layer in range(config.num_hidden_layers):
        for name, stored in _DENSE.items():
            put(f"layers.{layer}.{name}", _dense(pack, pack.index.dense[f"layers.{layer}.{stored}"]))
        experts = [[_expert(pack, layer, expert, name) for name in PARTS] for expert in range(config.num_experts)]
        put(f"layers.{layer}.mlp.gate_up", np.stack([np.concatenate([gate, up]) for gate, up, _ in experts]))
        put(f"layers.{layer}.mlp.down", np.stack([down for _, _, down in experts]))
    return model


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.train.unpack", description=__doc__)
    parser.add_argument("--pack", type=Path, required=True, help="an .emoe of a model of this recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    pack = Pack.open(args.pack)
    export(read_model(pack), pack.read_blob("tokenizer.json"), args.out, torch.float32)


if __name__ == "__main__":
    main()
