"""The trace file: what is written is read, and whatever else is there is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from edgemoe.errors import SourceError, TraceError
from edgemoe.profiling import Trace, TraceWriter, import_router_logits, read_trace
from edgemoe.profiling.trace import concatenate

EXPERTS, TOP_K = (0, 6, 300, 0, 4), (0, 2, 3, 0, 4)
HEADER = {"version": 1, "model": "m", "layers": 1, "experts": [4], "top_k": [2], "source": "s"}


def sample(tokens: int = 50, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    ids = np.concatenate(
        [
            np.argsort(rng.random((tokens, count)), axis=1)[:, :k]
            for count, k in zip(EXPERTS, TOP_K, strict=True)
            if count
        ],
        axis=1,
    ).astype(np.uint16)
    return Trace(
        "model",
        "source",
        EXPERTS,
        TOP_K,
        ("code", "prose"),
        (np.arange(tokens) >= 30).astype(np.int32),
        np.concatenate([np.arange(20), np.arange(10), np.arange(tokens)])[:tokens].astype(np.int32),
        ids,
        rng.random(ids.shape).astype(np.float16),
    )


def same(left: Trace, right: Trace) -> None:
    assert (left.model, left.source, left.experts, left.top_k) == (
        right.model,
        right.source,
        right.experts,
        right.top_k,
    )
    assert left.parts == right.parts
    for name in ("part", "position", "ids", "weights", "predicted"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b)


def test_a_trace_comes_back(tmp_path: Path) -> None:
    trace = sample()
    trace.save(tmp_path / "t")
    back = read_trace(tmp_path / "t")
    same(trace, back)
    assert back.layers == (1, 2, 4)
    assert back.starts.tolist() == [0, 20, 30, 50]
    assert back.layer_picks(2).tolist() == trace.ids[:, 2:5].tolist()
    with pytest.raises(ValueError, match="different numbers"):
        _ = back.picks
    assert read_trace(tmp_path / "t", weights=False).weights is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t"]


def test_blocks_ids_of_one_byte_and_predictions(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((9000, 2, 8)), axis=2)[:, :, :2].reshape(9000, 4)
    with TraceWriter(tmp_path / "t", "m", [8, 8], [2, 2], predictions=True) as writer:
        for begin in range(0, 9000, 1000):
            rows = ids[begin : begin + 1000]
            writer.extend(["x"] * 1000, np.arange(begin, begin + 1000), rows, predicted=rows[::-1])
        assert len(writer._buffer) <= 1 << 20
    back = read_trace(tmp_path / "t")
    assert back.ids.dtype == np.uint8
    assert back.picks.shape == (9000, 2, 2)
    np.testing.assert_array_equal(back.ids, ids)
    assert back.predicted is not None
    np.testing.assert_array_equal(back.predicted[:1000], ids[:1000][::-1])
    assert back.weights is None
    assert back.starts.tolist() == [0, 9000]


def test_one_token_at_a_time(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", "m", [4], [2]) as writer:
        writer.write("a", 0, [3, 1], [0.75, 0.25])
        writer.write("b", 0, [0, 1], [0.5, 0.5])
        writer.write("a", 0, [2, 1], [0.5, 0.25])
    back = read_trace(tmp_path / "t")
    assert back.parts == ("a", "b")
    assert back.part.tolist() == [0, 1, 0]
    assert back.starts.tolist() == [0, 1, 2, 3]
    assert back.weights is not None
    assert back.weights.tolist() == [[0.75, 0.25], [0.5, 0.5], [0.5, 0.25]]


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not \\[1 tokens, 2 picks\\]"),
        TraceWriter(tmp_path / "t", "m", [4], [2]) as w,
    ):
        w.write("a", 0, [3, 1, 2])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="5 of 4"):
        TraceWriter(tmp_path / "t", "m", [4], [5])


@pytest.mark.parametrize("cut", [1, 10, 100, 800])
def test_a_truncated_trace_is_refused(tmp_path: Path, cut: int) -> None:
    sample().save(tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[: len(data) - cut])
    with pytest.raises(TraceError, match="truncated"):
        read_trace(tmp_path / "t")


def record(*fields: Any) -> list[Any]:
    given = [0, 0, b"\0\0\1\0", b""]
    given[: len(fields)] = fields
    return given


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([{**HEADER, "version": 2}], "version 2"),
        ([{"hello": "world"}], "not a routing trace"),
        ([17], "not a routing trace"),
        ([], "not a routing trace"),
        ([{**HEADER, "layers": 2}], "experts is not a list of a number for each of the 2 layers"),
        ([{**HEADER, "experts": [1 << 20]}], "2 of 1048576 experts"),
        ([{**HEADER, "top_k": [5]}], "5 of 4 experts"),
        ([{**HEADER, "top_k": [True]}], "top_k is not a list"),
        ([{**HEADER, "experts": [0], "top_k": [0]}], "0 have experts"),
        ([{**HEADER, "model": 3}], "model is not a string"),
        ([HEADER], "no tokens"),
        ([HEADER, record()], "token 0: part 0 of 0"),
        ([HEADER, "a", record(1)], "token 0: part 1 of 1"),
        ([HEADER, "a", record(True)], "part True"),
        ([HEADER, "a", record(), record(0, -1)], "token 1: position -1"),
        ([HEADER, "a", record(0, 0, b"\0\0\4\0")], "token 0, layer 0: expert 4 is not one of 4"),
        ([HEADER, "a", record(), record(0, 1, b"\1\0\1\0")], "token 1, layer 0: expert 1 is there twice"),
        ([HEADER, "a", record(0, 0, b"\0\0")], "2 bytes of expert ids where 2 picks take 4"),
        ([HEADER, "a", record(0, 0, "text")], "expert ids are not bytes"),
        ([HEADER, "a", record(0, 0, b"\0\0\1\0", b"\0")], "1 bytes of weights"),
        ([HEADER, "a", record(), record(0, 1, b"\0\0\1\0", b"\0" * 4)], "some tokens have weights"),
        ([HEADER, "a", [0, 0, b"\0\0\1\0"]], "not a record of 4 fields"),
        ([HEADER, "a", {"part": 0}], "not a record"),
        ([{**HEADER, "predictions": True}, "a", record()], "not a record of 5 fields"),
        ([HEADER, "x" * 5000], "damaged"),
        ([HEADER, "a", record(0, 0, b"\0" * (3 << 20))], "damaged"),
        ([HEADER, "a", list(range(5000))], "damaged"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, objects: list[Any], words: str) -> None:
    (tmp_path / "t").write_bytes(b"".join(msgpack.packb(item) for item in objects))
    with pytest.raises(TraceError, match=words) as caught:
        read_trace(tmp_path / "t")
    assert str(tmp_path / "t") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"The quick brown fox", b"\xc1\xc1", b"PK\x03\x04" + bytes(100), b"\x80" * 4, b"\x93"]
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(TraceError):
        read_trace(tmp_path / "t")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(TraceError, match=str(path)):
            read_trace(path)


def test_noise_is_refused(tmp_path: Path) -> None:
    sample(12).save(tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        noisy = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            noisy[place] = int(rng.integers(256))
        (tmp_path / "t").write_bytes(noisy)
        try:
            read_trace(tmp_path / "t")  # damage to weights or names cannot be seen
        except TraceError as error:
            assert "\n" not in str(error)


def test_concatenation_keeps_parts_apart() -> None:
    one, two = sample(), sample(40, seed=3)
    both = concatenate([one, two])
    assert both.parts == ("code", "prose")
    assert both.tokens == 90
    np.testing.assert_array_equal(both.part, np.concatenate([one.part, two.part]))
    assert both.starts.tolist() == [0, 20, 30, 50, 70, 80, 90]


def test_router_logits(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    logits = {layer: {"b": rng.normal(size=(2, 5, 6)), "a": rng.normal(size=(1, 4, 6))} for layer in (1, 3)}
    for layer, tensors in logits.items():
        safetensors.save_file(
            {name: values.astype(np.float32) for name, values in tensors.items()},
            tmp_path / f"m-x_{layer:02d}.safetensors",
        )
    trace = import_router_logits(tmp_path, 2)
    assert (trace.model, trace.experts, trace.top_k) == ("m-x", (0, 6, 0, 6), (0, 2, 0, 2))
    assert trace.parts == ("a", "b")
    assert trace.starts.tolist() == [0, 4, 9, 14]
    expected = np.concatenate([logits[3]["a"].reshape(-1, 6), logits[3]["b"].reshape(-1, 6)])
    np.testing.assert_array_equal(trace.layer_picks(3), np.argsort(-expected, axis=1)[:, :2])
    shares = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    assert trace.weights is not None
    np.testing.assert_allclose(trace.weights[:, 2], shares.max(axis=1), rtol=2e-3)

    with pytest.raises(TraceError, match="7 of 6 experts"):
        import_router_logits(tmp_path, 7)
    with pytest.raises(TraceError, match="no logits of y"):
        import_router_logits(tmp_path, 2, model="y")
    safetensors.save_file({"a": np.zeros((1, 4, 6), np.float32)}, tmp_path / "m-x_03.safetensors")
    with pytest.raises(TraceError, match="m-x_03"):
        import_router_logits(tmp_path, 2)
    (tmp_path / "m-x_03.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match="m-x_03"):
        import_router_logits(tmp_path, 2)
    with pytest.raises(TraceError, match="no files"):
        import_router_logits(tmp_path / "none", 2)
