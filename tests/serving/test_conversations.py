"""What is remembered of conversations."""

from __future__ import annotations

import sys

from edgemoe.serving.conversations import Conversations


def test_the_longest_text_that_goes_on_is_found() -> None:
    known = Conversations()
    assert known.recall("anything") == ("", [])
    for text, tokens in (("ab", [1, 2]), ("abcd", [3]), ("x", [4])):
        known.remember(text, tokens)
    assert known.recall("abc") == ("ab", [1, 2])
    assert known.recall("abcde") == ("abcd", [3])
    assert known.recall("a") == ("", [])
    known.remember("ab", [5])
    assert known.recall("abc") == ("ab", [5])
    known.clear()
    assert known.recall("abcde") == ("", [])


def test_the_oldest_are_forgotten_and_the_last_is_kept() -> None:
    size = sys.getsizeof("a" * 100) + 4 * 50
    known = Conversations(limit=3 * size)
    for letter in "abcd":
        known.remember(letter * 100, [7] * 50)
    assert [bool(known.recall(letter * 101)[1]) for letter in "abcd"] == [False, True, True, True]
    known.remember("e" * 1000, [7] * 5000)
    assert [bool(known.recall(letter * 1001)[1]) for letter in "abcde"] == [False, False, False, False, True]
