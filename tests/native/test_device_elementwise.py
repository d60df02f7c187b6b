"""A device's norms, sums and activations against the processor's, byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import ORDERS, Memory, canonical, groups_for, number, numbers, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import floats, same_bytes, seeds, sizes

from edgemoe._core import Device, kernels

Array = np.ndarray[Any, np.dtype[Any]]

counts = st.integers(1, 5)
orders = pytest.mark.parametrize("order", ORDERS)


def fma(factor: Any, x: Array, y: Array) -> Array:
    return np.asarray(kernels.add_scaled("scalar", float(factor), np.ravel(x), np.ravel(y)), np.float32).reshape(
        np.shape(y)
    )


def sum_in_lanes(terms: list[Array]) -> np.float32:
    """Folds 16 accumulators by halves. terms: [16] each."""
    lanes = np.array(terms, np.float32)
    width = 8
    while width:
        lanes[:width] += lanes[width : 2 * width]
        width //= 2
    return np.float32(lanes[0])


def vector_shape(size: int, count: int, factor: float = 0.0) -> bytes:
    return numbers(size, count, factor)


def by_rows(function: Any, *arrays: Array) -> Array:
    return np.array([function(*rows) for rows in zip(*arrays, strict=True)], np.float32)


@orders
@settings(max_examples=8, deadline=None)
@given(seed=seeds, size=sizes, count=counts, wild=st.booleans())
def test_norms(order: str, seed: int, size: int, count: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    device = Device("emulated", order=order, seed=seed)
    x, weight, bias = floats(rng, count, size, wild=wild), *floats(rng, 2, size, wild=wild)
    epsilon = float(np.float32(1e-6))
    out = np.zeros_like(x)
    expected = by_rows(lambda row: kernels.rms_norm("scalar", row, weight, epsilon), x)
    results = run(device, "rms_norm", count, x, weight, out, numbers(size, epsilon))
    for one, other in zip([x, weight, expected], results, strict=True):
        same_bytes(one, other)
    expected = by_rows(lambda row: kernels.layer_norm("scalar", row, weight, bias, epsilon), x)
    results = run(device, "layer_norm", count, x, weight, bias, out, numbers(size, epsilon))
    for one, other in zip([x, weight, bias, expected], results, strict=True):
        same_bytes(one, other)


@orders
@pytest.mark.parametrize("size", [2047, 2048, 2049, 5000])
def test_norms_of_long_rows(order: str, size: int) -> None:
    rng = np.random.default_rng(size)
    device = Device("emulated", order=order)
    x, weight, bias = floats(rng, 2, size), *floats(rng, 2, size)
    out = np.zeros_like(x)
    expected = by_rows(lambda row: kernels.rms_norm("scalar", row, weight, 0.5), x)
    same_bytes(expected, run(device, "rms_norm", 2, x, weight, out, numbers(size, 0.5))[2])
    expected = by_rows(lambda row: kernels.layer_norm("scalar", row, weight, bias, 0.5), x)
    same_bytes(expected, run(device, "layer_norm", 2, x, weight, bias, out, numbers(size, 0.5))[3])
    same_bytes(gated_rows(weight, x, bias), run(device, "gate_rows", 1, weight, x[0], bias, vector_shape(size, 1))[2])


@orders
def test_norms_in_place(order: str) -> None:
    """The output may be the input."""
    rng = np.random.default_rng(3)
    device = Device("emulated", order=order)
    x, weight, bias = floats(rng, 3, 300), *floats(rng, 2, 300)
    for kernel in ("rms_norm", "layer_norm"):
        more = [bias] if kernel == "layer_norm" else []
        function = getattr(kernels, kernel)
        expected = by_rows(lambda row, function=function, more=more: function("scalar", row, weight, *more, 0.1), x)
        memory = Memory(device)
        both, *rest = [memory.put(array) for array in (x, weight, *more)]
        device.launch(kernel, 3, [both, *rest, both, numbers(300, 0.1)])
        same_bytes(expected, memory.get(both))


@orders
@settings(max_examples=8, deadline=None)
@given(seed=seeds, size=sizes, count=counts, wild=st.booleans())
def test_sums_and_products(order: str, seed: int, size: int, count: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    device = Device("emulated", order=order, seed=seed)
    groups = groups_for(size * count)
    x, values = floats(rng, 2, count, size, wild=wild)
    vector = floats(rng, size, wild=wild)
    factor = float(floats(rng, 1)[0])

    results = run(device, "add_vector", groups, vector, x, vector_shape(size, count))
    same_bytes(by_rows(lambda row: fma(1.0, vector, row), x), results[1])
    results = run(device, "add_scaled", groups, values, x, vector_shape(size, count, factor))
    same_bytes(by_rows(lambda one, row: fma(factor, one, row), values, x), results[1])
    with np.errstate(all="ignore"):
        results = run(device, "scale_by", groups, vector[:1], x, vector_shape(size, count))
        same_bytes(canonical(x * vector[0]), results[1])

        rows = rng.integers(0, count, 2 * count).astype(np.int32)
        out = np.zeros((2 * count, size), np.float32)
        results = run(device, "gather_rows", groups_for(out.size), x, rows, out, vector_shape(size, 2 * count))
        same_bytes(x[rows], results[2])

        strides = [size + int(more) for more in rng.integers(0, 9, 3)]
        a, b, target = (floats(rng, count, stride, wild=wild) for stride in strides)
        expected = target.copy()
        expected[:, :size] = canonical(a[:, :size] * b[:, :size])
        results = run(device, "multiply", groups, a, b, target, numbers(size, count, *strides))
        same_bytes(expected, results[2])


@orders
@settings(max_examples=10, deadline=None)
@given(seed=seeds, size=st.integers(1, 90), heads=st.integers(1, 4), count=counts)
def test_heads_are_brought_together_and_back(order: str, seed: int, size: int, heads: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    device = Device("emulated", order=order, seed=seed)
    before, after = rng.integers(0, 9, 2).tolist()  # of a head's elements that are not copied, and of a row's
    apart = floats(rng, count, heads * (before + size) + after, wild=True)
    by_head = np.stack([apart[:, h * (before + size) :][:, :size] for h in range(heads)])
    steps = [before + size, apart.shape[1], count * size, size]
    groups = groups_for(by_head.size)
    out = np.zeros_like(by_head)
    results = run(device, "copy_heads", groups, apart, out, numbers(size, heads, count, *steps))
    same_bytes(by_head, results[1])
    new = floats(rng, heads, count, size)
    expected = apart.copy()
    for head in range(heads):
        expected[:, head * (before + size) :][:, :size] = new[head]
    results = run(device, "copy_heads", groups, new, apart, numbers(size, heads, count, *steps[2:], *steps[:2]))
    same_bytes(expected, results[1])


def activated(kind: int, gate: Array, up: Array, alpha: float, limit: float) -> Array:
    if kind == 2:
        return np.asarray(kernels.clamped_swiglu("scalar", gate, up, alpha, limit), np.float32)
    return np.asarray((kernels.silu_multiply, kernels.gelu_multiply)[kind]("scalar", gate, up), np.float32)


@orders
@pytest.mark.parametrize("kind", [0, 1, 2])
@settings(max_examples=6, deadline=None)
@given(
    seed=seeds,
    size=sizes,
    count=counts,
    wild=st.booleans(),
    biases=st.integers(0, 2),
    limit=st.sampled_from([7.0, 0.0]),
)
def test_activations(
    order: str, kind: int, seed: int, size: int, count: int, wild: bool, biases: int, limit: float
) -> None:
    """biases: none, one row, or one for each expert."""
    rng = np.random.default_rng(seed)
    device = Device("emulated", order=order, seed=seed)
    gate, up = floats(rng, 2, count, size, wild=wild)
    with np.errstate(all="ignore"):
        gate = gate * np.float32(rng.choice([1, 10, 100]))
    alpha = float(np.float32(1.702))
    first = int(rng.integers(0, 4))
    experts = rng.integers(0, 6, first + count).astype(np.int32)
    gate_bias, up_bias = floats(rng, 2, 6 if biases == 2 else 1, size, wild=wild)
    rows = experts[first:] if biases == 2 else np.zeros(count, np.int32)
    gates, ups = list(gate), list(up)
    if biases:
        gates = [fma(1.0, gate_bias[expert], row) for expert, row in zip(rows, gate, strict=True)]
        ups = [fma(1.0, up_bias[expert], row) for expert, row in zip(rows, up, strict=True)]
    expected = np.array([activated(kind, *pair, alpha, limit) for pair in zip(gates, ups, strict=True)])
    shape = numbers(size, count, kind, first if biases == 2 else 0, alpha, limit)
    results = run(
        device,
        "activate",
        groups_for(gate.size),
        gate,
        up,
        *((gate_bias, up_bias) if biases else (None, None)),
        experts if biases == 2 else None,
        shape,
    )
    same_bytes(expected, results[0])
    same_bytes(up, results[1])


def gated_rows(weights: Array, x: Array, out: Array) -> Array:
    """CpuBackend::gate_rows; of one row where `out` is one."""
    if out.ndim == 1:
        return gated_rows(weights, x[:1], out[None])[0]
    rows = []
    padded = -(-weights.size // 16) * 16
    for values, row in zip(x, out, strict=True):
        lanes = np.zeros(16, np.float32)
        for i in range(0, padded, 16):
            for lane in range(min(16, weights.size - i)):
                lanes[lane] = fma(values[i + lane], weights[i + lane : i + lane + 1], lanes[lane : lane + 1])[0]
        gate = kernels.sigmoid("scalar", np.array([sum_in_lanes(list(lanes))], np.float32))[0]
        rows.append(canonical(row * gate))
    return np.array(rows)


@orders
@settings(max_examples=6, deadline=None)
@given(seed=seeds, size=st.integers(1, 400), count=st.integers(1, 3), wild=st.booleans())
def test_gates_of_rows(order: str, seed: int, size: int, count: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    weights, x, out = floats(rng, size), floats(rng, count, size), floats(rng, count, size, wild=wild)
    if wild:
        x[rng.integers(0, count), rng.integers(0, size)] = floats(rng, 1, wild=True)[0]
    with np.errstate(all="ignore"):
        expected = gated_rows(weights, x, out)
    results = run(
        Device("emulated", order=order, seed=seed), "gate_rows", count, weights, x, out, vector_shape(size, count)
    )
    same_bytes(expected, results[2])


@orders
@settings(max_examples=8, deadline=None)
@given(seed=seeds, size=sizes, count=counts, top_k=st.integers(1, 6), wild=st.booleans(), parts=st.integers(0, 7))
def test_combination(order: str, seed: int, size: int, count: int, top_k: int, wild: bool, parts: int) -> None:
    rng = np.random.default_rng(seed)
    from_zero, with_shared, with_bias = (bool(parts >> bit & 1) for bit in range(3))
    pairs, experts = count * top_k, 7
    shared, sums = floats(rng, 2, count, size, wild=wild)
    outputs, bias = floats(rng, pairs, size, wild=wild), floats(rng, experts, size, wild=wild)
    weights = floats(rng, count, top_k, wild=wild)
    picks = rng.integers(0, experts, (count, top_k)).astype(np.int32)
    places = rng.permutation(pairs).astype(np.int32)
    scale = float(floats(rng, 1)[0])
    expected = np.zeros_like(sums) if from_zero else sums.copy()
    for row in range(count):
        if with_shared:
            expected[row] = fma(scale, shared[row], expected[row])
        for pick in range(top_k):
            with np.errstate(all="ignore"):
                weight = np.float32(scale) * weights[row, pick]
            expected[row] = fma(weight, outputs[places[row * top_k + pick]], expected[row])
            if with_bias:
                expected[row] = fma(weight, bias[picks[row, pick]], expected[row])
    results = run(
        Device("emulated", order=order, seed=seed),
        "combine",
        groups_for(sums.size),
        shared if with_shared else None,
        weights,
        picks,
        places,
        outputs,
        bias if with_bias else None,
        sums,
        numbers(size, top_k, from_zero, scale),
        number(count),
    )
    same_bytes(expected, results[-1])


@orders
@settings(max_examples=8, deadline=None)
@given(seed=seeds, size=sizes, count=counts, wild=st.booleans(), parts=st.integers(0, 7))
def test_what_follows_the_product_of_the_head(
    order: str, seed: int, size: int, count: int, wild: bool, parts: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, bias = canonical(floats(rng, count, size, wild=wild)), floats(rng, size, wild=wild)
    with_bias, divisor, softcap = bool(parts & 1), 3.0 if parts & 2 else 1.0, 30.0 if parts & 4 else 0.0
    expected = by_rows(lambda row: fma(1.0, bias, row), logits) if with_bias else logits
    if divisor != 1:
        expected = canonical(expected / np.float32(divisor))
    if softcap:
        expected = by_rows(lambda row: kernels.softcap("scalar", softcap, row), expected)
    results = run(
        Device("emulated", order=order, seed=seed),
        "finish_logits",
        groups_for(logits.size),
        logits,
        bias if with_bias else None,
        numbers(size, divisor, softcap),
        number(count),
    )
    same_bytes(expected, results[0])
