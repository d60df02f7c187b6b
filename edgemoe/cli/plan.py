"""Tell whether a model fits, and how fast it will be, before it runs.

edgemoe plan model.emoe -M 8GB
edgemoe plan model.emoe -M 16GB --gpu cuda --vram 8GB     with a GPU that need not be there
edgemoe plan Qwen3-30B-A3B/ --bits 4
edgemoe plan config.json --bits 4 -M 8GB     before anything else is downloaded
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.options import context_option, gpu_options, load_option, memory_option
from edgemoe.errors import DeviceError, OptionError
from edgemoe.options import parse_size

if TYPE_CHECKING:
    from edgemoe.planning import Plan


@click.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@memory_option
@context_option
@load_option("parallel", "-np", "--parallel", metavar="N")
@gpu_options
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "16", "32"]),
    default="8",
    show_default=True,
    help="Of a folder's conversion; packs and GGUF files have theirs.",
)
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE", help="A routing trace of this model, for its hit rates."
)
@click.option("--disk", metavar="SIZE", help="Disk speed in bytes per second (2GB) instead of measuring it.")
@click.option("--bandwidth", metavar="SIZE", help="Memory speed in bytes per second (30GB) instead of measuring it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes are bytes.")
def command(
    model: Path | None,
    memory: int | None,
    context: int | None,
    parallel: int | None,
    gpu: str,
    gpu_layers: int | None,
    vram: int | None,
    bits: str,
    trace: Path | None,
    disk: str | None,
    bandwidth: str | None,
    as_json: bool,
) -> None:
    """Tell whether MODEL (a pack, a GGUF file, a Hugging Face folder or its config.json alone; default: the bundled
    one) fits into the memory, and how fast it will be with several budgets, and with each --quality that the pack has
    measured.

    With a GPU it is told what would lie there; with --gpu cuda --vram SIZE it need not be in this machine.

    Only headers are read. Disk and memory are measured where models are cached, unless given. Exits with 1 and the
    number that would do where the model cannot fit.
    """
    from edgemoe.model_files import bundled_model, default_cache_dir
    from edgemoe.planning import plan_model
    from edgemoe.profiling import read_trace

    path = model or bundled_model()
    speeds = {}
    for name, text in (("disk", disk), ("bandwidth", bandwidth)):
        if text is not None:
            speeds[name] = parse_size(text, f"--{name}")
            if speeds[name] is None:
                raise OptionError(f"--{name} {text} is not a speed")
    routing = read_trace(trace, weights=False) if trace else None
    # What does not fit is said before anything is measured.
    asked: dict[str, Any] = {"memory": memory, "context": context, "parallel": parallel, "bits": int(bits)}
    device, size, unified = _device(gpu, gpu_layers, vram)
    asked |= {"vram": size, "gpu_layers": gpu_layers, "unified": unified}
    plan_model(path, **asked)
    if len(speeds) < 2:
        from edgemoe.machine import examine

        machine = examine(default_cache_dir(), announce=lambda text: click.echo(f"{text} ...", err=True))
        if machine.best_disk:
            speeds.setdefault("disk", int(machine.best_disk.bytes_per_second))
        if machine.memory_bandwidth:
            speeds.setdefault("bandwidth", int(max(machine.memory_bandwidth.values())))
    plan = plan_model(
        path,
        **asked,
        trace=routing,
        disk=speeds.get("disk"),
        bandwidth=speeds.get("bandwidth"),
    )
    if as_json:
        click.echo(
            json.dumps(
                {
                    **dataclasses.asdict(plan),
                    "device_name": device if plan.device is not None else None,
                    **{f"{name}_speed": speed for name, speed in speeds.items()},
                }
            )
        )
    else:
        _show(plan, speeds, device)


def _device(gpu: str, layers: int | None, vram: int | None) -> tuple[str, int | None, bool]:
    """The name of the device that is planned for, and bytes of its memory, None for none; whether that is the
    processor's."""
    if gpu == "none" or layers == 0:
        return "", None, False
    if gpu == "cuda" and vram is not None:
        return "the GPU", vram, False
    from edgemoe.device_memory import automatic_vram
    from edgemoe.devices import open_device

    try:
        found = open_device(gpu, lambda text: click.echo(text, err=True))
    except DeviceError as error:
        raise type(error)(f"{error}; with --vram SIZE it need not be here") from error
    if found is None:
        if vram is not None:
            return "a GPU", vram, False
        if layers is not None:
            click.echo("there is no GPU: say with --vram how much memory one would have", err=True)
        return "", None, False
    if found.unified and vram is None:
        click.echo(f"{found.name} shares the processor's memory: say with --vram how much of it it may take", err=True)
        return "", None, False
    return found.name, automatic_vram(found.available) if vram is None else vram, found.unified


def _show(plan: Plan, speeds: dict[str, int | None], device: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgemoe.memory import format_count, format_size
    from edgemoe.printable import printable

    sequences = f"{plan.parallel} sequences of together " if plan.parallel > 1 else ""
    console = Console()
    # Piped into a file or a pager, tables keep their columns.
    console.width = max(console.width, 100) if not console.is_terminal else console.width

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    say(
        f"{printable(plan.model)}: {format_count(plan.parameters)} parameters, {format_count(plan.active_parameters)} "
        f"active per token"
    )
    say(
        f"dense weights {format_size(plan.dense)}, "
        f"experts {format_size(plan.experts)} ({format_size(plan.expert)} each), "
        f"state of {sequences}{plan.context} positions {format_size(plan.state)}"
    )
    if plan.device is not None:
        say(_placement(plan, device))
    fits = "all of it fits" if plan.memory >= plan.everything else "it fits, experts are streamed"
    say(f"with {format_size(plan.memory)}: {fits}")
    say(
        f"least --memory {_megabytes(plan.least)}, sensible {_megabytes(plan.sensible)}, "
        f"everything in memory {_megabytes(plan.everything)}"
    )
    table = Table()
    for name in ("--memory", "experts", "hit rate", "read per token", "tokens/s", "between"):
        table.add_column(name, justify="right", no_wrap=True)
    for speed in plan.speeds:
        chosen = speed.memory == plan.memory
        table.add_row(
            ("> " if chosen else "") + _megabytes(speed.memory),
            str(speed.slots),
            _range([f"{rate:.0%}" for rate in speed.hit_rate]),
            _range([format_size(size) for size in speed.bytes_per_token]),
            f"{speed.expected:.1f}" if speed.expected else "?",
            _range([f"{rate:.1f}" for rate in speed.tokens_per_second]) if speed.tokens_per_second else "?",
            style="bold" if chosen else None,
        )
    console.print(table)
    if plan.qualities and plan.speeds[0].expected:
        modes = {"exact": plan.speeds, **plan.qualities}
        table = Table()
        for name in ("--memory", *(f"{name}, tokens/s" for name in modes)):
            table.add_column(name, justify="right")
        for speed, *others in zip(*modes.values(), strict=True):
            chosen = speed.memory == plan.memory
            table.add_row(
                ("> " if chosen else "") + _megabytes(speed.memory),
                *(f"{mode.expected:.1f}" for mode in (speed, *others)),
                style="bold" if chosen else None,
            )
        say("by --quality:")
        console.print(table)
    say(f"hit rates: {printable(plan.source)}")
    if plan.device is not None and plan.device.layers:
        say("budgets, hit rates and reads are of the processor's memory alone; how fast the GPU is was not measured")
    if speeds.get("disk") and speeds.get("bandwidth"):
        say(f"at {format_size(speeds['disk'] or 0)}/s from disk, {format_size(speeds['bandwidth'] or 0)}/s from memory")


def _placement(plan: Plan, name: str) -> str:
    """What lies in a device's memory."""
    from edgemoe.memory import format_size
    from edgemoe.printable import printable

    found = plan.device
    assert found is not None
    where = f"on {printable(name)}, with {format_size(found.limit)}: "
    if not found.layers:
        return f"{where}nothing, not even one layer fits"
    head = " and the head" if found.layers > plan.layers else ""
    sizes = (
        f"{format_size(found.dense)} dense weights, {format_size(found.state)} state, "
        f"{format_size(found.scratch)} activations"
    )
    experts = f", {found.slots} of {found.all_slots} experts {format_size(found.slots * found.slot_bytes)}"
    return f"{where}{min(found.layers, plan.layers)} of {plan.layers} layers{head} ({sizes}){experts}"


def _range(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " - ".join(values)


def _megabytes(size: int) -> str:
    return f"{-(-size // 1_000_000)}MB"
