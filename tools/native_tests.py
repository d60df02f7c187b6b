"""Builds and runs the native tests (native/tests) where the Python ones cannot go: other processors, sanitizers.

    python -m tools.native_tests [STAGE...] [--build FOLDER]

Stages (all, unless some are named):

    aarch64   cross-compiled, under qemu's user mode: NEON, its dot products and its matrix products against scalar C++
    address   AddressSanitizer and UndefinedBehaviorSanitizer: kernels, thread pool, expert store, states, engine
    thread    ThreadSanitizer: thread pool, expert store, states, engine, five clients of one engine, with the portable
              kernels; EDGEMOE_TEST_SECONDS=60 keeps the clients at it for a minute
    device    ThreadSanitizer: the kernels of devices, each of whose threads is one in the emulator, as their Python
              tests launch them (tools/gpu_mutants.py)

A stage whose compiler or emulator is missing is skipped, and says so. The exit status is 1 if a stage fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Stage:
    """How one stage is built and run. `tools`: programs that must exist, by any of several names each."""

    flags: Sequence[str]
    definitions: Mapping[str, str] = field(default_factory=dict)
    tools: Sequence[Sequence[str]] = ()
    compiler: str = "c++"
    groups: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


STAGES = {
    "aarch64": Stage(
        flags=("-O1",),
        definitions={"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64"},
        tools=(("qemu-aarch64", "qemu-aarch64-static"),),
        compiler="aarch64-linux-gnu-g++",
    ),
    "address": Stage(
        flags=("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
        # Instrumented, each file of them takes minutes to compile; the tests put their inputs before forbidden pages.
        definitions={"EDGEMOE_VECTOR_FLAGS": "-fno-sanitize=all"},
        environment={"ASAN_OPTIONS": "detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": Stage(
        flags=("-O1", "-g1", "-fsanitize=thread"),
        definitions={"EDGEMOE_VECTOR_KERNELS": "OFF"},
        groups=("thread_pool", "placement", "store", "sequence_state", "backend", "engine", "clients"),
        environment={"TSAN_OPTIONS": "halt_on_error=1"},
    ),
}


DEVICE = "device"
ALL = (*STAGES, DEVICE)


def can_link(compiler: str, flags: Sequence[str]) -> bool:
    """Whether a program builds with these flags: a sanitizer's library is a package of its own on some systems."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "main.cpp"
        source.write_text("#include <thread>\nint main() { return 0; }\n")
        command = [compiler, "-std=c++20", *flags, str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


def run_device_stage(folder: Path) -> str:
    """As `run_stage`."""
    for module in ("pybind11", "pytest"):
        if importlib.util.find_spec(module) is None:
            return f"skipped: there is no {module}"
    if not can_link("c++", ["-fsanitize=thread"]):
        return "skipped: c++ does not build programs with -fsanitize=thread"
    from tools import gpu_mutants

    try:
        found = gpu_mutants.test_races(gpu_mutants.Package(folder))
    except gpu_mutants.BuildError as error:
        found = str(error)
    print(found, end="")
    return "FAILED" if found else "passed"


def run_stage(name: str, folder: Path) -> str:
    """Builds and runs a stage: 'passed', 'FAILED', or why it was skipped."""
    if shutil.which("cmake") is None:
        return "skipped: there is no cmake"
    if name == DEVICE:
        return run_device_stage(folder)
    stage = STAGES[name]
    emulator = []
    for names in stage.tools:
        found = next((path for path in map(shutil.which, names) if path), None)
        if found is None:
            return f"skipped: there is no {names[0]}"
        emulator = [found, "-cpu", "max"]
    if shutil.which(stage.compiler) is None:
        return f"skipped: there is no {stage.compiler}"
    flags = [*stage.flags, *(["-static"] if emulator else [])]
    if not can_link(stage.compiler, flags):
        return f"skipped: {stage.compiler} does not build programs with {' '.join(flags)}"
    definitions = {
        "EDGEMOE_PYTHON": "OFF",
        "EDGEMOE_NATIVE_TESTS": "ON",
        "CMAKE_BUILD_TYPE": "Tests",
        "CMAKE_CXX_COMPILER": stage.compiler,
        "CMAKE_CXX_FLAGS": " ".join(flags),
        **stage.definitions,
    }
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *ninja]
    configure += [f"-D{key}={value}" for key, value in definitions.items()]
    build = ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]
    run = [*emulator, str(folder / "edgemoe_tests"), *stage.groups]
    for command in (configure, build, run):
        output = None if command is run else subprocess.PIPE
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(stage.environment)
        )
        if done.returncode:
            print(done.stdout or "", end="")
            return "FAILED"
    return "passed"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.native_tests", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {' '.join(ALL)} (default: all)")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "native", help="default: build/native")
    options = parser.parse_args(argv)
    for name in options.stages:
        if name not in ALL:
            parser.error(f"there is no stage {name}; known: {' '.join(ALL)}")
    failed = False
    for name in options.stages or ALL:
        begin = time.monotonic()
        result = run_stage(name, options.build / name)
        failed |= result == "FAILED"
        print(f"native tests, {name}: {result} ({time.monotonic() - begin:.0f} s)", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
