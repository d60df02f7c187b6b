"""Every family against `transformers`, against its own GGUF form, and against itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemoe
from edgemoe.convert import convert
from edgemoe.formats.pack import Pack
from edgemoe.formats.read import read_index
from edgemoe.quantize.layerwise import LayerwiseModel, original_index
from edgemoe.quantize.nested_experts import NestedOptions
from edgemoe.source import SourceModel

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

import mixer_table
from family_table import CASES as FAMILY_CASES
from family_table import VOCABULARY, expected_logits, with_options, write_folder, write_gguf
from helpers import slow_except

CASES = {**FAMILY_CASES, **mixer_table.CASES}
# Every kind of layer, and of router.
KINDS = ("qwen2_moe", "gpt_oss", "gemma4", "phimoe", "deepseek_v3", "lfm2_moe", "qwen3_next")

F32_STATE: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}
Load = Callable[..., edgemoe.Model]


@pytest.fixture(scope="module", params=slow_except(CASES, *KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a case, and a folder with its model as "hf", converted at 32 bits as "model.emoe", and the logits of
    its tokens by transformers as "expected.npy"."""
    folder, case = tmp_path_factory.mktemp("model"), CASES[request.param]
    reference = write_folder(folder / "hf", case)
    if case.oracle:
        reference = with_options(folder / "hf", case.oracle)
    np.save(folder / "expected.npy", expected_logits(reference, tokens_of(request.param)))
    convert(folder / "hf", folder / "model.emoe", 32)
    return request.param, folder


@pytest.fixture
def load(model: tuple[str, Path]) -> Load:
    """Loads with a given chunk size or share of the experts instead of what the budget gives."""

    def load(path: Path, chunk: int = 512, share: float = 1.0, **options: Any) -> edgemoe.Model:
        experts = sum(layer.experts for layer in read_index(path).spec.layers)
        slots = max(1, int(experts * share)) if experts else None
        usual = {**F32_STATE, "context": CASES[model[0]].context, "parallel": 1}
        return edgemoe.load(path, chunk=chunk, expert_slots=slots, **{**usual, **options})

    return load


def tokens_of(name: str) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCABULARY, CASES[name].positions).astype(np.int32)


@pytest.mark.slow
def test_logits_equal_transformers(model: tuple[str, Path], load: Load) -> None:
    name, folder = model
    tokens = tokens_of(name)
    expected = np.load(folder / "expected.npy")
    tolerance = 2e-3 * (expected.max() - expected.min())
    with load(folder / "model.emoe") as engine:
        assert np.abs(engine.logits(tokens) - expected).max() <= tolerance
        # The second half token by token.
        half = len(tokens) // 2
        engine.logits(tokens[:half])
        steps = [engine.forward([tokens[i]], [i], [0], [0])[0] for i in range(half, len(tokens))]
        assert np.abs(np.stack(steps) - expected[half:]).max() <= tolerance


def test_gguf_of_the_same_weights(model: tuple[str, Path], load: Load) -> None:
    name, folder = model
    tokens = tokens_of(name)
    if not CASES[name].architecture:
        pytest.skip("GGUF files cannot say what this model has")
    path = write_gguf(folder / "model.gguf", folder / "hf", CASES[name])
    with load(folder / "model.emoe") as engine:
        expected = engine.logits(tokens)
    with load(path) as engine:
        # Pairs of rotary elements may be summed in another order.
        assert np.abs(engine.logits(tokens) - expected).max() <= 1e-4 * (expected.max() - expected.min())


def test_bits_do_not_depend_on_how_they_are_computed(
    model: tuple[str, Path], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = model
    tokens = tokens_of(name)
    with load(folder / "model.emoe", threads=1) as engine:
        expected = engine.logits(tokens).tobytes()
    variants: list[dict[str, Any]] = [{"threads": 3, "chunk": 7}, {"share": 0.4, "threads": 2, "chunk": 33}, {}]
    for variant in variants:
        monkeypatch.setenv("EDGEMOE_ISA", "" if variant else "scalar")
        with load(folder / "model.emoe", **variant) as engine:
            assert engine.logits(tokens).tobytes() == expected, variant


def test_generation_in_four_tenths_of_the_memory(model: tuple[str, Path], load: Load) -> None:
    name, folder = model
    prompt = tokens_of(name)[:20].tolist()
    texts = []
    for share in (1.0, 0.4):
        with load(folder / "model.emoe", share=share) as engine:
            texts.append("".join(engine.generate(prompt, max_tokens=24, temperature=0, ignore_eos=True)))
            again = "".join(engine.generate(prompt[:12], max_tokens=4, temperature=0, ignore_eos=True))
            texts.append(again)
    assert texts[:2] == texts[2:]
    assert texts[0]


def test_snapshots_and_prefixes(model: tuple[str, Path], load: Load) -> None:
    name, folder = model
    tokens = tokens_of(name)
    cut = len(tokens) - 30
    with load(folder / "model.emoe", chunk=16) as engine:
        expected = engine.logits(tokens)[-1].tobytes()
        engine.logits(tokens[:cut])
        held = engine.snapshot()
        engine.logits(tokens[::-1].copy())
        engine.restore(held)
        steps = np.arange(cut, len(tokens), dtype=np.int32)
        after = engine.forward(tokens[cut:], steps, np.zeros_like(steps), [len(steps) - 1])
        assert after[0].tobytes() == expected
        # A shorter prefix than what is held: cut off, or computed anew where a window has moved on.
        for length in (len(tokens) - 5, 3, len(tokens) - 1):
            other = [*tokens[:length].tolist(), 5, 6]
            reused = engine.next_logits(other).tobytes()
            assert engine.logits(other)[-1].tobytes() == reused
            engine.next_logits(tokens.tolist())


def test_layer_by_layer_equals_the_whole(model: tuple[str, Path], load: Load, tmp_path: Path) -> None:
    """As a calibration runs it: the folder's own weights, where they lie."""
    name, folder = model
    tokens = tokens_of(name)
    spec, window = SourceModel.open(folder / "hf").spec, len(tokens)
    index = original_index(folder / "hf", tmp_path)
    parts = LayerwiseModel(index, window, threads=1, memory=10**9, work=tmp_path)
    residual = np.zeros((1, window, spec.hidden_size), np.float32)
    for layer in range(len(spec.layers)):
        logits = list(parts.run(layer, tokens[None], residual, None, np.arange(window, dtype=np.int32)))
    with load(folder / "model.emoe", context=window, cache_type_k="f16", cache_type_v="f16") as engine:
        np.testing.assert_array_equal(logits[0], engine.logits(tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss, other layers, low limit",
        "deepseek_v2, experts in groups",
        "qwen3_next, other proportions, a dense layer",
    ],
)
def test_levels_are_calibrated(name: str, tmp_path: Path) -> None:
    import tokenizers

    write_folder(tmp_path / "hf", CASES[name])
    path = str(tmp_path / "hf" / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(path)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"<{i}>" for i in np.random.default_rng(3).integers(0, VOCABULARY, 600)))
    nested = NestedOptions((2, 8), text, tokens=512, quality_text=text, quality_tokens=256, threads=1)
    convert(tmp_path / "hf", tmp_path / "a.emoe", dense_bits=32, nested=nested)
    coarse, fine = Pack.open(tmp_path / "a.emoe").index.quality.levels
    assert 5 * fine.kl < coarse.kl
    assert fine.kl < 0.1
