"""Makes what an NVIDIA GPU's driver loads from the text of the device kernels (native/gpu). Needs no GPU.

    python -m tools.gpu_images                    writes edgemoe/kernel_images/kernels.ptx.gz
    python -m tools.gpu_images --check            makes it anew: the committed one must be the same, and exact
    python -m tools.gpu_images --cubins FOLDER    machine code for every architecture, and what its kernels take

PTX of the oldest architecture and of an old compiler is what every later driver accepts and compiles for its own GPU;
so it is committed, and installing needs no toolkit. The compilers are pinned wheels, which pip downloads into
build/toolchains.

PTX must say that it is exact: an addition or product without ".rn" may be fused by whatever reads it next, and nothing
may be flushed or approximated. The compiler's options ask for that, `refused` looks at what came of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "native" / "gpu"
IMAGES = ROOT / "edgemoe" / "kernel_images"
PTX, DIGEST = "kernels.ptx.gz", "kernels.digest"
TOOLCHAINS = ROOT / "build" / "toolchains"

ARCHITECTURE = "compute_75"
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
# What the pinned compiler makes machine code for itself, which drivers since CUDA 12.0 load; the rest is made of its
# PTX by a later assembler, as a driver does.
CUBINS = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
LATER_CUBINS = ("sm_110", "sm_120")


class ImageError(Exception):
    """An image cannot be made, or is not what it should be."""


@dataclass(frozen=True)
class Wheel:
    """A release of a package, with the digest of its file for Linux on x86-64."""

    name: str
    version: str
    sha256: str


COMPILER = Wheel(
    "nvidia-cuda-nvrtc-cu12", "12.0.140", "8e94e991d85c422de4da87bdc7472fdc1364367bd4aace7000b559cd33122071"
)
ASSEMBLER = Wheel("nvidia-cuda-nvcc", "13.0.88", "56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03")


# --- the text ---------------------------------------------------------------------------------------------------------


def kernel_text(folder: Path = TEXT) -> dict[str, str]:
    """The files of the kernels by name."""
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix in (".h", ".inl")}


def digest(text: Mapping[str, str]) -> str:
    """Of the kernels' text and of what decides beside it what becomes of it."""
    result = hashlib.sha256("\0".join((COMPILER.version, ARCHITECTURE, *OPTIONS)).encode())
    for name, content in sorted(text.items()):
        for part in (name, content):
            encoded = part.encode()
            result.update(len(encoded).to_bytes(8, "little") + encoded)
    return result.hexdigest()


def kernel_names(text: Mapping[str, str]) -> list[str]:
    """All kernels that the device may be asked for."""
    return re.findall(r"^EDGEMOE_KERNEL\((\w+),", text["kernel_list.h"], re.MULTILINE)


# --- the committed image ----------------------------------------------------------------------------------------------


def write_image(ptx: str, text: Mapping[str, str], folder: Path = IMAGES) -> None:
    """Writes PTX, unless it is there, and the digest of the text that it was made of."""
    path = folder / PTX
    if not path.exists() or gzip.decompress(path.read_bytes()).decode() != ptx:
        path.write_bytes(gzip.compress(ptx.encode(), mtime=0))
    (folder / DIGEST).write_text(digest(text) + "\n")


def read_image(folder: Path = IMAGES) -> tuple[str, str]:
    """The PTX and the digest of the text that it was made of."""
    return gzip.decompress((folder / PTX).read_bytes()).decode(), (folder / DIGEST).read_text().strip()


# --- exactness --------------------------------------------------------------------------------------------------------

# An instruction: perhaps a predicate, then its operation and what it says about it.
_INSTRUCTION = re.compile(r"^\s*(?:\{\s*)?(?:@!?%\w+\s+)?([a-z]\w*)((?:\.\w+)+)[\s;]")
_FLOAT = re.compile(r"\.(?:b?f16|b?f16x2|f32|f32x2|f64|tf32|e4m3|e5m2|e4m3x2|e5m2x2)(?=\.|$)")
# They round, so they must say how; others that are named do not round.
_ROUNDING = frozenset(("add", "sub", "mul", "fma", "div", "sqrt", "rcp"))
_EXACT = frozenset(
    ("abs", "atom", "copysign", "ld", "max", "min", "mov", "neg", "red", "selp", "set", "setp", "slct", "st", "testp")
)


def refused(ptx: str) -> list[str]:
    """The lines of PTX whose float operations may be fused, flushed or approximated, or are not known."""
    return [f"{number}: {line.strip()}" for number, line in _instructions(ptx) if not _is_exact(line)]


def _instructions(ptx: str) -> Iterator[tuple[int, str]]:
    """Lines that begin with an instruction on floats; declarations begin with a dot."""
    for number, line in enumerate(ptx.splitlines(), 1):
        found = _INSTRUCTION.match(line)
        if found and _FLOAT.search(found[2]):
            yield number, line


def _is_exact(line: str) -> bool:
    found = _INSTRUCTION.match(line)
    assert found is not None
    operation, words = found[1], found[2].split(".")[1:]
    if any(word in ("ftz", "approx", "full", "sat", "relu") for word in words):
        return False
    if operation in _ROUNDING:
        return "rn" in words
    if operation == "cvt":  # widening is exact, everything else names a rounding
        return True
    if operation in ("atom", "red"):  # sums in an order of their own
        return "add" not in words
    return operation in _EXACT


# --- the compilers ----------------------------------------------------------------------------------------------------


def unpacked(wheel: Wheel) -> Path:
    """The folder of a wheel's files; downloaded with pip unless it is there."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise ImageError("images are made on Linux on x86-64 only")
    folder = TOOLCHAINS / f"{wheel.name}-{wheel.version}"
    if folder.exists():
        return folder
    downloads = TOOLCHAINS / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    requirement = downloads / f"{wheel.name}.txt"
    requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(downloads), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ImageError(f"pip could not download {wheel.name} {wheel.version}:\n{done.stderr.strip()}")
    [file] = downloads.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl")
    partial = folder.with_suffix(".partial")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(partial)
    file.unlink()
    partial.rename(folder)
    return folder


class Compiler:
    """NVRTC."""

    def __init__(self) -> None:
        [library] = unpacked(COMPILER).glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.*")
        # It looks for its other library by name only, and finds it among what is loaded.
        for other in library.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(other), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))

    def ptx(self, text: Mapping[str, str], options: Sequence[str] = OPTIONS) -> str:
        """PTX of all kernels."""
        made, _ = self._compile(text, [f"--gpu-architecture={ARCHITECTURE}", *options], "PTX")
        return made.rstrip(b"\0").decode()

    def cubin(self, text: Mapping[str, str], architecture: str) -> tuple[bytes, dict[str, str]]:
        """Machine code of all kernels, and what each takes of a processor."""
        options = [f"--gpu-architecture={architecture}", *OPTIONS, "--ptxas-options=-v"]
        made, log = self._compile(text, options, "CUBIN")
        return made, what_kernels_take(log)

    def _compile(self, text: Mapping[str, str], options: Sequence[str], kind: str) -> tuple[bytes, str]:
        program = ctypes.c_void_p()
        names = list(text)
        sources = (ctypes.c_char_p * len(names))(*(text[name].encode() for name in names))
        headers = (ctypes.c_char_p * len(names))(*(name.encode() for name in names))
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            b'#include "kernels.inl"\n',
            b"kernels.cu",
            len(names),
            sources,
            headers,
        )
        try:
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), arguments)
            log = self._get("nvrtcGetProgramLog", program).rstrip(b"\0").decode()
            if failed:
                raise ImageError(f"the kernels do not compile:\n{log}")
            return self._get(f"nvrtcGet{kind}", program), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, function: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(function, program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise ImageError(f"{function} failed with {status}")


def assembled(ptx: str, architecture: str) -> tuple[bytes, dict[str, str]]:
    """Machine code made of PTX, and what each kernel takes of a processor."""
    ptxas = unpacked(ASSEMBLER) / "nvidia" / "cu13" / "bin" / "ptxas"
    ptxas.chmod(0o755)  # zipfile does not keep modes
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch={architecture}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ImageError(f"the PTX does not assemble for {architecture}:\n{done.stderr.strip()}")
        return target.read_bytes(), what_kernels_take(done.stderr)


def what_kernels_take(log: str) -> dict[str, str]:
    """Registers, spills and shared memory, as ptxas tells them, by kernel."""
    kernel, takes = "", dict[str, str]()
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            kernel, takes[found[1]] = found[1], ""
        elif "spill" in line or "Used" in line:
            takes[kernel] += ("; " if takes[kernel] else "") + re.sub(r"^ptxas\s*(?:info\s*:|\.)?\s*", "", line).strip()
    return takes


# --- commands ---------------------------------------------------------------------------------------------------------


def make(text: Mapping[str, str]) -> str:
    """PTX of the text. Raises ImageError where it is not exact, or lacks a kernel."""
    ptx = Compiler().ptx(text)
    if lines := refused(ptx):
        raise ImageError("float operations may be fused, flushed or approximated:\n" + "\n".join(lines[:20]))
    if missing := set(kernel_names(text)) - set(re.findall(r"\.entry (\w+)", ptx)):
        raise ImageError(f"kernels have no text: {', '.join(sorted(missing))}")
    return ptx


def check(folder: Path = IMAGES) -> str:
    """The committed PTX. Raises ImageError unless it is what the text gives, and the check of exactness can fail."""
    text = kernel_text()
    ptx, made_of = read_image(folder)
    if made_of != digest(text):
        raise ImageError(f"{folder / PTX} was made of another text: run python -m tools.gpu_images")
    if make(text) != ptx:
        raise ImageError(f"{folder / PTX} is not what the text gives: run python -m tools.gpu_images")
    if not refused(Compiler().ptx(text, [option.replace("fmad=false", "fmad=true") for option in OPTIONS])):
        raise ImageError("PTX that may be fused was not refused")
    return ptx


def write_cubins(text: Mapping[str, str], ptx: str, folder: Path) -> None:
    """Writes machine code for every architecture, and prints what the kernels take."""
    compiler = Compiler()
    unpacked(ASSEMBLER)
    folder.mkdir(parents=True, exist_ok=True)

    def made(architecture: str) -> tuple[bytes, dict[str, str]]:
        return compiler.cubin(text, architecture) if architecture in CUBINS else assembled(ptx, architecture)

    architectures = (*CUBINS, *LATER_CUBINS)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for architecture, (cubin, takes) in zip(architectures, threads.map(made, architectures), strict=True):
            (folder / f"{architecture}.cubin").write_bytes(cubin)
            print(f"{architecture}: {len(cubin)} bytes")
            for kernel, line in takes.items():
                print(f"  {kernel:18} {line}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_images", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the committed image with what the text gives")
    parser.add_argument("--cubins", type=Path, metavar="FOLDER", help="write machine code for every architecture")
    options = parser.parse_args(argv)
    text = kernel_text()
    try:
        ptx = check() if options.check else make(text)
        if options.check:
            print(f"{PTX} is what the text gives")
        if options.cubins:
            write_cubins(text, ptx, options.cubins)
        if not options.check and not options.cubins:
            write_image(ptx, text)
            print(f"{IMAGES / PTX}: {(IMAGES / PTX).stat().st_size} bytes")
    except ImageError as error:
        raise SystemExit(f"gpu_images: {error}") from error


if __name__ == "__main__":
    main()
