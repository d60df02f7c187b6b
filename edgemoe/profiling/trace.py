"""Routing traces: which experts a model chose for every token of some texts (docs/trace.md describes the file)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgemoe.errors import TraceError, quote

VERSION = 1

MAX_LAYERS = 4096
MAX_EXPERTS = 1 << 16
MAX_TOP_K = 256
MAX_PARTS = 1 << 16
MAX_NAME = 4096  # bytes of a string in the file

_FLUSH = 1 << 20  # bytes a writer holds back
_BLOCK = 4096  # tokens a reader checks at once
NO_PREDICTION = 0xFFFF


@dataclass(frozen=True, slots=True)
class Trace:
    """The experts chosen for the tokens of one or more texts.

    model, source: names, for people. experts, top_k: of every layer of the model, 0 for a dense layer.
    parts: names of the kinds of text ("code", "prose"); part, int32 [tokens]: which one a token belongs to.
    position: int32 [tokens], of the token in its text.
    ids: uint8 or uint16 [tokens, width], the picks of all layers with experts side by side, each layer's by descending
        weight; width is the sum of top_k.
    weights: float16 [tokens, width], what each expert's output was multiplied with, or None.
    predicted: uint16 [tokens, width] or None: what was predicted for a layer before it ran (by the next layer's router,
        say), NO_PREDICTION where nothing was.
    """

    model: str
    source: str
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    parts: tuple[str, ...]
    part: NDArray[np.int32]
    position: NDArray[np.int32]
    ids: NDArray[np.unsignedinteger]
    weights: NDArray[np.float16] | None = None
    predicted: NDArray[np.uint16] | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have experts."""
        return tuple(number for number, count in enumerate(self.experts) if count)

    def columns(self, layer: int) -> slice:
        """Where the picks of a layer (its number in the model) lie in `ids`."""
        begin = sum(self.top_k[:layer])
        return slice(begin, begin + self.top_k[layer])

    def layer_picks(self, layer: int) -> NDArray[np.unsignedinteger]:
        """[tokens, k] of one layer; a view."""
        return self.ids[:, self.columns(layer)]

    @property
    def picks(self) -> NDArray[np.unsignedinteger]:
        """[tokens, layers with experts, k]; a view. Raises ValueError where layers differ in k."""
        sizes = {self.top_k[layer] for layer in self.layers}
        if len(sizes) != 1:
            raise ValueError(f"{self.model}: layers have different numbers of picks: {sorted(sizes)}")
        return self.ids.reshape(self.tokens, len(self.layers), sizes.pop())

    @property
    def starts(self) -> NDArray[np.int64]:
        """[sequences + 1]: where each text begins, and the number of tokens at the end.

        A text ends where the part changes or the position is not the one that follows.
        """
        breaks = (np.diff(self.position) != 1) | (np.diff(self.part) != 0)
        return np.concatenate(([0], np.flatnonzero(breaks) + 1, [self.tokens])).astype(np.int64)

    def select(self, part: int) -> Trace:
        """The tokens of one part. A copy."""
        wanted = self.part == part
        return Trace(
            self.model,
            self.source,
            self.experts,
            self.top_k,
            self.parts,
            self.part[wanted],
            self.position[wanted],
            self.ids[wanted],
            None if self.weights is None else self.weights[wanted],
            None if self.predicted is None else self.predicted[wanted],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace to a file. Raises OSError."""
        with TraceWriter(
            path, self.model, self.experts, self.top_k, self.source, predictions=self.predicted is not None
        ) as writer:
            for begin in range(0, self.tokens, _BLOCK):
                block = slice(begin, begin + _BLOCK)
                writer.extend(
                    [self.parts[part] for part in self.part[block]],
                    self.position[block],
                    self.ids[block],
                    None if self.weights is None else self.weights[block],
                    None if self.predicted is None else self.predicted[block],
                )


class TraceWriter:
    """Writes a trace token by token; holds at most about a megabyte back.

    The file is called `PATH.partial` until it is closed without an error; after one it is removed. Use it in a `with`
    statement. Raises ValueError for tokens that do not fit the header, OSError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: str,
        experts: Sequence[int],
        top_k: Sequence[int],
        source: str = "",
        *,
        predictions: bool = False,
    ) -> None:
        header = {
            "version": VERSION,
            "model": model,
            "layers": len(experts),
            "experts": [int(count) for count in experts],
            "top_k": [int(count) for count in top_k],
            "source": source,
        }
        if predictions:
            header["predictions"] = True
        try:
            _check_header(header, Path(path))
        except TraceError as error:
            raise ValueError(str(error)) from None
        self._width = sum(top_k)
        self._predictions = predictions
        self._parts: dict[str, int] = {}
        self._packer = msgpack.Packer()
        self._path = Path(path)
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._file: BinaryIO | None = self._partial.open("wb")
        self._buffer = bytearray(self._packer.pack(header))

    def write(
        self,
        part: str,
        position: int,
        ids: ArrayLike,
        weights: ArrayLike | None = None,
        predicted: ArrayLike | None = None,
    ) -> None:
        """Adds a token: `ids`, `weights`, `predicted` of [width], all layers' picks side by side."""
        self.extend(
            [part],
            np.asarray([position]),
            np.asarray(ids)[None],
            None if weights is None else np.asarray(weights)[None],
            None if predicted is None else np.asarray(predicted)[None],
        )

    def extend(
        self,
        parts: Sequence[str],
        positions: ArrayLike,
        ids: ArrayLike,
        weights: ArrayLike | None = None,
        predicted: ArrayLike | None = None,
    ) -> None:
        """Adds tokens: parts and positions [tokens], the others [tokens, width]."""
        if self._file is None:
            raise ValueError(f"{self._path}: the trace is closed")
        tokens = len(parts)
        rows = np.ascontiguousarray(ids, dtype="<u2")
        shares = None if weights is None else np.ascontiguousarray(weights, dtype="<f2")
        guesses = None if predicted is None else np.ascontiguousarray(predicted, dtype="<u2")
        for array in (rows, shares, guesses):
            if array is not None and array.shape != (tokens, self._width):
                raise ValueError(f"{self._path}: {array.shape} is not [{tokens} tokens, {self._width} picks]")
        if self._predictions != (guesses is not None):
            raise ValueError(f"{self._path}: predictions must come with every token or with none")
        places = np.asarray(positions, dtype=np.int64).tolist()
        pack = self._packer.pack
        for token, (part, position) in enumerate(zip(parts, places, strict=True)):
            number = self._parts.get(part)
            if number is None:
                if len(self._parts) == MAX_PARTS or len(part.encode()) > MAX_NAME:
                    raise ValueError(f"{self._path}: too many parts, or a part's name is too long")
                number = self._parts[part] = len(self._parts)
                self._buffer += pack(part)
            record = [number, position, rows[token].tobytes(), b"" if shares is None else shares[token].tobytes()]
            if guesses is not None:
                record.append(guesses[token].tobytes())
            self._buffer += pack(record)
            if len(self._buffer) >= _FLUSH:
                self._file.write(self._buffer)
                self._buffer.clear()

    def close(self) -> None:
        """Finishes the file and gives it its name."""
        if self._file is None:
            return
        try:
            self._file.write(self._buffer)
            self._file.close()
            self._partial.replace(self._path)
        except BaseException:
            self.discard()
            raise
        self._file = None

    def discard(self) -> None:
        """Removes what was written."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._partial.unlink(missing_ok=True)
            self._file = None

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def read_trace(path: str | os.PathLike[str], *, weights: bool = True) -> Trace:
    """Reads a trace file, which is not trusted: every count, id and length is checked. Raises TraceError.

    weights: False leaves them out, for half the memory.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            return _read(stream, file, weights)
    except OSError as error:
        raise TraceError(f"{file}: {error.strerror or error}") from None


def _read(stream: BinaryIO, file: Path, want_weights: bool) -> Trace:
    from edgemoe._core import profiling

    size = os.fstat(stream.fileno()).st_size
    items = _items(stream, file, size)
    header = _check_header(next(items, None), file)
    experts, top_k, predictions = tuple(header["experts"]), tuple(header["top_k"]), bool(header.get("predictions"))
    width = sum(top_k)

    # What is not touched of these costs nothing.
    most = size // (2 * width + 6) + 1
    ids = np.empty((most, width), np.uint8 if max(experts) <= 256 else np.uint16)
    shares = np.empty((most, width), np.float16) if want_weights else None
    guesses = np.empty((most, width), np.uint16) if predictions else None
    part, position = np.empty(most, np.int32), np.empty(most, np.int32)
    parts: list[str] = []
    weighted = 0  # tokens that have weights

    def flush(begin: int, block: list[list[Any]]) -> None:
        nonlocal weighted
        end = begin + len(block)
        rows = np.frombuffer(b"".join(record[2] for record in block), "<u2").reshape(len(block), width)
        column = 0
        for layer, (count, k) in enumerate(zip(experts, top_k, strict=True)):
            if not k:
                continue
            fault = profiling.check(rows[:, column : column + k], count)
            if fault is not None:
                what = "is there twice" if fault[2] else f"is not one of {count}"
                raise TraceError(f"{file}: token {begin + fault[0]}, layer {layer}: expert {fault[1]} {what}")
            column += k
        ids[begin:end] = rows
        part[begin:end] = [record[0] for record in block]
        position[begin:end] = [record[1] for record in block]
        given = [record[3] for record in block]
        if given[0]:
            weighted += len(block)
            if shares is not None:
                shares[begin:end] = np.frombuffer(b"".join(given), "<f2").reshape(len(block), width)
        if guesses is not None:
            guesses[begin:end] = np.frombuffer(b"".join(record[4] for record in block), "<u2").reshape(-1, width)

    block: list[list[Any]] = []
    done = 0
    for item in items:
        if isinstance(item, str):
            if len(parts) == MAX_PARTS:
                raise TraceError(f"{file}: more than {MAX_PARTS} parts")
            parts.append(item)
            continue
        token = done + len(block)
        _check_record(item, file, token, len(parts), width, predictions, block[0] if block else None)
        block.append(item)
        if len(block) == _BLOCK:
            flush(done, block)
            if (weighted > 0) != (weighted == done + len(block)):
                raise TraceError(f"{file}: token {token}: some tokens have weights and some have none")
            done += len(block)
            block = []
    if block:
        flush(done, block)
        done += len(block)
    if not done:
        raise TraceError(f"{file}: the trace has no tokens")
    if weighted not in (0, done):
        raise TraceError(f"{file}: {weighted} of {done} tokens have weights")
    return Trace(
        header["model"],
        header["source"],
        experts,
        top_k,
        tuple(parts),
        part[:done],
        position[:done],
        ids[:done],
        shares[:done] if shares is not None and weighted else None,
        guesses[:done] if guesses is not None else None,
    )


def _items(stream: BinaryIO, file: Path, size: int) -> Iterator[Any]:
    """The objects of the file; a TraceError where it ends within one or is no msgpack."""
    unpacker = msgpack.Unpacker(
        stream,
        read_size=_FLUSH,
        strict_map_key=True,
        max_buffer_size=64 << 20,
        max_str_len=MAX_NAME,
        max_bin_len=2 * MAX_LAYERS * MAX_TOP_K,
        max_array_len=MAX_LAYERS,
        max_map_len=256,
        max_ext_len=0,
    )
    count = 0
    while True:
        try:
            item = unpacker.unpack()
        except msgpack.OutOfData:
            if unpacker.tell() != size:
                raise TraceError(f"{file}: truncated: the last record begins at byte {unpacker.tell()}") from None
            return
        except (ValueError, msgpack.exceptions.UnpackException, TypeError) as error:
            what = "not a routing trace" if count == 0 else f"damaged at byte {unpacker.tell()} ({error})"
            raise TraceError(f"{file}: {what}") from None
        count += 1
        yield item


def _check_header(header: Any, file: Path) -> dict[str, Any]:
    if not isinstance(header, dict) or "version" not in header or "experts" not in header:
        raise TraceError(f"{file}: not a routing trace")
    if header["version"] != VERSION:
        raise TraceError(
            f"{file}: a trace of version {quote(header['version'])}; version {VERSION} is what is read here"
        )
    experts, top_k, layers = header["experts"], header.get("top_k"), header.get("layers")
    for name, counts in (("experts", experts), ("top_k", top_k)):
        if not isinstance(counts, list) or len(counts) != layers or any(type(count) is not int for count in counts):
            raise TraceError(f"{file}: {name} is not a list of a number for each of the {quote(layers)} layers")
    assert isinstance(top_k, list)
    if len(experts) > MAX_LAYERS or not any(experts):
        raise TraceError(f"{file}: {len(experts)} layers of which {sum(map(bool, experts))} have experts")
    for layer, (count, k) in enumerate(zip(experts, top_k, strict=True)):
        if not 0 <= count <= MAX_EXPERTS or not (1 if count else 0) <= k <= min(count, MAX_TOP_K):
            raise TraceError(f"{file}: layer {layer}: {k} of {count} experts")
    for name in ("model", "source"):
        if not isinstance(header.get(name, ""), str):
            raise TraceError(f"{file}: {name} is not a string")
        header.setdefault(name, "")
    return header


def _check_record(
    record: Any, file: Path, token: int, parts: int, width: int, predictions: bool, first: list[Any] | None
) -> None:
    if not isinstance(record, list) or len(record) != 4 + predictions:
        raise TraceError(f"{file}: token {token}: not a record of {4 + predictions} fields")
    part, position = record[0], record[1]
    if type(part) is not int or not 0 <= part < parts:
        raise TraceError(f"{file}: token {token}: part {quote(part)} of {parts}")
    if type(position) is not int or not 0 <= position < 1 << 31:
        raise TraceError(f"{file}: token {token}: position {quote(position)}")
    for name, blob in (("expert ids", record[2]), ("weights", record[3]), ("predictions", record[-1])):
        if not isinstance(blob, bytes):
            raise TraceError(f"{file}: token {token}: {name} are not bytes")
        if len(blob) != 2 * width and not (name == "weights" and not blob):
            raise TraceError(f"{file}: token {token}: {len(blob)} bytes of {name} where {width} picks take {2 * width}")
        if not predictions and name == "weights":
            break
    if first is not None and len(first[3]) != len(record[3]):
        raise TraceError(f"{file}: token {token}: some tokens have weights and some have none")


def concatenate(traces: Iterable[Trace]) -> Trace:
    """Traces of one model as one, in order; what not all of them have is left out.

    Raises ValueError where they are not of one model.
    """
    given = list(traces)
    if not given:
        raise ValueError("no traces")
    first = given[0]
    names: list[str] = []
    numbers: list[NDArray[np.int32]] = []
    for trace in given:
        if (trace.experts, trace.top_k) != (first.experts, first.top_k):
            raise ValueError(f"{trace.model} does not route like {first.model}")
        names += [name for name in trace.parts if name not in names]
        table = np.asarray([names.index(name) for name in trace.parts], np.int32)
        numbers.append(table[trace.part])
    weights = [trace.weights for trace in given if trace.weights is not None]
    predicted = [trace.predicted for trace in given if trace.predicted is not None]
    return Trace(
        first.model,
        first.source,
        first.experts,
        first.top_k,
        tuple(names),
        np.concatenate(numbers),
        np.concatenate([trace.position for trace in given]),
        np.concatenate([trace.ids for trace in given]),
        np.concatenate(weights) if len(weights) == len(given) else None,
        np.concatenate(predicted) if len(predicted) == len(given) else None,
    )
