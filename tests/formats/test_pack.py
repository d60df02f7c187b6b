"""The pack: what the reader refuses. Every change to a pack is found, named and cheap to find."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from helpers import byte_level_tokenizer, write_tiny_qwen3_moe

from edgemoe._core import crc32c
from edgemoe.convert import convert
from edgemoe.errors import PackError
from edgemoe.formats.index import ModeQuality
from edgemoe.formats.pack import BLOCK, MAX_INDEX, Pack, PackWriter

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def pack_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A pack with a dense and a mixture-of-experts layer."""
    folder = tmp_path_factory.mktemp("source")
    write_tiny_qwen3_moe(folder / "tiny", mlp_only_layers=[0], num_experts=3, tokenizer=byte_level_tokenizer())
    convert(folder / "tiny", folder / "tiny.emoe", 4)
    return (folder / "tiny.emoe").read_bytes()


def split(pack: bytes) -> tuple[bytes, dict[str, Any]]:
    """(everything before the index, the index)."""
    offset, length = struct.unpack_from("<QQ", pack, 8)
    return pack[:offset], msgpack.unpackb(pack[offset : offset + length])


def joined(sections: bytes, index: bytes, version: int = 1) -> bytes:
    """A pack whose checksums are right, whatever the index says."""
    header = struct.pack("<4sIQQI", b"EMOE", version, len(sections), len(index), crc32c(index))
    header += struct.pack("<I", crc32c(header))
    return header.ljust(BLOCK, b"\0") + sections[BLOCK:] + index


def refusal(path: Path, content: bytes) -> str:
    """The message of the PackError that opening these bytes must raise, and quickly."""
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(PackError) as caught:
        Pack.open(path)
    assert time.process_time() - start < 20
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message) < 500 + len(str(path))
    assert len(message.splitlines()) == 1
    return message


def test_reads_back(pack_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.emoe"
    path.write_bytes(pack_bytes)
    pack = Pack.open(path)
    assert pack.index.path == path
    assert pack.index.files == (str(path),)
    assert pack.verify() == []
    assert set(pack.index.dense) == set(pack.index.spec.dense_tensors())
    assert list(pack.index.experts) == [1]
    assert [level.bits for level in pack.index.experts[1].levels] == [4]
    assert len(pack.index.experts[1].sections) == 3
    assert json.loads(pack.read_blob("tokenizer.json"))["version"] == "1.0"
    with pytest.raises(PackError, match="no chat_template"):
        pack.read_blob("chat_template.jinja")
    used = {tensor.section for tensor in pack.index.dense.values()} | {blob.section for blob in pack.blobs.values()}
    used |= {number for numbers in pack.index.experts[1].sections for number in numbers}
    assert used == set(range(len(pack.index.sections)))


def test_every_truncation(pack_bytes: bytes, tmp_path: Path) -> None:
    length = len(pack_bytes)
    for size in [0, 1, 3, 4, 8, 27, 31, 32, 4095, 4096, 4097, 8192, length // 2, length - 4096, length - 2, length - 1]:
        refusal(tmp_path / "a.emoe", pack_bytes[:size])
    assert "does not end a file" in refusal(tmp_path / "a.emoe", pack_bytes + b"\0")


def test_every_bit_of_the_header(pack_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.emoe"
    for at in range(32):
        for bit in range(8):
            damaged = bytearray(pack_bytes)
            damaged[at] ^= 1 << bit
            refusal(path, bytes(damaged))
    for at in (32, 100, 4095):
        damaged = bytearray(pack_bytes)
        damaged[at] ^= 1
        assert "not zero" in refusal(path, bytes(damaged))


def test_header_messages(pack_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.emoe"
    sections, index = split(pack_bytes)
    packed = msgpack.packb(index)
    assert "not an .emoe pack (it begins with 47475546)" in refusal(path, b"GGUF" + bytes(5000))
    assert "format version 7, this edgemoe reads 1" in refusal(path, joined(sections, packed, version=7))
    damaged = bytearray(pack_bytes)
    damaged[-1] ^= 1
    assert "index checksum" in refusal(path, bytes(damaged))
    for offset, length in (
        (0, 10),
        (4096, 0),
        (4097, 10),
        (1 << 63, 1 << 63),
        (4096, MAX_INDEX + 1),
        (4096, 2**64 - 1),
    ):
        header = struct.pack("<4sIQQI", b"EMOE", 1, offset, length, 0)
        content = (header + struct.pack("<I", crc32c(header))).ljust(BLOCK, b"\0") + bytes(4096)
        assert "an index of" in refusal(path, content)


def test_every_byte_of_the_index(pack_bytes: bytes, tmp_path: Path) -> None:
    """Changed without its checksum: always refused. (Below: changed with it.)"""
    path = tmp_path / "a.emoe"
    path.write_bytes(pack_bytes)
    offset, length = struct.unpack_from("<QQ", pack_bytes, 8)
    with path.open("r+b", buffering=0) as stream:
        for at in range(offset, offset + length, 7):
            stream.seek(at)
            stream.write(bytes([pack_bytes[at] ^ 0x5A]))
            with pytest.raises(PackError, match="index checksum"):
                Pack.open(path)
            stream.seek(at)
            stream.write(pack_bytes[at : at + 1])
    assert Pack.open(path).verify() == []


BOMBS = {
    "nothing": b"",
    "not a map": msgpack.packb([1, 2]),
    "a number": b"\x01",
    "two objects": msgpack.packb({}) + b"\xc0",
    "a cut string": b"\xa5ab",
    "a reserved byte": b"\xc1",
    "an array of 2^32 - 1": b"\xdd\xff\xff\xff\xff",
    "a map of 2^32 - 1": b"\xdf\xff\xff\xff\xff",
    "a string of 4 GiB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GiB": b"\xc6\xff\xff\xff\xff",
    "an extension of 4 GiB": b"\xc9\xff\xff\xff\xff\x01",
    "arrays within arrays": b"\xdd\x00\x0f\xff\xff" * 100_000,
    "arrays of one within arrays": b"\x91" * 1_000_000 + b"\xc0",
    "maps within maps": b"\x81\xa1a" * 300_000 + b"\xc0",
    "keys that are numbers": msgpack.packb({1: 2}),
    "keys that are lists": b"\x81\x91\x01\x02",
    "invalid UTF-8": b"\x81\xa4spec\xa2\xff\xfe",
}


@pytest.mark.parametrize("index", BOMBS.values(), ids=BOMBS.keys())
def test_indexes_that_are_no_index(pack_bytes: bytes, tmp_path: Path, index: bytes) -> None:
    refusal(tmp_path / "a.emoe", joined(split(pack_bytes)[0], index))


def set_at(*keys: Any, to: Any) -> Change:
    def change(index: dict[str, Any]) -> None:
        target: Any = index
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = to

    return change


def delete(*keys: Any) -> Change:
    def change(index: dict[str, Any]) -> None:
        target: Any = index
        for key in keys[:-1]:
            target = target[key]
        del target[keys[-1]]

    return change


LEVEL = ("experts", "1", "levels", 0)


def set_levels(*levels: tuple[int, str]) -> Change:
    """Bits and layout of each."""
    parts = [{name: [layout, 0, 0] for name in ("gate", "up", "down")} for _, layout in levels]
    of = [{"bits": bits, "parts": part} for (bits, _), part in zip(levels, parts, strict=True)]
    return set_at("experts", "1", "levels", to=of)


def two_levels_of_one_layout(index: dict[str, Any]) -> None:
    index["experts"]["1"]["levels"] *= 2


CHANGES: list[tuple[Change, str]] = [
    (set_at("required_features", to=["planes"]), "needs the feature 'planes'"),
    (set_at("required_features", to="planes"), "required_features is not a list"),
    (delete("required_features"), "required_features is not a list"),
    (delete("spec"), "spec: a map was expected"),
    (set_at("spec", "hidden_size", to=-1), "hidden_size = -1"),
    (set_at("spec", "hidden_size", to=1 << 40), "hidden_size"),
    (set_at("spec", "hidden_size", to="72"), "spec.hidden_size"),
    (set_at("spec", "norm_epsilon", to=float("nan")), "norm_epsilon"),
    (set_at("spec", "layers", to=[]), "number of layers = 0"),
    (set_at("spec", "layers", 1, "experts", to=1 << 62), "experts"),
    (set_at("spec", "layers", 1, "experts", to=4), "sections is not a list of 4 experts"),
    (set_at("spec", "layers", 1, "attention", "kind", to="mamba2"), "attention kind = 'mamba2' is not supported"),
    (set_at("spec", "vocab_size", to=1 << 23), "tensor embedding"),
    (set_at("files", to=[]), "files does not begin with the pack itself"),
    (set_at("files", to=["a.emoe"]), "files does not begin with the pack itself"),
    (set_at("files", to=["", "../a.emoe"]), "'../a.emoe' is not the name of a file beside the pack"),
    (set_at("files", to=["", "/etc/passwd"]), "'/etc/passwd' is not the name"),
    (set_at("files", to=["", ".."]), "'..' is not the name"),
    (set_at("files", to=["", "b\\c"]), "is not the name"),
    (set_at("files", to=["", "c:d"]), "is not the name"),
    (set_at("files", to=["", ""]), "'' is not the name"),
    (set_at("files", to=["", "nul\0byte"]), "is not the name"),
    (set_at("files", to=["", "gone.emoe"]), "its file 'gone.emoe': No such file"),
    (set_at("files", to=["", "link.emoe"]), "its file 'link.emoe' is not a regular file"),
    (set_at("files", to=["", "folder"]), "its file 'folder' is not a regular file"),
    (set_at("files", to=["", "pipe"]), "its file 'pipe' is not a regular file"),
    (set_at("files", to=["", 7]), "files is not a list of names"),
    (set_at("sections", to={}), "sections is not a list"),
    (set_at("sections", to=[]), "section 0 of 0"),
    (set_at("sections", 2, to=[[], 0]), "section 2"),
    (set_at("sections", 2, 1, to=-1), "section 2: -1 is not a checksum"),
    (set_at("sections", 2, 1, to=1 << 32), "section 2: 4294967296 is not a checksum"),
    (set_at("sections", 2, 0, to=[[0, 4096, 1]] * 4), "section 2: 4 extents (at most 3)"),
    (set_at("sections", 2, 0, 0, to=[0, 4096]), "section 2: [0, 4096] is not an extent"),
    (set_at("sections", 2, 0, 0, to=[0, -4096, 4096]), "is not an extent"),
    (set_at("sections", 2, 0, 0, to=[0, True, 4096]), "is not an extent"),
    (set_at("sections", 2, 0, 0, to=[1, 4096, 4096]), "section 2: file 1 of 1"),
    (set_at("sections", 2, 0, 0, 1, to=0), "bytes at 0 are not within bytes 4096-"),
    (set_at("sections", 2, 0, 0, 1, to=(1 << 63) - 1), "section 2"),
    (set_at("sections", 2, 0, 0, 2, to=1 << 62), "section 2: 4611686018427387904 bytes"),
    (set_at("sections", 2, 0, 0, 2, to=0), "section 2: 0 bytes"),
    (set_at("sections", 2, 0, 0, 1, to=4096), "overlap at byte"),
    (set_at("sections", 2, 0, 0, 2, to=64), "do not fit into 64 bytes of section 2"),
    (delete("dense", "final_norm"), "dense: final_norm is missing"),
    (set_at("dense", "layers.0.bias", to=[0, 0, "vector"]), "the model has no 'layers.0.bias'"),
    (set_at("dense", "final_norm", to=[0, 0]), "tensor final_norm: [0, 0] is not"),
    (set_at("dense", "final_norm", 0, to=999), "tensor final_norm: section 999 of"),
    (set_at("dense", "final_norm", 0, to=-1), "tensor final_norm"),
    (set_at("dense", "final_norm", 1, to=4), "tensor final_norm: offset 4 is not a multiple of 64"),
    (set_at("dense", "final_norm", 1, to=1 << 62), "tensor final_norm: 288 bytes at 4611686018427387904 do not fit"),
    (set_at("dense", "final_norm", 2, to="f32"), "tensor final_norm: layout f32 for shape [72]"),
    (set_at("dense", "embedding", 2, to="vector"), "tensor embedding: layout vector for shape [320, 72]"),
    (set_at("dense", "embedding", 2, to="q3g64"), "tensor embedding: unknown layout 'q3g64'"),
    (set_at("dense", "embedding", 2, to=["q8g64"]), "tensor embedding: unknown layout"),
    (set_at("dense", "embedding", 2, to="ggml.f32"), "tensor embedding: unknown layout 'ggml.f32'"),
    (set_at("dense", "embedding", 2, to="ggml.iq1_s"), "tensor embedding: unknown layout 'ggml.iq1_s'"),
    (set_at("dense", "embedding", 2, to="ggml.q4_0"), "embedding: rows of 72 are not whole blocks of 32 (ggml.q4_0)"),
    (set_at("dense", "embedding", 2, to="f32"), "tensor embedding: 92160 bytes at 0 do not fit into"),
    (delete("experts", "1"), "experts: layer '1' is missing"),
    (set_at("experts", "0", to={}), "experts: layer '0' has none"),
    (set_at("experts", "1", to=[]), "layer 1: experts have no levels"),
    (set_at(*LEVEL[:-1], to=[]), "layer 1: 0 levels"),
    (set_at(*LEVEL[:-1], to=[{}] * 9), "layer 1: 9 levels (1 to 8 are allowed)"),
    (set_at(*LEVEL, "bits", to=0), "layer 1, level 0: no bits from 1 to 32"),
    (delete(*LEVEL, "parts", "up"), "parts are not gate, up, down"),
    (set_at(*LEVEL, "parts", "up", to=["q4g64", 0]), "layer 1, level 0: up"),
    (set_at(*LEVEL, "parts", "up", 0, to="vector"), "layer 1, level 0: up: layout vector"),
    (set_at(*LEVEL, "parts", "up", 1, to=1), "layers.1.experts.0.up: extent 1 of 1"),
    (set_at(*LEVEL, "parts", "down", 2, to=1 << 20), "layers.1.experts.0.down: 2880 bytes at 1048576 do not fit"),
    (set_at(*LEVEL, "parts", "up", 0, to="refine4"), "level 0: up: layout refine4 does not make 4 bits of the 0"),
    (set_at(*LEVEL, "parts", "up", 0, to="base3r0"), "level 0: up: layout base3r0 does not make 4 bits of the 0"),
    (
        set_at(*LEVEL, "parts", "up", 0, to="base4r1"),
        "up: layout base4r1 has parameters of 1 later levels, there are 0",
    ),
    (set_at(*LEVEL, "parts", "up", 0, to="refine1r0"), "level 0: up: unknown layout 'refine1r0'"),
    (set_at(*LEVEL, "parts", "up", 0, to="base9r0"), "level 0: up: unknown layout 'base9r0'"),
    (set_at(*LEVEL, "parts", "up", 0, to="base8r1"), "level 0: up: unknown layout 'base8r1'"),
    (
        set_levels((2, "base2r2"), (3, "refine1"), (5, "refine1")),
        "layer 1, level 2: gate: layout refine1 does not make 5 bits of the 3 of coarser levels",
    ),
    (
        set_levels((2, "base2r1"), (4, "base2r0")),
        "layer 1, level 1: gate: layout base2r0 does not make 4 bits of the 2 of coarser levels",
    ),
    (
        set_levels((2, "base2r2"), (4, "refine2")),
        "layer 1: gate: layout base2r2 has parameters of 2 later levels, there are 1",
    ),
    (
        set_levels((2, "base2r0"), (3, "refine1"), (4, "refine1")),
        "layer 1: gate: layout base2r0 has parameters of 0 later levels, there are 2",
    ),
    (two_levels_of_one_layout, "layer 1, level 0: gate: layout q4g64 is not nested"),
    (set_at("dense", "embedding", 2, to="base8r0"), "tensor embedding: layout base8r0 is for experts only"),
    (set_at("experts", "1", "sections", 2, to=[]), "layer 1, expert 2: [] are not 1 to 1 of"),
    (set_at("experts", "1", "sections", to=[[0]] * 4), "sections is not a list of 3 experts"),
    (set_at("experts", "1", "sections", 2, to=[0, 1]), "layer 1, expert 2: [0, 1] are not 1 to 1 of"),
    (set_at("experts", "1", "sections", 2, to=[999]), "layer 1, expert 2: [999]"),
    (set_at("experts", "1", "sections", 2, to=[3]), "layers.1.experts.2."),
    (set_at("blobs", "tokenizer.json", to=[999, 1]), "blob 'tokenizer.json': [999, 1]"),
    (set_at("blobs", "tokenizer.json", 1, to=1 << 40), "blob 'tokenizer.json': 1099511627776 bytes"),
    (set_at("generation", to=[]), "generation is not a map"),
    (set_at("generation", "eos_token_ids", to=["a"]), "eos_token_ids = ['a'] is not a list of token ids"),
    (set_at("generation", "bos_token_ids", to=7), "bos_token_ids = 7"),
    (set_at("provenance", to=None), "provenance is not a map"),
    (set_at("unused", to=[1]), "unused is not a list"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_indexes_that_lie(pack_bytes: bytes, tmp_path: Path, change: Change, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").write_bytes(bytes(10_000))
    (tmp_path / "link.emoe").symlink_to(tmp_path / "target")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    elif "pipe" in message:
        pytest.skip("no pipes here")
    sections, index = split(pack_bytes)
    index = copy.deepcopy(index)
    change(index)
    assert message in refusal(tmp_path / "a.emoe", joined(sections, msgpack.packb(index)))


def test_messages_quote_no_control_characters(pack_bytes: bytes, tmp_path: Path) -> None:
    sections, index = split(pack_bytes)
    index["spec"]["family"] = "\x1b[2J\n" * 1000
    index["spec"]["hidden_size"] = 0
    assert ": \ufffd[2J\ufffd\ufffd[2J" in refusal(tmp_path / "a.emoe", joined(sections, msgpack.packb(index)))


def test_unknown_keys_are_ignored(pack_bytes: bytes, tmp_path: Path) -> None:
    sections, index = split(pack_bytes)
    index["opinions"] = {"kl": [0.1]}
    index["spec"]["colour"] = "red"
    index["experts"]["1"]["levels"][0]["note"] = 1
    path = tmp_path / "a.emoe"
    path.write_bytes(joined(sections, msgpack.packb(index)))
    assert Pack.open(path).verify() == []


QUALITY = {
    "text": "text.txt",
    "tokens": 100,
    "reference": {"perplexity": 10.0},
    "levels": [{"bits": 4, "perplexity": 10.5, "kl": 0.01}],
    "modes": {"exact": {"thresholds": [], "perplexity": 10.5, "kl": 0.01, "mean_bits": 4}},
}


def test_quality(pack_bytes: bytes, tmp_path: Path) -> None:
    sections, index = split(pack_bytes)
    fast = {"thresholds": [-1, 0.5], "perplexity": 11, "kl": 0.02, "mean_bits": 3.5, "later": 1}
    index["quality"] = QUALITY | {"modes": QUALITY["modes"] | {"fast": fast}}
    path = tmp_path / "a.emoe"
    path.write_bytes(joined(sections, msgpack.packb(index)))
    found = Pack.open(path).index.quality
    assert found is not None
    assert found.modes["fast"] == ModeQuality((-1.0, 0.5), 11.0, 0.02, 3.5)
    fast = {"thresholds": [-1.0, 0.5], "perplexity": 11.0, "kl": 0.02, "mean_bits": 3.5}
    assert found.to_dict() == QUALITY | {"modes": QUALITY["modes"] | {"fast": fast}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "quality: no text"),
        ({"text": 3}, "quality: no text"),
        ({"tokens": -1}, "tokens = -1 is not a number"),
        ({"reference": {}}, "reference: perplexity = None"),
        ({"reference": {"perplexity": float("nan")}}, "perplexity = nan"),
        ({"levels": []}, "levels are []"),
        ({"levels": [3]}, "levels: bits = None"),
        ({"modes": {"fast": 1}}, "mode 'fast': None are not ascending thresholds"),
        ({"modes": {"fast": {"thresholds": [0.5, 0.4]}}}, "[0.5, 0.4] are not ascending"),
        ({"modes": {"fast": {"thresholds": [float("nan")]}}}, "[nan] are not ascending"),
        ({"modes": {"fast": {"thresholds": [2]}}}, "[2] are not ascending"),
        ({"modes": {"fast": {"thresholds": []}}}, "mode 'fast': perplexity = None"),
        ({"modes": {str(number): {} for number in range(99)}}, "modes are"),
    ],
)
def test_broken_quality(pack_bytes: bytes, tmp_path: Path, change: Any, message: str) -> None:
    sections, index = split(pack_bytes)
    index["quality"] = QUALITY | change if isinstance(change, dict) else change
    path = tmp_path / "a.emoe"
    path.write_bytes(joined(sections, msgpack.packb(index)))
    with pytest.raises(PackError) as error:
        Pack.open(path)
    assert message in str(error.value)


def test_a_pack_of_two_files(pack_bytes: bytes, tmp_path: Path) -> None:
    """A section may lie in a file beside the pack, in pieces, anywhere."""
    sections, index = split(pack_bytes)
    (_, offset, length), checksum = index["sections"][3][0][0], index["sections"][3][1]
    (tmp_path / "more.bin").write_bytes(b"xyz" + sections[offset + 64 : offset + length] + b"xyz")
    index["files"].append("more.bin")
    index["sections"][3] = [[[0, offset, 64], [1, 3, length - 64]], checksum]
    path = tmp_path / "a.emoe"
    path.write_bytes(joined(sections, msgpack.packb(index)))
    pack = Pack.open(path)
    assert pack.verify() == []
    assert pack.read_section(3) == sections[offset : offset + length]
    assert pack.index.files[1] == str(tmp_path / "more.bin")
    os.truncate(tmp_path / "more.bin", length - 62)
    with pytest.raises(PackError, match=r"more\.bin: ends at byte"):
        pack.read_section(3)
    os.truncate(tmp_path / "more.bin", 10)
    with pytest.raises(PackError, match="are not within bytes 0-10 of file 1"):
        Pack.open(path)


def test_damaged_sections_are_named(pack_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.emoe"
    _, index = split(pack_bytes)
    damaged = bytearray(pack_bytes)
    expert = index["experts"]["1"]["sections"][2][0]
    embedding = index["dense"]["embedding"][0]
    for number in (expert, embedding):
        _, offset, length = index["sections"][number][0][0]
        damaged[offset + length - 1] ^= 0x80  # a byte of padding counts too
    path.write_bytes(damaged)
    pack = Pack.open(path)
    calls: list[tuple[int, int]] = []
    lines = pack.verify(lambda done, total: calls.append((done, total)))
    assert [line.split(": ")[1] for line in lines] == [
        f"section {embedding} (embedding)",
        f"section {expert} (layer 1, expert 2)",
    ]
    assert calls[-1][0] == calls[-1][1] == sum(section.length for section in pack.index.sections)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    with pytest.raises(
        PackError, match=r"section \d+ \(layer 1, expert 2\): checksum [0-9a-f]{8}, expected [0-9a-f]{8}"
    ):
        pack.read_section(expert)


@pytest.mark.slow
def test_mutated_indexes(pack_bytes: bytes, tmp_path: Path) -> None:
    """Thousands of changed bytes with a right checksum: opened or refused, never anything else."""
    rng = random.Random(1)
    path = tmp_path / "a.emoe"
    sections, index = split(pack_bytes)
    packed = msgpack.packb(index)
    path.write_bytes(joined(sections, packed))
    refused = 0
    with path.open("r+b", buffering=0) as stream:
        for _ in range(4000):
            mutated = bytearray(packed)
            for _ in range(rng.choice((1, 1, 1, 2, 8))):
                kind, at = rng.randrange(4), rng.randrange(len(mutated))
                if kind == 0:
                    mutated[at] ^= 1 << rng.randrange(8)
                elif kind == 1:
                    mutated[at] = rng.choice(
                        (0, 0x7F, 0x80, 0x90, 0xC0, 0xC3, 0xCB, 0xCF, 0xD3, 0xDB, 0xDD, 0xDF, 0xFF)
                    )
                elif kind == 2:
                    del mutated[at : at + rng.randrange(1, 9)]
                else:
                    mutated[at:at] = rng.randbytes(rng.randrange(1, 9))
            stream.seek(len(sections))
            stream.write(mutated)
            stream.truncate()
            header = struct.pack("<4sIQQI", b"EMOE", 1, len(sections), len(mutated), crc32c(bytes(mutated)))
            stream.seek(0)
            stream.write(header + struct.pack("<I", crc32c(header)))
            try:
                Pack.open(path)
            except PackError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1
    assert refused > 2000


def test_mutated_headers(pack_bytes: bytes, tmp_path: Path) -> None:
    """Random headers whose checksum is right."""
    rng = random.Random(2)
    path = tmp_path / "a.emoe"
    path.write_bytes(pack_bytes)
    edges = (0, 1, 4095, 4096, 8192, len(pack_bytes), 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
    with path.open("r+b", buffering=0) as stream:
        for _ in range(1000):
            fields = [rng.choice((*edges, rng.randrange(1 << 64))) for _ in range(2)]
            header = struct.pack("<4sIQQI", b"EMOE", 1, *fields, rng.randrange(1 << 32))
            stream.seek(0)
            stream.write(header + struct.pack("<I", crc32c(header)))
            with pytest.raises(PackError):
                Pack.open(path)


def test_missing_and_odd_paths(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="No such file"):
        Pack.open(tmp_path / "gone.emoe")
    with pytest.raises(PackError, match="not a file"):
        Pack.open(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(PackError, match="not a file"):
            Pack.open(tmp_path / "pipe")


def test_writer_refuses_empty_sections(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="section 0 has 0 bytes"), PackWriter.create(tmp_path / "a.emoe", "x") as writer:
        writer.add([])
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.emoe.journal").mkdir()
    with pytest.raises(OSError, match=r"a\.emoe\.journal"):
        PackWriter.create(tmp_path / "a.emoe", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.emoe.journal"]


def test_only_one_writer(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with PackWriter.create(tmp_path / "a.emoe", "x") as writer:
        writer.add([b"1"])
        with pytest.raises(PackError, match="another process is writing it"):
            PackWriter.create(tmp_path / "a.emoe", "x")
        assert writer.add([b"2"]) == 1
