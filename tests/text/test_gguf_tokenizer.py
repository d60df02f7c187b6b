"""Tokenizers from GGUF metadata: llama.cpp's own test vectors where they are at hand, small vocabularies otherwise."""

from __future__ import annotations

import functools
import heapq
import os
import random
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import byte_level_metadata, sentencepiece_metadata, write
from tokenizers import Regex, pre_tokenizers

from edgemoe.errors import TokenizerError
from edgemoe.formats.gguf import GgufModel
from edgemoe.text import gguf_tokenizer
from edgemoe.text.gguf_tokenizer import (
    _PRE_TOKENIZERS,
    pre_tokenizer_names,
    read_vocabulary,
    tokenizer_files,
    tokenizer_from_gguf,
)
from edgemoe.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGEMOE_SHARED", ROOT.parent / "shared"))
VOCABULARIES = ("deepseek-coder", "deepseek-llm", "gemma-4", "gpt-2", "llama-spm", "phi-3", "qwen2")


def shared_vocabulary(name: str) -> Path:
    path = SHARED / "data" / "vocab" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


@functools.cache
def real(name: str) -> tuple[dict[str, Any], Tokenizer]:
    """(metadata, tokenizer) of a real vocabulary."""
    path = shared_vocabulary(name)
    metadata = GgufModel.open(path).metadata
    return metadata, tokenizer_from_gguf(metadata, path.name)


def from_metadata(metadata: dict[str, Any], tmp_path: Path) -> Tokenizer:
    """By way of a file, as the metadata of a model come."""
    return tokenizer_from_gguf(
        GgufModel.open(write(tmp_path / "vocabulary.gguf", metadata)).metadata, "vocabulary.gguf"
    )


@pytest.fixture(params=VOCABULARIES)
def vector(request: pytest.FixtureRequest) -> tuple[Tokenizer, list[tuple[str, list[int]]]]:
    """A tokenizer, and the texts that llama.cpp is tested with, each with its ids."""
    path = shared_vocabulary(request.param)
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().splitlines()
    assert len(lines) > 40
    pairs = [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=False)]
    return real(request.param)[1], pairs


@pytest.mark.slow
def test_as_in_llama_cpp(vector: tuple[Tokenizer, list[tuple[str, list[int]]]]) -> None:
    tokenizer, pairs = vector
    for text, ids in pairs:
        assert tokenizer.encode(text, parse_special=False) == ids, text
        assert tokenizer.decode(ids, skip_special=False) == text
        if tokenizer.has_pieces:
            pieces = b"".join(tokenizer.piece(i, skip_special=False) for i in ids).decode()
            assert pieces.removeprefix(" " * tokenizer.stripped_spaces) == text


FACTS = {
    # name: ids that begin a text, ids that end one, a special token's text
    "deepseek-coder": ((32013,), (32014,), "<\uff5cbegin\u2581of\u2581sentence\uff5c>"),
    "deepseek-llm": ((100000,), (100001,), "<\uff5cbegin\u2581of\u2581sentence\uff5c>"),
    "gemma-4": ((2,), (1, 106, 50), "<bos>"),
    "gpt-2": ((), (50256,), "<|endoftext|>"),
    "llama-spm": ((1,), (2,), "<s>"),
    "phi-3": ((1,), (32000, 32007, 2), "<|assistant|>"),
    "qwen2": ((), (151643, 151645), "<|im_start|>"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARIES)
def test_facts_of_real_vocabularies(name: str) -> None:
    metadata, tokenizer = real(name)
    begin, end, special = FACTS[name]
    assert tokenizer.begin_ids == begin and tokenizer.eos_ids == end
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"])
    found = tokenizer.encode(special)
    assert len(found) == 1 and tokenizer.is_special(found[0])
    assert len(tokenizer.encode(special, parse_special=False)) > 1
    assert tokenizer.encode("x", add_special=True)[: len(begin)] == list(begin)


@pytest.mark.parametrize("name", ["gemma-4", "phi-3", "qwen2"])
def test_chat_templates_of_real_vocabularies(name: str) -> None:
    tokenizer = real(name)[1]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What is a quern?"}])
    assert "What is a quern?" in text
    assert sum(tokenizer.is_special(i) for i in tokenizer.encode(text)) >= 3


# -- SentencePiece --------------------------------------------------------------------------------------------------


def joined(text: str, ids: dict[str, int], scores: list[float]) -> list[int]:
    """SentencePiece by its definition: join the neighbours whose token has the highest score, the leftmost of equals,
    as long as there are any; characters without a token become bytes."""
    parts, after, before = list(text), list(range(1, len(text) + 1)), list(range(-1, len(text) - 1))
    queue: list[tuple[float, int, int, int]] = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right < len(parts):
            token = ids.get(parts[left] + parts[right])
            if token is not None:
                heapq.heappush(queue, (-scores[token], left, right, len(parts[left]) + len(parts[right])))

    for left in range(len(parts) - 1):
        consider(left, left + 1)
    while queue:
        _, left, right, length = heapq.heappop(queue)
        if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != length:
            continue
        parts[left], parts[right], after[left] = parts[left] + parts[right], "", after[right]
        if after[left] < len(parts):
            before[after[left]] = left
        consider(before[left], left)
        consider(left, after[left])
    result = []
    for part in filter(None, parts):
        result += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_sentencepiece_by_its_definition(name: str) -> None:
    metadata, tokenizer = real(name)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    ids, scores = {token: number for number, token in enumerate(tokens)}, metadata["tokenizer.ggml.scores"].tolist()
    chance = random.Random(0)
    for number in range(600):
        if number % 2:
            text = "".join(
                chance.choice("  \n\t-=_*#.aaabcdeoth\u00e9\u4e00\U0001f680") * chance.randint(1, 9) for _ in range(9)
            )
        else:
            text = "".join(chance.choice(tokens[3:]).replace("\u2581", " ") for _ in range(20))
        expected = joined("\u2581" + text.replace(" ", "\u2581"), ids, scores)
        assert tokenizer.encode(text, parse_special=False) == expected, text


def test_sentencepiece_prefix_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = from_metadata(sentencepiece_metadata(), tmp_path)
    spell = tokenizer._backend.id_to_token
    assert tokenizer.begin_ids == (1,) and tokenizer.eos_ids == (2,)
    assert [spell(i) for i in tokenizer.encode("the")] == ["\u2581the"]
    assert [spell(i) for i in tokenizer.encode(" the")] == ["\u2581", "\u2581the"]
    assert [spell(i) for i in tokenizer.encode("the</s>the")] == ["\u2581the", "</s>", "\u2581the"]
    assert [spell(i) for i in tokenizer.encode("\u00e9")] == ["\u2581", "<0xC3>", "<0xA9>"]
    for text in ("the", " the", "  hello the", "\u00e9\n the", "", "</s>"):
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False), skip_special=False) == text


def test_sentencepiece_without_prefix(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    metadata |= {"tokenizer.ggml.add_bos_token": False}
    tokenizer = from_metadata(metadata, tmp_path)
    assert tokenizer.begin_ids == () and tokenizer.stripped_spaces == 0
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert tokenizer.decode(tokenizer.encode("the")) == "the"


def test_gemma4(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.add_bos_token": False}
    metadata["tokenizer.ggml.merges"] = ["\u2581 t", "\u2581t h", "\u2581th e", "h e", "l l"]
    tokenizer = from_metadata(metadata, tmp_path)
    spell = tokenizer._backend.id_to_token
    assert tokenizer.begin_ids == (1,)  # whatever the file says
    assert [spell(i) for i in tokenizer.encode("the the")] == ["t", "he", "\u2581the"]
    assert tokenizer.decode(tokenizer.encode(" the\n\n  \u00e9")) == " the\n\n  \u00e9"


# -- byte-level BPE -------------------------------------------------------------------------------------------------

SPLITS = {
    # What tells the families apart; the pieces are put together with "|".
    "gpt-2": "I| see|'|Twas| 1234567| \u00e9\u00e8n|  | \u4e2d\u56fdx| +=|\n\n| y",
    "refact": "I| see|'|Twas| |1|2|3|4|5|6|7| \u00e9\u00e8n|  | \u4e2d\u56fdx| +=|\n\n| y",
    "llama-bpe": "I| see|'T|was| |123|456|7| \u00e9\u00e8n|  | \u4e2d\u56fdx| +=\n\n| y",
    "qwen2": "I| see|'T|was| |1|2|3|4|5|6|7| \u00e9\u00e8n|  | \u4e2d\u56fdx| +=\n\n| y",
    "deepseek-v3": "I| see|'Twas| |123|456|7| \u00e9\u00e8n|   |\u4e2d\u56fd|x| +=\n\n| y",
    "deepseek-coder": "I| see|'|Twas| |1|2|3|4|5|6|7| \u00e9\u00e8n|  | |\u4e2d\u56fd|x| +=|\n|\n| y",
    "gpt-4o": "I| see'T|was| |123|456|7| \u00e9\u00e8n|  | \u4e2d\u56fdx| +=\n\n| y",
    "tekken": "I| see|'Twas| |1|2|3|4|5|6|7| \u00e9\u00e8n|  | \u4e2d\u56fdx| +=\n\n| y",
    "kimi-k2": "I| see'T|was| |123|456|7| \u00e9\u00e8n|   |\u4e2d\u56fd|x| +=\n\n| y",
    "bailingmoe2": "I| see|'T|was| |1|2|3|4|5|6|7| \u00e9\u00e8n|  | \u4e2d\u56fdx| +=\n\n| y",
    "afmoe": "I| see|'Twas| |1|234|567| \u00e9\u00e8n|   |\u4e2d\u56fd|x| +=\n\n| y",
    "exaone-moe": "I see|'T|was| |1|2|3|4|5|6|7| \u00e9\u00e8n|  | \u4e2d\u56fdx| +=\n|\n| y",
}


def pieces(pre: str, text: str) -> list[str]:
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PRE_TOKENIZERS[pre].patterns]
    return [piece for piece, _ in pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", SPLITS)
def test_words(pre: str) -> None:
    assert "|".join(pieces(pre, SPLITS[pre].replace("|", ""))) == SPLITS[pre]


@pytest.mark.slow
@pytest.mark.parametrize("pre", pre_tokenizer_names())
def test_every_pre_tokenizer_keeps_the_text(pre: str, tmp_path: Path) -> None:
    if pre not in _PRE_TOKENIZERS:
        return
    tokenizer = from_metadata(byte_level_metadata(pre), tmp_path)
    chance = random.Random(1)
    letters = "aB'sT 1\u0663\u4e2d\u304b\uac00\u00e9\u0301\u0e01\u1780\r\n\t-+/!\u2026\U0001f680\u00a0\u017f"
    for length in range(40):
        text = "".join(chance.choice(letters) for _ in range(length))
        assert "".join(pieces(pre, text)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = from_metadata(byte_level_metadata(), tmp_path)
    spell = tokenizer._backend.id_to_token
    assert [spell(i) for i in tokenizer.encode("hello the")] == ["hello", "\u0120", "the"]
    assert [spell(i) for i in tokenizer.encode("<|im_start|>the<tool>")] == ["<|im_start|>", "the", "<tool>"]
    plain = tokenizer.encode("<|im_start|>the<tool>", parse_special=False)
    assert len(plain) > 10 and spell(plain[-1]) == "<tool>"  # user-defined tokens are always found
    assert tokenizer.decode(tokenizer.encode("<|im_start|>the<tool>")) == "the<tool>"
    assert tokenizer.begin_ids == () and tokenizer.eos_ids == tuple(tokenizer.encode("<|im_end|>"))


def test_whole_words(tmp_path: Path) -> None:
    """With Llama 3 a word in the vocabulary is one token, even if no merges lead there."""
    for pre, expected in (("llama-bpe", 1), ("qwen2", 2)):
        metadata = byte_level_metadata(pre)
        metadata["tokenizer.ggml.merges"] = [merge for merge in metadata["tokenizer.ggml.merges"] if merge[0] != "t"]
        tokenizer = from_metadata(metadata, tmp_path)
        assert len(tokenizer.encode("the")) == expected
        assert tokenizer.begin_ids == (tokenizer.bos_ids if pre == "llama-bpe" else ())


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["<|return|>", "<|call|>", "<|end|>", "<|message|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|user|>"], ["<|end|>"]),
        (["<|endoftext|>", "<|fim_pad|>"], ["<|endoftext|>", "<|fim_pad|>"]),
        (["<eos>", "<turn|>", "<|tool_response>", "</s>"], ["<eos>", "<turn|>", "<|tool_response>"]),
        (["[EOS]", "[EOT]", "[BOS]"], ["[EOT]", "[EOS]"]),
    ],
)
def test_what_ends_a_generation(tokens: list[str], ends: list[str], tmp_path: Path) -> None:
    metadata = byte_level_metadata()
    del metadata["tokenizer.ggml.eos_token_id"]
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-2], "x|y", "<tool>", *tokens]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[3] * len(tokens)]
    tokenizer = from_metadata(metadata, tmp_path)
    assert {tokenizer._backend.id_to_token(i) for i in tokenizer.eos_ids} == set(ends)


def test_a_word_that_looks_like_an_end(tmp_path: Path) -> None:
    """Vocabularies made from web pages have </s> as an ordinary word."""
    tokenizer = from_metadata(byte_level_metadata(words=("</s>",)), tmp_path)
    assert len(tokenizer.eos_ids) == 1 and tokenizer.decode(tokenizer.encode("<s>a</s>")) == "<s>a</s>"


def test_white_space_after_phi3s_tokens(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata() | {"general.name": "Phi-3-mini"}
    tokenizer = from_metadata(metadata, tmp_path)
    assert tokenizer.encode("</s>\n the") == tokenizer.encode("</s>the")
    assert tokenizer.encode("<s>\n the") != tokenizer.encode("<s>the")


def test_chat_template(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ eos_token }}"
    tokenizer = from_metadata(byte_level_metadata(chat_template=template), tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<|im_start|>[hi]<|im_end|>"


@pytest.mark.parametrize("make", [byte_level_metadata, sentencepiece_metadata])
def test_the_files_say_the_same(make: Any, tmp_path: Path) -> None:
    """What a conversion puts into a pack."""
    metadata = make(chat_template="{{ messages }}")
    tokenizer = from_metadata(metadata, tmp_path)
    files = tokenizer_files(metadata, "test")
    vocabulary = read_vocabulary(metadata, "test")
    again = Tokenizer.from_files(
        files["tokenizer.json"],
        files["tokenizer_config.json"],
        {"bos_token_ids": list(vocabulary.bos_ids), "eos_token_ids": list(vocabulary.eos_ids)},
        files["chat_template.jinja"],
    )
    for text in ("hello the", " the</s><|im_end|>\n\u00e9"):
        assert again.encode(text, add_special=True) == tokenizer.encode(text, add_special=True)
    assert (again.begin_ids, again.eos_ids) == (tokenizer.begin_ids, tokenizer.eos_ids)
    assert again.chat_template == tokenizer.chat_template


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model = 'bert' is not supported"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"model": 7}, "tokenizer.ggml.model = 7 is not of type str"),
        ({"pre": "nobody"}, r"tokenizer.ggml.pre = 'nobody' is not supported \(known: .*qwen2"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": "text"}, "tokenizer.ggml.tokens is not a list of strings"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is not a list of strings"),
        ({"tokens": []}, "tokenizer.ggml.tokens has 0 entries"),
        ({"tokens": ["a", "b" * 1025]}, r"tokenizer.ggml.tokens\[1\] has 1025 characters \(at most 1024\)"),
        ({"tokens": ["a", "b", "a"]}, r"tokenizer.ggml.tokens\[0\] = 'a' appears twice"),
        ({"token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries for"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a b", "ab"]}, r"tokenizer.ggml.merges\[0\] = 'a b' does not join two tokens to a third"),
        ({"merges": ["th"]}, r"tokenizer.ggml.merges\[0\] = 'th' does not join"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token = 1 is not of type bool"),
    ],
)
def test_broken_vocabularies(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    metadata = byte_level_metadata()
    for key, value in change.items():
        metadata.pop(f"tokenizer.ggml.{key}", None)
        if value is not None:
            metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(TokenizerError, match=message) as caught:
        from_metadata(metadata, tmp_path)
    assert str(caught.value).startswith("vocabulary.gguf: ")


def test_vocabularies_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, metadata, message in (
        ("MAX_TOKENS", byte_level_metadata(), "tokens has 267 entries"),
        ("MAX_MERGES", byte_level_metadata(), "merges has 8 entries"),
        ("MAX_CUTS", sentencepiece_metadata(), "characters"),
        ("MAX_MERGES", sentencepiece_metadata(), "more than 1 pairs that make a token"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(gguf_tokenizer, limit, 1)
            with pytest.raises(TokenizerError, match=message):
                from_metadata(metadata, tmp_path)


def test_broken_scores(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    for scores, message in (([0.0], "scores has 1 entries"), (None, "scores is missing")):
        metadata.pop("tokenizer.ggml.scores", None)
        if scores is not None:
            metadata["tokenizer.ggml.scores"] = scores
        with pytest.raises(TokenizerError, match=message):
            from_metadata(metadata, tmp_path)
    metadata["tokenizer.ggml.scores"] = [float("nan")] * len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(TokenizerError, match="an entry that is no number"):
        from_metadata(metadata, tmp_path)
