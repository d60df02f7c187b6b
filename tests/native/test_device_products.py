"""A device's products, of every layout: to the bit what the scalar kernels of the processor compute."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import test_ggml_kernels as ggml
import test_nested_kernels as nested_kernels
from devices import Memory, emulated, number, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import any_matrix, floats, same_bytes, seeds, sizes

from edgemoe._core import kernels

Array = np.ndarray[Any, np.dtype[Any]]

PLAIN = ["f32", "bf16", "f16", "q8g64", "q4g64"]
LAYOUTS = [*PLAIN, *ggml.FORMATS, "nested"]
TILE_PAIRS = 4
MOST_JOBS = 16


@dataclass
class Weights:
    """A matrix, and what a device must know of it."""

    rows: int
    cols: int
    data: list[Array]
    bits: list[int] = field(default_factory=list)
    parameters: int = 0


@dataclass
class Job:
    weights: Weights
    first: int
    count: int
    inputs: Array | None = None

    def groups(self) -> int:
        return -(-self.weights.rows // 16) * -(-self.count // TILE_PAIRS)


def random_weights(rng: np.random.Generator, layout: str, rows: int, cols: int, wild: bool) -> Weights:
    if layout == "nested":
        widths = tuple(sorted(rng.choice(np.arange(1, 9), rng.integers(1, 9), replace=False).tolist()))
        levels = nested_kernels.random_levels(rng, widths, rows, cols, wild)
        count = int(rng.integers(1, len(widths) + 1))
        return Weights(rows, cols, levels[:count], nested_kernels.steps(widths)[:count], len(widths) - 1)
    if layout in ggml.FORMATS:
        blocks = ggml.random_blocks(rng, layout, rows, cols // ggml.FORMATS[layout][0], wild)
        return Weights(rows, cols, [ggml.interleaved(layout, blocks, cols)])
    return Weights(rows, cols, [any_matrix(rng, layout, rows, cols, wild)])


def columns(layout: str, size: int) -> int:
    """About so many columns, as many as the layout can have."""
    width = ggml.FORMATS[layout][0] if layout in ggml.FORMATS else 1
    return -(-size // width) * width


def expected_product(layout: str, weights: Weights, x: Array, pairs: Array) -> Array:
    x = np.ascontiguousarray(x)
    if layout == "nested":
        levels = list(zip(weights.bits, weights.data, strict=True))
        result = kernels.nested_matmul(
            "scalar", levels, weights.parameters, weights.rows, weights.cols, x, pairs.astype(np.int32)
        )
    else:
        name = f"ggml.{layout}" if layout in ggml.FORMATS else layout
        result = kernels.matmul("scalar", name, weights.data[0], weights.rows, weights.cols, x, pairs.astype(np.int32))
    return np.asarray(result)


def jobs_bytes(memory: Memory, jobs: Sequence[Job], outs: Sequence[int]) -> tuple[bytes, int]:
    """The struct Jobs, and how many workgroups it has."""
    data, begin = struct.pack("<2i", len(jobs), jobs[0].weights.cols), 0
    for job, out in zip(jobs, outs, strict=True):
        levels = [memory.put(level) for level in job.weights.data]
        inputs = 0 if job.inputs is None else memory.put(job.inputs.astype(np.int32))
        data += struct.pack(
            "<10Q6i8s",
            *(*levels, *[0] * (8 - len(levels))),
            inputs,
            out,
            job.weights.rows,
            job.first,
            job.count,
            begin,
            len(job.weights.bits),
            job.weights.parameters,
            bytes(job.weights.bits),
        )
        begin += job.groups()
    return data + bytes(8 + 112 * MOST_JOBS - len(data)), begin


def activations(memory: Memory, x: Array) -> list[int]:
    """Addresses of values, codes, scales and sums, which the device computes."""
    rows, cols = x.shape
    groups = -(-cols // 64)
    values = memory.put(x)
    codes, scales, sums = memory.room((rows, groups * 64), np.int8), *(memory.room((rows, groups)) for _ in "12")
    memory.device.launch(
        "quantize_rows",
        -(-rows * groups // 4),
        [values, codes, scales, sums, numbers(cols, cols), number(rows)],
    )
    return [values, codes, scales, sums]


def check_products(seed: int, layout: str, x: Array, jobs: Sequence[Job]) -> None:
    memory = Memory(emulated(seed))
    given_rows = [activations(memory, x)][0]
    # Outputs have room for pairs before the first one, and all that is not written must stay.
    outs = [memory.put(np.full((job.first + job.count, job.weights.rows), 7, np.float32)) for job in jobs]
    shape, groups = jobs_bytes(memory, jobs, outs)
    memory.device.launch(f"product_{layout}", groups, [*given_rows, shape])
    for job, out in zip(jobs, outs, strict=True):
        pairs = np.arange(job.first + job.count) if job.inputs is None else job.inputs
        expected = np.full((job.first + job.count, job.weights.rows), 7, np.float32)
        expected[job.first :] = expected_product(layout, job.weights, x, pairs[job.first :])
        same_bytes(expected, memory.get(out))


# --- activations ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=seeds, rows=st.integers(1, 7), cols=sizes, apart=st.integers(0, 70), wild=st.booleans())
def test_quantize_rows(seed: int, rows: int, cols: int, apart: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    x = floats(rng, rows, cols + apart, wild=wild)
    if seed % 4 == 0:
        x[rng.integers(0, rows)] *= np.float32(2.0**-120)  # about the smallest that are no zeros
    memory = Memory(emulated(seed))
    groups = -(-cols // 64)
    values = memory.put(x)
    codes, scales, sums = memory.room((rows, groups * 64), np.int8), *(memory.room((rows, groups)) for _ in "12")
    arguments = [values, codes, scales, sums, numbers(cols, cols + apart), number(rows)]
    memory.device.launch("quantize_rows", -(-rows * groups // 4), arguments)
    for row in range(rows):
        expected = kernels.quantize("scalar", x[row, :cols].copy())
        same_bytes(expected, tuple(memory.get(address)[row] for address in (codes, scales, sums)))


@pytest.mark.parametrize("least", [0x03FDFFFF, 0x03FE0000])
def test_quantize_the_smallest(least: int) -> None:
    x = np.zeros((1, 64), np.float32)
    x[0, 5] = np.array(least, np.uint32).view(np.float32)
    memory = Memory(emulated())
    codes, scales, sums = activations(memory, x)[1:]
    assert memory.get(codes)[0, 5] == (127 if least == 0x03FE0000 else 0)
    same_bytes(kernels.quantize("scalar", x[0]), tuple(memory.get(address)[0] for address in (codes, scales, sums)))


# --- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, rows=st.integers(1, 50), size=sizes, tokens=st.integers(1, 6), wild=st.booleans())
def test_one_matrix(layout: str, seed: int, rows: int, size: int, tokens: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    cols = columns(layout, size)
    x = floats(rng, tokens, cols, wild=wild and seed % 2 == 0)
    check_products(seed, layout, x, [Job(random_weights(rng, layout, rows, cols, wild), 0, tokens)])


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=8, deadline=None)
@given(seed=seeds, size=st.integers(1, 300), rows=st.lists(st.integers(1, 40), min_size=2, max_size=5))
def test_several_matrices(layout: str, seed: int, size: int, rows: list[int]) -> None:
    """Experts: each has some pairs of its own, which read any rows of the input."""
    rng = np.random.default_rng(seed)
    cols = columns(layout, size)
    tokens = int(rng.integers(1, 6))
    x = floats(rng, tokens, cols)
    jobs, first = [], 0
    for number_of_rows in rows:
        count = int(rng.integers(1, 7))
        inputs = rng.integers(0, tokens, first + count) if rng.integers(0, 4) else None
        if inputs is None:
            first = 0
            count = min(count, tokens)
        jobs.append(Job(random_weights(rng, layout, number_of_rows, cols, bool(seed % 2)), first, count, inputs))
        first += count
    check_products(seed, layout, x, jobs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_more_columns_than_a_tile(layout: str, tokens: int) -> None:
    rng = np.random.default_rng(5)
    cols = columns(layout, 64 * (66 if tokens == 1 else 34) + 32)
    if layout in ("f32", "bf16", "f16"):
        cols = 64 * 3 + 32
    x = floats(rng, tokens, cols)
    check_products(tokens, layout, x, [Job(random_weights(rng, layout, 20, cols, False), 0, tokens)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_many_matrices_as_there_can_be(layout: str) -> None:
    rng = np.random.default_rng(6)
    cols = columns(layout, 40)
    jobs = [Job(random_weights(rng, layout, 1 + i, cols, False), 0, 1) for i in range(MOST_JOBS)]
    check_products(2, layout, floats(rng, 1, cols), jobs)
