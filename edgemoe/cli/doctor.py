"""Tell what this machine can do and what stands in the way.

edgemoe doctor
edgemoe doctor --gpu                     a GPU, too: its kernels, memory and link
edgemoe doctor --json
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.options import GPUS

if TYPE_CHECKING:
    from edgemoe.machine import Machine


@click.command()
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where models lie. Default: the cache folder.",
)
@click.option("--no-measure", is_flag=True, help="Measure no bandwidths: quicker, and no file to read is written.")
@click.option(
    "--gpu",
    is_flag=False,
    flag_value="auto",
    default="none",
    type=click.Choice(GPUS),
    metavar="[auto|cuda|emulated]",
    help="Look at a GPU, too: is every kernel right, how fast are its memory and its link.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object; sizes are bytes, speeds bytes per second."
)
def command(folder: Path | None, no_measure: bool, gpu: str, as_json: bool) -> int:
    """Tell what this machine can do and what stands in the way, each problem with its remedy.

    Writes a temporary file of at most 256 MiB into the folder, reads it, and removes it. Exits with 1 only for what
    must be mended.
    """
    from edgemoe.machine import examine
    from edgemoe.model_files import default_cache_dir

    machine = examine(
        folder or default_cache_dir(),
        measure=not no_measure,
        gpu=gpu,
        cache=default_cache_dir(),
        announce=None if as_json else lambda text: click.echo(f"{text} ...", err=True),
    )
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(machine), "healthy": machine.healthy}))
    else:
        _show(machine)
    return 0 if machine.healthy else 1


def _show(machine: Machine) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgemoe.printable import printable

    console = Console()
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    for finding in machine.findings:
        line = Text(f"{finding.state:>7}  ", style=styles[finding.state])
        line.append(f"{finding.topic}: {printable(finding.text)}", style="default")
        if finding.remedy:
            line.append(f" ({printable(finding.remedy)})", style="default")
        console.print(line, soft_wrap=True)
    if machine.disk:
        table = Table(title="Disk, MB/s", title_justify="left", title_style="bold")
        table.add_column("block", justify="right")
        depths = sorted({speed.depth for speed in machine.disk})
        for depth in depths:
            table.add_column(f"{depth} at a time", justify="right")
        for block in sorted({speed.block for speed in machine.disk}):
            row = {speed.depth: speed.bytes_per_second for speed in machine.disk if speed.block == block}
            table.add_row(f"{block >> 10} KiB", *(f"{row[depth] / 1e6:.0f}" for depth in depths))
        console.print(table)
    if machine.memory_bandwidth:
        speeds = ", ".join(f"{count}: {speed / 1e9:.1f}" for count, speed in machine.memory_bandwidth.items())
        console.print(f"Memory, GB/s by threads: {speeds}", highlight=False)
    ahead = "" if machine.read_ahead is None else f", read-ahead {machine.read_ahead >> 10} KiB"
    console.print(
        Text(
            f"{machine.system}, instruction sets {', '.join(machine.isas)}{ahead}, edgemoe {machine.build['edgemoe']}"
        ),
        soft_wrap=True,
    )
