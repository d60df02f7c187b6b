"""Small tokenizers of the kinds that models have."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from edgemoe.text.tokenizer import Tokenizer

TEXT = [
    "Once upon a time there was a small, grey cat; it was the cat of a baker.\n",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Es waren einmal drei Brüder, die aßen Äpfel für 3,50 €.\n\nЖил царь. 猫が好きです。 👩‍👩‍👧 🙂\n",
]


def byte_level_backend(size: int = 400) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return backend


def sentencepiece_backend() -> Backend:
    """Llama's and Mixtral's construction: byte fallback, a space put before the text, BOS by the post-processor."""
    words = ["the", "cat", "was", "▁the", "▁cat", "▁was", "▁a", "▁"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + list("abcdefghijklmnopqrstuvwxyz.,é") + words:
        vocab[token] = len(vocab)
    merges: list[tuple[str, str]] = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("w", "a"), ("wa", "s")]
    merges += [("▁", "the"), ("▁", "cat"), ("▁", "was"), ("▁", "a")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def wordpiece_backend() -> Backend:
    vocab = {token: i for i, token in enumerate(["[UNK]", "the", "cat", "##s", "play", "##ing", ".", "and"])}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return backend


def wrap(backend: Backend, config: dict[str, Any] | None = None, **generation: Any) -> Tokenizer:
    return Tokenizer.from_files(backend.to_str().encode(), json.dumps(config or {}).encode(), generation)
