"""Make a pack from a Hugging Face folder or a GGUF file.

edgemoe convert Qwen3-30B-A3B qwen3-30b.emoe                 4 bits for the experts, 8 for the rest
edgemoe convert --levels 2,3,4 Qwen3-30B-A3B qwen3-30b.emoe  the experts at 2, 3 and 4 bits in one
edgemoe convert --bits 16 Qwen3-30B-A3B qwen3-30b.emoe       the source's own weights
edgemoe convert qwen3-30b-q4_k_m.gguf qwen3-30b.emoe        the file's own blocks
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from edgemoe.cli._terminal import note, progress_bar
from edgemoe.cli.options import memory_size
from edgemoe.errors import PackError

if TYPE_CHECKING:
    from edgemoe.quantize.nested_experts import NestedOptions

_BITS = click.Choice(["32", "16", "8", "4"])
_DEFAULT_LEVELS = "2,3,4"


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "-b", "--bits", type=_BITS, help="Bits of an expert's weight.  [default: 4; of a GGUF file: its blocks as they are]"
)
@click.option(
    "-l",
    "--levels",
    metavar="N,N,...",
    help="Several widths of an expert's weight in one, ascending, at most 8 bits: 2,3,4. In place of --bits.",
)
@click.option(
    "--dense-bits",
    type=_BITS,
    help="Bits of attention, embedding and head.  [default: 8, or BITS if that is more; of a GGUF file without BITS: "
    "its blocks as they are]",
)
@click.option(
    "--calibration",
    metavar="FILE|none",
    help="The text that levels are fitted to, UTF-8; none: to the weights alone.  [default: a shipped one]",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    default=65536,
    show_default=True,
    metavar="N",
    help="At most so many of its tokens.",
)
@click.option(
    "--target-bpw",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="Finer levels only where they count most: X bits per weight of the experts on average, scales included (of "
    f"--levels {_DEFAULT_LEVELS}, unless given).",
)
@click.option(
    "--quality-text",
    metavar="FILE|none",
    help="The text that levels and modes are measured on, UTF-8; none: they are not, and there are no modes.  "
    "[default: a shipped one]",
)
@click.option(
    "--quality-tokens",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    metavar="N",
    help="At most so many of its tokens.",
)
@click.option(
    "-M",
    "--memory",
    callback=memory_size,
    metavar="auto|SIZE",
    help="What fitting levels may take in all, such as 8GB (10^9) or 6GiB.  [default: auto]",
)
@click.option(
    "-t",
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that fit levels.  [default: one per processor]",
)
@click.option("-f", "--force", is_flag=True, help="Replace TARGET if it exists.")
@click.pass_context
def command(
    ctx: click.Context,
    source: Path,
    target: Path,
    bits: str | None,
    levels: str | None,
    dense_bits: str | None,
    calibration: str | None,
    calibration_tokens: int,
    target_bpw: float | None,
    quality_text: str | None,
    quality_tokens: int,
    memory: int | None,
    threads: int | None,
    force: bool,
) -> None:
    """Make the pack TARGET from SOURCE, a Hugging Face folder or a GGUF file.

    A GGUF file's blocks are kept byte for byte unless bits are asked for. 16 bits keep a folder's weights as they are
    (bfloat16 or float16); 8 and 4 round them, 64 at a time, also those that a GGUF file has quantized in another way.
    Memory stays far below the model's size. TARGET appears when it is complete; an interrupted conversion continues
    with the same command.

    With levels a text runs through the source's model, and the experts are fitted to what it does with it. The pack
    then runs at several widths (edgemoe run --quality), and edgemoe show says what each of them costs.
    """
    # The matrices of experts are worked on side by side; a library that divides each of them is only in the way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from edgemoe.convert import convert, requantized_types
    from edgemoe.memory import format_size

    if target.exists() and not target.is_dir() and not force:
        raise PackError(f"{target}: exists already (--force replaces it)")
    nested = None
    if levels is not None or target_bpw is not None:
        if bits is not None:
            raise click.UsageError("--bits and --levels exclude each other")
        nested = _nested(
            levels or _DEFAULT_LEVELS, calibration, calibration_tokens, target_bpw, quality_text, quality_tokens
        )
        nested = dataclasses.replace(nested, memory=memory, threads=threads)
    else:
        for name in ("calibration", "calibration_tokens", "quality_text", "quality_tokens", "memory", "threads"):
            if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name.replace('_', '-')} is for --levels")
    experts, dense = (int(width) if width else None for width in (bits, dense_bits))
    types = requantized_types(source, experts if nested is None else max(nested.levels), dense)
    if types:
        rounded = nested is not None or any(width is not None and width < 16 for width in (experts, dense))
        what = "requantized: its weights are rounded a second time" if rounded else "written as float32"
        note(f"{source}: quantized already ({', '.join(types)}), will be {what}")
    start = time.monotonic()
    try:
        with progress_bar("converting") as advance:
            convert(source, target, experts, dense, progress=advance, nested=nested, overwrite=force)
    except KeyboardInterrupt:
        note(f"interrupted: the same command continues with {target}.partial")
        raise
    note(f"{target}: {format_size(target.stat().st_size)} in {time.monotonic() - start:.1f} s")


def _nested(
    levels: str,
    calibration: str | None,
    calibration_tokens: int,
    target_bpw: float | None,
    quality_text: str | None,
    quality_tokens: int,
) -> NestedOptions:
    from edgemoe.quantize.calibration import HELD_OUT
    from edgemoe.quantize.nested_experts import NestedOptions

    try:
        widths = tuple(int(width) for width in levels.split(","))
    except ValueError:
        raise click.BadParameter(f"{levels!r} is not a list of widths such as 2,3,4", param_hint="--levels") from None
    return NestedOptions(
        levels=widths,
        calibration=None if calibration in (None, "none") else Path(calibration),
        calibrate=calibration != "none",
        tokens=calibration_tokens,
        target_bits=target_bpw,
        quality_text=HELD_OUT if quality_text is None else None if quality_text == "none" else Path(quality_text),
        quality_tokens=quality_tokens,
    )
