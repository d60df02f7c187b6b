"""Options: what is refused, what is known of them, and that the command line takes them from here."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
import pytest

from edgemoe.cli.options import load_option, memory_option
from edgemoe.errors import OptionError
from edgemoe.options import EngineOptions, LoadOptions, context_length


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("threads", 0, "threads = 0 is not between 1 and 1024"),
        ("threads", 2.0, "threads = 2.0 is not a whole number"),
        ("threads", True, "threads = True is not a whole number"),
        ("context", -1, "context = -1 is not at least 0"),
        ("parallel", 257, "parallel = 257 is not between 1 and 256"),
        ("cache_type_k", "q4_0", "cache_type_k = 'q4_0' is not one of f32, f16, q8_0"),
        ("eviction", None, "eviction = None is not one of next_use, lru, lfu, least_stale"),
        ("prefetch", 1, "prefetch = 1 is not true or false"),
        ("quality", "best", "quality = 'best' is not one of exact, high, balanced, fast"),
        ("chunk", 0, "chunk = 0 is not between 1 and 1048576"),
        ("memory", "8XB", "memory '8XB' is not a size such as 8GB, 6GiB or auto"),
        ("memory", 1.5, "memory 1.5 is not between 1 byte and 4 EiB"),
        ("memroy", "8GB", r"unknown option 'memroy' \(known: memory, threads, "),
    ],
)
def test_values_that_make_no_sense_are_refused(name: str, value: Any, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        LoadOptions.given({name: value})


def test_sizes_are_numbers_afterwards() -> None:
    given = {"8GB": 8 * 10**9, "1.5GiB": 3 << 29, "auto": None, None: None, 5: 5}
    assert [LoadOptions(memory=text).memory_bytes for text in given] == list(given.values())


def test_every_option_has_a_meaning_and_is_said_once() -> None:
    for options in (EngineOptions, LoadOptions):
        for field in dataclasses.fields(options):
            assert field.metadata["meaning"].help.endswith("."), field.name
    engine = {field.name: field for field in dataclasses.fields(EngineOptions)}
    for field in dataclasses.fields(LoadOptions):
        if field.name in engine and field.name not in ("context", "quality"):  # to a user, 0 for all, and a name
            assert field.metadata["meaning"] is engine[field.name].metadata["meaning"]


@pytest.mark.parametrize(
    ("asked", "longest", "found"), [(None, 100, 100), (None, 10**6, 4096), (0, 10**6, 10**6), (100, 100, 100)]
)
def test_contexts(asked: int | None, longest: int, found: int) -> None:
    assert context_length(asked, longest) == found


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(OptionError, match="a context of 101 positions: the model was made for 1 to 100"):
        context_length(101, 100)


def test_the_command_line_takes_defaults_bounds_and_help() -> None:
    @click.command()
    @memory_option
    @load_option("threads", "-t", "--threads", metavar="N")
    @load_option("eviction", "--eviction")
    @load_option("prefetch", "--no-prefetch")
    def command(**_: Any) -> None: ...

    options = {option.name: option for option in command.params}
    assert command.make_context("x", []).params == {
        "memory": None,
        "threads": None,
        "eviction": "next_use",
        "prefetch": True,
    }
    given = command.make_context("x", ["-M", "8GB", "-t", "3", "--eviction", "lru", "--no-prefetch"]).params
    assert given == {"memory": 8 * 10**9, "threads": 3, "eviction": "lru", "prefetch": False}
    assert "[default: one per processor]" in (options["threads"].help or "")  # type: ignore[attr-defined]
    for wrong in (["-t", "0"], ["-t", "1025"], ["--eviction", "fifo"], ["-M", "8XB"]):
        with pytest.raises(click.UsageError):
            command.make_context("x", wrong)
