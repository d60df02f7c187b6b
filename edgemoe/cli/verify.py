"""Check every checksum of a pack."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgemoe.cli._terminal import progress_bar
from edgemoe.printable import printable


@click.command()
@click.argument("pack", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: path, sections, bytes, damaged.")
@click.pass_context
def command(ctx: click.Context, pack: Path, as_json: bool) -> None:
    """Read all of PACK and compare every checksum.

    The damaged sections are named, with the experts or tensors in them, and the exit status is 1.
    """
    from edgemoe.errors import PackError
    from edgemoe.formats.gguf import is_gguf
    from edgemoe.formats.pack import Pack
    from edgemoe.memory import format_size

    if pack.is_file() and is_gguf(pack):
        raise PackError(f"{pack}: a GGUF file has no checksums")
    opened = Pack.open(pack)
    with progress_bar("verifying") as advance:
        damaged = opened.verify(advance)
    sections = opened.index.sections
    size = sum(section.length for section in sections)
    if as_json:
        click.echo(json.dumps({"path": str(pack), "sections": len(sections), "bytes": size, "damaged": damaged}))
    else:
        for line in damaged:
            click.echo(printable(line))
        what = f"{len(damaged)} of {len(sections)} sections are damaged" if damaged else "all checksums are right"
        click.echo(f"{pack}: {len(sections)} sections, {format_size(size)}: {what}")
    ctx.exit(1 if damaged else 0)
