from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import OptionError
from edgemoe.text.stream import StopStrings, TextStream
from edgemoe.text.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    text = TextStream(tokenizer)
    pieces = [text.push(i) for i in ids]
    return [*pieces, text.finish()]


def check(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    for piece in pieces:
        piece.encode()  # whole characters only


# Every byte is a token of these tokenizers, so lists of ids are texts cut anywhere, valid and not.
@given(ids=st.lists(st.integers(0, 405), max_size=30))
def test_byte_level_stream_is_decode(byte_level: Tokenizer, ids: list[int]) -> None:
    check(byte_level, ids)


@given(ids=st.lists(st.integers(0, 310), max_size=30))
def test_sentencepiece_stream_is_decode(sentencepiece: Tokenizer, ids: list[int]) -> None:
    check(sentencepiece, ids)


@given(ids=st.lists(st.integers(0, 7), max_size=12))
def test_wordpiece_stream_is_decode(wordpiece: Tokenizer, ids: list[int]) -> None:
    check(wordpiece, ids)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_one_byte_at_a_time(sentencepiece: Tokenizer, text: str) -> None:
    bytes_as_ids = [3 + byte for byte in text.encode()]
    pieces = stream(sentencepiece, bytes_as_ids)
    expected = text.removeprefix(" ")
    assert "".join(pieces) == expected
    # No character waits longer than for its own last byte.
    assert [piece for piece in pieces if piece] == list(expected)


def test_only_unfinished_characters_wait(sentencepiece: Tokenizer) -> None:
    byte = lambda value: 3 + value  # noqa: E731
    text = TextStream(sentencepiece)
    assert [text.push(byte(b)) for b in "é".encode()] == ["", "é"]
    assert text.push(byte(0xFF)) == "\ufffd"  # never the begin of a character
    assert text.push(byte(0xE7)) == ""
    assert text.push(byte(0x41)) == "\ufffdA"  # the character will not be finished any more
    assert text.push(byte(0xF0)) == ""
    assert text.finish() == "\ufffd"


def test_special_tokens_print_nothing(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|user|>b<|end|>")
    assert "".join(stream(byte_level, ids)) == "ab"


def test_first_space(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the cat")
    assert "".join(stream(sentencepiece, ids)) == "the cat"
    text = TextStream(sentencepiece, continues=True)
    assert "".join(text.push(i) for i in ids) == " the cat"


def push_all(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    watch, out = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = watch.push(piece)
        out += text
        if stopped:
            assert watch.push("more") == ("", True)
            return out, True
    return out + watch.finish(), False


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


SHORT = st.text("ab", min_size=1, max_size=4)


@given(stops=st.lists(SHORT, max_size=3), pieces=st.lists(st.text("abc", max_size=5), max_size=8))
def test_stop_strings_wherever_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    assert push_all(stops, pieces) == reference(stops, "".join(pieces))


def test_stop_string_is_held_back_only_while_possible() -> None:
    watch = StopStrings(["\nUser:"])
    assert watch.push("Hello\nUs") == ("Hello", False)
    assert watch.push("ual") == ("\nUsual", False)
    assert watch.push("\n") == ("", False)
    assert watch.push("User: hi") == ("", True)


def test_empty_stop_string() -> None:
    with pytest.raises(OptionError):
        StopStrings([""])
    assert StopStrings("ab").push("xab") == ("x", True)
