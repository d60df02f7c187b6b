"""A device's convolutions and recurrences against the processor's, byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import ORDERS, Memory, numbers, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import floats, same_bytes, seeds

from edgemoe._core import Device, kernels
from edgemoe.formats.layouts import pack

Array = np.ndarray[Any, np.dtype[Any]]

orders = pytest.mark.parametrize("order", ORDERS)


def some_rows(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Sequences and positions of a chunk: each sequence's in their order, some from the beginning."""
    rows = []
    for sequence in range(int(rng.integers(1, 4))):
        begin = int(rng.choice([0, rng.integers(1, 20)]))
        rows += [(sequence, begin + i) for i in range(int(rng.integers(1, 6)))]
    return [sequence for sequence, _ in rows], [position for _, position in rows]


class States:
    """What is advanced, of each sequence, and where it was before, which some sequences keep apart."""

    def __init__(self, rng: np.random.Generator, sequences: list[int], positions: list[int], *shape: int) -> None:
        count = max(sequences) + 1
        self.before, self.now = floats(rng, 2, count, *shape)
        apart = rng.integers(0, 2, count).astype(bool)
        self.now[~apart] = self.before[~apart]
        self.sequences = sequences
        firsts = [row for row, sequence in enumerate(sequences) if sequence not in sequences[:row]]
        self.copied = [row for row in firsts if apart[sequences[row]] and positions[row] > 0]
        # The reference begins with what is to be copied.
        self.expected = self.before.copy()

    def put(self, memory: Memory) -> list[int]:
        """The states' address, and those of the rows' addresses of states and of states before."""
        states, before = memory.put(self.now), memory.put(self.before)
        size = self.now[0].nbytes
        addresses = np.array([states + sequence * size for sequence in self.sequences], np.uint64)
        sources = np.zeros(len(self.sequences), np.uint64)
        for row in self.copied:
            sources[row] = before + self.sequences[row] * size
        return [states, memory.put(addresses), memory.put(sources)]


@orders
@settings(max_examples=20, deadline=None)
@given(seed=seeds, channels=st.integers(1, 300), taps=st.integers(1, 5), silu=st.booleans(), wild=st.booleans())
def test_convolution(order: str, seed: int, channels: int, taps: int, silu: bool, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    sequences, positions = some_rows(rng)
    rows = len(sequences)
    weights, x = floats(rng, channels, taps, wild=wild), floats(rng, rows, channels, wild=wild)
    states = States(rng, sequences, positions, taps, channels)
    expected = np.zeros_like(x)
    for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        kept = states.expected[sequence]
        if position == 0:
            kept[:] = 0
        kept[position % taps] = x[row]
        earlier = [position - (taps - 1) + tap for tap in range(taps)]
        missing = sum(one < 0 for one in earlier)
        inputs = kept[[one % taps for one in earlier]]
        expected[row] = kernels.convolve("scalar", np.ascontiguousarray(weights.T), inputs, missing, silu)
    memory = Memory(Device("emulated", order=order, seed=seed))
    address, *tables = states.put(memory)
    given_arrays = [memory.put(array) for array in (pack("f32", weights), x)]
    out = memory.room(x.shape)
    arguments = [*given_arrays, *tables, memory.put(np.array(positions, np.int32)), out]
    memory.device.launch("convolve", -(-channels // 128), [*arguments, numbers(channels, taps, rows, silu)])
    same_bytes(expected, memory.get(out))
    same_bytes(states.expected, memory.get(address))


def delta_shape(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, tiled: bool, both: bool, rows: int, epsilon: float = 0.0
) -> bytes:
    return numbers(heads, kv_heads, key_dim, value_dim, tiled, both, rows, epsilon)


heads_of_delta = {
    "seed": seeds,
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 3),
    "key_dim": st.integers(1, 70),
    "chunks": st.integers(1, 5),
    "wild": st.booleans(),
}


def betas_and_alphas(both: bool, beta: Array, alpha: Array, kv_heads: int) -> Array:
    """Beside each other for each key head, or apart."""
    if not both:
        return beta
    rows = len(beta)
    parts = [values.reshape(rows, kv_heads, -1) for values in (beta, alpha)]
    return np.concatenate(parts, axis=2).reshape(rows, -1)


@orders
@pytest.mark.parametrize("both", [False, True])
@settings(max_examples=10, deadline=None)
@given(**heads_of_delta)
def test_before_and_after_the_delta_rule(
    order: str, both: bool, seed: int, kv_heads: int, group: int, key_dim: int, chunks: int, wild: bool
) -> None:
    rng = np.random.default_rng(seed)
    device = Device("emulated", order=order, seed=seed)
    heads, value_dim, rows = kv_heads * group, 16 * chunks, 2
    mixed = floats(rng, rows, 2 * kv_heads * key_dim + heads * value_dim, wild=wild)
    beta, alpha = floats(rng, 2, rows, heads, wild=wild)
    norms, about = floats(rng, 2, key_dim, wild=wild), floats(rng, 2, heads, wild=wild)
    new_mixed = mixed.copy()
    # Float32's quotient, as the processor has it.
    epsilon = float(np.float32(1e-6) / np.float32(key_dim))
    for row in range(rows):
        for head in range(2 * kv_heads):
            part = slice(head * key_dim, (head + 1) * key_dim)
            new_mixed[row, part] = kernels.rms_norm("scalar", mixed[row, part], norms[head // kv_heads], epsilon)
    new_beta = np.array([kernels.sigmoid("scalar", row) for row in beta])
    new_alpha = np.array([kernels.softplus_decay("scalar", row, about[1], about[0]) for row in alpha])
    shape = delta_shape(heads, kv_heads, key_dim, value_dim, False, both, rows, 0.25)
    results = run(
        device,
        "prepare_delta",
        rows * (2 * kv_heads + 1),
        mixed,
        betas_and_alphas(both, beta, alpha, kv_heads),
        None if both else alpha,
        *norms,
        *about,
        shape,
    )
    same_bytes(new_mixed, results[0])
    same_bytes(betas_and_alphas(both, new_beta, new_alpha, kv_heads), results[1])
    if not both:
        same_bytes(new_alpha, results[2])

    out, gates = floats(rng, 2, rows, heads, value_dim, wild=wild)
    norm = floats(rng, value_dim, wild=wild)
    expected = np.zeros_like(out)
    for row in range(rows):
        for head in range(heads):
            normed = kernels.rms_norm("scalar", out[row, head], norm, 0.25)
            expected[row, head] = kernels.silu_multiply("scalar", gates[row, head], normed)
    same_bytes(expected, run(device, "finish_delta", rows * heads, out, gates, norm, shape)[0])


@orders
@pytest.mark.parametrize("both", [False, True])
@settings(max_examples=10, deadline=None)
@given(**heads_of_delta, tiled=st.booleans())
def test_gated_delta_rule(
    order: str, both: bool, seed: int, kv_heads: int, group: int, key_dim: int, chunks: int, wild: bool, tiled: bool
) -> None:
    rng = np.random.default_rng(seed)
    heads, value_dim = kv_heads * group, 16 * chunks
    sequences, positions = some_rows(rng)
    rows = len(sequences)
    queries, keys = floats(rng, 2, rows, kv_heads, key_dim)
    values = floats(rng, rows, heads, value_dim, wild=wild)
    beta, alpha = floats(rng, 2, rows, heads)
    states = States(rng, sequences, positions, heads, key_dim, value_dim)
    expected = np.zeros_like(values)
    for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        for head in range(heads):
            state = states.expected[sequence, head]
            if position == 0:
                state[:] = 0
            key_head = head % kv_heads if tiled else head // group
            state[:], expected[row, head] = kernels.gated_delta(
                "scalar",
                state,
                queries[row, key_head],
                keys[row, key_head],
                values[row, head],
                float(alpha[row, head]),
                float(beta[row, head]),
            )
    mixed = np.concatenate([part.reshape(rows, -1) for part in (queries, keys, values)], axis=1)
    memory = Memory(Device("emulated", order=order, seed=seed))
    address, *tables = states.put(memory)
    given_arrays = [memory.put(array) for array in (mixed, betas_and_alphas(both, beta, alpha, kv_heads))]
    given_arrays.append(0 if both else memory.put(alpha))
    out = memory.room(values.shape)
    arguments = [*given_arrays, *tables, memory.put(np.array(positions, np.int32)), out]
    shape = delta_shape(heads, kv_heads, key_dim, value_dim, tiled, both, rows)
    memory.device.launch("gated_delta", heads * -(-value_dim // 32), [*arguments, shape])
    same_bytes(expected, memory.get(out))
    same_bytes(states.expected, memory.get(address))
