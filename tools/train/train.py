"""The training loop: deterministic order of the text, checkpoints, resume, a log of losses and routing."""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tools.train.data import DOMAINS
from tools.train.model import Config, Model, from_hf
from tools.train.optim import make_optimizers
from tools.train.routing import shares, srp

# Sizes of the recipe: the model, and sequences a step (of --context tokens).
PRESETS: dict[str, tuple[dict[str, Any], int]] = {
    "smoke": ({"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}, 8),
    "small": ({"num_hidden_layers": 4}, 16),
    "large": ({"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4}, 128),
}
DOMAIN_WEIGHTS = {"novel": 0.60, "code": 0.15, "docs": 0.25}


class Batches:
    """Sequences of ``context + 1`` tokens, each of one domain, in an order that depends on the seed alone.

    A domain's tokens are cut at multiples of ``context`` from an offset that changes from pass to pass; within a pass
    every cut is used once. Any position of the order can be reached directly, so that a resumed run goes on as if it
    had not stopped.
    """

    def __init__(self, folder: Path, context: int, weights: dict[str, float], seed: int = 0) -> None:
        self.context, self.seed = context, seed
        self.tokens: dict[str, NDArray[np.uint16]] = {}
        for domain in DOMAINS:
            path = folder / f"{domain}.bin"
            if path.is_file() and weights.get(domain, 0) > 0:
                self.tokens[domain] = np.memmap(path, dtype=np.uint16, mode="r")
        if not self.tokens:
            raise SystemExit(f"{folder}: no token files (run: python -m tools.train.data prepare --out {folder})")
        self.names = list(self.tokens)
        share = np.array([weights[name] for name in self.names])
        self.share = share / share.sum()
        self._domains = np.zeros(0, dtype=np.int64)
        self._orders: dict[tuple[str, int], NDArray[np.int64]] = {}

    def _domain_of(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if first + count > len(self._domains):
            # Always drawn from the beginning and in whole blocks, so that the order does not depend on how it is read.
            length = 1 << max(16, (first + count - 1).bit_length())
            draws = np.random.default_rng(self.seed).random(length)
            self._domains = np.searchsorted(np.cumsum(self.share)[:-1], draws, side="right")
        own = self._domains[first : first + count]
        before = np.bincount(self._domains[:first], minlength=len(self.names))
        return own, before

    def batch(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequences ``first .. first + count`` of the order: tokens ``[count, context + 1]``, domains ``[count]``."""
        domains, before = self._domain_of(first, count)
        rows = np.empty((count, self.context + 1), dtype=np.int64)
        for i, domain in enumerate(domains):
            name, tokens = self.names[domain], self.tokens[self.names[domain]]
            pieces = (len(tokens) - 1) // self.context - 1
            if pieces < 1:
                raise SystemExit(f"{name}: too few tokens for a context of {self.context}")
            number, piece = divmod(int(before[domain]), pieces)
            before[domain] += 1
            rng = np.random.default_rng([self.seed, int(domain), number])
            offset = int(rng.integers(self.context))
            if (name, number) not in self._orders:
                self._orders[name, number] = rng.permutation(pieces)
            start = offset + self.context * int(self._orders[name, number][piece])
            rows[i] = tokens[start : start + self.context + 1]
        return rows, domains


def held_out(folder: Path, limit: int) -> dict[str, tuple[NDArray[np.int64], int]]:
    """The first ``limit`` tokens of every held-out text, and how many bytes of text they are."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = {}
    for path in sorted((folder / "heldout").glob("*.txt")):
        ids = tokenizer.encode(path.read_text("utf-8")[: 8 * limit]).ids[:limit]
        if len(ids) > 1:
            texts[path.stem] = (np.array([0, *ids], dtype=np.int64), len(tokenizer.decode(ids).encode()))
    return texts


@dataclass
class Part:
    """What some of the sequences of a step gave."""

    gradients: tuple[Tensor, ...]  # in the order of the model's parameters
    cross: float  # their part of the step's cross-entropy, nats
    extra: float
    losses: list[float]  # of each sequence
    load: Tensor  # [layers, E], picks of each expert


def part_of_step(model: Model, rows: NDArray[np.int64], sequences: int, device: str, half: bool) -> Part:
    """Loss and gradients of ``rows [n, context + 1]``, which are ``n`` of a step's ``sequences``."""
    tokens = torch.from_numpy(rows).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=half):
        cross, extra, routing = model.loss(tokens[:, :-1], tokens[:, 1:])
    share = len(rows) / sequences
    # Not backward(): workers would then add to the same gradients at the same time.
    gradients = torch.autograd.grad((cross + extra) * share, list(model.parameters()))
    assert routing.losses is not None
    load = torch.stack([torch.bincount(p.flatten(), minlength=model.config.num_experts) for p in routing.picks])
    losses: list[float] = routing.losses.mean(1).tolist()
    return Part(gradients, float(cross.detach()) * share, float(extra.detach()) * share, losses, load)


def add_gradients(parameter: nn.Parameter, *gradients: Tensor) -> None:
    """Make the sum of ``gradients`` the gradient of ``parameter``."""
    for gradient in gradients[1:]:
        gradients[0].add_(gradient)
    parameter.grad = gradients[0]


@torch.no_grad()
def measure(model: Model, texts: dict[str, tuple[NDArray[np.int64], int]], context: int, device: str) -> dict[str, Any]:
    """Bits per byte, perplexity per token, and SRP(16) of every layer, for each held-out text."""
    results = {}
    experts = model.config.num_experts
    for name, (tokens, size) in texts.items():
        nats, picks = 0.0, []
        for first in range(0, len(tokens) - 1, context):
            window = torch.from_numpy(tokens[first : first + context + 1]).to(device)
            loss, _, routing = model.loss(window[None, :-1], window[None, 1:])
            nats += float(loss) * (len(window) - 1)
            picks.append(torch.stack(routing.picks).cpu())
        every = torch.cat(picks, 1).numpy()
        results[name] = {
            "bits_per_byte": round(nats / math.log(2) / size, 4),
            "perplexity": round(math.exp(nats / (len(tokens) - 1)), 2),
            "srp16": [round(srp(layer, experts, 16)[0], 3) for layer in every],
            "unused": [int((shares(layer, experts) == 0).sum()) for layer in every],
        }
    return results


def rate(step: int, steps: int, warmup: int, decay: int) -> float:
    """The learning rate of a step as a share of its base: a warm-up, a level, a straight line to nearly 0."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))


def has_bf16(device: str) -> bool:
    """Whether products of bfloat16 are quicker than those of float32 here: on a GPU, and with AVX-512 BF16."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(supported())


def train(args: argparse.Namespace) -> Path:
    """Train as the command line says and return the path of the last checkpoint."""
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    half = args.precision == "bf16" or (args.precision == "auto" and has_bf16(device))
    workers = 1 if device == "cuda" else args.workers or torch.get_num_threads()
    # Workers that share out a step's sequences, and not the threads of each product: nothing waits for a slow thread
    # (a core that other programs use too) before the end of the step.
    pool = ThreadPoolExecutor(workers)
    torch.set_num_threads(1)
    sizes, sequences = PRESETS[args.preset]
    meta = json.loads((args.data / "data.json").read_text()) if (args.data / "data.json").is_file() else {}
    start = from_hf(args.start) if args.start else None
    config = start.config if start else Config(**{"vocab_size": meta.get("vocab_size", 8192), **sizes})
    if meta.get("vocab_size", config.vocab_size) != config.vocab_size:
        raise SystemExit(
            f"{args.data} has a vocabulary of {meta['vocab_size']}, {args.start} one of {config.vocab_size}"
        )
    if args.balance is not None:
        config.router_aux_loss_coef = args.balance
    sequences = args.sequences or sequences
    batches = Batches(args.data, args.context, args.weights, args.seed)
    texts = held_out(args.data, args.held_out_tokens)
    model = (start or Model(config, args.seed)).to(device)
    optimizers = make_optimizers(model, args.muon_lr, args.adam_lr, args.weight_decay, pool, half)
    args.out.mkdir(parents=True, exist_ok=True)
    last: Path = args.out / "last.pt"
    done, consumed = 0, 0
    if args.resume and last.is_file():
        state = torch.load(last, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            rates = [group["base_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            # The rates are the command line's, not the checkpoint's.
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["base_lr"] = base
        done, consumed = int(state["step"]), int(state["sequences_seen"])
        if args.balance is None:
            config.router_aux_loss_coef = state["config"]["router_aux_loss_coef"]

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "config": asdict(config),
            "sequences_seen": consumed,
            "tokens_seen": consumed * args.context,
        }
        # Written beside and renamed, so that a run that is stopped here leaves the one before.
        torch.save(state, last.with_suffix(".new"))
        last.with_suffix(".new").replace(last)

    log = (args.out / "log.jsonl").open("a", buffering=1)

    def note(record: dict[str, Any]) -> None:
        log.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    total = sum(p.numel() for p in model.parameters())
    expert = sum(m.gate_up.numel() + m.down.numel() for m in model.mixtures())
    active = total - expert + expert * config.num_experts_per_tok // config.num_experts
    sizes_of = {"parameters": total, "active": active}
    note(sizes_of | {"device": device, "bf16": half, "resumed_at": done, "steps": args.steps})

    micro = min(sequences, args.micro or (64 if device == "cuda" else 4))
    began, seconds, clock = time.monotonic(), 0.0, time.monotonic()
    step = done
    for step in range(done, args.steps):
        factor = rate(step, args.steps, args.warmup, args.decay)
        if args.decay_minutes:
            factor = min(factor, max(0.0, args.minutes - (clock - began) / 60) / args.decay_minutes)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        rows, domains = batches.batch(consumed, sequences)
        consumed += sequences
        cross_sum, extra_sum, loads = 0.0, 0.0, []
        per_domain: dict[str, list[float]] = {}
        cuts = [slice(first, first + micro) for first in range(0, sequences, micro)]
        parts = list(pool.map(lambda own, rows=rows: part_of_step(model, rows[own], len(rows), device, half), cuts))
        for own, part in zip(cuts, parts, strict=True):
            cross_sum += part.cross
            extra_sum += part.extra
            loads.append(part.load)
            for domain, loss in zip(domains[own].tolist(), part.losses, strict=True):
                per_domain.setdefault(batches.names[domain], []).append(loss)
        # Summed in the order of the text, whichever worker was first.
        list(pool.map(add_gradients, model.parameters(), *(part.gradients for part in parts)))
        del parts
        load = torch.stack(loads).sum(0).float()
        load /= load.sum(1, keepdim=True)
        # A window of about 1 / (1 - keep) steps, shorter at the beginning.
        keep = min(args.window_keep, 1 - 1 / (step + 1))
        for mixture, recent in zip(model.mixtures(), load, strict=True):
            mixture.load.lerp_(recent.to(mixture.load.device), 1 - keep)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        seconds, clock = now - clock, now
        window = torch.stack([m.load for m in model.mixtures()]) * config.num_experts
        if step % args.log_every == 0 or step < 10:
            note(
                {
                    "step": step,
                    "tokens": consumed * args.context,
                    "loss": round(cross_sum, 4),
                    "domains": {name: round(sum(v) / len(v), 3) for name, v in sorted(per_domain.items())},
                    "extra": round(extra_sum, 5),
                    "norm": round(norm, 3),
                    "rate": round(factor, 4),
                    "load_max": [round(float(x), 2) for x in window.amax(1)],
                    "load_min": [round(float(x), 3) for x in window.amin(1)],
                    "tokens_per_second": round(sequences * args.context / seconds),
                    "minutes": round((now - began) / 60, 2),
                }
            )
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            note({"step": step + 1, "held_out": measure(model, texts, args.context, device)})
        if (step + 1) % args.save_every == 0:
            save(step + 1)
        if args.minutes and now - began > 60 * args.minutes:
            break
    if step + 1 > done:
        save(step + 1)
    pool.shutdown()
    return last


def _weights(text: str) -> dict[str, float]:
    weights = {name: float(value) for name, value in (part.split("=") for part in text.split(","))}
    if set(weights) - set(DOMAINS):
        raise argparse.ArgumentTypeError(f"domains are {', '.join(DOMAINS)}")
    return weights


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m tools.train.train", description=__doc__)
    p.add_argument("--preset", choices=sorted(PRESETS), default="small")
    p.add_argument("--start", type=Path, help="Hugging Face folder of the first weights and the sizes (else random)")
    p.add_argument("--data", type=Path, required=True, help="folder written by tools.train.data prepare")
    p.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the log")
    p.add_argument("--steps", type=int, required=True, help="the step at which the rate reaches 0")
    p.add_argument("--decay", type=int, default=0, help="steps of the final decay")
    p.add_argument("--warmup", type=int, default=20)
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, when it is there")
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--sequences", type=int, default=0, help="sequences a step (0: the preset's)")
    p.add_argument("--micro", type=int, default=0, help="sequences at once, for one worker (0: 4, on a GPU 64)")
    p.add_argument("--weights", type=_weights, default=DOMAIN_WEIGHTS, metavar="novel=0.6,code=0.15,docs=0.25")
    p.add_argument("--muon-lr", type=float, default=0.025)
    p.add_argument("--adam-lr", type=float, default=3e-3)
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--clip", type=float, default=1.0)
    p.add_argument("--balance", type=float, help="coefficient of the balancing loss")
    p.add_argument("--window-keep", type=float, default=0.95, help="share of the load kept from step to step")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=0, help="processor cores to use (0: all)")
    p.add_argument("--minutes", type=float, default=0, help="stop, with a checkpoint, after so long")
    p.add_argument("--decay-minutes", type=float, default=0, help="decay by the clock over the last of --minutes")
    p.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="of the matrix products")
    p.add_argument("--cpu", action="store_true")
    p.add_argument("--log-every", type=int, default=10)
    p.add_argument("--eval-every", type=int, default=100)
    p.add_argument("--save-every", type=int, default=100)
    p.add_argument("--held-out-tokens", type=int, default=10_240)
    return p


if __name__ == "__main__":
    train(parser().parse_args())
