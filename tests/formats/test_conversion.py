"""Conversion: every weight arrives, and whatever happens on the way, the target is a whole pack or does not exist."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import from_dtype, tiny_weights, to_dtype

import edgemoe.convert.conversion
import edgemoe.convert.sections
import edgemoe.source.tensors
from edgemoe.convert import convert, estimate_size
from edgemoe.errors import EdgemoeError, OptionError, PackError, SourceError, UnsupportedModelError
from edgemoe.families import TensorSource
from edgemoe.formats.layouts import tensor_size, unpack
from edgemoe.formats.pack import Pack, PackWriter
from edgemoe.formats.safetensors import SafetensorsFolder
from edgemoe.sampling_names import SAMPLING_NAMES
from edgemoe.source import SourceTensor, packed_rows
from edgemoe.text.sampling import SamplingOptions

Make = Callable[..., Path]

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
    "ffn.gate": "mlp.gate_proj.weight",
    "ffn.up": "mlp.up_proj.weight",
    "ffn.down": "mlp.down_proj.weight",
}


def weights_of(pack: Pack) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Source name and weights of every tensor in the pack."""
    for name, tensor in pack.index.dense.items():
        data = memoryview(pack.read_section(tensor.section))[tensor.offset :]
        rows, columns = (*tensor.shape, 1)[:2]
        size = tensor_size(tensor.layout, tensor.shape)
        weights = unpack(tensor.layout, data[:size], rows, columns).reshape(tensor.shape)
        if name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            yield f"model.layers.{layer}.{NAMES[part]}", weights
        else:
            yield NAMES[name], weights
    for number, layer_experts in pack.index.experts.items():
        for expert, sections in enumerate(layer_experts.sections):
            data = memoryview(pack.read_section(sections[0]))
            for part, place in layer_experts.levels[0].parts.items():
                size = tensor_size(place.layout, place.shape)
                weights = unpack(place.layout, data[place.offset : place.offset + size], *place.shape)
                yield f"model.layers.{number}.mlp.experts.{expert}.{part}_proj.weight", weights


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.is_dir())


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_every_weight_arrives(tiny_qwen3_moe: Make, tmp_path: Path, dtype: str, bits: int) -> None:
    source = tiny_qwen3_moe(dtype=dtype, mlp_only_layers=[1], num_hidden_layers=3)
    convert(source, tmp_path / "a.emoe", bits)
    pack = Pack.open(tmp_path / "a.emoe")
    assert pack.verify() == []
    expected = tiny_weights(json.loads((source / "config.json").read_text()))
    seen = set()
    for name, weights in weights_of(pack):
        seen.add(name)
        original = from_dtype(to_dtype(expected[name], dtype), dtype)
        kept_bits = (
            32
            if original.ndim == 1 or name.endswith("mlp.gate.weight")
            else bits
            if "experts" in name
            else max(bits, 8)
        )
        if kept_bits >= 16:
            np.testing.assert_array_equal(weights, original, err_msg=name)
        else:
            error = np.mean((weights - original) ** 2) / np.mean(original**2)
            assert error < {8: 4e-5, 4: 0.0085}[kept_bits], name
    assert seen == set(expected)
    plain = {"F32": "f32", "BF16": "bf16", "F16": "f16"}[dtype]
    layout = {32: "f32", 16: plain, 8: "q8g64", 4: "q4g64"}[bits]
    assert {part.layout for part in pack.index.experts[0].levels[0].parts.values()} == {layout}
    assert pack.index.dense["layers.0.router"].layout == "f32"
    assert pack.index.dense["layers.0.q_norm"].layout == "vector"
    assert pack.index.dense["head"].layout == ("q8g64" if bits == 4 else layout)


def test_index_facts(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source = tiny_qwen3_moe(
        extra={"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)},
        chat_template="{{ messages }}",
        generation={"eos_token_id": [3, 5], "top_p": 0.9, "repetition_penalty": 1.1, "max_length": 7, "top_k": None},
    )
    convert(source, tmp_path / "a.emoe", 4, dense_bits=16)
    pack = Pack.open(tmp_path / "a.emoe")
    assert pack.unused == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert pack.index.generation == {
        "bos_token_ids": [0],
        "eos_token_ids": [3, 5],
        "top_p": 0.9,
        "repetition_penalty": 1.1,
    }
    assert {key: pack.provenance[key] for key in ("source", "source_format", "bits", "dense_bits")} == {
        "source": source.name,
        "source_format": "safetensors",
        "bits": 4,
        "dense_bits": 16,
    }
    assert pack.index.dense["embedding"].layout == "bf16"
    assert pack.read_blob("chat_template.jinja") == b"{{ messages }}"
    assert pack.read_blob("tokenizer.json") == (source / "tokenizer.json").read_bytes()
    assert pack.index.spec.layers[0].experts == 6
    # One expert, one read: a section begins and ends at a multiple of 4096 and holds nothing else.
    numbers = [number for layer in pack.index.experts.values() for levels in layer.sections for number in levels]
    assert len(set(numbers)) == 12
    assert all(len(section.extents) == 1 for section in pack.index.sections)
    assert all(section.extents[0].offset % 4096 == section.length % 4096 == 0 for section in pack.index.sections)


def test_same_bytes_for_every_form_of_the_source(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    """Twice; in one file, in shards, stacked as transformers 5 can write it."""
    packs = []
    for number, options in enumerate(({}, {}, {"shards": 3}, {"stacked": True}, {"stacked": True, "shards": 4})):
        made = tiny_qwen3_moe(**options)
        source = tmp_path / str(number) / "tiny"
        source.parent.mkdir()
        made.rename(source)
        convert(source, tmp_path / f"{number}.emoe", 4)
        packs.append((tmp_path / f"{number}.emoe").read_bytes())
    assert packs[1:] == packs[:1] * 4


def test_estimate(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source = tiny_qwen3_moe()
    for bits in (32, 4):
        convert(source, tmp_path / "a.emoe", bits, overwrite=True)
        index = 0 < (tmp_path / "a.emoe").stat().st_size - estimate_size(source, bits) < 10_000
        assert index
    calls: list[tuple[int, int]] = []
    convert(source, tmp_path / "b.emoe", 4, progress=lambda done, total: calls.append((done, total)))
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1] == estimate_size(source, 4) - 4096
    assert calls == sorted(calls)


def test_mixed_types_share_a_layout(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    odd = "model.layers.1.mlp.experts.3.up_proj.weight"
    source = tiny_qwen3_moe(dtypes={odd: "F16", "lm_head.weight": "F32"})
    convert(source, tmp_path / "a.emoe", 16)
    pack = Pack.open(tmp_path / "a.emoe")
    assert pack.index.experts[0].levels[0].parts["up"].layout == "bf16"
    assert {name: part.layout for name, part in pack.index.experts[1].levels[0].parts.items()} == {
        "gate": "bf16",
        "up": "f32",
        "down": "bf16",
    }
    assert pack.index.dense["head"].layout == "f32"
    expected = tiny_weights(json.loads((source / "config.json").read_text()))
    read = dict(weights_of(pack))
    np.testing.assert_array_equal(read[odd], expected[odd].astype(np.float16).astype(np.float32))


def test_transposed_source(tiny_qwen3_moe: Make) -> None:
    folder = SafetensorsFolder.open(tiny_qwen3_moe(dtype="F32"))
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    tensor = SourceTensor("up", TensorSource(name, transpose=True), "f32", (72, 40))
    data = b"".join(packed_rows(folder, tensor, "f32"))
    np.testing.assert_array_equal(unpack("f32", data, 72, 40), folder.read(name).T)


def test_pieces_of_rows(tiny_qwen3_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than the working memory are converted some blocks of rows at a time: the bytes are the same."""
    source = tiny_qwen3_moe(stacked=True)
    convert(source, tmp_path / "a.emoe", 4)
    monkeypatch.setattr(edgemoe.source.tensors, "_WEIGHTS_AT_ONCE", 16 * 72)
    monkeypatch.setattr(edgemoe.convert.sections, "_WAITING_BYTES", 1 << 14)
    convert(source, tmp_path / "b.emoe", 4)
    assert (tmp_path / "a.emoe").read_bytes() == (tmp_path / "b.emoe").read_bytes()


# -- interruptions ----------------------------------------------------------------------------------------------------


class Stop:
    """A progress function that raises at its call number `at`."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error

    def __call__(self, done: int, total: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


@pytest.mark.slow
def test_interrupted_anywhere_continues(tiny_qwen3_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tiny_qwen3_moe(num_experts=3), tmp_path / "out" / "a.emoe"
    target.parent.mkdir()
    convert(source, tmp_path / "whole.emoe", 4)
    whole = (tmp_path / "whole.emoe").read_bytes()
    sections = len(Pack.open(tmp_path / "whole.emoe").index.sections)
    resumed_at = []
    create = PackWriter.create

    def noting(*arguments: Any) -> PackWriter:
        writer = create(*arguments)
        resumed_at.append(writer.done)
        return writer

    monkeypatch.setattr(PackWriter, "create", noting)
    for at in range(sections + 1):
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, 4, progress=Stop(at, KeyboardInterrupt()))
        assert left_in(target.parent) == ["a.emoe.journal", "a.emoe.partial"]
        convert(source, target, 4)
        assert target.read_bytes() == whole
        assert left_in(target.parent) == ["a.emoe"]
        target.unlink()
    assert resumed_at[1::2] == list(range(sections + 1))


def test_interrupted_within_a_section(tiny_qwen3_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"
    convert(source, tmp_path / "whole.emoe", 4)
    write, calls = PackWriter._write, iter(range(12))

    def stopping(writer: PackWriter, data: Any) -> int:
        if next(calls, None) is None:
            write(writer, data)  # written, but the section is not finished
            raise KeyboardInterrupt
        return write(writer, data)

    with monkeypatch.context() as patch:
        patch.setattr(PackWriter, "_write", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, 4)
    convert(source, target, 4)
    assert target.read_bytes() == (tmp_path / "whole.emoe").read_bytes()


def test_interrupted_again_and_again(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"
    convert(source, tmp_path / "whole.emoe", 8)
    rounds = 0
    while not target.exists():
        rounds += 1
        with contextlib.suppress(KeyboardInterrupt):
            convert(source, target, 8, progress=Stop(3, KeyboardInterrupt()))
    assert rounds > 3
    assert target.read_bytes() == (tmp_path / "whole.emoe").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["data", "cut data", "cut journal", "journal", "no journal", "options", "source"])
def test_what_is_wrong_in_the_leftovers_is_done_again(tiny_qwen3_moe: Make, tmp_path: Path, harm: str) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"
    partial, journal = tmp_path / "a.emoe.partial", tmp_path / "a.emoe.journal"
    convert(source, tmp_path / "whole.emoe", 4)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, 8 if harm == "options" else 4, progress=Stop(9, KeyboardInterrupt()))
    if harm == "data":
        damaged = bytearray(partial.read_bytes())
        damaged[4096 + 100] ^= 1
        partial.write_bytes(damaged)
    elif harm == "cut data":
        os.truncate(partial, partial.stat().st_size - 1)
    elif harm == "cut journal":
        os.truncate(journal, journal.stat().st_size - 3)
    elif harm == "journal":
        lines = journal.read_bytes().split(b"\n")
        journal.write_bytes(b"\n".join([lines[0], b"[-1, 2]", b"[[", *lines[3:]]))
    elif harm == "no journal":
        journal.unlink()
    elif harm == "source":
        file = source / "model.safetensors"
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    convert(source, target, 4)
    assert target.read_bytes() == (tmp_path / "whole.emoe").read_bytes()
    assert left_in(tmp_path) == ["a.emoe", "whole.emoe"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"
    convert(source, tmp_path / "whole.emoe", 4)
    script = f"""
        import os, signal
        from edgemoe.convert import convert
        calls = iter(range(9))
        convert({str(source)!r}, {str(target)!r}, 4,
                progress=lambda done, total: next(calls, None) is None and os.kill(os.getpid(), signal.SIGKILL))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert (tmp_path / "a.emoe.partial").stat().st_size > 4096
    convert(source, target, 4)
    assert target.read_bytes() == (tmp_path / "whole.emoe").read_bytes()
    assert left_in(tmp_path) == ["a.emoe", "whole.emoe"]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5, 20, 30])
def test_disk_full_leaves_nothing(
    tiny_qwen3_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "out" / "a.emoe"
    target.parent.mkdir()
    write, calls = PackWriter._write, iter(range(at))

    def full(writer: PackWriter, data: Any) -> int:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", "a.emoe.partial")
        return write(writer, data)

    monkeypatch.setattr(PackWriter, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, target, 4)
    assert left_in(target.parent) == []


def test_disk_full_for_real(tiny_qwen3_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, small = tiny_qwen3_moe(), tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a tmpfs")
    try:
        with pytest.raises(PackError, match=r"a\.emoe: needs .* GB, .* GB are free"):
            convert(source, small / "a.emoe", 4)
        assert left_in(small) == []
        monkeypatch.setattr(edgemoe.convert.conversion, "_require_space", lambda *_: None)
        with pytest.raises(OSError, match="No space left") as caught:
            convert(source, small / "a.emoe", 4)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(small / "a.emoe.partial")
        assert left_in(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_target_exists(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source, target = tiny_qwen3_moe(), tmp_path / "a.emoe"
    target.write_bytes(b"precious")
    with pytest.raises(PackError, match="exists already"):
        convert(source, target, 4)
    with pytest.raises(RuntimeError):
        convert(source, target, 4, progress=Stop(5, RuntimeError()), overwrite=True)
    assert target.read_bytes() == b"precious"
    assert left_in(tmp_path) == ["a.emoe"]
    convert(source, target, 4, overwrite=True)
    Pack.open(target)
    with pytest.raises(PackError, match="is a folder"):
        convert(source, tmp_path, 4, overwrite=True)
    with pytest.raises(PackError, match="no such folder"):
        convert(source, tmp_path / "gone" / "a.emoe", 4)


def test_a_pack_keeps_what_its_folder_says_about_sampling(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    """Every option that generation_config.json may decide."""
    given = {sampling.config: 0.5 for sampling in SAMPLING_NAMES} | {"top_k": 7}
    folder = tiny_qwen3_moe(generation={**given, "max_new_tokens": 3})
    convert(folder, tmp_path / "a.emoe", 32)
    defaults = Pack.open(tmp_path / "a.emoe").index.generation
    assert {name: value for name, value in defaults.items() if not name.endswith("_ids")} == given
    options = SamplingOptions.merged({}, defaults)
    assert {sampling.config: getattr(options, sampling.option) for sampling in SAMPLING_NAMES} == given


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_that_cannot_be_quantized(tiny_qwen3_moe: Make, tmp_path: Path, bad: float) -> None:
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    values = np.zeros((72, 40), np.float32)
    values[70, 3] = bad
    source, target = tiny_qwen3_moe(extra={name: values}), tmp_path / "out" / "a.emoe"
    target.parent.mkdir()
    with pytest.raises(SourceError, match=rf"tensor {name}, rows 0-72: the weight .* does not fit float16 scales"):
        convert(source, target, 4)
    assert left_in(target.parent) == []
    convert(source, target, 16)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model_type": "gpt5_moe"}, UnsupportedModelError, "config.json: model_type = 'gpt5_moe' is not supported"),
        ({"attention_bias": True}, UnsupportedModelError, "config.json: qwen3_moe: attention_bias = True"),
        ({"num_hidden_layers": None}, SourceError, "config.json: qwen3_moe: num_hidden_layers is missing"),
        ({"num_experts": 60000}, SourceError, "config.json: 120000 experts, but only"),
        ({"generation": {"eos_token_id": "x"}}, SourceError, "eos_token_id = ['x'] is not a token id"),
        ({"generation": {"temperature": "hot"}}, SourceError, "generation_config.json: temperature = 'hot'"),
    ],
)
def test_folders_that_are_refused(
    tiny_qwen3_moe: Make, tmp_path: Path, options: dict[str, Any], kind: type[EdgemoeError], message: str
) -> None:
    changed = {name: options.pop(name) for name in list(options) if name not in ("generation",)}
    source = tiny_qwen3_moe(**options)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(kind) as caught:
        convert(source, tmp_path / "a.emoe", 4)
    assert message in str(caught.value)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "stacked", "message"),
    [
        ({"vocab_size": 321}, False, "embed_tokens.weight: shape [320, 72] does not give embedding [321, 72]"),
        ({"hidden_size": 64}, False, "embed_tokens.weight: shape [320, 72] does not give embedding [320, 64]"),
        ({"num_experts": 7}, False, "gate.weight: shape [6, 72] does not give layers.0.router [7, 72]"),
        ({"num_hidden_layers": 3}, False, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"moe_intermediate_size": 41}, False, "does not give layers.0.experts.0.gate [41, 72]"),
        ({"moe_intermediate_size": 41}, True, "does not give layers.0.experts.0.up [41, 72]"),
        ({"moe_intermediate_size": 39}, True, "does not give layers.0.experts.0.down [72, 39]"),
    ],
)
def test_config_and_tensors_disagree(
    tiny_qwen3_moe: Make, tmp_path: Path, changed: dict[str, Any], stacked: bool, message: str
) -> None:
    source = tiny_qwen3_moe(stacked=stacked)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(SourceError) as caught:
        convert(source, tmp_path / "a.emoe", 4)
    assert message in str(caught.value)
    assert left_in(tmp_path) == []


def test_unsupported_dtype(tmp_path: Path, tiny_qwen3_moe: Make) -> None:
    source = tiny_qwen3_moe()
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype": "BF16"', b'"dtype": "I16" ', 1))
    with pytest.raises(UnsupportedModelError, match=r"tensor lm_head\.weight: dtype i16 is not supported"):
        convert(source, tmp_path / "a.emoe", 4)


def test_other_refusals(tiny_qwen3_moe: Make, tmp_path: Path) -> None:
    source = tiny_qwen3_moe()
    with pytest.raises(OptionError, match="bits = 5 is not one of 32, 16, 8, 4"):
        convert(source, tmp_path / "a.emoe", 5)
    with pytest.raises(OptionError, match="dense_bits = 2"):
        convert(source, tmp_path / "a.emoe", 4, dense_bits=2)
    with pytest.raises(SourceError, match="no such folder"):
        convert(tmp_path / "gone", tmp_path / "a.emoe", 4)
    with pytest.raises(SourceError, match="not a model folder"):
        convert(source / "config.json", tmp_path / "a.emoe", 4)
    (source / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json: no such file"):
        convert(source, tmp_path / "a.emoe", 4)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM")
@pytest.mark.parametrize("bits", [32, 4])
def test_memory_stays_far_below_the_model(tiny_qwen3_moe: Make, tmp_path: Path, bits: int) -> None:
    """112 MB of float32 in 4 shards; the process may grow by a fraction of that."""
    source = tiny_qwen3_moe(
        dtype="F32", shards=4, hidden_size=512, moe_intermediate_size=1024, num_experts=8, vocab_size=4000
    )
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 100e6
    script = f"""
        import re
        import edgemoe.convert.sections
        edgemoe.convert.sections._WAITING_BYTES = 16 << 20  # else finished experts may wait for the disk in 256 MiB
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
        before = peak()
        edgemoe.convert.convert({str(source)!r}, {str(tmp_path / "a.emoe")!r}, {bits})
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 0.6 * size
