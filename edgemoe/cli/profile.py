"""Tell whether a model suits offloading, from a trace of its routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.options import gpu_options, load_option, memory_option
from edgemoe.errors import OptionError, TraceError

if TYPE_CHECKING:
    from edgemoe.profiling import Trace

_PIECE = 512  # tokens of a text that are run together, as in the paper


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "-f",
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text to run a model on; may be repeated, each file is a kind of text.",
)
@click.option("-n", "--tokens", type=click.IntRange(1), default=8192, show_default=True, help="Of each text, at most.")
@memory_option
@click.option(
    "--top-k", type=click.IntRange(1, 256), help="Experts per token, where TRACE is a folder of router logits."
)
@click.option("--model", "name", help="Whose router logits, where the folder holds several models'.")
@click.option("--expert-size", help="Size of one stored expert (2.5MB), to count bytes and memory.")
@load_option("threads", "-t", "--threads", metavar="N")
@gpu_options
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a report to this file.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the trace to this file.")
def command(
    trace: Path,
    texts: tuple[Path, ...],
    tokens: int,
    memory: int | None,
    top_k: int | None,
    name: str | None,
    expert_size: str | None,
    threads: int | None,
    gpu: str,
    gpu_layers: int | None,
    vram: int | None,
    as_json: bool,
    page: Path | None,
    save: Path | None,
) -> None:
    """Tell whether a model suits offloading, from a trace of its routing.

    TRACE is a routing trace, a folder of router logits (MODEL_00.safetensors, ..., each [sequence, token, expert]),
    or a model (a pack, a GGUF file, a Hugging Face folder), which is run on the files given with --text.
    """
    from rich.console import Console
    from rich.progress import Progress

    from edgemoe.options import parse_size
    from edgemoe.profiling.analysis import profile
    from edgemoe.profiling.report import terminal, to_html, to_json

    expert_bytes = parse_size(expert_size, "--expert-size") if expert_size else None
    errors = Console(stderr=True)
    options = {"memory": memory, "threads": threads, "gpu": gpu, "gpu_layers": gpu_layers, "vram": vram}
    routing = _run(trace, texts, tokens, options) if texts else _load(trace, top_k, name)
    if save:
        routing.save(save)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        work = bar.add_task("measuring", total=None)
        try:
            result = profile(
                routing,
                expert_bytes=expert_bytes,
                threads=threads,
                progress=lambda done, total: bar.update(work, completed=done, total=total),
            )
        except ValueError as error:
            raise TraceError(f"{trace}: {error}") from None
    if page:
        page.write_text(to_html(result), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(to_json(result), allow_nan=False))
    else:
        console = Console()
        # Piped into a file or a pager, tables keep their columns.
        console.width = max(console.width, 100) if not console.is_terminal else console.width
        console.print(terminal(result))
        if page:
            click.echo(f"\nreport: {page}")


def _load(source: Path, top_k: int | None, name: str | None) -> Trace:
    """The trace behind the argument: a trace file or a folder of router logits."""
    from edgemoe.profiling import import_router_logits, read_trace

    if source.is_dir():
        if (source / "config.json").exists():
            raise OptionError(f"{source}: a model needs --text, a file to run it on")
        if top_k is None:
            raise OptionError(f"{source}: router logits need --top-k, the number of experts per token")
        return import_router_logits(source, top_k, model=name)
    with source.open("rb") as stream:
        if stream.read(4) in (b"EMOE", b"GGUF"):
            raise OptionError(f"{source}: a model needs --text, a file to run it on")
    return read_trace(source, weights=False)


def _run(source: Path, texts: tuple[Path, ...], tokens: int, options: dict[str, Any]) -> Trace:
    """The trace of a model on some files, cut into pieces of _PIECE tokens that are run one by one."""
    import tempfile

    import edgemoe
    from edgemoe.profiling import read_trace
    from edgemoe.profiling.trace import concatenate

    traces = []
    with (
        tempfile.TemporaryDirectory() as folder,
        edgemoe.load(source, announce=lambda text: click.echo(text, err=True), **options) as model,
    ):
        piece = min(_PIECE, model.context)
        for number, text in enumerate(texts):
            ids = model.tokenizer.encode(text.read_text(encoding="utf-8", errors="replace"))[:tokens]
            if not ids:
                raise OptionError(f"{text}: no tokens")
            file = Path(folder) / str(number)
            with model.trace(file, text.stem):
                for begin in range(0, len(ids), piece):
                    model.logits(ids[begin : begin + piece])
            traces.append(read_trace(file))
    return concatenate(traces)
