"""`edgemoe doctor`: what it finds, and that it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_cuda import WrongCuda

from edgemoe import device_check, devices, machine
from edgemoe.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.01)
    monkeypatch.setattr(machine, "TEST_FILE", 16 << 20)
    monkeypatch.setattr(machine, "BLOCK_SIZES", (64 << 10, 1 << 20))
    monkeypatch.setattr(machine, "DEPTHS", (1, 2))
    monkeypatch.setattr(machine, "DEVICE_BYTES", 1 << 20)
    monkeypatch.setattr(device_check, "ROUNDS", 1)
    monkeypatch.setenv("EDGEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEMOE_ISA", raising=False)


def test_everything_is_measured_and_nothing_left(tmp_path: Path) -> None:
    result = run("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["healthy"]
    assert found["isa"] in found["isas"]
    assert found["isas"][0] == "scalar"
    assert 0 < found["memory_headroom"] <= found["memory_total"]
    assert all(speed > 1e8 for speed in found["memory_bandwidth"].values())
    assert {(speed["block"], speed["depth"]) for speed in found["disk"]} == {
        (block, depth) for block in (64 << 10, 1 << 20) for depth in (1, 2)
    }
    assert all(speed["bytes_per_second"] > 0 for speed in found["disk"])
    assert found["direct"] in (True, False)
    assert not list((tmp_path / "cache").iterdir())


def test_for_people() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    for words in ("processor:", "memory:", "disk speed:", "GB/s", "KiB"):
        assert words in result.stdout


def test_a_named_folder_must_be_there(tmp_path: Path) -> None:
    result = run("--no-measure", "--folder", str(tmp_path / "gone"))
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    assert not (tmp_path / "gone").exists()


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("EDGEMOE_CACHE", str(file / "below"))
    result = run("--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    (problem,) = (finding for finding in found["findings"] if finding["state"] == "problem")
    assert str(file / "below") in problem["text"]
    assert "EDGEMOE_CACHE" in problem["remedy"]


def test_an_unknown_instruction_set_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMOE_ISA", "mmx")
    result = run("--no-measure")
    assert result.exit_code == 1
    assert "EDGEMOE_ISA=mmx is not available" in result.stdout
    monkeypatch.setenv("EDGEMOE_ISA", "scalar")
    result = run("--no-measure", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [finding["state"] for finding in found["findings"] if finding["topic"] == "processor"] == ["note"]
    assert found["disk"] == []


def test_little_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cgroup_headroom", lambda: 100_000_000)
    result = run("--no-measure")
    assert result.exit_code == 1
    assert "cgroup" in result.stdout


def test_little_space_is_only_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = machine.psutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(machine.psutil, "disk_usage", lambda _: usage._replace(free=50 << 20))
    result = run("--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    notes = [finding["topic"] for finding in found["findings"] if finding["state"] == "note"]
    assert {"cache folder", "disk speed"} <= set(notes)


def test_a_device_is_looked_at() -> None:
    result = run("--gpu", "emulated", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["device"]
    assert found["kind"] == found["name"] == "emulated"
    assert 0 < found["available"] <= found["memory"]
    assert found["bandwidth"] > 0 and found["upload"] > 0 and found["round_trip"] > 0
    assert found["kernels"] > 40 and found["wrong"] == []
    result = run("--gpu=emulated", "--no-measure")
    assert "gpu: emulated" in result.stdout and f"{found['kernels']} of {found['kernels']} kernels" in result.stdout
    assert "gpu" not in run("--no-measure").stdout


def test_a_gpu_that_is_not_there() -> None:
    result = run("--no-measure", "--gpu")
    assert result.exit_code == 0
    assert "note  gpu: no NVIDIA driver" in result.stdout
    result = run("--no-measure", "--gpu", "cuda")
    assert result.exit_code == 1
    assert "problem  gpu: no NVIDIA driver" in result.stdout


def test_a_kernel_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = WrongCuda()
    monkeypatch.setattr(devices, "CUDA_LIBRARY", fake.path)
    result = run("--no-measure", "--gpu")
    assert result.exit_code == 1
    assert "gpu: Fake 0, driver of CUDA 12.4, " in result.stdout
    assert "kernels give the processor's bits, but not add_vector (--gpu none computes without it)" in result.stdout
    fake.lose(999)
    result = run("--no-measure", "--gpu")
    assert "problem  gpu: " in result.stdout and result.exit_code == 1
