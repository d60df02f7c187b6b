"""Measure a Hugging Face folder on held-out text and print the tables of its model card."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tools.train.data import DOC_PACKAGES
from tools.train.model import Model, from_hf
from tools.train.routing import hot_overlap, shares, srp

PROMPTS = (
    "The old man put down his lamp and",
    "CHAPTER II\n\nThe next morning",
    "def read_lines(path):\n",
    "To install the package, you need to",
)


@dataclass
class Measurement:
    """One model on one text."""

    size: int  # bytes of text
    tokens: int
    nats: float
    picks: NDArray[np.int64]  # [layers, tokens, k]

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text."""
        return self.nats / math.log(2) / self.size

    @property
    def perplexity(self) -> float:
        """Perplexity per token of the model's own tokenizer."""
        return math.exp(self.nats / self.tokens)


class Measured:
    """A model of a Hugging Face folder with its tokenizer."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise SystemExit(f"{folder / name}: no such file")
        self.model: Model = from_hf(folder).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    @torch.no_grad()
    def measure(self, text: str, window: int, batch: int = 16) -> Measurement:
        """All tokens of ``text``, each predicted from those before it in its window; a window begins with the last
        token of the one before, the first with the end-of-text token."""
        ids = np.array([0, *self.tokenizer.encode(text).ids], dtype=np.int64)
        count = len(ids) - 1
        nats, picks = 0.0, []
        whole = count // window
        spans = [(n * window, min(batch, whole - n), window) for n in range(0, whole, batch)]
        if count % window:
            spans.append((whole * window, 1, count % window))
        for first, rows, width in spans:
            piece = torch.from_numpy(ids[first : first + rows * width + 1])
            hidden, routing = self.model(piece[:-1].view(rows, width))
            flat = hidden.flatten(0, 1)
            for start in range(0, len(flat), 1024):
                part, targets = flat[start : start + 1024], piece[1 + start : 1 + start + 1024]
                logits = part @ self.model.embed_tokens.weight.t()
                nats += float(F.cross_entropy(logits, targets, reduction="sum"))
            picks.append(torch.stack(routing.picks).numpy())
        return Measurement(len(text.encode()), count, nats, np.concatenate(picks, 1))

    @torch.no_grad()
    def sample(self, prompt: str, length: int, seed: int = 0, temperature: float = 0.8, top_k: int = 40) -> str:
        """``prompt`` and ``length`` sampled tokens more."""
        generator = torch.Generator().manual_seed(seed)
        ids = [0, *self.tokenizer.encode(prompt).ids]
        for _ in range(length):
            logits = self.model.logits(torch.tensor([ids]))[0, -1] / temperature
            best, entries = logits.topk(top_k)
            choice = int(torch.multinomial(best.softmax(0), 1, generator=generator))
            ids.append(int(entries[choice]))
            if ids[-1] == 0:
                break
        return str(self.tokenizer.decode(ids))


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode("utf-8", "ignore") if size else text


def read_texts(data: Path, text: Path, size: int) -> dict[str, str]:
    """Held-out texts by name: those of the prepared folder, and the test part of WikiText-2 where it is present."""
    texts = {path.stem: _cut(path.read_text("utf-8"), size) for path in sorted((data / "heldout").glob("*.txt"))}
    if not texts:
        raise SystemExit(f"{data / 'heldout'}: no held-out text (run: python -m tools.train.data prepare)")
    wikitext = text / "wikitext-2-test.txt"
    if wikitext.is_file():
        texts["wikitext-2 test"] = _cut(wikitext.read_text("utf-8"), size)
    return texts


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quality(model: dict[str, Measurement], baseline: dict[str, Measurement] | None) -> str:
    """The table of bits per byte."""
    head = ["held-out text", "bytes", *(["baseline, bits per byte"] if baseline else []), "bits per byte", "perplexity"]
    rows = []
    for name, own in model.items():
        other = [f"{baseline[name].bits_per_byte:.3f}"] if baseline else []
        rows.append([name, f"{own.size:,}", *other, f"**{own.bits_per_byte:.3f}**", f"{own.perplexity:.1f}"])
    return _table(head, rows)


def routing(model: dict[str, Measurement], experts: int) -> str:
    """The tables of routing: consistency per layer and text, unused experts, hot experts shared by two texts."""
    layers = len(next(iter(model.values())).picks)
    rows, means = [], []
    for name, own in model.items():
        values = [srp(layer, experts, 16) for layer in own.picks]
        scores = [score for score, _ in values]
        means.append(float(np.mean(scores)))
        rho = float(np.mean([r for _, r in values]))
        rows.append([name, *(f"{score:.2f}" for score in scores), f"**{means[-1]:.2f}**", f"{rho:.2f}"])
    parts = [
        "SRP over windows of 16 tokens (arXiv 2505.16056):",
        _table(["held-out text", *(f"layer {n}" for n in range(layers)), "mean", "cache, in units of k"], rows),
        f"Mean of all texts and layers: {np.mean(means):.3f}.",
    ]
    load = {name: np.stack([shares(layer, experts) for layer in own.picks]) for name, own in model.items()}
    every = np.mean(list(load.values()), axis=0) * experts
    dead = int((every == 0).sum())
    parts.append(
        f"Experts that none of the texts picks: {dead} of {layers * experts}. Load of an expert over that of an even "
        f"spread, mean of the texts: {every.min():.2f} to {every.max():.2f}."
    )
    rows = []
    for first, second in combinations(load, 2):
        shared = [hot_overlap(load[first][n], load[second][n]) for n in range(layers)]
        rows.append([f"{first}, {second}", *(f"{value:.2f}" for value in shared), f"**{np.mean(shared):.2f}**"])
    parts.append("Share of the hottest quarter of a layer's experts that two texts have in common (0.25 by chance):")
    parts.append(_table(["texts", *(f"layer {n}" for n in range(layers)), "mean"], rows))
    return "\n\n".join(parts)


def training(log: Path) -> str:
    """What the log of the run tells: steps, tokens, time."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    rates = [record["tokens_per_second"] for record in steps]
    sizes = next(record for record in records if "parameters" in record)
    return (
        f"{sizes['parameters'] / 1e6:.1f} M parameters, {sizes['active'] / 1e6:.1f} M of them for a token; "
        f"{steps[-1]['step'] + 1} steps, {steps[-1]['tokens'] / 1e6:.2f} M tokens, "
        f"{np.median(rates):,.0f} tokens a second (median) on {sizes['device']}."
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.train.card", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder written by tools.train.export")
    parser.add_argument("--baseline", type=Path, help="another Qwen3-MoE folder, measured on the same bytes")
    parser.add_argument("--data", type=Path, required=True, help="folder written by tools.train.data prepare")
    parser.add_argument("--text", type=Path, default=Path("../shared/data/text"), help="folder with WikiText-2")
    parser.add_argument("--log", type=Path, help="log.jsonl of the run")
    parser.add_argument("--window", type=int, default=256, help="tokens a prediction may look back on")
    parser.add_argument("--max-bytes", type=int, default=0, help="bytes of each text to measure, 0 for all")
    parser.add_argument("--sample-tokens", type=int, default=80)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = read_texts(args.data, args.text, args.max_bytes)
    model = Measured(args.model)
    own = {name: model.measure(text, args.window) for name, text in texts.items()}
    other = None
    if args.baseline:
        base = Measured(args.baseline)
        other = {name: base.measure(text, args.window) for name, text in texts.items()}
    if args.log:
        print(f"## Training\n\n{training(args.log)}\n")
        meta = json.loads((args.data / "data.json").read_text())
        rows = [[n, f"{d['documents']:,}", f"{d['bytes']:,}", f"{d['tokens']:,}"] for n, d in meta["domains"].items()]
        print(_table(["domain", "documents", "bytes", "tokens"], rows) + "\n")
        rows = [[name, version, DOC_PACKAGES[name]] for name, version in meta["packages"].items()]
        print(_table(["package of documentation", "version", "licence"], rows) + "\n")
    print(f"## Held-out text\n\nWindows of {args.window} tokens.\n\n{quality(own, other)}\n")
    print(f"## Routing\n\n{routing(own, model.model.config.num_experts)}\n")
    print("## Samples\n\nTemperature 0.8, the 40 likeliest tokens, seed 0; the prompt is the first words.\n")
    for prompt in PROMPTS:
        print("```\n" + model.sample(prompt, args.sample_tokens) + "\n```\n")


if __name__ == "__main__":
    main()
