"""A Hugging Face folder or a GGUF file becomes an `.emoe` pack: section by section, with a few matrices in memory at a
time.

What goes where is planned from the headers alone; then every section is read, quantized, interleaved and written. The
bytes depend on the source, the options and the version only.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgemoe.convert.plan import plan_pack
from edgemoe.convert.sections import make_sections
from edgemoe.errors import PackError
from edgemoe.formats.ggml_blocks import TYPES
from edgemoe.formats.gguf import is_gguf
from edgemoe.formats.gguf_index import GgufSource
from edgemoe.formats.index import ModelIndex
from edgemoe.formats.pack import BLOCK, PackWriter, consecutive_sections, partial_path
from edgemoe.quantize.nested_experts import NestedExperts, NestedOptions


def convert(
    source: str | Path,
    target: str | Path,
    bits: int | None = None,
    dense_bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    nested: NestedOptions | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the pack `target` from the folder, or the GGUF file, `source`.

    bits: of the experts. 32: float32; 16: as the source has them (bfloat16, float16; float32, and what a GGUF file has
    quantized, is float32); 8 and 4: groups of 64 weights with a scale and an offset each. None: the blocks of a GGUF
    file as they are, and 4 for a folder. MXFP4 weights of a folder stay what they are unless 32 is asked for.
    dense_bits: of embedding, attention, dense feed-forward parts and output head; unless given, 8 or `bits` if that is
    more, and as they are if the experts are. Routers, convolutions and vectors are float32, the routers of a GGUF file
    whose weights are kept excepted.
    nested: the experts at several widths at once, in place of `bits` (docs/quantization.md); a text runs through the
    source's model for it. NumPy's own threads only get in the way then: OPENBLAS_NUM_THREADS=1 is best.
    progress: called with (work done, work in all), which is bytes written and, with `nested`, what else takes time.

    The target appears when it is complete. An interrupted conversion (KeyboardInterrupt, a killed process) leaves
    `target.partial` and `target.journal`, and the same call continues it; any other failure leaves nothing.
    Raises SourceError, UnsupportedModelError, OptionError, PackError (the target exists, the disk is too small),
    OSError and, with `nested`, MemoryBudgetError and TokenizerError.
    """
    source, target = Path(source), Path(target)
    if target.is_dir():
        raise PackError(f"{target}: is a folder")
    if target.exists() and not overwrite:
        raise PackError(f"{target}: exists already")
    if not target.parent.is_dir():
        raise PackError(f"{target.parent}: no such folder")
    plan = plan_pack(source, bits, dense_bits, nested)
    _require_space(target, plan.size + plan.temporary)
    with PackWriter.create(target, plan.fingerprint) as writer:

        def report(beside: int = 0) -> None:
            if progress is not None:
                total = plan.size - BLOCK + plan.unwritten
                progress(min(writer.bytes_done + beside, total), total)

        report()
        with contextlib.closing(make_sections(plan, writer.done)) as sections:
            for section in sections:
                writer.add(section)
                report()
        if nested is not None:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
                experts = NestedExperts(source, plan.model, nested, Path(work))
                experts.write(writer, plan.contents, len(plan.sections), report)
            # Texts may be shorter, and levels measured in fewer passes, than planned.
            report(plan.size + plan.unwritten)
        writer.finish(plan.contents)


def estimate_size(source: str | Path, bits: int | None = None, dense_bits: int | None = None) -> int:
    """Bytes that the pack of this conversion takes, its index (some 100 KB) left out. Raises as `convert`."""
    return plan_pack(Path(source), bits, dense_bits).size


def planned_index(source: str | Path, bits: int | None = None, dense_bits: int | None = None) -> ModelIndex:
    """The index that the pack of this conversion would have, without checksums. Raises as `convert`."""
    plan = plan_pack(Path(source), bits, dense_bits)
    sections = consecutive_sections([section.length for section in plan.sections])
    return plan.contents.index(Path(source), [str(source)], sections)


def requantized_types(source: str | Path, bits: int | None = None, dense_bits: int | None = None) -> list[str]:
    """The quantized types of a GGUF file that this conversion turns into others; none for a folder. Raises as `convert`
    does for the source."""
    source = Path(source)
    if (bits is None and dense_bits is None) or not is_gguf(source):
        return []
    gguf = GgufSource.open(source)
    kinds = {
        TYPES[gguf.model.info(tensor.name).type]
        for name, tensor in gguf.sources.items()
        if bits is not None or ".experts." not in name
    }
    return sorted(kind.name for kind in kinds if kind.weights > 1)


def _require_space(target: Path, size: int) -> None:
    partial = partial_path(target)
    free = shutil.disk_usage(target.parent).free + (partial.stat().st_size if partial.exists() else 0)
    if size > free:
        raise PackError(f"{target}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
