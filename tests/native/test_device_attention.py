"""A device's queries, keys, values and attention against the processor's, byte by byte."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from devices import ORDERS, Memory, canonical, groups_for, number, numbers, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import KV_TYPES, SPECIAL, floats, same_bytes, seeds

from edgemoe._core import Device, kernels

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 64
UNKEPT = -(2**31)  # the table's entry of a block that must not be read
orders = pytest.mark.parametrize("order", ORDERS)


def heads_shape(heads: int, dim: int, pairs: int = 0, interleaved: bool = False, epsilon: float = 0.0) -> bytes:
    return numbers(heads, dim, pairs, interleaved, epsilon)


@orders
@settings(max_examples=10, deadline=None)
@given(seed=seeds, rows=st.integers(1, 4), heads=st.integers(1, 5), dim=st.integers(1, 150), wild=st.booleans())
def test_queries_are_taken_from_between_their_gates(
    order: str, seed: int, rows: int, heads: int, dim: int, wild: bool
) -> None:
    projected = floats(np.random.default_rng(seed), rows, heads, 2, dim, wild=wild)
    queries = np.zeros((rows, heads, dim), np.float32)
    shape = heads_shape(heads, dim)
    results = run(
        Device("emulated", order=order),
        "split_gates",
        groups_for(queries.size),
        projected,
        queries,
        shape,
        number(rows),
    )
    same_bytes(projected[:, :, 0], results[1])


@orders
@settings(max_examples=10, deadline=None)
@given(seed=seeds, rows=st.integers(1, 4), size=st.integers(1, 400), limit=st.sampled_from([1e-3, 0.7, 8.0]))
def test_limits(order: str, seed: int, rows: int, size: int, limit: float) -> None:
    x = floats(np.random.default_rng(seed), rows, size, wild=True)
    limit = float(np.float32(limit))
    expected = np.where(x > limit, np.float32(limit), np.where(x < -limit, np.float32(-limit), x))
    results = run(Device("emulated", order=order), "clip", groups_for(x.size), x, numbers(size, rows, limit))
    same_bytes(expected, results[0])


def turned(head: Array, cosine: Array, sine: Array, interleaved: bool) -> Array:
    """CpuBackend::rotate."""
    pairs = cosine.size
    head = head.copy()
    if interleaved:
        head[: 2 * pairs] = np.concatenate([head[0 : 2 * pairs : 2], head[1 : 2 * pairs : 2]])
    return np.asarray(kernels.rope("scalar", head, cosine, sine), np.float32) if pairs else head


@orders
@settings(max_examples=20, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(1, 3),
    heads=st.integers(1, 4),
    dim=st.one_of(st.integers(1, 80), st.integers(250, 600)),
    normed=st.booleans(),
    interleaved=st.booleans(),
    wild=st.booleans(),
)
def test_norm_and_rotation_of_heads(
    order: str, seed: int, rows: int, heads: int, dim: int, normed: bool, interleaved: bool, wild: bool
) -> None:
    rng = np.random.default_rng(seed)
    pairs = int(rng.integers(0, dim // 2 + 1))
    x, norm = floats(rng, rows, heads, dim, wild=wild), floats(rng, dim, wild=wild)
    cosine, sine = floats(rng, 2, rows, pairs, wild=wild and seed % 2 == 0)
    expected = x.copy()
    for row in range(rows):
        for head in range(heads):
            one = x[row, head]
            if normed:
                one = kernels.rms_norm("scalar", one, norm, 0.25)
            expected[row, head] = turned(one, cosine[row], sine[row], interleaved)
    results = run(
        Device("emulated", order=order, seed=seed),
        "turn_heads",
        rows * heads,
        x,
        norm if normed else None,
        cosine if pairs else None,
        sine if pairs else None,
        heads_shape(heads, dim, pairs, interleaved, 0.25),
    )
    same_bytes(expected, results[0])


def tables_for(lengths: list[int], rng: np.random.Generator) -> tuple[Array, int]:
    """Where sequences' blocks lie, anywhere in a pool of so many; entries beyond a sequence must not be read."""
    needed = [-(-length // BLOCK) for length in lengths]
    places = rng.permutation(2 * sum(needed)).tolist()
    tables = np.full((len(lengths), max(needed) + 1), UNKEPT, np.int32)
    for sequence, count in enumerate(needed):
        tables[sequence, :count] = [places.pop() for _ in range(count)]
    return tables, 2 * sum(needed)


@dataclass
class State:
    """Sequences in blocks anywhere in a pool, the heads of a block side by side."""

    key_type: str
    value_type: str
    kv_heads: int
    dim: int
    lengths: list[int]
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.key_bytes = kernels.kv_block_bytes(self.key_type, self.dim)
        self.head = self.key_bytes + kernels.kv_block_bytes(self.value_type, self.dim)
        self.before = 128  # of other layers in a block
        self.stride = self.before + self.kv_heads * self.head + 64
        self.tables, blocks = tables_for(self.lengths, self.rng)
        self.pool = np.full((blocks, self.stride), 0xFF, np.uint8)

    def fill(self, keys: list[Array], values: list[Array]) -> None:
        """Of each sequence [length, kv heads, dim]: as the processor stores them."""
        for sequence, length in enumerate(self.lengths):
            for first in range(0, length, BLOCK):
                block = self.pool[self.tables[sequence, first // BLOCK]]
                for head in range(self.kv_heads):
                    begin = self.before + head * self.head
                    for kind, vectors, is_key in (
                        (self.key_type, keys[sequence], True),
                        (self.value_type, values[sequence], False),
                    ):
                        part = np.ascontiguousarray(vectors[first : first + BLOCK, head])
                        data = kernels.store("scalar", kind, is_key, part)
                        block[begin : begin + data.size] = data
                        begin += data.size

    def shape(self, pool: int, heads: int, window: int = 0, gated: bool = False, scale: float = 1.0) -> bytes:
        kinds = [KV_TYPES.index(kind) for kind in (self.key_type, self.value_type)]
        integers = numbers(heads, self.kv_heads, self.dim, *kinds, window, gated, self.tables.shape[1])
        addresses = struct.pack("<4Q", pool + self.before, self.stride, self.key_bytes, self.head)
        return integers + addresses + number(scale) + bytes(4)


def a_dim(dim: int, *kinds: str) -> int:
    return -(-dim // 32) * 32 if "q8_0" in kinds else dim


@orders
@pytest.mark.parametrize("key_type", KV_TYPES)
@pytest.mark.parametrize("value_type", KV_TYPES)
@settings(max_examples=4, deadline=None)
@given(seed=seeds, kv_heads=st.integers(1, 3), dim=st.integers(1, 200), count=st.integers(1, 3), wild=st.booleans())
def test_stored_keys_and_values(
    order: str, key_type: str, value_type: str, seed: int, kv_heads: int, dim: int, count: int, wild: bool
) -> None:
    """Rows of several sequences in any order; places of a block where no row stores stay as they are."""
    rng = np.random.default_rng(seed)
    dim = a_dim(dim, key_type, value_type)
    lengths = rng.integers(1, 12 if seed % 4 else 80, count).tolist()
    state = State(key_type, value_type, kv_heads, dim, lengths, rng)
    vectors = [
        [floats(rng, length, kv_heads, dim, wild=wild) for length in lengths] for _ in range(2)
    ]  # keys and values of each sequence
    if "q8_0" in (key_type, value_type):
        for kind in vectors:
            for part in kind:
                with np.errstate(all="ignore"):
                    part *= np.float32(10.0) ** rng.integers(-10, 10, (len(part), 1, 1)).astype(np.float32)
    empty = state.pool.copy()
    state.fill(*vectors)
    rows = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]
    rng.shuffle(rows)
    sequences, positions = np.array(rows, np.int32).T
    memory = Memory(Device("emulated", order=order, seed=seed))
    pool = memory.put(empty)
    shape = state.shape(pool, kv_heads)
    about = [memory.put(array) for array in (positions, sequences, state.tables)]
    for kernel, kind in zip(("store_keys", "store_values"), vectors, strict=True):
        given_rows = np.array([kind[sequence][position] for sequence, position in rows])
        memory.device.launch(kernel, len(rows) * kv_heads, [memory.put(given_rows), *about, shape])
    same_bytes(state.pool, memory.get(pool))


def attended(
    state: State,
    rows: list[tuple[int, int]],
    queries: Array,
    keys: list[Array],
    values: list[Array],
    window: int,
    scale: float,
    sinks: Array | None,
    projected: Array | None,
) -> Array:
    """CpuBackend::attend. queries [rows, heads, dim]; rows are (sequence, position)."""
    out = np.zeros_like(queries)
    group = queries.shape[1] // state.kv_heads
    for row, (sequence, position) in enumerate(rows):
        start = max(position + 1 - window, 0) if window else 0
        for kv_head in range(state.kv_heads):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            past = [part[sequence][: position + 1, kv_head] for part in (keys, values)]
            _, total, found = kernels.attend(
                "scalar",
                state.key_type,
                state.value_type,
                queries[row, heads],
                *past,
                scale,
                start,
                sinks=None if sinks is None else sinks[heads],
            )
            with np.errstate(all="ignore"):
                out[row, heads] = canonical(found / total[:, None])
    if projected is not None:
        gates = np.ascontiguousarray(projected[:, :, 1]).reshape(-1)
        out = kernels.sigmoid_multiply("scalar", gates, out.reshape(-1)).reshape(out.shape)
    return out


def check_attention(
    order: str,
    seed: int,
    key_type: str,
    value_type: str,
    *,
    kv_heads: int,
    group: int,
    dim: int,
    lengths: list[int],
    window: int,
    row_count: int,
    gated: bool,
    with_sinks: bool,
    wild: bool,
) -> None:
    rng = np.random.default_rng(seed)
    dim, heads = a_dim(dim, key_type, value_type), kv_heads * group
    state = State(key_type, value_type, kv_heads, dim, lengths, rng)
    keys, values = ([floats(rng, length, kv_heads, dim) for length in lengths] for _ in range(2))
    # The last position of the first sequence, and others.
    sequences = [0, *rng.integers(0, len(lengths), row_count - 1).tolist()]
    rows = [(0, lengths[0] - 1)] + [(owner, int(rng.integers(0, lengths[owner]))) for owner in sequences[1:]]
    queries, projected = floats(rng, row_count, heads, dim), floats(rng, row_count, heads, 2, dim, wild=wild)
    queries *= np.float32(rng.choice([0.1, 1, 5]))
    sinks = floats(rng, heads) * np.float32(3)
    if wild:
        for vectors in [*keys, *values, queries, sinks]:
            if rng.integers(0, 2):
                vectors.reshape(-1)[rng.integers(0, vectors.size, 3)] = rng.choice(SPECIAL, 3)
    state.fill(keys, values)
    scale = float(np.float32(dim**-0.5))
    expected = attended(
        state,
        rows,
        queries,
        keys,
        values,
        window,
        scale,
        sinks if with_sinks else None,
        projected if gated else None,
    )
    # Blocks that no row sees are not kept.
    for sequence, length in enumerate(lengths):
        begins = [max(position + 1 - window, 0) if window else 0 for owner, position in rows if owner == sequence]
        state.tables[sequence, : min(begins, default=length) // BLOCK] = UNKEPT
    memory = Memory(Device("emulated", order=order, seed=seed))
    pool = memory.put(state.pool)
    arrays = [queries, projected if gated else None, sinks if with_sinks else None]
    arrays += [np.array([position for _, position in rows], np.int32), np.array(sequences, np.int32), state.tables]
    addresses = [0 if array is None else memory.put(array) for array in arrays]
    out = memory.room(queries.shape)
    shape = state.shape(pool, heads, window, gated, scale)
    memory.device.launch("attend", row_count * heads, [*addresses, out, shape])
    same_bytes(expected, memory.get(out))


@orders
@pytest.mark.parametrize("key_type", KV_TYPES)
@pytest.mark.parametrize("value_type", KV_TYPES)
@settings(max_examples=4, deadline=None)
@given(
    seed=seeds,
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    dim=st.integers(1, 140),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    window=st.one_of(st.just(0), st.integers(1, 150)),
    gated=st.booleans(),
    with_sinks=st.booleans(),
    wild=st.booleans(),
)
def test_attention(order: str, seed: int, key_type: str, value_type: str, **options: Any) -> None:
    check_attention(order, seed, key_type, value_type, row_count=3, **options)


@orders
@pytest.mark.parametrize("length", [511, 512, 513, 1100])
@pytest.mark.parametrize("window", [0, 1, 64, 600])
def test_long_sequences(order: str, length: int, window: int) -> None:
    """More blocks than are dealt with at a time."""
    check_attention(
        order,
        length,
        "f16",
        "q8_0",
        kv_heads=1,
        group=2,
        dim=32,
        lengths=[length],
        window=window,
        row_count=2,
        gated=False,
        with_sinks=window == 64,
        wild=False,
    )


# --- latents --------------------------------------------------------------------------------------------------------


@dataclass
class Latents:
    """Sequences whose latents lie anywhere in a pool, and rows (sequence, position) of a chunk."""

    kind: str
    heads: int
    head_dim: int
    rank: int
    rope_dim: int
    lengths: list[int]
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.dim = self.rank + self.rope_dim
        self.block = kernels.kv_block_bytes(self.kind, self.dim)
        self.tables, blocks = tables_for(self.lengths, self.rng)
        self.pool = np.full((blocks, self.block + 64), 0xFF, np.uint8)

    def fill(self, latents: list[Array]) -> None:
        for sequence, length in enumerate(self.lengths):
            for first in range(0, length, BLOCK):
                data = kernels.store("scalar", self.kind, True, latents[sequence][first : first + BLOCK])
                self.pool[self.tables[sequence, first // BLOCK], : self.block] = data

    def shape(self, pool: int, *, scale: float = 1.0, more: bytes) -> bytes:
        kind, entries = KV_TYPES.index(self.kind), self.tables.shape[1]
        state = numbers(self.heads, 1, self.dim, kind, kind, 0, 0, entries)
        state += struct.pack("<4Q", pool, self.block + 64, 0, 0) + number(scale) + bytes(4)
        whole = state + numbers(self.rank, self.rope_dim, self.head_dim) + more
        return whole + bytes(-len(whole) % 8)


@orders
@pytest.mark.parametrize("kind", KV_TYPES)
@settings(max_examples=6, deadline=None)
@given(
    seed=seeds,
    heads=st.integers(1, 4),
    rank=st.integers(1, 150),
    rope_dim=st.integers(0, 70),
    interleaved=st.booleans(),
    wild=st.booleans(),
)
def test_stored_latents(
    order: str, kind: str, seed: int, heads: int, rank: int, rope_dim: int, interleaved: bool, wild: bool
) -> None:
    rng = np.random.default_rng(seed)
    if kind == "q8_0":
        rank += -(rank + rope_dim) % 32
    pairs, head_dim = int(rng.integers(0, rope_dim // 2 + 1)), rope_dim + int(rng.integers(0, 40))
    lengths = rng.integers(1, 9 if seed % 4 else 70, 2).tolist()
    state = Latents(kind, heads, max(head_dim, 1), rank, rope_dim, lengths, rng)
    rows = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]
    rng.shuffle(rows)
    sequences, positions = np.array(rows, np.int32).T
    queries = floats(rng, len(rows), heads, state.head_dim, wild=wild)
    latents, norm = floats(rng, len(rows), state.dim, wild=wild), floats(rng, rank, wild=wild)
    cosine, sine = floats(rng, 2, len(rows), pairs)
    new_queries, new_latents = queries.copy(), latents.copy()
    stored = [np.zeros((length, state.dim), np.float32) for length in lengths]
    for row, (sequence, position) in enumerate(rows):
        new_latents[row, :rank] = kernels.rms_norm("scalar", latents[row, :rank], norm, 0.25)
        new_latents[row, rank:] = turned(latents[row, rank:], cosine[row], sine[row], interleaved)
        for head in range(heads):
            begin = state.head_dim - rope_dim
            new_queries[row, head, begin:] = turned(queries[row, head, begin:], cosine[row], sine[row], interleaved)
        stored[sequence][position] = new_latents[row]
    memory = Memory(Device("emulated", order=order, seed=seed))
    pool = memory.put(state.pool)
    first, *given_arrays = [
        memory.put(array) for array in (queries, latents, norm, cosine, sine, positions, sequences, state.tables)
    ]
    shape = state.shape(pool, more=numbers(0, 0, pairs, interleaved, 0.25))
    memory.device.launch("store_latents", len(rows) * (1 + heads), [first, *given_arrays, shape])
    state.fill(stored)
    same_bytes(new_queries, memory.get(first))
    same_bytes(new_latents, memory.get(given_arrays[0]))
    same_bytes(state.pool, memory.get(pool))


@orders
@pytest.mark.parametrize("kind", KV_TYPES)
@settings(max_examples=8, deadline=None)
@given(
    seed=seeds,
    heads=st.integers(1, 4),
    rank=st.one_of(st.integers(1, 100), st.integers(100, 300)),
    rope_dim=st.integers(0, 40),
    lengths=st.lists(st.one_of(st.integers(1, 200), st.integers(510, 600)), min_size=1, max_size=2),
    wild=st.booleans(),
)
def test_attention_over_latents(
    order: str, kind: str, seed: int, heads: int, rank: int, rope_dim: int, lengths: list[int], wild: bool
) -> None:
    rng = np.random.default_rng(seed)
    if kind == "q8_0":
        rank += -(rank + rope_dim) % 32
    state = Latents(kind, heads, rope_dim + 5, rank, rope_dim, lengths, rng)
    latents = [floats(rng, length, state.dim) for length in lengths]
    rows = [(0, lengths[0] - 1), (len(lengths) - 1, int(rng.integers(0, lengths[-1])))]
    first = int(rng.integers(0, heads))
    count = int(rng.integers(1, heads - first + 1))
    queries, asked = floats(rng, 2, heads, state.head_dim), floats(rng, 2, count, state.dim)
    if wild:
        for vectors in [*latents, queries, asked]:
            vectors.reshape(-1)[rng.integers(0, vectors.size, 2)] = rng.choice(SPECIAL, 2)
    state.fill(latents)
    scale = float(np.float32(state.dim**-0.5))
    expected = np.zeros((2, count, rank), np.float32)
    whole = asked.copy()
    whole[:, :, rank:] = queries[:, first : first + count, 5:]
    for row, (sequence, position) in enumerate(rows):
        past = latents[sequence][: position + 1]
        _, total, found = kernels.attend_latent("scalar", kind, whole[row], past, rank, scale)
        with np.errstate(all="ignore"):
            expected[row] = canonical(found / total[:, None])
    memory = Memory(Device("emulated", order=order, seed=seed))
    pool = memory.put(state.pool)
    sequences, positions = np.array(rows, np.int32).T
    addresses = [memory.put(array) for array in (queries, asked, positions, sequences, state.tables)]
    out = memory.room(expected.shape)
    shape = state.shape(pool, scale=scale, more=numbers(first, count, 0, 0, 0.0))
    memory.device.launch("attend_latents", 2 * count, [*addresses, out, shape])
    same_bytes(expected, memory.get(out))
