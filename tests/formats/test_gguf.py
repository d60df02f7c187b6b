"""The GGUF reader: tensors and metadata, split files, and files that are wrong in every way."""

from __future__ import annotations

import os
import random
import resource
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import (
    ARRAY,
    BLOCKS,
    BOOL,
    F32,
    F64,
    I64,
    STRING,
    U8,
    U16,
    U64,
    Tensor,
    Value,
    byte_level_metadata,
    gguf_bytes,
    random_tensor,
    sentencepiece_metadata,
    string,
    tiny_qwen3_moe_gguf,
    write,
)

from edgemoe.errors import EdgemoeError, SourceError
from edgemoe.formats import gguf as gguf_module
from edgemoe.formats.ggml_blocks import dequantize
from edgemoe.formats.gguf import GgufModel
from edgemoe.formats.gguf_index import GgufSource, build_index
from edgemoe.text.gguf_tokenizer import tokenizer_from_gguf


def opened(tmp_path: Path, data: bytes) -> GgufModel:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return GgufModel.open(path)


def refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        opened(tmp_path, data)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- what is right --------------------------------------------------------------------------------------------------


def test_metadata_of_every_type(tmp_path: Path) -> None:
    metadata = {
        "u8": Value(U8, 200),
        "u16": Value(U16, 60000),
        "u64": Value(U64, 1 << 63),
        "i64": Value(I64, -5),
        "f32": Value(F32, 1e-6),
        "f64": Value(F64, 1e-300),
        "bool": True,
        "string": "süß",
        "empty": Value(ARRAY, [], STRING),
        "strings": ["a", "", "\u2581b"],
        "bools": Value(ARRAY, [True, False], BOOL),
        "numbers": Value(ARRAY, [1, 2, 65535], U16),
    }
    found = opened(tmp_path, gguf_bytes(metadata)).metadata
    assert list(found) == list(metadata)
    assert found["u8"] == 200 and found["u16"] == 60000 and found["u64"] == 1 << 63 and found["i64"] == -5
    assert found["f32"] == 1e-6 and found["f64"] == 1e-300
    assert found["bool"] is True and found["string"] == "süß"
    assert list(found["empty"]) == [] and list(found["strings"]) == ["a", "", "\u2581b"]
    assert found["strings"][2] == found["strings"][-1] == "\u2581b" and found["strings"][:2] == ["a", ""]
    assert found["bools"].tolist() == [True, False] and found["numbers"].tolist() == [1, 2, 65535]
    with pytest.raises(IndexError):
        found["strings"][3]


@pytest.mark.parametrize("kind", BLOCKS)
def test_tensors_and_their_parts(tmp_path: Path, kind: str) -> None:
    tensor = random_tensor(kind, (3, 5, 512))
    model = opened(tmp_path, gguf_bytes({}, {"first": random_tensor("f32", (3,)), "stack": tensor}))
    whole = dequantize(kind, np.frombuffer(tensor.data, np.uint8)).reshape(3, 5, 512)
    np.testing.assert_array_equal(model.read("stack"), whole)
    np.testing.assert_array_equal(model.read("stack", index=1), whole[1])
    np.testing.assert_array_equal(model.read("stack", index=2, rows=(1, 4)), whole[2, 1:4])
    np.testing.assert_array_equal(model.read("stack", rows=(1, 3)), whole[1:3])
    assert model.read("stack", rows=(2, 2)).shape == (0, 5, 512)
    size = len(tensor.data) // 3
    extents = [model.extent("stack", index=index) for index in range(3)]
    assert [extent.length for extent in extents] == [size] * 3
    assert [extent.offset - extents[0].offset for extent in extents] == [0, size, 2 * size]
    assert b"".join(model.read_bytes("stack", index=index) for index in range(3)) == tensor.data
    assert model.info("stack").type == kind and model.info("stack").shape == (3, 5, 512)


def test_a_tensor_larger_than_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor("q4_k", (64, 512))
    model = opened(tmp_path, gguf_bytes({}, {"t": tensor}))
    whole = model.read("t")
    monkeypatch.setattr(gguf_module, "_WEIGHTS_AT_ONCE", 1000)
    np.testing.assert_array_equal(model.read("t"), whole)


def test_other_alignments(tmp_path: Path) -> None:
    tensors = {name: random_tensor("f32", (3,), seed) for seed, name in enumerate("ab")}
    for alignment in (1, 8, 4096):
        data = gguf_bytes({"general.alignment": alignment}, tensors, alignment=alignment)
        model = opened(tmp_path, data)
        assert model.read("b").tobytes() == tensors["b"].data


def test_files_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "package.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_uint32("qwen3moe.block_count", 7)
    writer.add_array("words", ["x", "yz"])
    values = np.random.default_rng(0).standard_normal((4, 8, 64)).astype(np.float32)
    writer.add_tensor("plain", values)
    writer.add_tensor("half", values.astype(np.float16))
    q8 = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = GgufModel.open(path)
    assert model.metadata["general.architecture"] == "qwen3moe" and model.metadata["qwen3moe.block_count"] == 7
    assert list(model.metadata["words"]) == ["x", "yz"]
    np.testing.assert_array_equal(model.read("plain"), values)
    np.testing.assert_array_equal(model.read("half", index=3), values[3].astype(np.float16).astype(np.float32))
    expected = gguf.quants.dequantize(q8, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(model.read("blocks", index=2, rows=(3, 5)), expected[2, 3:5])


def test_our_files_in_the_gguf_package(tmp_path: Path) -> None:
    """The hand-written writer of these tests, checked once."""
    gguf = pytest.importorskip("gguf")
    metadata, tensors = tiny_qwen3_moe_gguf()
    reader = gguf.GGUFReader(write(tmp_path / "tiny.gguf", metadata, tensors))
    assert {tensor.name: tensor.data.tobytes() for tensor in reader.tensors} == {
        name: tensor.data for name, tensor in tensors.items()
    }
    assert reader.get_field("tokenizer.ggml.tokens").contents() == metadata["tokenizer.ggml.tokens"]


def split(folder: Path, parts: int = 3, **changes: Any) -> list[Path]:
    """A model in `parts` files of one tensor each; changes: metadata of the second file, or "count" of tensors."""
    paths = []
    for number in range(parts):
        metadata: dict[str, Any] = {"general.name": "whole"} if number == 0 else {}
        metadata |= {"split.no": Value(U16, number), "split.count": Value(U16, parts)}
        metadata["split.tensors.count"] = changes.get("count", parts)
        if number == 1:
            metadata |= {key: value for key, value in changes.items() if "." in key}
        name = changes.get("name", f"t{number}") if number == 1 else f"t{number}"
        path = folder / f"big-{number + 1:05}-of-{parts:05}.gguf"
        paths.append(write(path, metadata, {name: random_tensor("f32", (2, 4), number)}))
    return paths


def test_split_files(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:
        model = GgufModel.open(path)
        assert model.files == paths and model.metadata["general.name"] == "whole"
        assert model.names() == ["t0", "t1", "t2"] and model.info("t2").file == 2
        assert model.read("t1").tobytes() == random_tensor("f32", (2, 4), 1).data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split.no": Value(U16, 2)}, "split.no = 2, expected 1"),
        ({"split.count": Value(U16, 4)}, "split.count = 4, expected 3"),
        ({"name": "t0"}, "tensor t0 is in big-00001-of-00003.gguf too"),
        ({"count": 4}, "split.tensors.count = 4, but the files have 3"),
    ],
)
def test_split_files_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        GgufModel.open(split(tmp_path, **changes)[0])


def test_split_files_that_are_not_there(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[2].unlink()
    with pytest.raises(SourceError, match=r"big-00003-of-00003\.gguf: no such file"):
        GgufModel.open(paths[0])
    alone = paths[1].rename(tmp_path / "alone.gguf")
    with pytest.raises(SourceError, match=r"alone\.gguf: one of 3 files, but not called"):
        GgufModel.open(alone)
    many = paths[0].rename(tmp_path / "big-00001-of-99999.gguf")
    with pytest.raises(SourceError, match="file 1 of 99999"):
        GgufModel.open(many)


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {}, {"t": random_tensor("f32", (4,))})
    first = GgufModel.open(path).fingerprint()
    assert GgufModel.open(path).fingerprint() == first
    os.utime(path, ns=(1, 1))
    assert GgufModel.open(path).fingerprint() != first


# -- what is wrong --------------------------------------------------------------------------------------------------

HUGE = 1 << 62


def header(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "beyond the end"),
        (b"GGU", "beyond the end"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (header(1), "version 1 "),
        (header(4), "version 4 "),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian file"),
        (header(tensors=HUGE), f"{HUGE} tensors"),
        (header(keys=HUGE), f"{HUGE} keys"),
        (header(keys=60000), "key 0: 8 bytes at 24 go beyond"),
        (header(keys=1) + struct.pack("<Q", HUGE) + b"key", f"key 0: a string of {HUGE} bytes"),
        (header(keys=1) + struct.pack("<Q", 1000) + b"key", "key 0: 1000 bytes at 32 go beyond"),
        (header(keys=1) + string(b"\xff\xfe") + bytes(12), "key 0 is not UTF-8"),
        (header(keys=1) + string("k") + struct.pack("<I", 77), "key k: unknown type 77"),
        (header(keys=1) + string("k") + struct.pack("<IQ", STRING, HUGE), f"key k: a string of {HUGE}"),
        (header(keys=1) + string("k") + struct.pack("<IIQ", ARRAY, STRING, HUGE), f"{HUGE} strings in arrays"),
        (header(keys=1) + string("k") + struct.pack("<IIQ", ARRAY, STRING, 999), "999 strings in the 0 bytes"),
        (header(keys=1) + string("k") + struct.pack("<IIQ", ARRAY, U64, HUGE), "bytes at 49 go beyond the end"),
        (header(keys=1) + string("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "arrays in arrays"),
        (header(keys=1) + string("k") + struct.pack("<IIQ", ARRAY, 77, 1), "an array of unknown type 77"),
        (
            header(keys=1)
            + string("k")
            + struct.pack("<IIQ", ARRAY, STRING, 2)
            + string("a")
            + struct.pack("<Q", HUGE),
            r"key k\[1\]: \d+ bytes at \d+ go beyond",
        ),
        (gguf_bytes({"a": 1, "b": 2}).replace(string("b"), string("a")), "key 1: a appears twice"),
        (gguf_bytes({"": 1}), "key 0: '' is empty"),
        (gguf_bytes({"general.alignment": 24}), "general.alignment = 24"),
        (gguf_bytes({"general.alignment": 0}), "general.alignment = 0"),
        (gguf_bytes({"general.alignment": "x"}), "general.alignment = 'x'"),
        (gguf_bytes({}, counts=(1, 0)), "tensor '': 4 bytes at 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_headers_that_are_wrong(tmp_path: Path, data: bytes, message: str) -> None:
    refused(tmp_path, data, message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"t": Tensor((4, 0), 0, b"")}, r"tensor t: bad shape \[4, 0\]"),
        ({"t": Tensor((HUGE, HUGE), 0, b"")}, "tensor t: bad shape"),
        ({"t": Tensor((1 << 40,), 0, b"")}, "beyond the end of the file"),
        ({"t": Tensor((), 0, b"")}, "tensor t: 0 dimensions"),
        ({"t": Tensor((1, 1, 1, 1, 1), 0, bytes(4))}, "tensor t: 5 dimensions"),
        ({"t": Tensor((1,), 99, bytes(4))}, "tensor t: unknown type 99"),
        ({"t": Tensor((4, 33), 2, bytes(18 * 8))}, "rows of 33 are not whole blocks of 32"),
        ({"t": Tensor((8,), 0, bytes(28))}, "tensor t: 32 bytes at"),
        ({"t": Tensor((8,), 0, bytes(32), offset=HUGE)}, "beyond the end of the file"),
        ({"t": Tensor((8,), 0, bytes(32), offset=(1 << 64) - 32)}, "beyond the end of the file"),
        ({"t": Tensor((1,), 0, bytes(32), offset=4)}, "offset 4 is no multiple of 32"),
        ({"a": Tensor((16,), 0, bytes(64)), "b": Tensor((8,), 0, bytes(32), offset=32)}, "tensor b at .* overlaps a"),
        ({"a": Tensor((8,), 0, bytes(32)), "b": Tensor((8,), 0, bytes(32), offset=0)}, "tensor b at .* overlaps a"),
        ({"": Tensor((8,), 0, bytes(32))}, "tensor 0: '' has no name"),
        ({"n" * 1025: Tensor((8,), 0, bytes(32))}, "a string of 1025 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_are_wrong(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    refused(tmp_path, gguf_bytes({}, tensors), message)


def test_a_tensor_twice(tmp_path: Path) -> None:
    data = gguf_bytes({}, {name: random_tensor("f32", (8,)) for name in ("aa", "bb")})
    refused(tmp_path, data.replace(b"bb", b"aa"), "tensor 1: aa appears twice")


def test_what_is_asked_for_must_be_there(tmp_path: Path) -> None:
    model = opened(tmp_path, gguf_bytes({}, {"m": random_tensor("f32", (2, 4)), "odd": Tensor((256,), 19, bytes(50))}))
    for arguments, message in (
        ({"name": "x"}, "tensor x is missing"),
        ({"name": "m", "index": 2}, "has no slice 2"),
        ({"name": "m", "index": -1}, "has no slice -1"),
        ({"name": "m", "rows": (1, 3)}, "has no rows 1-3"),
        ({"name": "m", "rows": (2, 1)}, "has no rows 2-1"),
        ({"name": "odd"}, "iq1_s cannot be read"),
    ):
        with pytest.raises(SourceError, match=message):
            model.read(**arguments)  # type: ignore[arg-type]
    model.path.write_bytes(model.path.read_bytes()[:-60])
    with pytest.raises(SourceError, match=r"the file ends \d+ bytes too early"):
        model.read("m")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        GgufModel.open(tmp_path / "absent.gguf")
    with pytest.raises(SourceError, match="not a file"):
        GgufModel.open(tmp_path)


def peak_memory() -> int:
    """KiB that this process has taken at most, so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    """8 GB of (sparse) weights open in a moment and cost no memory."""
    rows = 1 << 21
    path = tmp_path / "large.gguf"
    head = gguf_bytes({}, {"t": Tensor((rows, 1024), 0, b"")})
    path.write_bytes(head)
    os.truncate(path, len(head) + rows * 4096)
    before, start = peak_memory(), time.perf_counter()
    model = GgufModel.open(path)
    assert not model.read("t", rows=(rows - 2, rows)).any()
    assert time.perf_counter() - start < 5
    assert peak_memory() - before < 64 << 10


# -- fuzzing --------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, HUGE, (1 << 63) - 1]
NUMBERS += [1 << 63, (1 << 64) - 1, (1 << 64) - 8, (1 << 64) - 32]


def mutated(data: bytes, chance: random.Random, head: int) -> bytes:
    """A few changes of the kinds that break readers; most of them in the first `head` bytes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        end = len(changed) if chance.random() < 0.1 else min(head, len(changed))
        at = chance.randrange(max(1, end))
        kind = chance.randrange(8)
        if kind == 0:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            changed[at : at + 8] = struct.pack("<Q", chance.choice(NUMBERS))
        elif kind == 3:
            changed[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == 4:
            del changed[at : at + chance.choice((1, 4, 8, 100))]
        elif kind == 5:
            changed[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 4, 8))))
        elif kind == 6:
            length, other = chance.randrange(1, 64), chance.randrange(max(1, end))
            changed[at : at + length] = changed[other : other + length]
        elif chance.random() < 0.3:
            del changed[at:]
        else:
            changed[4:24] = struct.pack("<IQQ", 3, chance.choice((1, *NUMBERS)), chance.choice((1, *NUMBERS)))
    return bytes(changed)


def use_all(path: Path) -> int:
    """Everything that is done with a file from outside; returns how much of it worked."""
    steps = 0
    try:
        model = GgufModel.open(path)
        steps += 1
        for name in model.names():
            model.read(name)
        steps += 1
        tokenizer = tokenizer_from_gguf(model.metadata, path.name)
        assert isinstance(tokenizer.decode(tokenizer.encode("hello the 1234 \u00e9\n  ", add_special=True)), str)
        steps += 1
        build_index(GgufSource.open(path))
        steps += 1
    except EdgemoeError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    return steps


@pytest.mark.slow
def test_mutated_files(tmp_path: Path) -> None:
    """Errors, no crashes: EDGEMOE_FUZZ=40000 for the long run."""
    count = int(os.environ.get("EDGEMOE_FUZZ", "3000"))
    words = ("he", "12")
    kinds = list(BLOCKS)
    tensors = {kind: random_tensor(kind, (1, 256)) for kind in kinds}
    sources = [
        gguf_bytes({"general.alignment": 32, "x": [1.5], **byte_level_metadata(words=words)}, tensors),
        gguf_bytes(sentencepiece_metadata(pieces=("\u2581the", "he"))),
        gguf_bytes({"a": Value(U16, 3), "b": ["x", "y"], "c": "text", "d": True}, tensors),
        gguf_bytes(*tiny_qwen3_moe_gguf(layers=1, experts=2, hidden=32)),
    ]
    path = tmp_path / "mutant.gguf"
    before = peak_memory()
    steps = [0] * 5
    slowest = 0.0
    for number in range(count):
        chance = random.Random(number)
        source = sources[chance.choice((0, 1, 2, 2, 3, 3))]
        path.write_bytes(mutated(source, chance, head=source.find(b"\0" * 64) if number % 2 else len(source)))
        start = time.perf_counter()
        steps[use_all(path)] += 1
        slowest = max(slowest, time.perf_counter() - start)
    peak = peak_memory() - before
    print(
        f"{count} files: refused {steps[0]}, opened {steps[1:]}; slowest {slowest:.2f} s; {peak} KiB more than before"
    )
    assert steps[0] > count // 4 and sum(steps[1:]) > count // 20
    assert slowest < 10
    assert peak < 1 << 20
