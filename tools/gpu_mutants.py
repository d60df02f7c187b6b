"""Shows that the tests of the device kernels (native/gpu) can fail, and that the kernels have no races.

    python -m tools.gpu_mutants [--only WORD] [--build FOLDER]     the kernels as they are, then every mutant
    python -m tools.gpu_mutants --races [--build FOLDER]           the kernels as they are under ThreadSanitizer

A mutant is the text with one mistake: a barrier is missing, half a warp does not shuffle, an order is another one. The
text is compiled once with all of them, and the environment says which one is made; then the tests of its subject run,
and one of them must fail. WORD: mutants whose description has it.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "native" / "gpu"
SOURCES = ROOT / "native" / "src" / "device"

# What mistakes are made with, at the end of the words that kernels are written in. A site makes its mistake if the
# environment has its number.
VARIABLE = "EDGEMOE_MUTANT"
MISTAKES = f"""
static const int mutant = std::getenv("{VARIABLE}") ? std::atoi(std::getenv("{VARIABLE}")) : -1;
#define BARRIER_UNLESS(n)                            \\
    do                                               \\
        if (mutant != (n)) BARRIER();                \\
    while (false)
FN float shuffle_xor_unless(int n, float x, int mask) {{ return mutant == n && LANE >= 16 ? x : shuffle_xor(x, mask); }}
FN i32 shuffle_xor_unless(int n, i32 x, int mask) {{ return mutant == n && LANE >= 16 ? x : shuffle_xor(x, mask); }}
"""

# Other orders: file, what stands there, what stands there instead.
ORDERS = [
    (
        "product_of_codes.inl",
        "const int place = i * pairs * 16 + THREAD;",
        "const int place = (mutant == {n} ? count - 1 - i : i) * pairs * 16 + THREAD;",
    ),
    (
        "product_of_floats.inl",
        "int column = 0; column < columns; ++column",
        "int i = 0, column = mutant == {n} ? columns - 1 : 0; i < columns; ++i, column += mutant == {n} ? -1 : 1",
    ),
    (
        "functions.h",
        "int width = 8; width >= 1; width /= 2) x +=",
        "int i = 0, width = mutant == {n} ? 1 : 8; i < 4; ++i, width = mutant == {n} ? 2 * width : width / 2) x +=",
    ),
]


RACE = 66
"""What a process returns in which ThreadSanitizer found a race."""


class BuildError(Exception):
    """Something does not compile."""


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    line: int
    mistake: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.mistake}"


def subject(file: str) -> str:
    """Whose tests find a mistake in a file: tests/native/test_device_SUBJECT.py."""
    if file.startswith("product"):
        return "products"
    return "*" if file == "functions.h" else Path(file).stem


def mutated_text() -> tuple[dict[str, str], list[Mutant]]:
    """The files of the kernels that can make mistakes, and all of these."""
    texts = {"dialect.h": (TEXT / "dialect.h").read_text() + MISTAKES}
    mutants: list[Mutant] = []
    for path in (TEXT / "functions.h", *sorted(TEXT.glob("*.inl"))):
        text = path.read_text()
        changes = [(found.start(), found[0], "BARRIER_UNLESS({n});") for found in re.finditer(r"\bBARRIER\(\);", text)]
        changes += [
            (found.start(), found[0], "shuffle_xor_unless({n}, ") for found in re.finditer(r"\bshuffle_xor\(", text)
        ]
        for file, before, after in ORDERS:
            if file == path.name:
                if text.count(before) != 1:
                    raise BuildError(f"{file} does not have {before!r} once")
                changes.append((text.index(before), before, after))
        made, end = "", 0
        for at, before, after in sorted(changes):
            mistake = {"B": "no barrier", "s": "half a warp shuffles"}.get(before[0], "another order")
            mutants.append(Mutant(len(mutants), path.name, text.count("\n", 0, at) + 1, mistake))
            if at < end:
                raise BuildError(f"{mutants[-1]} lies within another change")
            made += text[end:at] + after.replace("{n}", str(mutants[-1].number))
            end = at + len(before)
        texts[path.name] = made + text[end:]
    return texts, mutants


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

    def make(self, texts: Mapping[str, str], flags: Sequence[str] = ("-O1",), races: bool = False) -> None:
        """Compiles the emulated kernels, with other texts in some files, and links a core with them."""
        tree = self.build / "tree" / "native"
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(TEXT, tree / "gpu")
        (tree / "src" / "device").mkdir(parents=True)
        source = tree / "src" / "device" / "emulated_kernels.cpp"
        shutil.copy(SOURCES / source.name, source)
        for file, text in texts.items():
            (tree / "gpu" / file).write_text(text)
        common = ["-std=c++20", "-fPIC", "-w", "-ffp-contract=off", "-include", "cstdlib"]
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
        command += ["--capture=sys"]  # what ThreadSanitizer says goes by Python
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
        if done.returncode > 1 and done.returncode != RACE:
            raise BuildError(f"the tests do not run:\n{done.stdout}")
        return done.stdout if done.returncode else ""


def test_races(package: Package) -> str:
    """What ThreadSanitizer says of the kernels' tests; nothing if they pass."""
    package.make({}, ("-O1", "-g1", "-fsanitize=thread"), races=True)
    library = subprocess.run(
        [package.compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Where addresses are too random it does not start.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {"LD_PRELOAD": library, "TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}"}
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
    texts, mutants = mutated_text()
    package.make(texts)
    if found := package.test("*"):
        raise SystemExit(f"the tests fail without a mistake:\n{found}")
    survivors = 0
    for mutant in mutants:
        if options.only not in str(mutant):
            continue
        begin = time.monotonic()
        output = package.test(subject(mutant.file), {VARIABLE: str(mutant.number)})
        failure = re.search(r"^FAILED \S+::(\S+)", output, re.MULTILINE)
        survivors += not output
        result = f"found by {failure[1]}" if failure else "found" if output else "NOT FOUND"
        print(f"{mutant}: {result} ({time.monotonic() - begin:.0f} s)", flush=True)
    print(f"{survivors} mutants were not found")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
