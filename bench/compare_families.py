"""Does edgemoe compute what llama.cpp computes, for every family that both know?

    python -m bench.compare_families --peer-python PYTHON [--only NAME] [--markdown FILE]

The tiny models of the tests (tests/families), random weights, each as the float32 GGUF file that llama.cpp's conversion
would make of it; the same random tokens go through both, and the measure is the mean Kullback-Leibler divergence after
each token. Keys and values are kept in 32 bits, and llama.cpp's flash attention, which rounds more, is left out: random
routers are often undecided, and where a rounding changes a choice, one token, or all that attend to it, make up the
mean. Beside it stands the divergence from `transformers`, which has the model that the file was made of.

llama.cpp refuses some of the tests' cases and computes others in another way than the models' authors. `ADAPTED` says
which and why, and has each of them once more without that. PYTHON has xllamacpp; this one needs torch, transformers
and gguf. Exit status 1 if llama.cpp is not within the limit in a case that has no such reason.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "families")]

import mixer_table  # noqa: E402
from family_table import CASES as FAMILY_CASES  # noqa: E402
from family_table import VOCABULARY, Case, expected_logits, with_options, write_folder, write_gguf  # noqa: E402
from gguf_writer import byte_level_metadata  # noqa: E402

import edgemoe  # noqa: E402
from bench.compare_llama_cpp import LIMIT, divergence, log_softmax, theirs  # noqa: E402

ROUNDING = 1e-6
"""What the float32 log probabilities that llama.cpp gives out add to a divergence, at most."""

CASES: dict[str, Case] = {
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "head_dim": 24,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "qwen3moe",
        {
            "expert_count": 8,
            "expert_used_count": 3,
            "expert_feed_forward_length": 48,
            "attention.key_length": 24,
            "attention.value_length": 24,
            "rope.freq_base": 1e6,
        },
    ),
    **FAMILY_CASES,
    **mixer_table.CASES,
}


@dataclass(frozen=True)
class Adapted:
    """A case of the tests that llama.cpp refuses or computes in another way than the model's authors.

    reason: what it does. change: how the case is changed so that this makes no difference; options, metadata (None:
    the file does not have the key) and fields: of the case, the changed ones.
    """

    reason: str
    change: str
    options: Mapping[str, Any]
    metadata: Mapping[str, Any]
    fields: Mapping[str, Any]

    def case(self, of: Case) -> Case:
        options, metadata = {**of.options, **self.options}, {**of.metadata, **self.metadata}
        return replace(of, options=options, metadata=metadata, **self.fields)


def adapted(
    reason: str,
    change: str,
    options: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Adapted:
    return Adapted(reason, change, options or {}, metadata or {}, fields)


def whole_pairs(of: str) -> Adapted:
    """gpt-oss with a correction range of YaRN from pair 0 to pair 2."""
    rope = FAMILY_CASES[of].options["rope_parameters"]
    # How often pair 2 of 8 turns within the original context; a little more, so that rounding up gives 2 again.
    slow = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (2 / 8)) * (1 + 1e-5)
    return adapted(
        "rounds the range that YaRN corrects to whole pairs (models have truncate: false)",
        "range of whole pairs",
        {"rope_parameters": {**rope, "beta_fast": 32.0, "beta_slow": slow}},
        {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": slow},
    )


def opposite_pairs(parameters: dict[str, Any]) -> None:
    """Routers whose experts in a group of two have opposite scores: the better one, and the sum of the two after a
    softmax, rank groups alike."""
    for name, values in parameters.items():
        if name.endswith(".mlp.gate.weight"):
            values[1::2] = -values[0::2]


def centred(parameters: dict[str, Any]) -> None:
    """Phi-3.5-MoE where LayerNorms are RMS norms, as the residual stream has a mean of 0, and where the first expert's
    weight is 1 and the second's does not matter: the first is one of two with opposite scores, far ahead, the second is
    an expert of zeros."""
    for name, values in parameters.items():
        if name.endswith(("self_attn.o_proj.weight", "experts.down_proj")):
            values -= values.mean(-2, keepdim=True)
        elif name.endswith(("embed_tokens.weight", "self_attn.o_proj.bias")):
            values -= values.mean(-1, keepdim=True)
        if name.endswith("experts.down_proj"):
            values[2] = 0
        elif name.endswith("mlp.router.weight"):
            values[0] *= 1e5
            values[1] = -values[0]


_PHI = (
    "computes RMS norms instead of LayerNorms, softmax weights instead of SparseMixer's, and takes LongRoPE's factor "
    "from the context lengths"
)
_PHI_CHANGE = "centred stream, sure routers"
_MSCALE = {"expert_count": 3, "rope.scaling.attn_factor": 1.243163121016122}
_NO_SOFTCAP = adapted(
    "caps logits at 30 where a file does not say so (those of released models do)",
    "capped at 30",
    {"final_logit_softcapping": 30.0},
    {"final_logit_softcapping": 30.0},
)


def equal_heads(size: int, heads: int) -> Adapted:
    return adapted(
        "takes values of linear attention to be as large as keys (so in released models)",
        "equally large",
        {"linear_key_head_dim": size, "linear_value_head_dim": size},
        {"ssm.state_size": size, "ssm.inner_size": size * heads},
    )


ADAPTED: dict[str, Adapted] = {
    "qwen2_moe": adapted("needs an output head (so in released models)", "own head", {"tie_word_embeddings": False}),
    "qwen2_moe, renormalized, without biases": adapted(
        "ignores norm_topk_prob (false in released models)",
        "not renormalized",
        {"norm_topk_prob": False},
        {"expert_weights_norm": None},
    ),
    "olmoe": adapted(
        "needs a key for each query (so in released models)",
        "a key for each query",
        {"num_key_value_heads": 4},
        {"attention.head_count_kv": 4},
    ),
    "olmoe, clipped, renormalized, one key for each query": adapted(
        "ignores clip_qkv and norm_topk_prob (not in released models)",
        "neither of them",
        {"clip_qkv": None, "norm_topk_prob": False},
        {"attention.clamp_kqv": None, "expert_weights_norm": None},
    ),
    "mixtral, with a window": adapted(
        "ignores sliding_window (not in released models)",
        "without a window",
        {"sliding_window": None},
        {"attention.sliding_window": None},
    ),
    "gpt_oss": whole_pairs("gpt_oss"),
    "gpt_oss, other layers, low limit": whole_pairs("gpt_oss, other layers, low limit"),
    "ernie4_5_moe, no shared experts, biases, own head": adapted(
        "needs experts in every layer after the first ones, refuses biases (so in released models)",
        "experts in every layer, no biases",
        {"moe_layer_interval": 1, "use_bias": False},
        {"interleave_moe_layer_step": 1},
    ),
    "gemma4, values of their own, half of the pairs turn": _NO_SOFTCAP,
    "gemma4, without experts": _NO_SOFTCAP,
    "phimoe": adapted(_PHI, _PHI_CHANGE, {"num_local_experts": 3}, _MSCALE, adjust=centred),
    "phimoe, within the original context": adapted(
        f"needs a bias of the output head (so in released models), {_PHI}",
        f"{_PHI_CHANGE}, a bias",
        {
            "num_local_experts": 3,
            "lm_head_bias": True,
            # Its contexts are multiples of 256.
            "rope_parameters": {
                **FAMILY_CASES["phimoe"].options["rope_parameters"],
                "original_max_position_embeddings": 256,
            },
        },
        {**_MSCALE, "rope.scaling.original_context_length": 256},
        adjust=centred,
        context=256,
        positions=200,
    ),
    "deepseek_v2, scaled, queries without a latent": adapted(
        "needs q_lora_rank, unless a model has the 27 layers of DeepSeek-V2-Lite",
        "27 layers",
        {"num_hidden_layers": 27, "first_k_dense_replace": 25},
        {"leading_dense_block_count": 25},
    ),
    "deepseek_v2, experts in groups": adapted(
        "ranks groups by the sum of their best two experts, as in DeepSeek-V3",
        "opposite scores in groups",
        adjust=opposite_pairs,
    ),
    "lfm2_moe, four taps, no bias for the choice": adapted(
        "needs a bias for the choice, ignores routed_scaling_factor (1 in released models)",
        "a bias, not scaled",
        {"use_expert_bias": True, "routed_scaling_factor": 1.0},
        {"expert_weights_scale": None},
    ),
    "qwen3_next": equal_heads(32, 6),
    "qwen3_5_moe": equal_heads(32, 6),
    "qwen3_5_moe, tied, more heads": equal_heads(16, 8),
}


def rows() -> Iterator[tuple[str, Case, str]]:
    """(name, case, reason to differ or nothing), in the order of the tables."""
    for name, case in CASES.items():
        if not case.architecture:
            continue
        change = ADAPTED.get(name)
        yield name, case, change.reason if change else ""
        if change:
            yield f"{name}: {change.change}", change.case(case), ""


def short(value: float) -> str:
    return f"{value:.1e}" if value > ROUNDING else f"< {ROUNDING:g}"


def compare(name: str, case: Case, reason: str, options: argparse.Namespace) -> tuple[str, bool]:
    """The line of a table, and whether llama.cpp is within the limit."""
    letter = byte_level_metadata()["tokenizer.ggml.tokens"].index("a")
    tokens = np.random.default_rng(1).integers(2, VOCABULARY, case.positions)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "hf"
        reference = write_folder(folder, case)
        if case.oracle:
            reference = with_options(folder, case.oracle)
        path = write_gguf(Path(work) / "model.gguf", folder, case)
        with edgemoe.load(path, gpu="none", context=case.context, cache_type_k="f32", cache_type_v="f32") as model:
            own = log_softmax(model.logits(tokens.tolist()))
        authors = divergence(log_softmax(expected_logits(reference, tokens)), own).mean()
        try:
            peer = theirs(path, tokens.tolist(), VOCABULARY, options, sampled=letter, context=case.context, exact=True)
        except SystemExit as failure:
            said = re.sub(r"(llama\.cpp failed|error loading model \w+|check_tensor_dims): ", "", str(failure))
            said = " ".join(said.replace("|", "/").split())[:100]
            verdict = f"not loaded ({said}){': llama.cpp ' + reason if reason else ''}"
            return f"| {name} | - | - | - | {short(authors)} | {verdict} |", False
    kl, best = divergence(peer, own), (own.argmax(-1) == peer.argmax(-1)).mean()
    within = bool(kl.mean() <= LIMIT)
    verdict = f"<= {LIMIT:g}" if within else f"> {LIMIT:g}{': llama.cpp ' + reason if reason else ''}"
    figures = [short(kl.mean()), short(float(np.median(kl))), f"{best:.1%}", short(authors)]
    return f"| {name} | {' | '.join(figures)} | {verdict} |", within


HEAD = [
    "| case | mean KL to llama.cpp | median | same best token | mean KL to transformers | verdict |",
    "|---|---|---|---|---|---|",
]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare_families", description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has xllamacpp")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp (default: 1)")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args(argv)
    lines, failed = list(HEAD), False
    print(*lines, sep="\n", flush=True)
    for name, case, reason in rows():
        if options.only not in name:
            continue
        line, within = compare(name, case, reason, options)
        failed |= not within and not reason
        lines.append(line)
        print(line, flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
