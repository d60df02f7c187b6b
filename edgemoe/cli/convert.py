"""Make a pack from a Hugging Face folder or a GGUF file.

edgemoe convert Qwen3-30B-A3B qwen3-30b.emoe            4 bits for the experts, 8 for the rest
edgemoe convert --bits 16 Qwen3-30B-A3B qwen3-30b.emoe  the source's own weights
edgemoe convert qwen3-30b-q4_k_m.gguf qwen3-30b.emoe   the file's own blocks
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from edgemoe.cli._terminal import note, progress_bar
from edgemoe.errors import PackError

_BITS = click.Choice(["32", "16", "8", "4"])


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "-b", "--bits", type=_BITS, help="Bits of an expert's weight.  [default: 4; of a GGUF file: its blocks as they are]"
)
@click.option(
    "--dense-bits",
    type=_BITS,
    help="Bits of attention, embedding and head.  [default: 8, or BITS if that is more; of a GGUF file without BITS: "
    "its blocks as they are]",
)
@click.option("-f", "--force", is_flag=True, help="Replace TARGET if it exists.")
def command(source: Path, target: Path, bits: str | None, dense_bits: str | None, force: bool) -> None:
    """Make the pack TARGET from SOURCE, a Hugging Face folder or a GGUF file.

    A GGUF file's blocks are kept byte for byte unless bits are asked for. 16 bits keep a folder's weights as they are
    (bfloat16 or float16); 8 and 4 round them, 64 at a time, also those that a GGUF file has quantized in another way.
    Memory stays far below the model's size. TARGET appears when it is complete; an interrupted conversion continues
    with the same command.
    """
    from edgemoe.convert import convert, requantized_types
    from edgemoe.memory import format_size

    if target.exists() and not target.is_dir() and not force:
        raise PackError(f"{target}: exists already (--force replaces it)")
    experts, dense = (int(width) if width else None for width in (bits, dense_bits))
    types = requantized_types(source, experts, dense)
    if types:
        rounded = any(width is not None and width < 16 for width in (experts, dense))
        what = "requantized: its weights are rounded a second time" if rounded else "written as float32"
        note(f"{source}: quantized already ({', '.join(types)}), will be {what}")
    start = time.monotonic()
    try:
        with progress_bar("converting") as advance:
            convert(source, target, experts, dense, progress=advance, overwrite=force)
    except KeyboardInterrupt:
        note(f"interrupted: the same command continues with {target}.partial")
        raise
    note(f"{target}: {format_size(target.stat().st_size)} in {time.monotonic() - start:.1f} s")
