from __future__ import annotations

import itertools
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import edgemoe
from edgemoe.cli import _chat, main
from edgemoe.cli._terminal import AnswerWriter
from edgemoe.errors import ContextLengthError, ReadError
from edgemoe.text.named_templates import NAMED_TEMPLATES
from edgemoe.text.parts import Part

WORDS = [" there", " was", " a", " cat", "."]


class FakeGeneration:
    """Pieces that come, and a result."""

    def __init__(self, pieces: Iterator[Any]) -> None:
        self.pieces = pieces
        self.result = types.SimpleNamespace(finish_reason="eos")

    def __iter__(self) -> Iterator[Any]:
        return self.pieces


class FakeModel:
    """Answers with five words and remembers what it was asked."""

    device = None

    def __init__(self, template: str | None = None) -> None:
        self.tokenizer = types.SimpleNamespace(chat_template=template, use_chat_template=self.use_chat_template)
        self.asked: list[Any] = []
        self.options: dict[str, Any] = {}
        self.loaded: tuple[Any, dict[str, Any]] = (None, {})
        self.failure: Exception | None = None
        self.failure_at = 0
        self.thoughts: list[str] = []
        self.closed = False
        self.direct_io = True

    def load(self, path: Any, announce: Any = None, progress: Any = None, **options: Any) -> FakeModel:
        self.loaded = (path, options)
        announce("announced")
        progress(1, 2)
        return self

    def generate(self, prompt: Any, **options: Any) -> FakeGeneration:
        self.asked.append(prompt)
        self.options = options
        return FakeGeneration(self._words())

    def chat_parts(self, messages: Any, **options: Any) -> FakeGeneration:
        thoughts = [Part("reasoning", thought) for thought in self.thoughts]
        words = self.generate(messages, **options)
        return FakeGeneration(itertools.chain(thoughts, (Part("content", word) for word in words)))

    def use_chat_template(self, source: str) -> None:
        self.tokenizer.chat_template = source

    def _words(self) -> Iterator[str]:
        for number, word in enumerate(WORDS):
            if self.failure is not None and number == self.failure_at:
                raise self.failure
            yield word

    def stats(self, result: Any = None) -> dict[str, Any]:
        return {"prompt_tokens": 3, "hit_rate": 0.5, "bytes_read": 2_000_000, "ttft_ms": 1.25, "generation_tps": 7.0}

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(edgemoe, "load", fake.load)
    return fake


@pytest.fixture
def pack(tmp_path: Path) -> str:
    path = tmp_path / "model.emoe"
    path.touch()
    return str(path)


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(main, ["run", *arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_model_and_prompt(model: FakeModel, pack: str) -> None:
    result = run(pack, "Once upon a time")
    assert (result.exit_code, result.stdout) == (0, "".join(WORDS))
    assert result.stderr == "announced\n"
    assert model.asked == ["Once upon a time"]
    assert model.loaded[0] == pack and model.closed


@pytest.mark.parametrize(
    ("arguments", "stdin", "asked", "named"),
    [
        (["-p", "a b"], None, "a b", False),
        (["PACK", "-p", "a b"], None, "a b", True),
        (["-m", "PACK", "a b"], None, "a b", True),
        (["-p", "-"], "no", "-", False),
        (["PACK", "-f", "FILE"], "no", "from a file", True),
        (["-f", "FILE"], None, "from a file", False),
        (["-"], "piped\n", "piped", False),
        (["PACK", "-"], "piped\n\n", "piped\n", True),
        (["PACK"], "piped\r\n", "piped", True),
        ([], "piped", "piped", False),
        (["-f", "-"], "piped", "piped", False),
        (["-m", "PACK"], "пиво 🍺", "пиво 🍺", True),
    ],
)
def test_where_the_prompt_comes_from(
    model: FakeModel, pack: str, tmp_path: Path, arguments: list[str], stdin: str | None, asked: str, named: bool
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n")
    result = run(*({"PACK": pack, "FILE": str(file)}.get(word, word) for word in arguments), stdin=stdin)
    assert result.exit_code == 0, result.stderr
    assert model.asked == [asked]
    assert model.loaded[0] == (pack if named else None)


def test_options_reach_the_model(model: FakeModel) -> None:
    result = run(
        *("-p", "x", "-n", "5", "-c", "100", "-t", "2", "-M", "1.5GB", "-s", "7", "--temp", "0.5", "--top-k", "3"),
        *("--top-p", "0.9", "--min-p", "0.1", "--repeat-penalty", "1.1", "--repeat-last-n", "-1", "-ctk", "f32"),
        *("-ctv", "q8_0", "--stop", "a", "--stop", "b", "--ignore-eos", "--typical", "0.7", "--top-nsigma", "2"),
        *("--xtc-probability", "0.5", "--xtc-threshold", "0.2", "--presence-penalty", "0.3"),
        *("--frequency-penalty", "0.4", "--dry-multiplier", "0.8", "--dry-base", "1.5", "--dry-allowed-length", "3"),
        *("--dry-penalty-last-n", "100", "--dry-sequence-breaker", "\\n", "--dry-sequence-breaker", ";"),
        *("--mirostat", "2", "--mirostat-lr", "0.2", "--mirostat-ent", "4", "--samplers", "top_k;temp"),
        *("-l", "5+1.5", "--logit-bias", "6-inf", "-j", '{"type": "object"}', "--eviction", "lru", "--no-prefetch"),
        *("--quality", "fast", "--gpu", "cuda", "-ngl", "99", "--vram", "8GiB"),
    )
    assert result.exit_code == 0, result.stderr
    assert model.loaded[1] == {
        "memory": 1_500_000_000,
        "threads": 2,
        "gpu": "cuda",
        "gpu_layers": 99,
        "vram": 8 << 30,
        "context": 100,
        "cache_type_k": "f32",
        "cache_type_v": "q8_0",
        "eviction": "lru",
        "prefetch": False,
        "quality": "fast",
        "parallel": 1,
    }
    assert model.options == {
        "max_tokens": 5,
        "seed": 7,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "stop": ("a", "b"),
        "ignore_eos": True,
        "typical_p": 0.7,
        "top_n_sigma": 2.0,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "dry_multiplier": 0.8,
        "dry_base": 1.5,
        "dry_allowed_length": 3,
        "dry_penalty_last_n": 100,
        "dry_sequence_breakers": ("\n", ";"),
        "mirostat": 2,
        "mirostat_eta": 0.2,
        "mirostat_tau": 4.0,
        "samplers": "top_k;temp",
        "logit_bias": {5: 1.5, 6: -math.inf},
        "json_schema": '{"type": "object"}',
    }


def test_zero_is_a_value(model: FakeModel) -> None:
    assert run("-p", "x", "--temp", "0", "--top-k", "0", "-s", "0").exit_code == 0
    assert model.options == {"max_tokens": None, "stop": (), "temperature": 0.0, "top_k": 0, "seed": 0}


def test_options_from_files(model: FakeModel, tmp_path: Path) -> None:
    grammar, schema = tmp_path / "g.gbnf", tmp_path / "s.json"
    grammar.write_text('root ::= "yes" | "no"\n')
    schema.write_text("{}")
    assert run("-p", "x", "--grammar-file", str(grammar)).exit_code == 0
    assert model.options["grammar"] == 'root ::= "yes" | "no"\n'
    assert run("-p", "x", "-jf", str(schema)).exit_code == 0
    assert model.options["json_schema"] == "{}"
    assert run("-p", "x", "--grammar", "root ::= [a-z]+", "--dry-sequence-breaker", "none").exit_code == 0
    assert model.options["grammar"] == "root ::= [a-z]+" and model.options["dry_sequence_breakers"] == ()


def test_only_what_was_given_reaches_the_model(model: FakeModel) -> None:
    assert run("-p", "x", "--predict", "-1", "-M", "auto").exit_code == 0
    seed = model.options.pop("seed")
    assert 0 <= seed < 1 << 32
    assert model.options == {"max_tokens": None, "stop": ()}
    defaults = {"memory": None, "threads": None, "context": None, "cache_type_k": "f16", "cache_type_v": "f16"}
    defaults |= {"gpu": "auto", "gpu_layers": None, "vram": None}
    assert model.loaded[1] == {**defaults, "eviction": "next_use", "prefetch": True, "quality": "exact", "parallel": 1}


@pytest.mark.parametrize(("size", "bytes_"), [("8GB", 8 * 10**9), ("6GiB", 6 * 2**30), ("512M", 512 * 10**6)])
def test_memory_sizes(model: FakeModel, size: str, bytes_: int) -> None:
    assert run("-p", "x", "--memory", size).exit_code == 0
    assert model.loaded[1]["memory"] == bytes_


def test_chat_template_is_applied(model: FakeModel) -> None:
    model.tokenizer.chat_template = "T"
    run("-p", "hi", "-sys", "be brief")
    run("-p", "hi")
    run("-p", "hi", "--raw")
    user = {"role": "user", "content": "hi"}
    assert model.asked == [[{"role": "system", "content": "be brief"}, user], [user], "hi"]


@pytest.mark.parametrize("name", sorted(NAMED_TEMPLATES))
def test_named_chat_templates(model: FakeModel, name: str) -> None:
    assert run("-p", "hi", "--chat-template", name).exit_code == 0
    assert model.tokenizer.chat_template == NAMED_TEMPLATES[name] and model.asked == [[user("hi")]]


def test_chat_template_options(model: FakeModel, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    assert run("-p", "hi", "-sys", "be brief", "--chat-template-file", str(file)).exit_code == 0
    assert model.tokenizer.chat_template == "{{ messages }}"
    assert run("-p", "hi", "--chat-template", "{{ 1 }}", "--chat-template-kwargs", '{"a": [1]}').exit_code == 0
    assert model.tokenizer.chat_template == "{{ 1 }}" and model.options["chat_template_kwargs"] == {"a": [1]}
    assert run("-p", "hi", "--reasoning-format", "none").exit_code == 0
    assert model.options["reasoning_format"] == "none"


def test_thoughts_are_no_answer(model: FakeModel) -> None:
    model.tokenizer.chat_template, model.thoughts = "T", ["A cat", "?"]
    result = run("-p", "hi")
    assert (result.stdout, result.stderr) == ("".join(WORDS), "announced\nA cat?\n\n")
    report = json.loads(run("-p", "hi", "--json").stdout)
    assert report["text"] == "".join(WORDS) and report["reasoning_content"] == "A cat?"


def test_thoughts_are_dim_and_cannot_steer_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    writer = AnswerWriter()
    for part in (("reasoning", "hm\x1b[2J"), ("content", "So\x07.")):
        writer.write(*part)
    writer.finish(line=True)
    written = capsys.readouterr()
    assert (written.out, written.err) == ("So\ufffd.\n", "\x1b[2mhm\ufffd[2J\x1b[0m\n\n")
    assert (writer.content, writer.reasoning) == ("So\x07.", "hm\x1b[2J")


def test_json(model: FakeModel) -> None:
    result = run("-p", "x", "--json", "-s", "3")
    report = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert report == {"text": " there was a cat.", "stop_reason": "eos", "seed": 3, "stats": model.stats()}


def test_verbose(model: FakeModel) -> None:
    result = run("-p", "x", "-v", "-s", "3")
    assert result.stdout == "".join(WORDS)
    lines = [line.split(maxsplit=1) for line in result.stderr.splitlines()[1:]]
    assert lines == [
        ["stopped", "by eos, seed 3"],
        ["prompt_tokens", "3"],
        ["hit_rate", "50.0 %"],
        ["read", "2 MB"],
        ["ttft", "1.2 ms"],
        ["generation", "7.00 tokens/s"],
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere.emoe", "x"], 2, "'nowhere.emoe': no such file"),
        (["Once upon a time"], 2, "the first argument is the model"),
        (["PACK", "a", "b"], 2, "put quotes"),
        (["PACK", "a", "-p", "b"], 2, "more than one prompt"),
        (["-p", "a", "-f", "b"], 2, "more than one prompt"),
        (["PACK", "-p", ""], 2, "the prompt is empty"),
        (["PACK"], 2, "the standard input is empty"),
        (["PACK", "-f", "nowhere.txt"], 1, "nowhere.txt: No such file"),
        (["PACK", "-f", "EMPTY"], 2, "empty.txt is empty"),
        (["PACK", "-f", "BINARY"], 2, "not UTF-8 text: byte 2 is 0xff"),
        (["PACK", "-f", "FOLDER"], 1, "Is a directory"),
        (["PACK", "x", "-n", "-5"], 2, "-5 is negative"),
        (["PACK", "x", "-n", "many"], 2, "'many' is not a valid integer"),
        (["PACK", "x", "--temp", "nan"], 2, "temperature = nan"),
        (["PACK", "x", "--temp", "hot"], 2, "--temp"),
        (["PACK", "x", "--top-p", "2"], 2, "top_p = 2.0"),
        (["PACK", "x", "--typical", "-1"], 2, "typical_p = -1.0"),
        (["PACK", "x", "--top-nsigma", "inf"], 2, "top_n_sigma = inf"),
        (["PACK", "x", "--xtc-probability", "2"], 2, "xtc_probability = 2.0"),
        (["PACK", "x", "--xtc-threshold", "2"], 2, "xtc_threshold = 2.0"),
        (["PACK", "x", "--presence-penalty", "nan"], 2, "presence_penalty = nan"),
        (["PACK", "x", "--frequency-penalty", "x"], 2, "--frequency-penalty"),
        (["PACK", "x", "--repeat-penalty", "0"], 2, "repeat_penalty = 0.0"),
        (["PACK", "x", "--dry-multiplier", "inf"], 2, "dry_multiplier = inf"),
        (["PACK", "x", "--dry-base", "-1"], 2, "dry_base = -1.0"),
        (["PACK", "x", "--dry-allowed-length", "-1"], 2, "dry_allowed_length = -1"),
        (["PACK", "x", "--dry-penalty-last-n", "-2"], 2, "dry_penalty_last_n = -2"),
        (["PACK", "x", "--dry-sequence-breaker", ""], 2, "must not be empty"),
        (["PACK", "x", "--mirostat", "3"], 2, "mirostat = 3"),
        (["PACK", "x", "--mirostat-lr", "-1"], 2, "mirostat_eta = -1.0"),
        (["PACK", "x", "--mirostat-ent", "nan"], 2, "mirostat_tau = nan"),
        (["PACK", "x", "--samplers", "top_k;magic"], 2, "unknown sampler 'magic'"),
        (["PACK", "x", "-l", "5"], 2, "--logit-bias '5' is not of the form"),
        (["PACK", "x", "-l", "5+inf"], 2, "a bias at most"),
        (["PACK", "x", "--grammar", "root = x"], 2, "grammar: line 1: expected ::="),
        (["PACK", "x", "--grammar", "start: foo"], 2, "grammar: "),
        (["PACK", "x", "--grammar-file", "nowhere"], 2, "'nowhere' does not exist"),
        (["PACK", "x", "--grammar-file", "BINARY"], 2, "not UTF-8"),
        (["PACK", "x", "-j", "{"], 2, "json_schema is not JSON"),
        (["PACK", "x", "-j", '{"type": "thing"}'], 2, "json_schema: "),
        (["PACK", "x", "-j", "{}", "-jf", "EMPTY"], 2, "exclude each other"),
        (["PACK", "x", "-j", "{}", "--grammar", "root ::= [a]"], 2, "exclude each other"),
        (["PACK", "x", "-jf", "EMPTY"], 2, "json_schema is not JSON"),
        (["PACK", "x", "--chat-template", "magic"], 2, "neither a template nor one of"),
        (["PACK", "x", "--chat-template", "{% if %}"], 2, "chat template failed"),
        (["PACK", "x", "--chat-template", "chatml", "--chat-template-file", "EMPTY"], 2, "exclude each other"),
        (["PACK", "x", "--chat-template", "chatml", "--raw"], 2, "--raw is without"),
        (["PACK", "x", "--chat-template-kwargs", "{"], 2, "--chat-template-kwargs is not JSON"),
        (["PACK", "x", "--chat-template-kwargs", "[]"], 2, "is not a JSON object"),
        (["PACK", "x", "--chat-template-kwargs", '{"messages": 1}'], 2, "'messages' is not a variable"),
        (["PACK", "x", "--chat-template-kwargs", "{}"], 2, "--chat-template-kwargs needs a model with a chat"),
        (["PACK", "x", "--reasoning-format", "none"], 2, "--reasoning-format needs a model with a chat"),
        (["PACK", "x", "--reasoning-format", "magic"], 2, "'magic' is not one of"),
        (["PACK", "x", "--seed", "-2"], 2, "seed = -2"),
        (["PACK", "x", "-c", "-1"], 2, "-1 is not in the range"),
        (["PACK", "x", "-t", "0"], 2, "0 is not in the range"),
        (["PACK", "x", "-M", "8XB"], 2, "8XB"),
        (["PACK", "x", "-M", "0"], 2, "memory '0'"),
        (["PACK", "x", "-ctk", "q9"], 2, "'q9' is not one of"),
        (["PACK", "x", "--stop", ""], 2, "--stop must not be empty"),
        (["PACK", "x", "--stop"], 2, "requires an argument"),
        (["PACK", "x", "--nonsense"], 2, "--nonsense"),
        (["PACK", "x", "-sys", "y"], 2, "--system-prompt needs a model with a chat template"),
    ],
)
def test_bad_input_is_one_line(
    model: FakeModel,
    pack: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("binary").write_bytes(b"ab\xff")
    names = {"PACK": pack, "EMPTY": "empty.txt", "BINARY": "binary", "FOLDER": "."}
    result = run(*(names.get(word, word) for word in arguments), stdin="")
    assert result.exit_code == status, result.stderr
    assert result.stdout == ""
    line = result.stderr.removeprefix("announced\n")
    assert line.startswith("edgemoe: error: ") and message in line and line.count("\n") == 1
    assert not model.asked


def test_failures_of_the_model_are_one_line(model: FakeModel) -> None:
    model.failure = ReadError("layer 3, expert 5:\nchecksum 1 instead of 2")
    result = run("-p", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "announced\nedgemoe: error: layer 3, expert 5: checksum 1 instead of 2\n"
    model.failure = MemoryError()
    assert run("-p", "x").stderr.endswith("edgemoe: error: out of memory\n")
    model.failure, model.failure_at = OSError(28, "No space left on device", "/x"), 2
    result = run("-p", "x")
    assert (result.exit_code, result.stdout) == (1, "".join(WORDS[:2]))
    assert result.stderr.endswith("edgemoe: error: /x: No space left on device\n")


def test_interrupt_and_closed_pipe_are_quiet(model: FakeModel) -> None:
    model.failure, model.failure_at = KeyboardInterrupt(), 2  # type: ignore[assignment]
    result = run("-p", "x")
    assert (result.exit_code, result.stderr.strip()) == (130, "announced")


def test_json_needs_a_prompt(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe.cli.run._model_and_prompt", lambda *_: (None, None))
    result = run("--json")
    assert result.exit_code == 2 and "--json needs a prompt" in result.stderr


# -- the conversation -------------------------------------------------------------------------------------------


@pytest.fixture
def converse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def start(model: Any, lines: list[str | type[BaseException]], templated: bool, system: str | None = None) -> None:
        answers = iter([*lines, EOFError])

        def read(prompt: str = "") -> str:
            line = next(answers)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        _chat.converse(model, templated, system, {"max_tokens": 9}, verbose=False)

    return start


ANSWER = {"role": "assistant", "content": "".join(WORDS)}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_conversation_with_a_template(converse: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel("T")
    converse(model, ["one", "", "two \\", "lines"], True, "be brief")
    system = {"role": "system", "content": "be brief"}
    assert model.asked == [[system, user("one")], [system, user("one"), ANSWER, user("two \nlines")]]
    assert model.options == {"max_tokens": 9}
    assert capsys.readouterr().out == ("".join(WORDS) + "\n") * 2


def test_thoughts_are_kept_in_the_history(converse: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel("T")
    model.thoughts = ["hm"]
    converse(model, ["one", "two"], True)
    assert model.asked[1] == [user("one"), {**ANSWER, "reasoning_content": "hm"}, user("two")]
    written = capsys.readouterr()
    assert "hm" not in written.out and written.err.count("hm\n") == 2


def test_conversation_without_a_template(converse: Callable[..., None]) -> None:
    model = FakeModel()
    converse(model, ["Once", "And then"], False)
    assert model.asked == ["Once", "Once there was a cat.\nAnd then"]


def test_interrupt_stops_the_answer_only(converse: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel("T")
    model.failure, model.failure_at = KeyboardInterrupt(), 2  # type: ignore[assignment]
    converse(model, ["one", KeyboardInterrupt, "two"], True)
    assert model.asked[1] == [user("one"), {"role": "assistant", "content": " there was"}, user("two")]
    assert "(stopped)" in capsys.readouterr().err


def test_a_failed_turn_did_not_happen(converse: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel("T")
    model.failure, model.failure_at = ReadError("section 5"), 1
    converse(model, ["one", "two"], True)
    assert model.asked == [[user("one")], [user("two")]]
    assert capsys.readouterr().err.count("edgemoe: error: section 5\n") == 2


def test_a_full_context_begins_anew(converse: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel("T")
    chat = model.chat_parts

    def limited(messages: list[Any], **options: Any) -> FakeGeneration:
        if len(messages) > 2:
            raise ContextLengthError("a prompt of 99 tokens")
        return chat(messages, **options)

    model.chat_parts = limited  # type: ignore[method-assign]
    converse(model, ["one", "two", "three"], True)
    assert model.asked == [[user("one")], [user("three")]]
    assert "begins anew" in capsys.readouterr().err


# -- a real model, a real process -------------------------------------------------------------------------------


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    # A shell's background job ignores SIGINT, and so would all that it starts.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from edgemoe.cli import main; main(sys.argv[1:])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(edgemoe.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, **options)


def test_tiny_model(folder: str) -> None:
    first = run(folder, "The quick", "-n", "8", "--temp", "0", "--json", "--ignore-eos")
    assert first.exit_code == 0, first.stderr
    assert "converting" in first.stderr
    report = json.loads(first.stdout)
    assert report["stop_reason"] == "length" and report["stats"]["generated_tokens"] == 8
    second = run(folder, "The quick", "-n", "8", "--temp", "0", "--ignore-eos", "-t", "1")
    assert (second.stdout, second.stderr) == (report["text"], "")


def test_every_sampling_option_runs(folder: str) -> None:
    common = (folder, "The quick", "-n", "6", "-s", "1")
    plain = run(*common, "--ignore-eos", "--temp", "1.5").stdout
    for options in (
        *(["--typical", "0.3"], ["--top-nsigma", "0.5"], ["--xtc-probability", "1", "--xtc-threshold", "0.01"]),
        *(["--repeat-penalty", "5"], ["--presence-penalty", "9"], ["--frequency-penalty", "9"], ["--mirostat", "1"]),
        *(["--mirostat", "2", "--mirostat-ent", "1"], ["--samplers", "temperature"], ["--top-k", "2"]),
        *(["--min-p", "0.9"], ["--top-p", "0.05"], ["--samplers", "top_k", "--top-k", "1"], ["--temp", "0"]),
    ):
        result = run(*common, "--ignore-eos", "--temp", "1.5", *options)
        assert result.exit_code == 0 and result.stdout != plain, (options, result.stderr)
    again = ("--temp", "0", "--ignore-eos", "-n", "40")
    assert (
        run(*common, *again).stdout
        != run(*common, *again, "--dry-multiplier", "50", "--dry-allowed-length", "0").stdout
    )
    report = json.loads(run(*common, "-l", "70+1000", "--json", "--temp", "0").stdout)
    token = edgemoe.load_tokenizer(folder).decode([70])
    assert report["text"] == 6 * token
    result = run(*common, "-l", "100000+1")
    assert result.exit_code == 1 and "token 100000, but the vocabulary has 320" in result.stderr


def test_grammar_and_schema(folder: str) -> None:
    result = run(folder, "Is it?", "--grammar", 'root ::= "yes" | "no"', "--json")
    report = json.loads(result.stdout)
    assert report["text"] in ("yes", "no") and report["stop_reason"] == "eos"
    schema = (
        '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'
    )
    assert json.loads(run(folder, "x", "-j", schema).stdout)["a"] in (1, 2)


def test_python_m_edgemoe(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(edgemoe.__file__).parents[1])}
    arguments = [sys.executable, "-m", "edgemoe", "run", "nowhere.emoe"]
    result = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("edgemoe: error: 'nowhere.emoe'")


def test_prompt_longer_than_the_context(folder: str) -> None:
    result = run(folder, "The quick brown fox " * 40, "-c", "16")
    assert result.exit_code == 1
    assert "does not fit into the context of 16" in result.stderr.splitlines()[-1]
    too_much = run(folder, "x", "-c", "100000")
    assert too_much.exit_code == 1 and "100000" in too_much.stderr


def test_reader_that_leaves_early(folder: str) -> None:
    process = start(
        "run", folder, "-p", "The", "-n", "400", "--ignore-eos", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) in (0, 141)
    assert "Traceback" not in errors and "error" not in errors


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_terminal(folder: str) -> None:
    import pty

    run(folder, "x", "-n", "1")  # converts
    leader, follower = pty.openpty()
    process = start(
        *("run", folder, "-n", "5", "--ignore-eos", "--temp", "0"), stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    shown = b""
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()

    def wait_for(prompts: int, interrupt: bool = False) -> None:
        nonlocal shown
        while shown.count(b"> ") < prompts:
            if select.select([leader], [], [], 0.2)[0]:
                shown += os.read(leader, 4096)
            elif interrupt:  # again and again: Python overlooks one between the prompt and its wait for a key
                process.send_signal(signal.SIGINT)

    try:
        wait_for(1)
        os.write(leader, b"The quick\n")
        wait_for(2)
        wait_for(3, interrupt=True)  # at the prompt: nothing but a new one
        while select.select([leader], [], [], 1.0)[0]:  # what the last interrupts still bring
            shown += os.read(leader, 4096)
        os.write(leader, b"\x04")
        assert process.wait(60) == 0
    finally:
        watchdog.cancel()
        process.kill()
        os.close(leader)
    assert b"Traceback" not in shown and b"error" not in shown
