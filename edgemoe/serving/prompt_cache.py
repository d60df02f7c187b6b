"""What sequences hold, on disk: so that a conversation goes on, also after a restart, where it was.

One file for each state: a line that says what it is, a header (msgpack), the tokens, the state as the engine gives it.
A file is used for exactly the model, the arithmetic and the options that its key says, and only if its digest is right:
what was interrupted, damaged or made by something else is never used. Files are written under a temporary name and then
renamed; the oldest leave when there are more bytes than there may be. They hold what users wrote, so only their owner
may read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import OptionError
from edgemoe.formats.index import ModelIndex
from edgemoe.options import EngineOptions

ARITHMETIC = 1
"""To be raised whenever the same tokens give other bits than before (tests/test_golden.py), or a state another form."""
_MAGIC = b"edgemoe state 1\n"
_MAX_HEADER = 1 << 12
_MAX_TOKENS = 1 << 24
_SUFFIX = ".state"
_ABANDONED = 600.0  # seconds after which nobody writes a file any more


def state_key(index: ModelIndex, options: EngineOptions) -> str:
    """Names everything that a state depends on beside the tokens."""
    facts = hashlib.sha256()
    facts.update(repr((ARITHMETIC, options.cache_type_k, options.cache_type_v, options.quality, index.spec)).encode())
    facts.update(repr((index.sections, dict(index.dense), dict(index.experts))).encode())
    for file in index.files:  # of files without checksums: whether they are still the same
        status = Path(file).stat()
        facts.update(repr((status.st_size, status.st_mtime_ns)).encode())
    return facts.hexdigest()


@dataclass(slots=True)
class _Entry:
    path: Path
    tokens: NDArray[np.int32]
    size: int


class PromptCache:
    """States of one model in a folder, which other models, and other processes, may use as well."""

    def __init__(self, folder: Path, size: int, key: str, goes_back: bool) -> None:
        """size: bytes that all files in the folder may have together. goes_back: a state can be truncated anywhere, so
        that its beginning is of use, too. Raises OptionError for a folder that cannot be written to."""
        self._folder = folder
        self._size = size
        self._key = key
        self._goes_back = goes_back
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()  # of the entries
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OptionError(f"{folder}: the prompt cache cannot be written: {error.strerror}") from None
        for path in folder.glob("*.partial"):  # of writers that were killed
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
        self._entries = [entry for path in sorted(folder.glob("*" + _SUFFIX)) if (entry := self._read_entry(path))]

    def find(self, tokens: list[int]) -> int:
        """How many of the tokens the best state saves."""
        return self._best(tokens)[0]

    def load(self, tokens: list[int]) -> tuple[list[int], NDArray[np.uint8]] | None:
        """The best state's tokens and data; None where there is none, or it is damaged."""
        entry = self._best(tokens)[1]
        if entry is None:
            return None
        try:
            state = self._read_state(entry)
        except OSError:
            return None
        if state is None:
            self._forget(entry)
            return None
        with contextlib.suppress(OSError):
            os.utime(entry.path)  # it was used
        return entry.tokens.tolist(), state

    def forget(self, tokens: list[int]) -> None:
        """Removes the best state for these tokens, which turned out to be of no use."""
        entry = self._best(tokens)[1]
        if entry is not None:
            self._forget(entry)

    @property
    def busy(self) -> bool:
        """Whether a state is being written: memory has room for one only."""
        return self._writer is not None and self._writer.is_alive()

    def holds(self, tokens: list[int]) -> bool:
        """Whether a state of these tokens is there, or one that is as good."""
        ids = np.asarray(tokens, np.int32)
        return any(self._replaces(entry.tokens, ids) for entry in self._entries)

    def save(self, tokens: list[int], state: NDArray[np.uint8]) -> None:
        """Writes on a thread of its own; if the last state is still being written, this one is left out: memory has
        room for one."""
        if state.nbytes > self._size or self.busy:
            return
        self._writer = threading.Thread(target=self._write, args=(tokens, state), name="edgemoe prompt cache")
        self._writer.start()

    def wait(self) -> None:
        """Until what is being written has been."""
        if self._writer is not None:
            self._writer.join()

    def _best(self, tokens: list[int]) -> tuple[int, _Entry | None]:
        """How many tokens are saved, and by which state."""
        ids = np.asarray(tokens, np.int32)
        best: tuple[int, _Entry | None] = (0, None)
        for entry in self._entries:
            common = _common(ids, entry.tokens)
            if common > best[0] and (self._goes_back or common == len(entry.tokens) < len(ids)):
                best = (common, entry)
        return best

    def _write(self, tokens: list[int], state: NDArray[np.uint8]) -> None:
        ids = np.asarray(tokens, np.int32)
        digest = hashlib.sha256(ids.tobytes())
        digest.update(state.data)
        header = {"key": self._key, "tokens": len(tokens), "bytes": state.nbytes, "sha256": digest.hexdigest()}
        packed = msgpack.packb(header)
        name = hashlib.sha256(self._key.encode() + ids.tobytes()).hexdigest()[:32]
        path = self._folder / (name + _SUFFIX)
        try:
            # Only for the owner (mkstemp's mode).
            descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=name, suffix=".partial")
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(_MAGIC + len(packed).to_bytes(4, "little") + packed)
                    stream.write(ids.tobytes())
                    stream.write(state.data)
                    stream.flush()
                    os.fsync(stream.fileno())
                    size = stream.tell()
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError:
            return  # a full disk: it is only a cache
        for entry in list(self._entries):
            if self._replaces(ids, entry.tokens):
                self._forget(entry, unlink=entry.path != path)
        with self._lock:
            self._entries = [*self._entries, _Entry(path, ids, size)]
        self._make_room()

    def _replaces(self, tokens: NDArray[np.int32], other: NDArray[np.int32]) -> bool:
        """Whether a state of `tokens` is worth as much as that of `other`: of the same, or going back to it."""
        begins = _common(tokens, other) == len(other)
        return begins and (self._goes_back or len(tokens) == len(other))

    def _make_room(self) -> None:
        """Removes what was used least recently, whoever wrote it."""
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("*" + _SUFFIX):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._size:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            with self._lock:
                self._entries = [entry for entry in self._entries if entry.path != path]
            total -= size

    def _forget(self, entry: _Entry, unlink: bool = True) -> None:
        with self._lock:
            self._entries = [other for other in self._entries if other is not entry]
        if unlink:
            with contextlib.suppress(OSError):
                entry.path.unlink()

    def _read_entry(self, path: Path) -> _Entry | None:
        """What a file's header says; None where it is none of this model's, or not whole."""
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
                return None
            with path.open("rb") as stream:
                header = self._read_header(stream.read(len(_MAGIC) + 4 + _MAX_HEADER))
                if header is None:
                    return None
                begin, facts = header
                stream.seek(begin)
                data = stream.read(4 * facts.tokens)
                size = os.fstat(stream.fileno()).st_size
        except OSError:
            return None
        if facts.key != self._key or size != begin + 4 * facts.tokens + facts.bytes:
            return None
        return _Entry(path, np.frombuffer(data, np.int32), size)

    def _read_state(self, entry: _Entry) -> NDArray[np.uint8] | None:
        """None where the file is not what its header says."""
        data = np.fromfile(entry.path, np.uint8)
        header = self._read_header(data[: len(_MAGIC) + 4 + _MAX_HEADER].tobytes())
        if header is None:
            return None
        begin, facts = header
        content = data[begin:]
        if facts.key != self._key or len(content) != 4 * facts.tokens + facts.bytes:
            return None
        if hashlib.sha256(content.data).hexdigest() != facts.sha256:
            return None
        if content[: 4 * facts.tokens].tobytes() != entry.tokens.tobytes():  # written anew meanwhile
            return None
        return content[4 * facts.tokens :]

    @staticmethod
    def _read_header(data: bytes) -> tuple[int, _Header] | None:
        """Where the tokens begin, and what the header says; None for another kind of file."""
        begin = len(_MAGIC) + 4
        if len(data) < begin or not data.startswith(_MAGIC):
            return None
        length = int.from_bytes(data[len(_MAGIC) : begin], "little")
        if length > _MAX_HEADER or len(data) < begin + length:
            return None
        try:
            facts = _Header(**msgpack.unpackb(data[begin : begin + length]))
        except (ValueError, TypeError, msgpack.UnpackException):
            return None
        counts = (facts.tokens, facts.bytes)
        if not all(type(count) is int and count >= 0 for count in counts) or facts.tokens > _MAX_TOKENS:
            return None
        return begin + length, facts


@dataclass(frozen=True, slots=True)
class _Header:
    key: str
    tokens: int
    bytes: int
    sha256: str


def _common(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    count = min(len(left), len(right))
    different = np.flatnonzero(left[:count] != right[:count])
    return int(different[0]) if len(different) else count
