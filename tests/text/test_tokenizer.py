from __future__ import annotations

import dataclasses
import json
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_level_backend, sentencepiece_backend, wrap

from edgemoe.errors import TokenizerError
from edgemoe.formats.read import load_tokenizer, pack_tokenizer
from edgemoe.text import tokenizer as module
from edgemoe.text.tokenizer import Tokenizer, check_vocabulary

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(text=UNICODE)
def test_byte_level_round_trip(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text, parse_special=False)) == text


@given(text=UNICODE)
def test_sentencepiece_round_trip(sentencepiece: Tokenizer, text: str) -> None:
    plain = text.replace("▁", " ")  # the tokenizer cannot tell them apart
    assert sentencepiece.decode(sentencepiece.encode(text, parse_special=False)) == plain


@given(data=st.data(), text=UNICODE)
def test_decoding_agrees_with_the_library(
    byte_level: Tokenizer, sentencepiece: Tokenizer, data: st.DataObject, text: str
) -> None:
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)
    assert tokenizer.decode(ids, skip_special=False) == tokenizer._backend.decode(ids, skip_special_tokens=False)


@given(ids=st.lists(st.integers(0, 420), max_size=20))
def test_any_ids_decode_as_in_the_library(byte_level: Tokenizer, ids: list[int]) -> None:
    assert byte_level.decode(ids) == byte_level._backend.decode(ids)


TEXTS = st.lists(st.sampled_from(["a", "the", " ", "\n", ".", "é", "<|end|>", "\n\n"]), max_size=80).map("".join)


@given(text=TEXTS, piece=st.integers(1, 9))
def test_long_texts_in_pieces(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str, piece: int) -> None:
    for tokenizer in (byte_level, sentencepiece):
        whole = tokenizer.encode(text, add_special=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PIECE", piece)
            assert tokenizer.encode(text, add_special=True) == whole


def test_limit(byte_level: Tokenizer) -> None:
    text = "Once upon a time\n" * 10_000
    whole = byte_level.encode(text)
    assert byte_level.encode(text, limit=len(whole)) == whole
    part = byte_level.encode(text, limit=100)
    assert 100 < len(part) < 20_000 and part == whole[: len(part)]


def test_special_tokens_in_the_text(byte_level: Tokenizer) -> None:
    assert byte_level.encode("<|user|>") == [1]
    assert byte_level.decode([1]) == ""
    assert byte_level.decode([1], skip_special=False) == "<|user|>"
    assert byte_level.decode(byte_level.encode("a<|user|>b", parse_special=False)) == "a<|user|>b"
    assert byte_level.decode(byte_level.encode("a<tool>b")) == "a<tool>b"  # added, but no special one


def test_begin_of_text_is_added_once(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.begin_ids == (0,)
    plain = byte_level.encode("cat")
    assert byte_level.encode("cat", add_special=True) == [0, *plain]
    assert byte_level.encode("<|end|>cat", add_special=True) == [0, *plain]
    assert sentencepiece.begin_ids == (1,)  # from the post-processor
    assert sentencepiece.encode("the", add_special=True)[0] == 1
    assert sentencepiece.encode("the") == sentencepiece.encode("the", add_special=True)[1:]


@pytest.mark.parametrize(
    ("config", "begin"),
    [
        ({"bos_token": "<s>"}, (1,)),
        ({"bos_token": "<s>", "add_bos_token": False}, ()),
        ({"bos_token": "<s>", "add_bos_token": True}, (1,)),
        ({"bos_token": None, "add_bos_token": True}, ()),
    ],
)
def test_the_configuration_decides_about_the_begin(config: dict[str, Any], begin: tuple[int, ...]) -> None:
    assert wrap(sentencepiece_backend(), config).begin_ids == begin


def test_end_tokens_come_from_every_source() -> None:
    tokenizer = wrap(byte_level_backend(), {"eos_token": "<|end|>"}, eos_token_id=[2, 0])
    assert tokenizer.eos_ids == (0, 2)
    assert wrap(byte_level_backend(), {}, eos_token_ids=[1, 2]).eos_ids == (1, 2)
    assert wrap(byte_level_backend(), {}, eos_token_id=1, bos_token_id=None).eos_ids == (1,)
    assert wrap(byte_level_backend(), {}, eos_token_id="nonsense").eos_ids == ()


def test_padding_and_truncation_of_the_file_are_ignored() -> None:
    backend = byte_level_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    tokenizer = wrap(backend)
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level_backend().to_str())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1, "bos_token_id": 0}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "bos_token_id": None}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from the configuration"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_ids, tokenizer.eos_ids) == ((0,), (1, 2))
    assert tokenizer.chat_template == "from the configuration"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_template == "from the file"


def test_named_chat_templates() -> None:
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert wrap(byte_level_backend(), {"chat_template": several}).chat_template == "D"
    assert wrap(byte_level_backend(), {"chat_template": 5}).chat_template is None


def test_chat_template_knows_the_special_tokens() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = wrap(
        byte_level_backend(), {"eos_token": "<|user|>", "chat_template": template}, bos_token_ids=[0], eos_token_ids=[2]
    )
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<|end|>user: hi<|user|>"


def test_no_chat_template(byte_level: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        byte_level.apply_chat_template([{"role": "user", "content": "hi"}])


def test_vocabulary_must_fit_the_model(byte_level: Tokenizer) -> None:
    @dataclasses.dataclass
    class Spec:
        vocab_size: int

    size = byte_level.vocab_size
    assert size == byte_level._backend.get_vocab_size()
    spec: Any = Spec(size)
    check_vocabulary(byte_level, spec)
    with pytest.raises(TokenizerError, match=f"token {size - 1}, .* only {size - 1} rows"):
        check_vocabulary(byte_level, Spec(size - 1))  # type: ignore[arg-type]
    foreign = wrap(byte_level_backend(), {}, eos_token_ids=[100_000])
    with pytest.raises(TokenizerError, match="token 100000"):
        check_vocabulary(foreign, spec)


def test_vocabulary_with_gaps() -> None:
    backend = json.loads(sentencepiece_backend().to_str())
    backend["model"]["vocab"]["far"] = 5000
    tokenizer = Tokenizer.from_files(json.dumps(backend).encode())
    assert tokenizer.vocab_size == 5001
    assert tokenizer.decode([4000]) == ""


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"\xff\xfe", b'{"version": "1.0"', b'{"model": {"type": "Nonsense"}}', b"[" * 100_000],
)
def test_broken_tokenizer(data: bytes) -> None:
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_files(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_broken_configuration(config: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.from_files(byte_level_backend().to_str().encode(), config)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model alone"):
        load_tokenizer(tmp_path)


def test_text_must_be_unicode(byte_level: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="character 3"):
        byte_level.encode("abc\ud800")
    with pytest.raises(TokenizerError, match="negative"):
        byte_level.decode([1, -1])


def test_pack(byte_level: Tokenizer) -> None:
    blobs = {
        "tokenizer.json": byte_level_backend().to_str().encode(),
        "tokenizer_config.json": b'{"bos_token": "<|end|>"}',
        "chat_template.jinja": b"T",
    }
    pack: Any = types.SimpleNamespace(
        index=types.SimpleNamespace(path="m.emoe", generation={"eos_token_ids": [2]}),
        blobs=blobs,
        read_blob=blobs.__getitem__,
    )
    tokenizer = pack_tokenizer(pack)
    assert (tokenizer.bos_ids, tokenizer.eos_ids, tokenizer.chat_template) == ((0,), (2,), "T")
    del blobs["tokenizer.json"]
    with pytest.raises(TokenizerError, match=r"m\.emoe: no tokenizer"):
        pack_tokenizer(pack)


@pytest.mark.parametrize(
    ("added", "ends"),
    [
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], ["<|im_end|>", "<|endoftext|>"]),
        (["<|eot_id|>", "<|eom_id|>"], ["<|eot_id|>", "<|eom_id|>"]),
        (["<start_of_turn>", "<end_of_turn>"], ["<end_of_turn>"]),
        # An <|end|> ends gpt-oss's messages, not its answers.
        (["<|return|>", "<|call|>", "<|start|>"], ["<|return|>", "<|call|>"]),
        (["<|assistant|>"], ["<|end|>"]),
    ],
)
def test_ends_of_turns(added: list[str], ends: list[str]) -> None:
    backend = byte_level_backend()
    backend.add_special_tokens(added)
    tokenizer = wrap(backend, {})
    expected = {*ends} if "<|return|>" in added else {*ends, "<|end|>"}  # which the tokenizer has anyway
    assert {tokenizer.spelling(token).decode() for token in tokenizer.end_ids} == expected
    assert tokenizer.eos_ids == ()
    named = wrap(backend, {"eos_token": "<|user|>"})
    assert named.end_ids[0] == named.eos_ids[0] and set(named.end_ids) == {*named.eos_ids, *tokenizer.end_ids}


def test_spellings(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.spelling(0) == b"<|end|>" and byte_level.piece(0) == b""
    assert byte_level.spelling(100_000) == b""
    assert byte_level.token_id("<|user|>") == 1 and byte_level.token_id("nothing") is byte_level.token_id("") is None
    (cat,) = sentencepiece.encode("cat")
    assert sentencepiece.spelling(cat) == b" cat" and sentencepiece.spelling(1) == b"<s>"
    ids = byte_level.encode("Äpfel 🙂")
    assert b"".join(byte_level.spelling(token) for token in ids).decode() == "Äpfel 🙂"


def test_threads_do_not_mix_up_what_special_tokens_are(tiny_tokenizer: bytes) -> None:
    """Whether the backend takes special tokens as text is a switch of its own, not an argument."""
    tokenizer = Tokenizer.from_files(tiny_tokenizer)
    real = tokenizer._backend

    class Slow:
        """Gives other threads time between the switch and the call."""

        def __setattr__(self, name: str, value: object) -> None:
            setattr(real, name, value)
            time.sleep(0.01)

        def encode(self, text: str, add_special_tokens: bool) -> object:
            return real.encode(text, add_special_tokens=add_special_tokens)

    tokenizer._backend = Slow()  # type: ignore[assignment]
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda number: tokenizer.encode("<|endoftext|>", parse_special=number % 2 == 0), range(12)))
    assert [found == [0] for found in ids] == [True, False] * 6
