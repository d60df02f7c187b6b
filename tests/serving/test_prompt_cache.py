"""States on disk: used for what they are of, and for nothing else."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe.convert import convert
from edgemoe.formats.read import read_index
from edgemoe.options import EngineOptions
from edgemoe.serving.prompt_cache import PromptCache, state_key

GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
TEXT = random.Random(1).choices(range(1, 320), k=300)


@pytest.fixture
def pack(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> Path:
    convert(tiny_qwen3_moe(max_position_embeddings=4096), tmp_path / "tiny.emoe", 8)
    return tmp_path / "tiny.emoe"


def answer(path: Path, prompt: list[int], folder: Path | None, **options: Any) -> tuple[str, int]:
    """The text and how many positions were computed for it."""
    with edgemoe.load(path, threads=1, prompt_cache_dir=folder, **options) as model:
        generation = model.generate(prompt, **GREEDY)
        text = "".join(generation)
        return text, generation.result.computed_prompt_tokens


def test_a_conversation_goes_on_after_a_restart(pack: Path, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    expected = answer(pack, TEXT, None)
    assert answer(pack, TEXT, folder) == expected
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # What was generated is part of the state; another text with the same beginning uses that.
    assert answer(pack, TEXT, folder) == (expected[0], 1)
    other = [*TEXT[:280], 5, 6, 7]
    assert answer(pack, other, folder) == (answer(pack, other, None)[0], 3)


def test_states_are_of_a_model_and_its_options(pack: Path, tmp_path: Path, tiny_qwen3_moe: Callable[..., Path]) -> None:
    folder = tmp_path / "states"
    answer(pack, TEXT, folder)
    assert answer(pack, TEXT, folder, cache_type_k="f32")[1] == 300
    assert answer(pack, TEXT, folder, context=1000)[1] == 1
    convert(tiny_qwen3_moe(max_position_embeddings=4096, seed=5), tmp_path / "other.emoe", 8)
    assert answer(tmp_path / "other.emoe", TEXT, folder)[1] == 300
    pack.rename(tmp_path / "renamed.emoe")
    assert answer(tmp_path / "renamed.emoe", TEXT, folder)[1] == 1


@pytest.mark.slow
def test_damaged_files_are_not_used(pack: Path, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    expected = answer(pack, TEXT, folder)
    (file,) = folder.iterdir()
    good = file.read_bytes()
    rng = random.Random(2)
    for case in range(40):
        broken = bytearray(good)
        if case % 4 == 0:
            del broken[rng.randrange(len(broken)) :]
        elif case % 4 == 1:
            broken += b"x"
        else:
            place = rng.randrange(200) if case % 4 == 2 else rng.randrange(len(broken))
            broken[place] ^= 1 << rng.randrange(8)
        for other in folder.iterdir():
            other.unlink()
        file.write_bytes(broken)
        text, computed = answer(pack, TEXT, folder)
        assert text == expected[0] and computed == 300
    for content in (b"", b"edgemoe state 1\n", b"edgemoe state 1\n\xff\xff\xff\xff", b"edgemoe state 1\n\1\0\0\0\xc1"):
        file.write_bytes(content)
        assert answer(pack, TEXT, folder) == expected


def test_the_oldest_leave(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, 5000, "key", True)
    for number in range(6):
        tokens = [number] * 100
        cache.save(tokens, np.zeros(1000, np.uint8))
        cache.wait()
        os.utime(next(path for path in tmp_path.iterdir() if path.stat().st_mtime > number + 1000), (number, number))
    assert 0 < len(list(tmp_path.iterdir())) < 5
    assert not cache.holds([0] * 100) and cache.holds([5] * 100)
    cache.save([9] * 100, np.zeros(6000, np.uint8))
    cache.wait()
    assert not cache.holds([9] * 100)


def test_a_folder_that_cannot_be_written_is_refused(pack: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(edgemoe.OptionError, match="file: the prompt cache cannot be written"):
        edgemoe.load(pack, prompt_cache_dir=tmp_path / "file")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process")
def test_a_killed_process_leaves_nothing_wrong(pack: Path, tmp_path: Path) -> None:
    """At any moment while it writes states."""
    folder = tmp_path / "states"
    code = f"""
        import random, edgemoe
        with edgemoe.load({str(pack)!r}, threads=1, parallel=1, prompt_cache_dir={str(folder)!r}) as model:
            print("ready", flush=True)
            rng = random.Random(1)
            while True:
                text = rng.choices(range(1, 320), k=300)
                "".join(model.generate(text, max_tokens=3, temperature=0, ignore_eos=True))
    """
    for wait in (0.02, 0.2, 0.5):
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        try:
            child.wait(wait)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        child.communicate()
    rng = random.Random(1)
    texts = [rng.choices(range(1, 320), k=300) for _ in range(3)]
    expected = [answer(pack, text, None)[0] for text in texts]
    assert [answer(pack, text, folder)[0] for text in texts] == expected


def test_a_state_finds_room_beside_others(pack: Path, tmp_path: Path) -> None:
    """In a pool that idle sequences have filled; and what another quality left behind is not kept."""
    folder = tmp_path / "states"
    texts = [random.Random(seed).choices(range(1, 320), k=300) for seed in range(4)]
    expected = [answer(pack, text, None) for text in texts]
    with edgemoe.load(pack, threads=1, parallel=3, context=640, prompt_cache_dir=folder) as model:
        for _ in range(2):
            for text, (said, _computed) in zip(texts, expected, strict=True):
                generation = model.generate(text, **GREEDY)
                assert "".join(generation) == said
                model._scheduler.keep()
        assert generation.result.computed_prompt_tokens == 1


def test_a_fault_of_the_cache_is_nobodys(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(pack, TEXT, tmp_path / "states")[0]

    def fail(*_: object) -> None:
        raise MemoryError

    for name in ("_read_state", "save"):
        with monkeypatch.context() as patched:
            patched.setattr(PromptCache, name, fail)
            assert answer(pack, TEXT, tmp_path / "states")[0] == expected


def test_rotary_angles_that_depend_on_the_context_are_part_of_the_key(pack: Path) -> None:
    index = read_index(pack)
    options = EngineOptions(threads=1, context=512, chunk=64)
    other = replace(index, spec=replace(index.spec, context=1000))
    assert state_key(index, options) != state_key(other, options)
