"""The safetensors reader: whole and partial reads, shards, and files made to harm."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import from_dtype, safetensors_bytes, tiny_weights, to_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgemoe.errors import SourceError
from edgemoe.formats import safetensors
from edgemoe.formats.safetensors import SafetensorsFolder

NAME = "model.safetensors"


def opened(folder: Path, content: bytes) -> SafetensorsFolder:
    (folder / NAME).write_bytes(content)
    return SafetensorsFolder.open(folder)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_written(tiny_qwen3_moe: Callable[..., Path], dtype: str, shards: int) -> None:
    path = tiny_qwen3_moe(dtype=dtype, shards=shards)
    expected = tiny_weights(json.loads((path / "config.json").read_text()))
    folder = SafetensorsFolder.open(path)
    assert folder.names() == sorted(expected)
    for name, values in expected.items():
        assert folder.info(name) == (dtype.lower(), values.shape)
        read = folder.read(name)
        np.testing.assert_array_equal(from_dtype(read, dtype), from_dtype(to_dtype(values, dtype), dtype))


def test_parts_of_tensors(tmp_path: Path) -> None:
    values = np.arange(4 * 6 * 5, dtype=np.float32).reshape(4, 6, 5)
    header = {"t": {"dtype": "F32", "shape": [4, 6, 5], "data_offsets": [0, 480]}}
    folder = opened(tmp_path, safetensors_bytes(header, values.tobytes()))
    np.testing.assert_array_equal(folder.read("t", index=2), values[2])
    np.testing.assert_array_equal(folder.read("t", rows=(1, 3)), values[1:3])
    np.testing.assert_array_equal(folder.read("t", rows=(4, 6), index=3), values[3, 4:6])
    assert folder.read("t", rows=(2, 2)).shape == (0, 6, 5)
    for bad in ({"index": 4}, {"index": -1}, {"rows": (0, 5)}, {"rows": (3, 2)}, {"index": 0, "rows": (0, 7)}):
        with pytest.raises(SourceError, match=r"tensor t \[.*6, 5\] has no"):
            folder.read("t", **bad)
    with pytest.raises(SourceError, match="tensor u is missing"):
        folder.info("u")


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    header = {
        "scalar": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
        "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [8, 8]},
    }
    folder = opened(tmp_path, safetensors_bytes(header, (42).to_bytes(8, "little")))
    assert folder.read("scalar") == 42
    assert folder.read("empty").shape == (0, 7)
    assert "scalar" in folder and "x" not in folder


def test_header_may_be_padded_with_spaces(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}   '
    assert opened(tmp_path, safetensors_bytes(text, b"\x07")).read("a")[0] == 7


def tensor(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


HOSTILE: list[tuple[str, bytes, str]] = [
    ("empty", b"", "0 bytes are too few"),
    ("short", b"\x01\x00", "2 bytes are too few"),
    ("length beyond the file", (1000).to_bytes(8, "little") + b"{}", "a header of 1000 bytes in a file of 10"),
    ("length of 2^64 - 1", b"\xff" * 8 + b"{}", "a header of 18446744073709551615 bytes"),
    ("not JSON", safetensors_bytes(b"{nope"), "not valid JSON"),
    ("not UTF-8", safetensors_bytes(b'{"\xff":1}'), "not valid JSON"),
    ("not an object", safetensors_bytes(b"[1]"), "a JSON object was expected"),
    ("nested deeply", safetensors_bytes(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    ("endless number", safetensors_bytes(b'{"a":' + b"9" * 1_000_000 + b"}"), "a number of 1000000 digits"),
    ("a name twice", safetensors_bytes(b'{"a":{},"a":{}}'), "a appears twice"),
    ("no description", safetensors_bytes({"a": 3}), "tensor a: 3 is not a description"),
    ("unknown dtype", safetensors_bytes(tensor(dtype="F7"), bytes(16)), "tensor a: unknown dtype 'F7'"),
    ("dtype not a string", safetensors_bytes(tensor(dtype=["F32"]), bytes(16)), "tensor a: unknown dtype"),
    ("no shape", safetensors_bytes(tensor(shape=None), bytes(16)), "tensor a: bad shape None"),
    ("negative shape", safetensors_bytes(tensor(shape=[-2, -2]), bytes(16)), "tensor a: bad shape"),
    ("shape of floats", safetensors_bytes(tensor(shape=[2.0, 2]), bytes(16)), "tensor a: bad shape"),
    ("shape of booleans", safetensors_bytes(tensor(shape=[True, 4]), bytes(16)), "tensor a: bad shape"),
    ("shape overflow", safetensors_bytes(tensor(shape=[1 << 62, 1 << 62]), bytes(16)), "16 bytes, but F32"),
    ("shape overflow to 16", safetensors_bytes(tensor(shape=[(1 << 62) + 1, 4]), bytes(16)), "16 bytes, but F32"),
    ("many dimensions", safetensors_bytes(tensor(shape=[1] * 17), bytes(16)), "tensor a: bad shape"),
    ("wrong size", safetensors_bytes(tensor(shape=[2, 3]), bytes(16)), "16 bytes, but F32 [2, 3] takes 24"),
    ("offsets reversed", safetensors_bytes(tensor(data_offsets=[16, 0]), bytes(16)), "bad offsets [16, 0]"),
    ("offsets negative", safetensors_bytes(tensor(data_offsets=[-16, 0]), bytes(16)), "bad offsets [-16, 0]"),
    ("offsets beyond", safetensors_bytes(tensor(data_offsets=[8, 24]), bytes(16)), "in 16 bytes of data"),
    ("offsets huge", safetensors_bytes(tensor(data_offsets=[1 << 62, 1 << 63]), bytes(16)), "bad offsets"),
    ("three offsets", safetensors_bytes(tensor(data_offsets=[0, 8, 16]), bytes(16)), "bad offsets"),
    ("data cut off", safetensors_bytes(tensor(), bytes(15)), "bad offsets [0, 16] in 15 bytes"),
    ("data left over", safetensors_bytes(tensor(), bytes(17)), "17 bytes of data, but the tensors take 16"),
    (
        "overlap",
        safetensors_bytes({**tensor(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}, bytes(20)),
        "tensor b at 12 overlaps",
    ),
    (
        "hole",
        safetensors_bytes({**tensor(), "b": {"dtype": "U8", "shape": [1], "data_offsets": [19, 20]}}, bytes(20)),
        "tensor b at 19 leaves 3 bytes unused",
    ),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_files(tmp_path: Path, content: bytes, message: str) -> None:
    start = time.process_time()
    with pytest.raises(SourceError) as caught:
        opened(tmp_path, content)
    assert message in str(caught.value)
    assert str(tmp_path / NAME) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert time.process_time() - start < 20


def test_header_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_HEADER", 50)
    with pytest.raises(SourceError, match="at most 50 are allowed"):
        opened(tmp_path, safetensors_bytes(tensor(), bytes(16)))


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    folder = opened(tmp_path, safetensors_bytes(tensor(), bytes(16)))
    os.truncate(tmp_path / NAME, (tmp_path / NAME).stat().st_size - 1)
    with pytest.raises(SourceError, match="a: the file ends at byte"):
        folder.read("a")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no model\.safetensors"):
        SafetensorsFolder.open(tmp_path)
    (tmp_path / NAME).mkdir()
    with pytest.raises(SourceError, match="not a file"):
        SafetensorsFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": [1]}, "no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "is not the name of a shard"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is not the name of a shard"),
        ({"weight_map": {"a": 7}}, "7 (of tensor a) is not the name of a shard"),
        ({"weight_map": {"a": "gone.safetensors"}}, "no such file"),
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "tensor b is not in one.safetensors"),
        ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "tensor a is in one.safetensors too"),
    ],
)
def test_hostile_shard_index(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for shard in ("one", "two"):
        (tmp_path / f"{shard}.safetensors").write_bytes(safetensors_bytes(tensor(), bytes(16)))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(change))
    with pytest.raises(SourceError) as caught:
        SafetensorsFolder.open(tmp_path)
    assert message in str(caught.value)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=4), st.integers(0, 400), st.booleans())
def test_mutated_headers_are_read_or_refused(tmp_path: Path, noise: bytes, at: int, insert: bool) -> None:
    whole = safetensors_bytes({**tensor(), "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}, bytes(22))
    at %= len(whole)
    content = whole[:at] + noise + whole[at + (0 if insert else len(noise)) :]
    try:
        folder = opened(tmp_path, content)
        for name in folder.names():
            folder.read(name)
    except SourceError:
        pass


def test_fingerprint_follows_the_files(tiny_qwen3_moe: Callable[..., Path]) -> None:
    path = tiny_qwen3_moe(shards=2)
    first = SafetensorsFolder.open(path).fingerprint()
    assert SafetensorsFolder.open(path).fingerprint() == first
    shard = sorted(path.glob("*.safetensors"))[0]
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    assert SafetensorsFolder.open(path).fingerprint() != first
