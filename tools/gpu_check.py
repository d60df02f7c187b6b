"""Every device kernel on an NVIDIA GPU: the same bytes as on the emulated device, and how fast the products are.

    python -m tools.gpu_check [--rounds 12] [--gigabytes 5] [--seconds 0.2] [--megabytes 256] [--cold 512]
                              [--layers 6] [--tokens 64] [--small] [--seed 0] [--library PATH] [--json FILE]

The emulated device gives the bytes of the processor's scalar kernels: the tests see to that. Here both are given the
same random numbers, sane ones and wild ones, and what they leave in their memory is compared. Then the last rows of
matrices that are larger than 32 bits can count are compared with the same rows as matrices of their own. With
--rounds 0, --gigabytes 0 and --layers 0 nothing is compared; with --megabytes 0 and --layers 0 nothing is measured.

Products: GB/s of a matrix's bytes, for one token and for four, of matrices that together are larger than the caches
hold, and as a share of the bandwidth of a plain copy on the device. Small ones are reported too: what they take is
mostly their launch and the chain of sums. Beside that: what the link to the host carries, and what a step's small
exchanges with the host take.

Then a whole model, synthesized with layers of Qwen3-30B-A3B's shape: its logits on the device have the bytes of the
processor's, with none, a quarter, half and all of its experts there; and tokens a second of a prompt of 512 and of one
token after the other, beside the processor's. --layers 0: no model.

Ends with status 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe._core import Device
from edgemoe.device_check import (
    Addresses,
    Case,
    Placed,
    Rng,
    copy_bandwidth,
    differences,
    floats,
    host_exchange,
    i32,
    layout_of,
    nothing,
    seconds_of,
    shapes,
    struct,
    threads,
    weights,
)
from edgemoe.engine import Engine
from edgemoe.errors import DeviceError
from edgemoe.formats.index import ModelIndex
from edgemoe.formats.layouts import packed_size
from edgemoe.formats.read import read_index
from edgemoe.options import EngineOptions
from edgemoe.processors import usable_processors
from tools.model_files import write_pack
from tools.synthesize import SyntheticModel

PROMPT = 512
MEGABYTES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Row = dict[str, Any]


def same_far_rows(device: Device, kernel: str, nbytes: int, cols: int = 2048) -> bool:
    """Whether the last 16 rows of a matrix of so many bytes give what they give as a matrix of their own."""
    rng, layout, groups = np.random.default_rng(3), layout_of(kernel), -(-cols // 64)
    last = weights(rng, layout, 16, cols)
    blocks = nbytes // last.nbytes
    x = [floats(rng, cols), rng.integers(-127, 128, groups * 64, np.int8), floats(rng, groups), floats(rng, groups)]
    data, out = device.allocate(blocks * last.nbytes), device.allocate(blocks * 64)
    device.write(data + (blocks - 1) * last.nbytes, last)  # what the other rows are does not matter
    inputs = [device.allocate(array.nbytes) for array in x]
    for address, array in zip(inputs, x, strict=True):
        device.write(address, array)
    results = []
    for rows, at in ((blocks * 16, data), (16, data + (blocks - 1) * last.nbytes)):
        jobs = np.zeros((), shapes()["Jobs"])
        jobs["count"], jobs["cols"] = 1, cols
        job = jobs["job"][0]
        job["data"], job["out"], job["rows"], job["count"] = at, out, rows, 1
        device.launch(kernel, rows // 16, [*inputs, jobs.tobytes()])
        results.append(device.read(out + (rows - 16) * 4, 64))
    for address in (data, out, *inputs):
        device.release(address)
    return results[0] == results[1]


# --- speed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of measurements."""

    seconds: float  # at least, of each
    megabytes: float  # of the largest matrix
    cold: float  # megabytes of the matrices that are taken in turn

    def matrices(self) -> list[int]:
        """Bytes, ascending."""
        sizes = [size for size in MEGABYTES if size <= self.megabytes] or [self.megabytes]
        return [int(size * 10**6) for size in sizes]


def product_speed(device: Device, kernel: str, nbytes: int, tokens: int, of: Sizes, cols: int = 2048) -> Row:
    """A product with one matrix after the other of about so many bytes, which the caches do not hold together."""
    layout, rng = layout_of(kernel), np.random.default_rng(1)
    nested = layout == "nested"
    levels = ["base2r2", "refine1", "refine1"] if nested else [layout]
    rows = max(16, nbytes // (sum(packed_size(level, 16, cols) for level in levels) // 16) // 16 * 16)
    sizes = [packed_size(level, rows, cols) for level in levels]
    groups, blocks = -(-cols // 64), rows // 16
    free = int(device.facts()["available"])
    copies = max(1, min(512, int(of.cold * 10**6) // sum(sizes), free // 2 // sum(sizes)))
    # The same bytes again and again: only that they lie elsewhere counts.
    some_bytes = rng.integers(0, 256, min(max(sizes), 1 << 20), np.uint8)
    matrices = []
    for _ in range(copies):
        addresses = [device.allocate(size) for size in sizes]
        for address, size in zip(addresses, sizes, strict=True):
            for at in range(0, size, some_bytes.size):
                device.write(address + at, some_bytes[: size - at])
        matrices.append(addresses)
    x = [device.allocate(size) for size in (tokens * cols * 4, tokens * groups * 64, *[tokens * groups * 4] * 2)]
    out = device.allocate(tokens * rows * 4)
    arguments: list[list[int | bytes]] = []
    for data, *later in matrices:
        jobs = np.zeros((), shapes()["Jobs"])
        jobs["count"], jobs["cols"] = 1, cols
        job = jobs["job"][0]
        job["data"], job["out"], job["rows"], job["count"] = data, out, rows, tokens
        if nested:
            job["later"][:2], job["levels"], job["parameters"], job["bits"][:3] = later, 3, 2, (2, 1, 1)
        arguments.append([*x, jobs.tobytes()])
    number = blocks * -(-tokens // 4)

    def launches(times: int) -> None:
        device.launches(kernel, number, arguments, times)

    launches(copies)
    taken = seconds_of(device, launches, of.seconds)
    for address in [*(address for matrix in matrices for address in matrix), *x, out]:
        device.release(address)
    return {
        "kernel": kernel,
        "bytes": sum(sizes),
        "rows": rows,
        "cols": cols,
        "tokens": tokens,
        "seconds": taken,
        "bytes_per_second": sum(sizes) / taken,
    }


def small_kernels(device: Device, lengths: Sequence[int], least: float) -> list[Row]:
    """What kernels take that move next to nothing: of the sizes of a step of Qwen3-30B-A3B for one token."""
    rng = np.random.default_rng(2)
    row = {"x": floats(rng, 1, 2048), "weight": floats(rng, 2048), "out": nothing(1, 2048)}
    norm = Case("rms_norm", 1, row, ["x", "weight", "out", struct("NormShape", size=2048, epsilon=1e-6)])
    codes = {"x": row["x"], "codes": nothing(1, 2048, dtype=np.int8), "scales": nothing(1, 32), "sums": nothing(1, 32)}
    quantize = Case("quantize_rows", 8, codes, [*codes, struct("QuantizeShape", cols=2048, stride=2048), i32(1)])
    choice = {
        "scores": floats(rng, 1, 128),
        "picks": nothing(1, 8, dtype=np.int32),
        "weights": nothing(1, 8),
        "choice": nothing(1, 128),
        "order": nothing(1, 128, dtype=np.int32),
    }
    shape = struct("ChooseShape", experts=128, top_k=8, groups=1, groups_kept=1, renormalize=1, weight_scale=1.0)
    choosing = Case("choose", 1, choice, ["scores", None, None, "picks", "weights", "choice", "order", shape])
    rows = []
    for case in (norm, quantize, choosing, *(attend_case(rng, length) for length in lengths)):
        placed = Placed(device, case)
        launches = functools.partial(device.launches, case.kernel, case.groups, [placed.arguments()])
        taken = seconds_of(device, launches, least)
        positions = int(case.buffers["positions"][0]) + 1 if "positions" in case.buffers else None
        rows.append({"kernel": case.kernel, "positions": positions, "seconds": taken})
        placed.results()
    return rows


def attend_case(rng: Rng, length: int) -> Case:
    """One token's attention over so many positions: 32 heads of 128, 4 of keys, float16."""
    blocks, head = -(-length // 64), 64 * 128 * 2 * 2
    buffers = {
        "positions": np.array([length - 1], np.int32),
        "sequences": np.zeros(1, np.int32),
        "tables": np.arange(blocks, dtype=np.int32),
        "pool": (rng.standard_normal(blocks * head * 4 // 2, np.float32) * 0.5).astype(np.float16),
        "queries": floats(rng, 32, 128),
        "attended": nothing(32, 128),
    }

    def value(at: Addresses) -> bytes:
        members = {"heads": 32, "kv_heads": 4, "dim": 128, "key_type": 1, "value_type": 1, "blocks": blocks}
        places = {"pool": at["pool"], "stride": head * 4, "values": head // 2, "head": head}
        return struct("StateShape", **members, **places, scale=128**-0.5)

    where = ["positions", "sequences", "tables"]
    return Case("attend", 32, buffers, ["queries", None, None, *where, "attended", value])


def measure(device: Device, of: Sizes) -> dict[str, Any]:
    """Prints as it goes."""
    sizes = of.matrices()
    bandwidth = copy_bandwidth(device, 4 * sizes[-1], of.seconds)
    print(f"a copy on the device moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    exchange = host_exchange(device, min(64 << 20, sizes[-1]), of.seconds)
    print(f"8 KiB there and 512 bytes back: {exchange['round_trip_seconds'] * 1e6:.1f} us", flush=True)
    for name in ("write", "upload", "pinned_upload"):
        print(f"{name}: {exchange.get(f'{name}_bytes_per_second', 0) / 1e9:.1f} GB/s", flush=True)
    small = small_kernels(device, (512, 4096, 16384) if of.megabytes >= 64 else (100,), of.seconds)
    for row in small:
        what = f"{row['kernel']} over {row['positions']} positions" if row["positions"] else row["kernel"]
        print(f"{what}: {row['seconds'] * 1e6:.1f} us", flush=True)
    rows = []
    main = ("product_q4g64", "product_q8g64", "product_nested", "product_q4_k")
    for kernel in (name for name in threads() if name.startswith("product_")):
        for size in sizes if kernel in main else sizes[-1:]:
            for tokens in (1, 4):
                row = product_speed(device, kernel, size, tokens, of)
                row["share"] = row["bytes_per_second"] / bandwidth
                rows.append(row)
                print(
                    f"{kernel}, {row['bytes'] / 1e6:.1f} MB [{row['rows']}, {row['cols']}], {tokens} tokens: "
                    f"{row['seconds'] * 1e6:.1f} us, {row['bytes_per_second'] / 1e9:.0f} GB/s, {row['share']:.0%}",
                    flush=True,
                )
    return {"copy_bytes_per_second": bandwidth, **exchange, "small": small, "products": rows}


# --- a model ----------------------------------------------------------------------------------------------------------


def run_model(index: ModelIndex, options: EngineOptions, device: Device | None, tokens: int) -> tuple[Row, bytes]:
    """Speed, counters, and the logits after a prompt of a chunk and of `tokens` tokens one by one."""
    length = options.chunk
    engine = Engine(index, options, device)
    numbers = np.random.default_rng(4).integers(2, index.spec.vocab_size, length + tokens).tolist()
    engine.forward(numbers[:16], range(16), [0] * 16, [15])  # what is done once only
    engine.truncate(0, 0)
    begin = time.perf_counter()
    logits = [engine.forward(numbers[:length], range(length), [0] * length, [length - 1])]
    prompt = time.perf_counter() - begin
    before, begin = engine.counters(), time.perf_counter()
    logits += [engine.forward([numbers[i]], [i], [0], [0]) for i in range(length, length + tokens)]
    taken, counted = time.perf_counter() - begin, engine.counters() - before
    engine.close()
    row = {
        "layers": options.device_layers,
        "slots": options.device_slots,
        "prompt_tokens_per_second": length / prompt,
        "tokens_per_second": tokens / taken,
        "hits": counted.device_hits / max(counted.expert_uses, 1),
        "uploads": counted.device_uploads,
        "upload_bytes": counted.device_upload_bytes,
    }
    return row, b"".join(one.tobytes() for one in logits)


def check_model(open_device: Callable[[], Device], layers: int, tokens: int, small: bool) -> list[Row]:
    """One row for each placement, the processor alone first; "same": whether its logits are the processor's."""
    shape: dict[str, int] = {"hidden": 128, "ffn": 64, "experts": 16, "vocabulary": 512} if small else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.emoe"
        write_pack(SyntheticModel(layers=layers, **shape), path, 4, 8)
        index = read_index(path)
        experts = sum(layer.experts for layer in index.spec.layers)
        length = 16 if small else PROMPT
        usual = EngineOptions(threads=usable_processors(), context=length + tokens, chunk=length, expert_slots=experts)
        rows: list[Row] = []
        expected = b""
        for share in (None, 0.0, 0.25, 0.5, 1.0):
            there = 0 if share is None else layers + 1
            options = replace(usual, device_layers=there, device_slots=round((share or 0) * experts))
            row, logits = run_model(index, options, None if share is None else open_device(), tokens)
            expected = expected or logits
            row["same"] = logits == expected
            rows.append(row)
            where = "the processor" if share is None else f"the device, {share:.0%} of the experts there"
            print(
                f"{where}: prompt {row['prompt_tokens_per_second']:.1f} tok/s, then {row['tokens_per_second']:.2f} "
                f"tok/s, {row['hits']:.0%} of the uses there; {'the same' if row['same'] else 'OTHER'} logits",
                flush=True,
            )
    return rows


# --- command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="random launches of each kernel (default: 12)")
    parser.add_argument("--gigabytes", type=float, default=5, help="of a large matrix (default: 5; 0: none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.2, help="at least, of each measurement (default: 0.2)")
    parser.add_argument("--megabytes", type=float, default=256, help="of the largest matrix (default: 256; 0: none)")
    parser.add_argument("--cold", type=float, default=512, help="megabytes of matrices taken in turn (default: 512)")
    parser.add_argument("--layers", type=int, default=6, help="of the model (default: 6; 0: none)")
    parser.add_argument("--tokens", type=int, default=64, help="one after the other (default: 64)")
    parser.add_argument("--small", action="store_true", help="a model of tiny layers")
    parser.add_argument("--library", default="libcuda.so.1", help="the driver's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    begin = time.perf_counter()
    try:
        device = Device("cuda", library=options.library)
        report: dict[str, Any] = {"device": device.facts(), "opened_seconds": time.perf_counter() - begin}
        print(f"{report['device']}, opened in {report['opened_seconds']:.1f} s", flush=True)
        different: dict[str, list[str]] = {}
        for kernel in threads() if options.rounds else ():
            different[kernel] = differences(device, kernel, options.seed, options.rounds)
            print(f"{kernel}: {len(different[kernel])} differences", *different[kernel][:5], sep="\n  ", flush=True)
        for kernel in ("product_bf16", "product_q8g64", "product_q4_k") if options.gigabytes else ():
            same = same_far_rows(device, kernel, int(options.gigabytes * 10**9))
            print(f"{kernel}, {options.gigabytes:g} GB: the last rows are {'the same' if same else 'DIFFERENT'}")
            if not same:
                different.setdefault(kernel, []).append("the last rows of a large matrix")
        report["different"] = different
        if options.megabytes:
            report["speed"] = measure(device, Sizes(options.seconds, options.megabytes, options.cold))
        del device
        if options.layers:

            def another() -> Device:
                return Device("cuda", library=options.library)

            report["model"] = check_model(another, options.layers, options.tokens, options.small)
            if not all(row["same"] for row in report["model"]):
                different["a model"] = ["logits"]
    except DeviceError as error:
        raise SystemExit(f"gpu_check: {error}") from error
    report["seconds"] = time.perf_counter() - begin
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    failed = [kernel for kernel, lines in different.items() if lines]
    for kernel in failed:
        print(f"{kernel} is DIFFERENT")
    print(f"{len(different) - len(failed)} of {len(different)} kernels give the same bytes ({report['seconds']:.0f} s)")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
