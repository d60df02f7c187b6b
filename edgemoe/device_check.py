"""Every kernel of a device against the emulated one, and how fast its memory and its link to the host are.

The emulated device gives the bytes of the processor's scalar kernels: the tests see to that. Here both are given the
same random numbers, sane ones and wild ones, and what they leave in their memory is compared.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe import _core, kernel_images
from edgemoe._core import Device
from edgemoe.devices import OpenDevice
from edgemoe.formats.layouts import GGML_LAYOUTS, packed_size
from edgemoe.kept import read_kept, write_kept

ROUNDS = 2
"""Launches of each kernel when a device is checked."""
GUARD = 256
"""Bytes behind every buffer that stay as they are."""

Array = npt.NDArray[Any]
Addresses = dict[str, int]
Rng = np.random.Generator


# --- structs and kernels, as their text says --------------------------------------------------------------------------


@functools.cache
def shapes() -> dict[str, np.dtype[Any]]:
    """The structs of native/gpu/shapes.h."""
    text = re.sub(r"//.*", "", _core.kernels.device_headers()["shapes"])
    numbers = {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)", text)}
    types: dict[str, Any] = {"u8": np.uint8, "i32": np.int32, "u64": np.uint64, "float": np.float32}
    numbers_only = set(types)
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields: list[Any] = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, rest = declaration.split(None, 1)
            for member, count in re.findall(r"(\w+)(?:\[(\w+)\])?", rest):
                size = (numbers.get(count) or int(count),) if count else ()
                fields.append((member, types[kind], *([size] if size else [])))
        types[name] = np.dtype(fields, align=True)
    return {name: kind for name, kind in types.items() if name not in numbers_only}


def struct(name: str, **members: Any) -> bytes:
    """One of them; members that are not named are 0."""
    value = np.zeros((), shapes()[name])
    for member, given in members.items():
        value[member] = given
    return value.tobytes()


@functools.cache
def threads() -> dict[str, int]:
    """Of a group, by kernel."""
    found = re.findall(r"^EDGEMOE_KERNEL\((\w+), (\d+)\)", _core.kernels.device_headers()["kernel_list"], re.MULTILINE)
    return {name: int(count) for name, count in found}


Argument = str | None | bytes | Callable[[Addresses], bytes]


@dataclass
class Case:
    """A launch: buffers by name, what is in them, and arguments: a buffer's name, none, or a value, which may hold
    addresses. Some buffers hold addresses of others, or none."""

    kernel: str
    groups: int
    buffers: Mapping[str, Array]
    arguments: Sequence[Argument]
    pointers: Mapping[str, Sequence[str | None]] = field(default_factory=dict)


class Placed:
    """A case's buffers on a device, with guards behind them."""

    def __init__(self, device: Device, case: Case) -> None:
        self.device, self.case, self.addresses = device, case, dict[str, int]()
        for name, array in case.buffers.items():
            self.addresses[name] = device.allocate(array.nbytes + GUARD)
            device.write(self.addresses[name], np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            device.write(self.addresses[name] + array.nbytes, b"\xa5" * GUARD)
        for name, targets in case.pointers.items():
            numbers = np.array([self.addresses[target] if target else 0 for target in targets], np.uint64)
            self.addresses[name] = device.allocate(numbers.nbytes)
            device.write(self.addresses[name], numbers)

    def arguments(self) -> list[int | bytes]:
        """For `Device.launch`."""
        return [
            self.addresses[argument]
            if isinstance(argument, str)
            else 0
            if argument is None
            else argument
            if isinstance(argument, bytes)
            else argument(self.addresses)
            for argument in self.case.arguments
        ]

    def results(self) -> dict[str, bytes]:
        """What is in all buffers and behind them, but for addresses; they are given back."""
        found = {
            name: self.device.read(self.addresses[name], array.nbytes + GUARD)
            for name, array in self.case.buffers.items()
        }
        for address in self.addresses.values():
            self.device.release(address)
        return found


def run(device: Device, case: Case) -> dict[str, bytes]:
    """What a case leaves in its buffers."""
    placed = Placed(device, case)
    device.launch(case.kernel, case.groups, placed.arguments())
    return placed.results()


# --- random cases -----------------------------------------------------------------------------------------------------


def floats(rng: Rng, *shape: int, wild: bool = False) -> Array:
    """Normal numbers; wild ones are of all magnitudes, or any bits at all."""
    values = rng.standard_normal(shape).astype(np.float32)
    if wild:
        with np.errstate(over="ignore", under="ignore"):
            values *= np.float32(2.0) ** rng.integers(-140, 127, shape).astype(np.float32)
        bits = rng.integers(0, 1 << 32, shape, np.uint32).view(np.float32)
        values = np.where(rng.integers(0, 16, shape) == 0, bits, values)
    return np.asarray(values, np.float32)


def elements(count: int) -> int:
    """Groups of kernels that have a thread for each element."""
    return -(-count // 256)


def nothing(*shape: int, dtype: Any = np.float32) -> Array:
    """Room for an output."""
    room = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0x77, np.uint8)
    return np.asarray(room.view(dtype).reshape(shape))


def some(rng: Rng, buffers: dict[str, Array], name: str, array: Array) -> str | None:
    """A buffer that may be missing, and half of the time is."""
    if rng.integers(2):
        return None
    buffers[name] = array
    return name


def i32(value: int) -> bytes:
    return np.int32(value).tobytes()


def layout_of(kernel: str) -> str:
    """Of a product: its name in packs."""
    name = kernel.removeprefix("product_")
    return f"ggml.{name}" if name not in ("f32", "f16", "bf16", "q8g64", "q4g64", "nested") else name


def weights(rng: Rng, layout: str, rows: int, cols: int, wild: bool = False) -> Array:
    """A matrix's bytes. Their scales are of all magnitudes, of every 32 about one is not finite."""
    padded = -(-rows // 16) * 16
    if layout in ("f32", "f16", "bf16") and not wild:
        values = rng.standard_normal(padded * cols, np.float32)
        if layout == "bf16":
            return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)
        return values.astype("<f4" if layout == "f32" else "<f2").view(np.uint8)
    return rng.integers(0, 256, packed_size(layout, padded, cols), np.uint8)


def product(rng: Rng, kernel: str, wild: bool) -> Case:
    layout, count = layout_of(kernel), int(rng.integers(1, 4))
    unit = GGML_LAYOUTS[layout].weights if layout in GGML_LAYOUTS else 1
    cols = max(1, int(rng.integers(1, 600)) // unit) * unit
    groups, inputs = -(-cols // 64), int(rng.integers(1, 7))
    x = floats(rng, inputs, cols, wild=wild)
    buffers: dict[str, Array] = {
        "x": x,
        "codes": rng.integers(-127, 128, (inputs, groups * 64), np.int8),
        "scales": floats(rng, inputs, groups, wild=wild),
        "sums": floats(rng, inputs, groups, wild=wild),
    }
    jobs, begin = [], 0
    for number in range(count):
        rows, first, pairs = int(rng.integers(1, 70)), int(rng.integers(0, 3)), int(rng.integers(1, inputs + 1))
        listed = rng.integers(2) or first + pairs > inputs
        job: dict[str, Any] = {"rows": rows, "first": first, "count": pairs, "begin": begin}
        names = [f"data{number}"]
        if layout == "nested":
            bits = [2, 1, 1][: int(rng.integers(1, 4))]
            names += [f"data{number}.{level}" for level in range(1, len(bits))]
            for level, name in enumerate(names):
                buffers[name] = weights(rng, "refine1" if level else "base2r2", rows, cols)
            job |= {"levels": len(bits), "parameters": 2, "bits": (bits + [0] * 8)[:8]}
        else:
            buffers[names[0]] = weights(rng, layout, rows, cols, wild)
        if listed:
            buffers[f"inputs{number}"] = rng.integers(0, inputs, first + pairs, np.int32)
        buffers[f"out{number}"] = nothing(first + pairs, rows)
        jobs.append((job, names, f"inputs{number}" if listed else None, f"out{number}"))
        begin += -(-rows // 16) * -(-pairs // 4)

    def value(at: Addresses) -> bytes:
        result = np.zeros((), shapes()["Jobs"])
        result["count"], result["cols"] = count, cols
        for place, (job, names, listed, out) in zip(result["job"], jobs, strict=False):
            for member, given in job.items():
                place[member] = given
            place["data"], place["out"] = at[names[0]], at[out]
            place["later"][: len(names) - 1] = [at[name] for name in names[1:]]
            place["inputs"] = at[listed] if listed else 0
        return result.tobytes()

    return Case(kernel, begin, buffers, ["x", "codes", "scales", "sums", value])


def quantize_rows(rng: Rng, wild: bool) -> Case:
    rows, cols, apart = int(rng.integers(1, 6)), int(rng.integers(1, 400)), int(rng.integers(0, 9))
    groups = -(-cols // 64)
    buffers = {
        "x": floats(rng, rows, cols + apart, wild=wild),
        "codes": nothing(rows, groups * 64, dtype=np.int8),
        "scales": nothing(rows, groups),
        "sums": nothing(rows, groups),
    }
    shape = struct("QuantizeShape", cols=cols, stride=cols + apart)
    return Case("quantize_rows", -(-rows * groups // 4), buffers, [*buffers, shape, i32(rows)])


def elementwise(rng: Rng, kernel: str, wild: bool) -> Case:
    """All but `choose` of what is computed of rows."""
    count, size = int(rng.integers(1, 6)), int(rng.integers(1, 600))
    x, other = floats(rng, count, size, wild=wild), floats(rng, count, size, wild=wild)
    vector = floats(rng, size, wild=wild)
    factor = float(floats(rng, 1)[0])
    shape = struct("VectorShape", size=size, count=count, factor=factor)
    norm = struct("NormShape", size=size, epsilon=1e-6)
    each = elements(x.size)
    if kernel == "rms_norm":
        return Case(
            kernel, count, {"x": x, "weight": vector, "out": nothing(count, size)}, ["x", "weight", "out", norm]
        )
    if kernel == "layer_norm":
        buffers = {"x": x, "weight": vector, "bias": floats(rng, size)}
        return Case(kernel, count, buffers, ["x", "weight", "bias", "x", norm])
    if kernel == "add_vector":
        return Case(kernel, each, {"vector": vector, "x": x}, ["vector", "x", shape])
    if kernel == "add_scaled":
        return Case(kernel, each, {"values": other, "x": x}, ["values", "x", shape])
    if kernel == "scale_by":
        return Case(kernel, each, {"factor": vector[:1], "x": x}, ["factor", "x", shape])
    if kernel == "clip":
        limit = struct("VectorShape", size=size, count=count, factor=abs(factor))
        return Case(kernel, each, {"x": x}, ["x", limit])
    if kernel == "gather_rows":
        rows = rng.integers(0, count, count + 2, np.int32)
        gathered = struct("VectorShape", size=size, count=count + 2)
        buffers = {"x": x, "rows": rows, "out": nothing(count + 2, size)}
        return Case(kernel, elements((count + 2) * size), buffers, ["x", "rows", "out", gathered])
    if kernel == "copy_heads":
        heads = int(rng.integers(1, 4))
        steps = {"from_step": size, "from_stride": heads * size, "to_step": count * size, "to_stride": size}
        parts = {"x": floats(rng, count, heads, size, wild=wild), "out": nothing(heads, count, size)}
        copied = struct("CopyShape", size=size, heads=heads, count=count, **steps)
        return Case(kernel, elements(heads * count * size), parts, ["x", "out", copied])
    if kernel == "multiply":
        apart = struct("MultiplyShape", size=size, count=count, a_stride=size, b_stride=size + 3, out_stride=size)
        return Case(kernel, each, {"a": x, "b": floats(rng, count, size + 3, wild=wild)}, ["a", "b", "a", apart])
    if kernel == "gate_rows":
        return Case(kernel, count, {"weights": vector, "x": x, "out": other}, ["weights", "x", "out", shape])
    if kernel == "finish_logits":
        buffers = {"logits": x}
        bias = some(rng, buffers, "bias", vector)
        last = struct("LogitsShape", size=size, divisor=rng.choice([1.0, 1.7]), softcap=rng.choice([0.0, 30.0]))
        return Case(kernel, each, buffers, ["logits", bias, last, i32(count)])
    if kernel == "activate":
        buffers = {"gate": x, "up": other}
        kind, first = int(rng.integers(3)), int(rng.integers(3))
        experts = some(rng, buffers, "experts", rng.integers(0, 4, first + count, np.int32))
        biases = [some(rng, buffers, name, floats(rng, 4 if experts else 1, size)) for name in ("gate_bias", "up_bias")]
        value = struct("ActivateShape", size=size, count=count, kind=kind, first=first, alpha=1.702, limit=7.0)
        return Case(kernel, each, buffers, ["gate", "up", *biases, experts, value])
    assert kernel == "combine", kernel
    top_k = int(rng.integers(1, 9))
    buffers = {
        "weights": floats(rng, count, top_k),
        "picks": rng.integers(0, 8, (count, top_k), np.int32),
        "places": rng.permutation(count * top_k).astype(np.int32).reshape(count, top_k),
        "outputs": floats(rng, count * top_k, size, wild=wild),
        "sum": other,
    }
    shared, bias = some(rng, buffers, "shared", x), some(rng, buffers, "down_bias", floats(rng, 8, size))
    value = struct("CombineShape", size=size, top_k=top_k, from_zero=int(rng.integers(2)), scale=1.5)
    names = ["weights", "picks", "places", "outputs"]
    return Case(kernel, each, buffers, [shared, *names, bias, "sum", value, i32(count)])


def attention(rng: Rng, kernel: str, wild: bool) -> Case:
    """Heads, and keys and values in blocks of 64 positions."""
    kv_heads, dim, rows = int(rng.integers(1, 4)), 32 * int(rng.integers(1, 5)), int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    if kernel in ("split_gates", "turn_heads"):
        pairs = int(rng.integers(0, dim // 2 + 1))
        members = {"heads": heads, "dim": dim, "pairs": pairs, "interleaved": int(rng.integers(2)), "epsilon": 1e-6}
        shape = struct("HeadsShape", **members)
        if kernel == "split_gates":
            buffers = {"projected": floats(rng, rows, heads, 2, dim, wild=wild), "queries": nothing(rows, heads, dim)}
            return Case(kernel, elements(rows * heads * dim), buffers, ["projected", "queries", shape, i32(rows)])
        buffers = {"x": floats(rng, rows, heads, dim, wild=wild), "cosine": floats(rng, rows, max(pairs, 1))}
        buffers["sine"] = floats(rng, rows, max(pairs, 1))
        norm = some(rng, buffers, "norm", floats(rng, dim))
        return Case(kernel, rows * heads, buffers, ["x", norm, "cosine", "sine", shape])
    sequences, blocks = 2, 9
    types = rng.integers(0, 3, 2)
    sizes = [{0: dim * 256, 1: dim * 128, 2: dim * 64 + dim // 32 * 128}[int(kind)] for kind in types]
    head = sum(sizes)
    stride = head * kv_heads
    table = rng.permutation(sequences * blocks).astype(np.int32).reshape(sequences, blocks)
    positions = rng.integers(0, blocks * 64, rows, np.int32)
    pool = (rng.standard_normal(sequences * blocks * stride // 2) * 0.5).astype(np.float16).view(np.uint8)
    if types[0] == 0 and types[1] == 0:
        pool = (rng.standard_normal(sequences * blocks * stride // 4) * 0.5).astype(np.float32).view(np.uint8)
    buffers = {"positions": positions, "sequences": rng.integers(0, sequences, rows, np.int32), "tables": table}
    buffers["pool"] = pool
    window, gated = int(rng.choice([0, 5, 200])), int(rng.integers(2))

    def value(at: Addresses) -> bytes:
        return struct(
            "StateShape",
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            key_type=types[0],
            value_type=types[1],
            window=window,
            gated=gated,
            blocks=blocks,
            pool=at["pool"],
            stride=stride,
            values=sizes[0],
            head=head,
            scale=dim**-0.5,
        )

    where = ["positions", "sequences", "tables"]
    if kernel != "attend":
        # Rows of one place would be a race.
        buffers["positions"] = (np.arange(rows) + rng.integers(0, blocks * 64 - rows)).astype(np.int32)
        buffers["vectors"] = floats(rng, rows, kv_heads, dim, wild=wild)
        return Case(kernel, rows * kv_heads, buffers, ["vectors", *where, value])
    buffers["queries"], buffers["attended"] = floats(rng, rows, heads, dim), nothing(rows, heads, dim)
    if gated:
        buffers["projected"] = floats(rng, rows, heads, 2, dim)
    sinks = some(rng, buffers, "sinks", floats(rng, heads))
    arguments = ["queries", "projected" if gated else None, sinks, *where, "attended", value]
    return Case(kernel, rows * heads, buffers, arguments)


def latents(rng: Rng, kernel: str, wild: bool) -> Case:
    """Keys that all heads have in common, of which the first elements are values too."""
    heads, rank, rope_dim, rows = int(rng.integers(1, 4)), 32 * int(rng.integers(1, 6)), 32, int(rng.integers(1, 4))
    head_dim, dim, blocks, kind = 64, rank + rope_dim, 11, int(rng.integers(0, 3))
    stride = {0: dim * 256, 1: dim * 128, 2: dim * 64 + dim // 32 * 128}[kind]
    pairs, first = int(rng.integers(0, rope_dim // 2 + 1)), int(rng.integers(0, heads))
    count = heads - first
    buffers: dict[str, Array] = {
        "positions": (np.arange(rows) + rng.integers(0, blocks * 64 - rows)).astype(np.int32),
        "sequences": np.zeros(rows, np.int32),
        "tables": rng.permutation(blocks).astype(np.int32),
        "pool": (rng.standard_normal(blocks * stride // 2) * 0.5).astype(np.float16).view(np.uint8),
        "queries": floats(rng, rows, heads, head_dim, wild=wild),
    }

    def value(at: Addresses) -> bytes:
        result = np.zeros((), shapes()["LatentShape"])
        state = {"heads": heads, "kv_heads": 1, "dim": dim, "key_type": kind, "value_type": kind, "blocks": blocks}
        state |= {"pool": at["pool"], "stride": stride, "values": stride, "head": stride, "scale": dim**-0.5}
        for name, given in state.items():
            result["state"][name] = given
        members: dict[str, Any] = {
            "rank": rank,
            "rope_dim": rope_dim,
            "head_dim": head_dim,
            "first": first,
            "count": count,
        }
        members |= {"pairs": pairs, "interleaved": int(pairs % 2), "epsilon": 1e-6}
        for name, given in members.items():
            result[name] = given
        return result.tobytes()

    where = ["positions", "sequences", "tables"]
    if kernel == "store_latents":
        buffers |= {"latents": floats(rng, rows, dim, wild=wild), "norm": floats(rng, rank)}
        buffers |= {"cosine": floats(rng, rows, max(pairs, 1)), "sine": floats(rng, rows, max(pairs, 1))}
        names = ["queries", "latents", "norm", "cosine", "sine", *where]
        return Case(kernel, rows * (1 + heads), buffers, [*names, value])
    buffers |= {"asked": floats(rng, rows, count, dim), "found": nothing(rows, count, rank)}
    return Case(kernel, rows * count, buffers, ["queries", "asked", *where, "found", value])


def recurrence(rng: Rng, kernel: str, wild: bool) -> Case:
    """Rows of one sequence, which each see what the one before left; the first begins, or goes on elsewhere."""
    rows, begin = int(rng.integers(1, 5)), int(rng.choice([0, 3]))
    buffers: dict[str, Array] = {"positions": (begin + np.arange(rows)).astype(np.int32)}
    pointers: dict[str, list[str | None]] = {"states": ["state"] * rows, "before": [None] * rows}
    if begin:
        pointers["before"][0] = "earlier"
    if kernel == "convolve":
        channels, taps = int(rng.integers(1, 300)), int(rng.integers(2, 5))
        blocks = -(-channels // 16)
        buffers |= {"weights": floats(rng, blocks, taps, 16), "x": floats(rng, rows, channels, wild=wild)}
        buffers |= {"state": floats(rng, taps, channels), "earlier": floats(rng, taps, channels)}
        buffers["out"] = nothing(rows, channels)
        shape = struct("ConvolveShape", channels=channels, taps=taps, rows=rows, silu=int(rng.integers(2)))
        names: list[Argument] = ["weights", "x", "states", "before", "positions", "out", shape]
        return Case(kernel, -(-channels // threads()[kernel]), buffers, names, pointers)
    kv_heads, key_dim, value_dim = int(rng.integers(1, 3)), int(rng.integers(1, 80)), int(rng.integers(1, 80))
    heads, fused = kv_heads * int(rng.integers(1, 4)), int(rng.integers(2))
    members = {"heads": heads, "kv_heads": kv_heads, "key_dim": key_dim, "value_dim": value_dim, "rows": rows}
    tiled = int(rng.integers(2))
    shape = struct("DeltaShape", **members, tiled_heads=tiled, fused_beta_alpha=fused, epsilon=1e-6)
    if kernel == "finish_delta":
        buffers = {"out": floats(rng, rows, heads, value_dim, wild=wild), "gates": floats(rng, rows, heads, value_dim)}
        buffers["head_norm"] = floats(rng, value_dim)
        return Case(kernel, rows * heads, buffers, [*buffers, shape])
    shares = {"mixed": floats(rng, rows, 2 * kv_heads * key_dim + heads * value_dim, wild=wild)}
    shares["beta"] = floats(rng, rows, heads * (2 if fused else 1))
    if not fused:
        shares["alpha"] = floats(rng, rows, heads)
    alpha = None if fused else "alpha"
    if kernel == "prepare_delta":
        norms = {"query_norm": floats(rng, key_dim), "key_norm": floats(rng, key_dim)}
        rates = {"decay_rate": -abs(floats(rng, heads)), "step_bias": floats(rng, heads)}
        names = ["mixed", "beta", alpha, *norms, *rates, shape]
        return Case(kernel, rows * (2 * kv_heads + 1), shares | norms | rates, names)
    assert kernel == "gated_delta", kernel
    buffers |= shares
    buffers |= {name: floats(rng, heads, key_dim, value_dim) for name in ("state", "earlier")}
    buffers["out"] = nothing(rows, heads, value_dim)
    names = ["mixed", "beta", alpha, "states", "before", "positions", "out", shape]
    return Case(kernel, heads * -(-value_dim // 32), buffers, names, pointers)


def choose(rng: Rng, wild: bool) -> Case:
    rows, scores = int(rng.integers(1, 5)), int(rng.integers(0, 4))
    groups = int(rng.choice([1, 4])) if scores != 3 else 1
    experts = groups * int(rng.integers(4, 40))
    top_k = int(rng.integers(1, min(8, experts // groups) + 1))
    buffers = {
        "scores": floats(rng, rows, experts, wild=wild),
        "picks": nothing(rows, top_k, dtype=np.int32),
        "weights": nothing(rows, top_k),
        "choice": nothing(rows, experts),
        "order": nothing(rows, experts, dtype=np.int32),
    }
    bias = some(rng, buffers, "selection_bias", floats(rng, experts)) if scores != 3 else None
    scale = some(rng, buffers, "expert_scale", floats(rng, experts))
    shape = struct(
        "ChooseShape",
        experts=experts,
        top_k=top_k,
        scores=scores,
        groups=groups,
        groups_kept=max(1, groups // 2),
        group_score=int(rng.integers(2)),
        renormalize=int(rng.integers(2)),
        renormalize_least=1e-6,
        renormalize_epsilon=1e-20,
        weight_scale=2.5,
        mask_threshold=0.02,
    )
    return Case("choose", rows, buffers, ["scores", bias, scale, "picks", "weights", "choice", "order", shape])


def cases(kernel: str, seed: int, rounds: int) -> Iterator[Case]:
    """Random launches of a kernel; every third is of wild numbers."""
    for number in range(rounds):
        rng = np.random.default_rng([seed, number, list(threads()).index(kernel)])
        wild = number % 3 == 2
        if kernel.startswith("product_"):
            yield product(rng, kernel, wild)
        elif kernel == "quantize_rows":
            yield quantize_rows(rng, wild)
        elif kernel == "choose":
            yield choose(rng, wild)
        elif kernel in ("split_gates", "turn_heads", "store_keys", "store_values", "attend"):
            yield attention(rng, kernel, wild)
        elif kernel in ("convolve", "prepare_delta", "gated_delta", "finish_delta"):
            yield recurrence(rng, kernel, wild)
        elif kernel in ("store_latents", "attend_latents"):
            yield latents(rng, kernel, wild)
        else:
            yield elementwise(rng, kernel, wild)


def differences(device: Device, kernel: str, seed: int, rounds: int) -> list[str]:
    """What a kernel computes differently on this device than on an emulated one."""
    found = []
    for number, case in enumerate(cases(kernel, seed, rounds)):
        wanted = run(Device("emulated", order="shuffled", seed=number), case)
        for name, data in run(device, case).items():
            if data != wanted[name]:
                left, right = (np.frombuffer(one, np.uint8) for one in (data, wanted[name]))
                places = np.flatnonzero(left != right)
                found.append(f"{kernel}, case {number}, {name}: {len(places)} of {left.size} bytes, from {places[0]}")
    return found


def wrong_kernels(device: OpenDevice, folder: Path, *, anew: bool = False) -> list[str]:
    """Kernels that give other bytes on this device than the processor's, of some random launches each.

    That is found out once, or anew, and kept in `folder`/devices.json for the device, its driver and these kernels: it
    takes about a second. Raises DeviceError."""
    file = folder / "devices.json"
    key = f"{device.name}, {device.driver}, {kernel_images.digest()}"
    known = read_kept(file)
    kept = known.get(key)
    if not anew and isinstance(kept, list) and all(isinstance(name, str) and name in threads() for name in kept):
        return kept
    found = [name for name in threads() if differences(device.core, name, 0, ROUNDS)]
    write_kept(file, {**known, key: found})
    return found


# --- speed ------------------------------------------------------------------------------------------------------------


def seconds_of(device: Device, launch: Callable[[int], None], least: float) -> float:
    """Of one of many launches, which take at least so long together."""
    times = 1
    while True:
        device.wait()
        begin = time.perf_counter()
        launch(times)
        device.wait()
        taken = time.perf_counter() - begin
        if taken >= least or times >= 1 << 20:
            return taken / times
        times = min(times * 8, max(times * 2, int(times * least * 1.2 / max(taken, 1e-9)) + 1))


def copy_bandwidth(device: Device, nbytes: int, least: float) -> float:
    """Bytes that a copy on the device reads and writes in a second."""
    source, target = device.allocate(nbytes), device.allocate(nbytes)

    def copies(times: int) -> None:
        for _ in range(times):
            device.copy(target, source, nbytes)

    taken = seconds_of(device, copies, least)
    device.release(source)
    device.release(target)
    return 2 * nbytes / taken


def host_exchange(device: Device, nbytes: int, least: float) -> dict[str, float]:
    """What a step and an expert cost at least: a few bytes there and back; megabytes there."""
    address = device.allocate(nbytes)
    small = np.zeros(8192, np.uint8)

    def round_trips(times: int) -> None:
        for _ in range(times):
            device.write(address, small)
            device.read(address, 512)

    megabytes = np.zeros(nbytes, np.uint8)

    def uploads(times: int) -> None:
        for _ in range(times):
            device.wait(device.upload(address, megabytes))

    def writes(times: int) -> None:
        for _ in range(times):
            device.write(address, megabytes)

    result = {
        "round_trip_seconds": seconds_of(device, round_trips, least),
        "write_bytes_per_second": megabytes.nbytes / seconds_of(device, writes, least),
        "upload_bytes_per_second": megabytes.nbytes / seconds_of(device, uploads, least),
    }
    if device.pin(megabytes):
        result["pinned_upload_bytes_per_second"] = megabytes.nbytes / seconds_of(device, uploads, least)
        device.unpin(megabytes)
    device.release(address)
    return result
