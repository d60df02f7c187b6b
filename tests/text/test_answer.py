from __future__ import annotations

import pytest
from small_tokenizers import byte_level_backend, wrap

from edgemoe.errors import OptionError
from edgemoe.text.answer import FORMATS, AnswerSplitter, end_of_thoughts, mark_ids
from edgemoe.text.parts import Part
from edgemoe.text.stream import TextStream

HARMONY = (
    "<|channel|>analysis<|message|>Let me\nsee.<|end|><|start|>assistant<|channel|>commentary<|message|>Looking."
    "<|end|><|start|>assistant<|channel|>analysis<|message|> Hm<|end|><|start|>assistant<|channel|>final "
    "<|constrain|>json<|message|>It is <|5 o'clock."
)


def together(parts: list[Part]) -> list[tuple[str, str]]:
    result: list[tuple[str, str]] = []
    for kind, text, *_ in parts:
        if result and result[-1][0] == kind:
            text = result.pop()[1] + text
        result.append((kind, text))
    return result


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("", "Hello <b>you</b>.\n", [("content", "Hello <b>you</b>.\n")]),
        ("", "", []),
        ("", "<think>\nA cat?\n\n Yes.\n</think>\n\nA cat.", [("reasoning", "A cat?\n\n Yes."), ("content", "A cat.")]),
        ("", "\n <think>x</think>y", [("reasoning", "x"), ("content", "y")]),
        ("", "<think>\n\n</think>\n\nNo thoughts.", [("content", "No thoughts.")]),
        ("", "<think>cut off </thi", [("reasoning", "cut off </thi")]),
        ("", "<thin air>", [("content", "<thin air>")]),
        ("", " <thi", [("content", " <thi")]),
        ("", "It says <think>x</think>.", [("content", "It says <think>x</think>.")]),
        ("...<think>\n", "So be it.\n</think>\nYes.", [("reasoning", "So be it."), ("content", "Yes.")]),
        ("<think>\n\n</think>\n\n", "Yes.", [("content", "Yes.")]),
        ("", "[THINK]a[/THINK]b", [("reasoning", "a"), ("content", "b")]),
        ("", "<|channel>thought\na<channel|>b", [("reasoning", "a"), ("content", "b")]),
        ("", "<seed:think>a</seed:think>b", [("reasoning", "a"), ("content", "b")]),
        ("...<|start|>assistant", HARMONY, None),
        ("", HARMONY, None),
        ("...<|start|>assistant", "<|channel|>final<|message|>Yes.<|return|>", [("content", "Yes.")]),
        # What is in no frame is content, too.
        ("...<|start|>assistant", '{"a": 1}', [("content", '{"a": 1}')]),
        ("...<|start|>assistant", "Hello", [("content", "Hello")]),
        ("...<|start|>assistant", " to", [("content", " to")]),
        ("...<|start|>assistant", " to=f", [("content", " to=f")]),
        ("...<|start|>assistant", "<|channel|>Hello you", [("content", "<|channel|>Hello you")]),
        (
            "...<|start|>assistant",
            "Yes.<|end|><|start|>assistant<|channel|>final<|message|>No.",
            [("content", "Yes.No.")],
        ),
        ("...<|start|>assistant", "<|channel|>" + "x" * 600, [("content", "<|channel|>" + "x" * 600)]),
        ("...<|start|>assistant", "<|channel|>fin", []),
        ("...<|start|>assistant", "<|channel|>final<|mess", []),
        ("...<|start|>assistant", "<|message|>Yes.", [("content", "Yes.")]),
    ],
)
def test_thoughts_and_answers(prompt: str, answer: str, expected: list[tuple[str, str]] | None) -> None:
    if expected is None:
        expected = [
            ("reasoning", "Let me\nsee."),
            ("content", "Looking."),
            ("reasoning", "Hm"),
            ("content", "It is <|5 o'clock."),
        ]
    for size in (1, 2, 3, 7, len(answer) or 1):  # however the text is cut
        pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
        assert together(list(AnswerSplitter(prompt).split(pieces))) == expected, size
    whole = together(list(AnswerSplitter(prompt, "none").split([answer])))
    assert whole == ([("content", answer)] if answer else [])


def test_answers_are_not_held_back() -> None:
    splitter = AnswerSplitter()
    assert list(splitter.push("Once")) == [Part("content", "Once")]
    splitter = AnswerSplitter()
    assert list(splitter.push("<think>One ")) == [Part("reasoning", "One")]
    assert list(splitter.push("two")) == [Part("reasoning", " two")]
    assert list(splitter.push("</think>")) == []
    assert list(splitter.push("\nThree \n")) == [Part("content", "Three \n")]


def test_formats() -> None:
    assert FORMATS == ("auto", "deepseek", "none")
    with pytest.raises(OptionError, match="reasoning_format = 'magic' is not one of auto, deepseek, none"):
        AnswerSplitter("", "magic")
    assert end_of_thoughts("a<think>\n") == "</think>" and end_of_thoughts("a") == ""


def test_marks_that_are_special_tokens_are_spelled() -> None:
    backend = byte_level_backend()
    backend.add_special_tokens(["[THINK]", "[/THINK]", "<|im_end|>"])
    tokenizer = wrap(backend, {})
    marks = mark_ids(tokenizer)
    assert {tokenizer.spelling(token) for token in marks} == {b"[THINK]", b"[/THINK]"}
    stream = TextStream(tokenizer, spelled=marks)
    ids = tokenizer.encode("[THINK]a<|user|>[/THINK]b")
    assert "".join(stream.push(token) for token in ids) == "[THINK]a[/THINK]b"
