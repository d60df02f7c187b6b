"""A model on a device, as users load it: what it says does not depend on what lies where. And what they are told where
a device cannot be used."""

from __future__ import annotations

import gc
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, WrongCuda
from helpers import finished, slow_except
from numpy.typing import NDArray
from tiny_gguf import tiny

import edgemoe
from edgemoe import device_check, devices, memory
from edgemoe.convert import convert
from edgemoe.device_memory import RESERVE, automatic_vram, plan_device
from edgemoe.engine import plan_memory
from edgemoe.errors import DeviceError, DeviceMemoryError, MemoryBudgetError, OptionError
from edgemoe.formats.read import read_index
from edgemoe.model_files import bundled_model
from edgemoe.options import EngineOptions
from edgemoe.text.named_templates import NAMED_TEMPLATES

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
EMULATED: dict[str, Any] = {"gpu": "emulated", "threads": 1}
CPU: dict[str, Any] = {"gpu": "none", "threads": 1}
OUT_OF_MEMORY = 2
"""A status of the driver."""


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return random.Random(3).choices(range(1, 320), k=70)


@pytest.fixture
def pack(tiny_qwen3_moe: Callable[..., Path], tmp_path: Path) -> Path:
    """Of 8 bits, 3 layers of 8 experts."""
    convert(tiny_qwen3_moe(num_hidden_layers=3, num_experts=8), tmp_path / "tiny.emoe", 8)
    return tmp_path / "tiny.emoe"


def logits(path: Path | None, tokens: list[int], **options: Any) -> NDArray[np.float32]:
    with edgemoe.load(path, context=256, **options) as model:
        return model.logits(tokens)


def same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.tobytes() == b.tobytes()


# -- the same, wherever it lies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", slow_except([0, 1, 2, 99], 2))
def test_the_bundled_model_says_the_same(layers: int) -> None:
    said = []
    for options in (CPU, EMULATED | {"gpu_layers": layers}):
        with edgemoe.load(context=128, **options) as model:
            prompt = model.tokenizer.encode("Once upon a time there was a tree.")
            said.append((model.logits(prompt).tobytes(), "".join(model.generate(prompt, max_tokens=6, **GREEDY))))
            assert (model.device is not None) == (options != CPU and layers > 0)
            if model.device is not None:
                assert model.device.budget.layers == min(layers, 5)
                assert model.device.budget.slots == model.device.budget.all_slots == 32 * min(layers, 4)
                assert model.counters()["device_hits"] > 0
    assert said[0] == said[1]


@pytest.mark.parametrize("quality", slow_except(["high", "balanced", "fast"], "fast"))
def test_lossy_qualities(quality: str) -> None:
    tokens = random.Random(1).choices(range(1, 2000), k=24)
    wanted = logits(None, tokens, quality=quality, **CPU)
    assert same(logits(None, tokens, quality=quality, gpu_layers=3, **EMULATED), wanted)
    with edgemoe.load(context=128, gpu_layers=2, **EMULATED) as exact, edgemoe.load(context=128, **CPU) as cpu:
        # Texts of several qualities, of which one is the model's.
        for own in (quality, "exact", quality):
            texts = [finished(model.generate(tokens, max_tokens=3, quality=own, **GREEDY)) for model in (exact, cpu)]
            assert texts[0].tokens == texts[1].tokens


def test_few_experts_in_both_memories(pack: Path, tokens: list[int]) -> None:
    wanted = logits(pack, tokens, **CPU)
    for slots, chunk in ((6, 4), (2, 1)):
        options = EMULATED | {"expert_slots": slots, "chunk": chunk, "readers": 2}
        with edgemoe.load(pack, context=256, gpu_layers=2, **options) as model:
            assert model.device is not None
            least = model.device.budget.taken - model.device.budget.slots * model.device.budget.slot_bytes
            room = RESERVE + least + 4 * model.device.budget.slot_bytes  # of 16
        with edgemoe.load(pack, context=256, gpu_layers=2, vram=room, **options) as model:
            assert model.device is not None and (model.device.budget.slots, model.options.device_slots) == (4, 4)
            assert same(model.logits(tokens), wanted)
            counters = model.counters()
            assert counters["evictions"] > 0 and counters["device_uploads"] > 0 and counters["device_hits"] > 0
            assert counters["device_upload_bytes"] > 0


@pytest.mark.parametrize("kind", slow_except(["q4_k", "q8_0", "q6_k", "f16"], "q4_k"))
def test_a_gguf_file(kind: str, tmp_path: Path, tokens: list[int]) -> None:
    path = tiny(tmp_path, kind)
    found = []
    for options in (CPU, EMULATED):
        with edgemoe.load(path, **options) as model:
            found.append(model.logits([token % 260 for token in tokens[:20]]))
    assert same(*found)


def test_texts_at_once(pack: Path, tokens: list[int]) -> None:
    prompts = [tokens[: 5 + 9 * number] for number in range(6)]
    with edgemoe.load(pack, context=256, **CPU) as model:
        alone = [finished(model.generate(prompt, max_tokens=5, **GREEDY)).tokens for prompt in prompts]
    with edgemoe.load(pack, context=256, parallel=4, **EMULATED) as model:
        found: dict[int, Any] = {}

        def answer(number: int) -> None:
            found[number] = finished(model.generate(prompts[number], max_tokens=5, **GREEDY)).tokens

        threads = [threading.Thread(target=answer, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[number] for number in range(6)] == alone


def test_what_a_sequence_holds_is_used_again(pack: Path, tokens: list[int]) -> None:
    with (
        edgemoe.load(pack, context=256, gpu_layers=2, **EMULATED) as model,
        edgemoe.load(pack, context=256, **CPU) as cpu,
    ):
        other = [*tokens[:40], 7, 8, 9]
        for prompt, computed in ((tokens, 70), (other, 3), (tokens[:30], 1)):
            results = [finished(one.generate(prompt, max_tokens=4, **GREEDY)) for one in (model, cpu)]
            assert results[0].tokens == results[1].tokens
            assert results[0].computed_prompt_tokens == results[1].computed_prompt_tokens == computed


def test_sequences_are_forked_and_truncated(pack: Path, tokens: list[int]) -> None:
    ends = []
    for options in (CPU, EMULATED):
        with edgemoe.load(pack, context=256, parallel=3, **options) as model:
            engine = model.engine
            ids, places = np.array(tokens, np.int32), np.arange(70, dtype=np.int32)
            engine.forward(ids, places, np.zeros(70, np.int32), [])
            engine.remove_sequence(2)
            fork = engine.fork(0, 65)  # within a block
            engine.truncate(0, 10)
            more = [engine.forward([5], [length], [id], [0]) for id, length in ((fork, 65), (0, 10), (fork, 66))]
            ends.append(np.concatenate(more).tobytes())
    assert ends[0] == ends[1]


def test_states_on_disk_are_of_no_device(pack: Path, tokens: list[int], tmp_path: Path) -> None:
    wanted, prompt = None, tokens * 4
    # What one has kept another goes on with.
    for number, options in enumerate((EMULATED, CPU, EMULATED | {"gpu_layers": 1})):
        with edgemoe.load(pack, context=300, prompt_cache_dir=tmp_path / "states", **options) as model:
            result = finished(model.generate(prompt, max_tokens=5, **GREEDY))
            wanted = wanted or result.tokens
            assert result.tokens == wanted
            assert result.computed_prompt_tokens == (280 if number == 0 else 1)


def test_snapshots_are_of_no_device(pack: Path, tokens: list[int]) -> None:
    with (
        edgemoe.load(pack, context=256, gpu_layers=2, **EMULATED) as model,
        edgemoe.load(pack, context=256, **CPU) as cpu,
    ):
        model.next_logits(tokens)
        cpu.restore(model.snapshot())
        assert same(cpu.next_logits([*tokens, 4]), model.next_logits([*tokens, 4]))


def test_a_conversation() -> None:
    said = []
    for options in (CPU, EMULATED | {"gpu_layers": 3}):
        with edgemoe.load(context=256, **options) as model:
            model.tokenizer.use_chat_template(NAMED_TEMPLATES["chatml"])
            messages = [{"role": "user", "content": "Tell me of the sea."}]
            answer = "".join(model.chat(messages, max_tokens=5, **GREEDY))
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
            again = model.chat(messages, max_tokens=5, **GREEDY)
            said.append((answer, "".join(again), again.result.computed_prompt_tokens))
            assert again.result.computed_prompt_tokens < again.result.prompt_tokens
    assert said[0] == said[1]


# -- dividing its memory ----------------------------------------------------------------------------------------------


def test_layers_first_then_experts() -> None:
    index = read_index(bundled_model())
    options = EngineOptions(threads=1, context=512, sequences=2, positions=512)
    before = plan_device(0, index, options)
    assert (before.layers, before.slots, before.taken) == (0, 0, 0)
    for size in range(33_000_000, 75_000_000, 1_000_000):
        found = plan_device(size, index, options)
        assert found.taken <= max(size - RESERVE, 0)
        assert 4 * found.scratch <= size - RESERVE or found.chunk == 32
        assert found.layers >= before.layers or found.chunk > before.chunk
        if found.slots < found.all_slots and found.layers:
            assert found.taken + found.slot_bytes > size - RESERVE
        if found.layers < 5:
            with pytest.raises(MemoryBudgetError):
                plan_device(size, index, options, layers=found.layers + 1, chunk=found.chunk)
        before = found
    assert before.layers == 5 and before.slots == before.all_slots == 128


def test_a_number_that_does_not_fit_names_one_that_does() -> None:
    index = read_index(bundled_model())
    options = EngineOptions(threads=1, context=512, sequences=2, positions=512)
    with pytest.raises(
        MemoryBudgetError, match=r"too little for 4 layers .* least that works is --vram (\d+)MB"
    ) as told:
        plan_device(34_000_000, index, options, layers=4)
    least = int(str(told.value).split("--vram ")[1].split("MB")[0])
    assert plan_device(least * 10**6, index, options, layers=4, chunk=32).layers == 4
    fit = int(str(told.value).rsplit(" ", 1)[1])
    assert plan_device(34_000_000, index, options, layers=fit).layers == fit < 4


def test_auto_leaves_a_margin() -> None:
    assert automatic_vram(8 * 10**9) == 75 * 10**8
    assert automatic_vram(8 * 10**8) == 7 * 10**8


def test_the_processors_budget_is_without_what_the_device_has(pack: Path) -> None:
    with edgemoe.load(pack, **CPU) as cpu, edgemoe.load(pack, gpu_layers=2, **EMULATED) as model:
        assert model.device is not None
        assert model.budget.dense < cpu.budget.dense
        assert model.budget.state + model.device.budget.state == cpu.budget.state


def test_copies_of_states_are_the_hosts(pack: Path, tmp_path: Path) -> None:
    kept = {"prompt_cache_dir": tmp_path / "states"}
    with edgemoe.load(pack, **CPU, **kept) as cpu, edgemoe.load(pack, **EMULATED, **kept) as model:
        assert model.device is not None and model.device.budget.state > 0
        assert model.budget.state + model.device.budget.state == cpu.budget.state


def test_both_memories_are_planned_with_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "used_now", lambda: 50_000_000)
    index = read_index(bundled_model())
    for options, smaller in (({"memory": 95_000_000}, True), ({"vram": 45_000_000}, True), ({}, False)):
        with edgemoe.load(gpu_layers=2, context=256, **EMULATED, **options) as model:
            assert model.device is not None
            placed, planned = model.device.budget, plan_memory(index, model.options)
            assert model.options.chunk == model.budget.chunk == placed.chunk
            assert (placed.chunk < 512) == smaller
            assert (placed.scratch, placed.state) == (planned.device_scratch, planned.device_state)


def test_a_device_too_small_for_a_layer_is_not_used(pack: Path) -> None:
    told: list[str] = []
    with edgemoe.load(pack, vram="30MB", announce=told.append, **EMULATED) as model:
        assert model.device is None
    assert told == ["emulated: 30 MB of its memory hold no layer; the processor computes everything"]
    with pytest.raises(MemoryBudgetError, match="30 MB of the device's memory are too little for 1 layers"):
        edgemoe.load(pack, vram="30MB", gpu_layers=1, **EMULATED)


# -- GPUs that are not there, or fail ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is kept that the fake driver's kernels are right."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    monkeypatch.setattr(devices, "CUDA_LIBRARY", fake.path)
    monkeypatch.setenv("EDGEMOE_CACHE", str(cache))
    device = devices.open_device("cuda")
    assert device is not None and device_check.wrong_kernels(device, cache) == []
    del device
    gc.collect()
    fake.launches.clear()
    yield fake
    gc.collect()  # what is left of a device must not meet another one's driver


def test_without_a_driver(pack: Path) -> None:
    told: list[str] = []
    with edgemoe.load(pack, announce=told.append) as model:
        assert model.device is None
        assert "device_hits" not in model.counters()
    assert told == []
    with edgemoe.load(pack, gpu_layers=2, announce=told.append) as model:
        assert model.device is None
    assert told == ["there is no GPU: the processor computes everything"]
    with pytest.raises(DeviceError, match=r"--gpu cuda: no NVIDIA driver: /nowhere/.*--gpu none computes without it"):
        edgemoe.load(pack, gpu="cuda")


def test_a_driver_that_fails_is_told_and_one_without_a_gpu_is_not(pack: Path, cuda: FakeCuda) -> None:
    for fact, value, wanted in (
        ("devices", 0, []),
        (
            "version",
            11080,
            ["the GPU is not used: the NVIDIA driver is of CUDA 11.8, but the kernels need 12.0 or later"],
        ),
    ):
        cuda.set(fact, value)
        told: list[str] = []
        with edgemoe.load(pack, announce=told.append) as model:
            assert model.device is None
        assert told == [f"{line}; the processor computes everything" for line in wanted]
        cuda.set(fact, {"devices": 1, "version": 12040}[fact])


def test_a_gpu_is_used(pack: Path, tokens: list[int], cuda: FakeCuda) -> None:
    ids = tokens[:12]
    wanted = logits(pack, ids, **CPU)
    for gpu in ("auto", "cuda"):
        with edgemoe.load(pack, context=256, threads=1, gpu=gpu) as model:
            assert model.device is not None and model.device.kind == "cuda"
            assert same(model.logits(ids), wanted)
            assert "layers and the head" in repr(model)
    assert not cuda.errors
    assert not {kind: count for kind, count in cuda.live().items() if kind == "allocations"}


def test_a_gpu_with_a_wrong_kernel(
    pack: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Is found out when a model is loaded, and remembered."""
    fake = WrongCuda()
    monkeypatch.setattr(devices, "CUDA_LIBRARY", fake.path)
    monkeypatch.setenv("EDGEMOE_CACHE", str(tmp_path))
    ids, told, counts = tokens[:12], list[str](), list[int]()
    for _ in range(2):
        with edgemoe.load(pack, context=256, threads=1, announce=told.append) as model:
            assert model.device is None
            assert same(model.logits(ids), logits(pack, ids, **CPU))
        counts.append(len(fake.launches))
    assert counts[0] == counts[1] > 0  # the second time it was known
    wrong = "add_vector give other bits than the processor's (edgemoe doctor --gpu looks again)"
    assert told == [f"Fake 0: {wrong}; the processor computes everything"] * 2
    with pytest.raises(DeviceError, match=r"add_vector give other bits .*; --gpu none computes without it"):
        edgemoe.load(pack, gpu="cuda")
    # A file that anybody may have written is not believed.
    kept = tmp_path / "devices.json"
    kept.write_text(json.dumps(dict.fromkeys(json.loads(kept.read_text()), "x")))
    with edgemoe.load(pack, announce=told.append) as model:
        assert model.device is None
    gc.collect()


@pytest.mark.parametrize("n", [1, 2])
def test_a_gpu_without_room(pack: Path, tokens: list[int], cuda: FakeCuda, n: int) -> None:
    told: list[str] = []
    cuda.fail("cuMemAlloc_v2", OUT_OF_MEMORY, n)
    with edgemoe.load(pack, context=256, announce=told.append) as model:
        assert model.device is None
        assert same(model.logits(tokens), logits(pack, tokens, **CPU))
    assert len(told) == 1 and "; the processor computes everything" in told[0]
    assert "allocations" not in cuda.live()
    cuda.fail("cuMemAlloc_v2", OUT_OF_MEMORY, n)
    way_out = "a smaller --vram or -ngl takes less of it, --gpu none computes without"
    with pytest.raises(DeviceMemoryError, match=way_out) as error:
        edgemoe.load(pack, gpu="cuda")
    assert "contexts" not in cuda.live() and error


def test_a_gpu_that_is_lost(pack: Path, tokens: list[int], cuda: FakeCuda) -> None:
    with edgemoe.load(pack, context=256, gpu="cuda") as model:
        generation = iter(model.generate(tokens, max_tokens=20, **GREEDY))
        next(generation)
        cuda.lose(999)
        with pytest.raises(DeviceError, match="load the model again, or with --gpu none") as told:
            list(generation)
    # Nothing of it is left, though the error is.
    assert "contexts" not in cuda.live() and told


def test_memory_that_is_the_processors(pack: Path, cuda: FakeCuda) -> None:
    cuda.set("integrated", 1)
    told: list[str] = []
    with edgemoe.load(pack, announce=told.append) as model:
        assert model.device is None
    assert len(told) == 1 and "shares the processor's memory: say with --vram" in told[0]
    with pytest.raises(OptionError, match="shares the processor's memory: say with --vram how much"):
        edgemoe.load(pack, gpu="cuda")
    limit = memory.used_now() + 400_000_000  # whatever other tests have loaded into this process
    with edgemoe.load(pack, gpu="cuda", vram="60MB", memory=limit) as model:
        assert model.device is not None
        assert model.budget.limit == limit
        assert model.budget.base > model.device.budget.taken


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gpu": "metal"}, "gpu = 'metal' is not one of auto, none, cuda, emulated"),
        ({"gpu_layers": -1}, "gpu_layers = -1 is not at least 0"),
        ({"gpu_layers": "all"}, "gpu_layers = 'all' is not a whole number"),
        ({"vram": "8XB"}, "vram '8XB' is not a size"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        edgemoe.load(**options)
