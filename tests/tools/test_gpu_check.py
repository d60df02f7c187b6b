"""The check for machines with a GPU, on a fake driver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, WrongCuda

from edgemoe import device_check
from edgemoe._core import Device
from tools import gpu_check


def status_of(*arguments: str) -> Any:
    """What it ends with; nothing holds its device any more."""
    try:
        gpu_check.main(arguments)
    except SystemExit as error:
        return error.code
    return 0


def test_structs_are_as_large_as_the_kernels_say() -> None:
    device = Device("emulated")
    assert (
        device_check.struct("VectorShape", size=3, count=1, factor=2.0)
        == np.array([3, 1, np.float32(2).view(np.int32)], np.int32).tobytes()
    )
    for kernel in device_check.threads():
        for case in device_check.cases(kernel, 0, 3):
            assert device_check.run(device, case)  # an argument of another size is refused


def test_it_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeCuda()
    sizes = ["--rounds", "2", "--gigabytes", "0.0005", "--megabytes", "0.02", "--cold", "0.05", "--seconds", "0.0001"]
    sizes += ["--layers", "2", "--tokens", "4", "--small"]
    status = status_of(*sizes, "--library", fake.path, "--json", str(tmp_path / "report.json"))
    out = capsys.readouterr().out
    assert status == 0, out
    assert not fake.errors
    assert fake.live() == {}
    assert set(fake.launches) == set(device_check.threads())
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert report["different"] == {kernel: [] for kernel in device_check.threads()}
    assert len(report["speed"]["products"]) == 2 * sum(name.startswith("product_") for name in device_check.threads())
    assert all(0 < row["seconds"] < 60 for row in report["speed"]["products"] + report["speed"]["small"])
    assert out.count("the last rows are the same") == 3
    assert [row["same"] for row in report["model"]] == [True] * 5
    assert report["model"][-1]["uploads"] > report["model"][1]["uploads"] == report["model"][1]["hits"] == 0
    assert f"{len(device_check.threads())} of {len(device_check.threads())} kernels give the same bytes" in out


def test_a_kernel_that_computes_something_else_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    fake = WrongCuda()
    assert (
        status_of("--rounds", "1", "--gigabytes", "0", "--megabytes", "0", "--layers", "0", "--library", fake.path) == 1
    )
    out = capsys.readouterr().out
    count = len(device_check.threads())
    assert f"{count - 1} of {count} kernels give the same bytes" in out
    assert "add_vector: 1 differences" in out


class Narrow(FakeCuda):
    """Products of many rows forget the last of them."""

    def _launch(self, name: bytes, groups: int, *arguments: Any) -> None:
        super()._launch(name, groups - 1 if groups > 1 else 1, *arguments)


def test_rows_that_are_not_reached_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    fake = Narrow()
    assert (
        status_of("--rounds", "0", "--gigabytes", "0.0005", "--megabytes", "0", "--layers", "0", "--library", fake.path)
        == 1
    )
    assert capsys.readouterr().out.count("the last rows are DIFFERENT") == 3


def test_without_a_gpu_it_says_so() -> None:
    assert "gpu_check: no NVIDIA driver" in status_of("--library", "/nowhere/libcuda.so.1")
