"""Shows that the tests of the device kernels (native/gpu) can fail, and that the kernels have no races.

    python -m tools.gpu_mutants [--only WORD] [--build FOLDER]     the kernels as they are, then every mutant
    python -m tools.gpu_mutants --races [--build FOLDER]           the kernels as they are under ThreadSanitizer

A mutant is the text with one mistake: a barrier is missing, half a warp does not shuffle, an order is another one. The
emulated text alone is compiled anew, and the tests of its subject run; one of them must fail. WORD: mutants whose
description has it.

Under ThreadSanitizer the emulator's fibers are threads, which only barriers order: not shuffles, and not that one group
runs after another. What the tests compute must not have a race.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "native" / "gpu"
SOURCES = ROOT / "native" / "src" / "device"

# Half of the lanes of a warp do not get to a shuffle.
HALF_A_WARP = """
FN float half_shuffle_xor(float x, int mask) { return LANE < 16 ? shuffle_xor(x, mask) : x; }
FN i32 half_shuffle_xor(i32 x, int mask) { return LANE < 16 ? shuffle_xor(x, mask) : x; }
FN float half_shuffle_from(float x, int lane) { return LANE < 16 ? shuffle_from(x, lane) : x; }
FN i32 half_shuffle_from(i32 x, int lane) { return LANE < 16 ? shuffle_from(x, lane) : x; }
"""

# Other orders: file, what stands there, what stands there instead.
ORDERS = [
    (
        "product_of_codes.inl",
        "const int place = i * pairs * 16 + THREAD;",
        "const int place = (count - 1 - i) * pairs * 16 + THREAD;",
    ),
    ("product_of_floats.inl", "column = 0; column < columns; ++column", "column = columns - 1; column >= 0; --column"),
    (
        "functions.h",
        "int width = 8; width >= 1; width /= 2) x += shuffle",
        "int width = 1; width <= 8; width *= 2) x += shuffle",
    ),
]


class BuildError(Exception):
    """Something does not compile."""


@dataclass(frozen=True)
class Mutant:
    description: str
    file: str
    text: str


def subject(file: str) -> str:
    """Whose tests find a mistake in a file: tests/native/test_device_SUBJECT.py."""
    if file.startswith("product"):
        return "products"
    return "*" if file == "functions.h" else Path(file).stem


def mutants() -> Iterator[Mutant]:
    """One mistake each."""
    for path in (TEXT / "functions.h", *sorted(TEXT.glob("*.inl"))):
        file, text = path.name, path.read_text()
        for found in re.finditer(r"\bBARRIER\(\);|\bshuffle_(xor|from)\(", text):
            line = text.count("\n", 0, found.start()) + 1
            if found[0].startswith("BARRIER"):
                yield Mutant(f"{file}:{line}: barrier missing", file, text[: found.start()] + ";" + text[found.end() :])
            else:
                changed = f"{text[: found.start()]}half_{text[found.start() :]}"
                yield Mutant(f"{file}:{line}: shuffle by half a warp", file, changed)
    for file, before, after in ORDERS:
        text = (TEXT / file).read_text()
        if text.count(before) != 1:
            raise BuildError(f"{file} does not have {before!r} once")
        line = text.count("\n", 0, text.index(before)) + 1
        yield Mutant(f"{file}:{line}: another order", file, text.replace(before, after))


def run(command: Sequence[str | Path], **options: object) -> None:
    """Raises BuildError with what the command printed."""
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )  # type: ignore[call-overload]
    if done.returncode:
        raise BuildError(f"{' '.join(str(part) for part in command)}\n{done.stdout}")


class Package:
    """edgemoe, with a core whose emulated kernels can be others."""

    def __init__(self, build: Path) -> None:
        self.build = build.resolve()
        self.compiler = os.environ.get("CXX", "c++")
        pybind = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
        ).stdout.strip()
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "SKBUILD_PROJECT_VERSION": "0",
            "EDGEMOE_VECTOR_KERNELS": "OFF",
            "pybind11_DIR": pybind,
            "Python_EXECUTABLE": sys.executable,
        }
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        core = self.build / "core"
        run(["cmake", "-S", ROOT, "-B", core, *ninja, *(f"-D{key}={value}" for key, value in definitions.items())])
        run(["cmake", "--build", core, "--target", "_core", "--parallel", str(os.cpu_count() or 1)])
        self.objects = [*sorted(core.glob("CMakeFiles/_core.dir/**/*.o")), core / "libedgemoe_core.a"]
        if len(self.objects) < 2:
            raise BuildError(f"{core} has no objects")
        self.package = self.build / "package" / "edgemoe"
        shutil.rmtree(self.package, ignore_errors=True)
        self.package.mkdir(parents=True)
        for path in (ROOT / "edgemoe").iterdir():
            if path.suffix != ".so" and path.name != "__pycache__":
                (self.package / path.name).symlink_to(path)
        if not (self.package / "models").exists():
            (self.package / "models").symlink_to(ROOT / "models")

    def make(self, mutant: Mutant | None = None, flags: Sequence[str] = ("-O1",), races: bool = False) -> None:
        """Compiles the emulated kernels and links a core with them."""
        tree = self.build / "tree" / "native"
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(TEXT, tree / "gpu")
        (tree / "src" / "device").mkdir(parents=True)
        source = tree / "src" / "device" / "emulated_kernels.cpp"
        shutil.copy(SOURCES / source.name, source)
        if mutant:
            (tree / "gpu" / mutant.file).write_text(mutant.text)
            with (tree / "gpu" / "dialect.h").open("a") as file:
                file.write(HALF_A_WARP)
        common = ["-std=c++20", "-fPIC", "-w", "-ffp-contract=off"]
        common += [f"-I{ROOT}/native/include", f"-I{ROOT}/native/src"]
        made = [self.build / "emulated_kernels.o"]
        run([self.compiler, *common, *flags, "-c", source, "-o", made[0]])
        if races:
            made.append(self.build / "emulator.o")
            fibers = ["-O2", "-DEDGEMOE_TSAN_FIBERS"]
            run([self.compiler, *common, *fibers, "-c", SOURCES / "emulator.cpp", "-o", made[1]])
        core = self.package / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        core.unlink(missing_ok=True)
        sanitizer = ["-fsanitize=thread"] if races else []
        run([self.compiler, "-shared", *sanitizer, *made, *self.objects, "-pthread", "-ldl", "-o", core])

    def test(self, subject: str, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> str:
        """Runs a subject's tests, up to the first that fails: what the run printed, or nothing if all pass."""
        files = sorted(str(path) for path in (ROOT / "tests" / "native").glob(f"test_device_{subject}.py"))
        command = [*prefix, sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *files]
        # In the folder of the package: Python looks there before anywhere else.
        done = subprocess.run(
            command,
            cwd=self.package.parent,
            env=os.environ | {"PYTHONPATH": str(self.package.parent)} | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode not in (0, 1, 66):  # 66: ThreadSanitizer's
            raise BuildError(f"the tests do not run:\n{done.stdout}")
        return done.stdout if done.returncode else ""


def test_races(package: Package) -> str:
    """What ThreadSanitizer says of the kernels' tests; nothing if they pass."""
    package.make(flags=("-O1", "-g1", "-fsanitize=thread"), races=True)
    library = subprocess.run(
        [package.compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Where addresses are too random it does not start.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {"LD_PRELOAD": library, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return package.test("*", environment, prefix)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--races", action="store_true", help="no mutants: ThreadSanitizer")
    parser.add_argument("--only", default="", metavar="WORD", help="mutants whose description has it")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "mutants", help="default: build/mutants")
    options = parser.parse_args(argv)
    package = Package(options.build)
    if options.races:
        found = test_races(package)
        print(found or "no races")
        raise SystemExit(1 if found else 0)
    package.make()
    if found := package.test("*"):
        raise SystemExit(f"the tests fail without a mistake:\n{found}")
    survivors = []
    for mutant in mutants():
        if options.only not in mutant.description:
            continue
        begin = time.monotonic()
        package.make(mutant)
        failure = re.search(r"^FAILED \S+::(\S+)", package.test(subject(mutant.file)), re.MULTILINE)
        if not failure:
            survivors.append(mutant)
        print(
            f"{mutant.description}: {f'found by {failure[1]}' if failure else 'NOT FOUND'} "
            f"({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
    print(f"{len(survivors)} mutants were not found")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
