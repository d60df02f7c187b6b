from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemoe.errors import OptionError
from edgemoe.text import tokenizer as module
from edgemoe.text.perplexity import Estimate, negative_log_likelihoods, perplexity, read_tokens
from edgemoe.text.tokenizer import Tokenizer

VOCAB = 50


def forward(tokens: Sequence[int], first: int) -> NDArray[np.float32]:
    """A model whose logits depend on every token so far."""
    rows = [np.random.default_rng(abs(hash(tuple(tokens[: i + 1])))).standard_normal(VOCAB) for i in range(len(tokens))]
    return np.array(rows[first:], np.float32) * 3


def by_llama_perplexity(tokens: list[int], context: int, bos: int | None) -> tuple[float, float, int]:
    """The loop of llama.cpp's tools/perplexity, as it stands there."""
    nll = nll2 = 0.0
    count, first = 0, context // 2
    for chunk in range(len(tokens) // context):
        start = chunk * context
        inputs = tokens[start : start + context]
        if bos is not None:
            inputs[0] = bos
        logits = forward(inputs, 0).astype(np.float64)
        for j in range(first, context - 1):
            probability = np.exp(logits[j] - logits[j].max())
            v = -math.log(probability[tokens[start + j + 1]] / probability.sum())
            nll += v
            nll2 += v * v
        count += context - first - 1
    nll2 /= count
    nll /= count
    ppl = math.exp(nll)
    nll2 -= nll * nll
    return ppl, math.sqrt(nll2 / (count - 1)) * ppl, count


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("context", [4, 9, 16])
def test_the_method_is_llama_perplexitys(context: int, bos: int | None) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB, 100).tolist()
    estimates = list(perplexity(iter(tokens), forward, context, bos))
    ppl, error, count = by_llama_perplexity(tokens, context, bos)
    assert [estimate.chunks for estimate in estimates] == list(range(1, 100 // context + 1))
    assert estimates[-1].tokens == count
    assert estimates[-1].perplexity == pytest.approx(ppl, rel=1e-12)
    assert estimates[-1].error == pytest.approx(error, rel=1e-9)


def test_chunks_bound_what_is_read() -> None:
    tokens = iter(range(VOCAB))
    assert len(list(perplexity(tokens, forward, 8, chunks=2))) == 2
    assert next(tokens) == 16


def test_too_short() -> None:
    with pytest.raises(OptionError, match="the text has 10 tokens, fewer than one chunk of 16"):
        list(perplexity(range(10), forward, 16))
    with pytest.raises(OptionError, match="3 tokens is too short"):
        list(perplexity(range(10), forward, 3))


def test_likelihoods_of_large_logits() -> None:
    logits = np.array([[1e4, -1e4, 0], [0, 0, 0]], np.float32)
    assert negative_log_likelihoods(logits, [1, 2]).tolist() == pytest.approx([2e4, math.log(3)])
    assert math.isinf(Estimate(1, 1, 1e6, 1e12).perplexity)
    assert math.isnan(Estimate(1, 1, 1.0, 1.0).error)


LINES = st.lists(
    st.sampled_from(["The cat was.", "", "  indented", "the end ", "Äpfel für 3,50 €", "\tx = 1", "猫", "a", "\r"]),
    max_size=40,
)  # fmt: skip


@pytest.mark.slow
@given(lines=LINES, data=st.data())
def test_pieces_of_a_file_give_the_tokens_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    byte_level: Tokenizer,
    sentencepiece: Tokenizer,
    lines: list[str],
    data: st.DataObject,
) -> None:
    text = "\n".join(lines) + data.draw(st.sampled_from(["", "\n", "x"]))
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(text, newline="")
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", data.draw(st.integers(1, 40)))
        text = text.removesuffix("\n")
        if not text:
            with pytest.raises(OptionError, match="is empty"):
                list(read_tokens(tokenizer, path))
            return
        tokens = list(read_tokens(tokenizer, path, read.append))
    assert tokens == tokenizer.encode(text, add_special=True, parse_special=False)
    assert read[-1] == len(text.encode()) and read == sorted(read)


def test_an_endless_line_is_cut(
    tmp_path: Path, byte_level: Tokenizer, sentencepiece: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [t.encode("the cat was small " * 100, add_special=True) for t in (byte_level, sentencepiece)]
    monkeypatch.setattr(module, "PIECE", 50)
    monkeypatch.setattr(module, "LONGEST_PIECE", 100)
    path = tmp_path / "line"
    for text, exact in (("the cat was small " * 100, True), ("x" * 1000, False)):
        path.write_text(text)
        for tokenizer, whole in zip((byte_level, sentencepiece), expected, strict=True):
            tokens = list(read_tokens(tokenizer, path))
            assert tokenizer.decode(tokens) == text
            assert tokens == whole or not exact


def test_special_tokens_in_the_text_are_text(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = tmp_path / "text"
    path.write_text("a<|user|>b")
    assert byte_level.decode(read_tokens(byte_level, path), skip_special=True) == "a<|user|>b"


def test_not_text(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc\xff")
    with pytest.raises(OptionError, match=r"text: not UTF-8 text: .* \(byte 0xff\)"):
        list(read_tokens(byte_level, path))
    with pytest.raises(FileNotFoundError):
        list(read_tokens(byte_level, tmp_path / "missing"))
