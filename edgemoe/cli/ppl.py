"""Measure the perplexity of a text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from edgemoe.cli._terminal import note, print_counters, progress_bar
from edgemoe.cli.options import model_options, open_model

DEFAULT_CONTEXT = 512


@click.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="PATH", help="The same as MODEL.")
@click.option("-f", "--file", "file", required=True, metavar="FILE", help="The text, UTF-8, of any length.")
@click.option(
    "-c",
    "--ctx-size",
    "context",
    type=click.IntRange(min=4),
    metavar="N",
    help="Tokens of a chunk.  [default: 512, or what the model was made for]",
)
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Stop after N chunks.  [default: all]")
@model_options
@click.option("-v", "--verbose", is_flag=True, help="Print the estimate after each chunk, and the counters, on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str | None,
    model_option: str | None,
    file: str,
    context: int | None,
    chunks: int | None,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how well a model predicts a text: its perplexity, by llama-perplexity's method.

    The text is cut into chunks of N tokens; the first half of each is context, the second half is scored. MODEL is a
    pack, a GGUF file, or a Hugging Face folder; without one the bundled model is measured. The figure after +/- is the
    standard error.
    """
    if model is not None and model_option is not None:
        raise click.UsageError("the model is given twice, as MODEL and with -m")
    model = model or model_option
    size = Path(file).stat().st_size  # refuses a missing file before the model is loaded
    from edgemoe.text.perplexity import Estimate, perplexity, read_tokens

    if context is None:
        context = min(DEFAULT_CONTEXT, _model_context(model))
    with open_model(model, context=context, **options) as engine:
        begin = engine.tokenizer.begin_ids
        done = 0

        def on_read(read: int) -> None:
            nonlocal done
            done = read

        tokens = read_tokens(engine.tokenizer, file, on_read)
        estimates = perplexity(tokens, engine.logits, context, begin[0] if begin else None, chunks)
        estimate = Estimate()
        with progress_bar("perplexity") as advance:
            advance(0, size)
            for estimate in estimates:
                # A piece of the text is many chunks; its bytes count as done when its last chunk is.
                advance(*((estimate.chunks, chunks) if chunks else (done, size)))
                if verbose:
                    note(f"[{estimate.chunks}] {estimate.perplexity:.4f} +/- {estimate.error:.4f}")
        if as_json:
            report = {
                "perplexity": _number(estimate.perplexity),
                "error": _number(estimate.error),
                "tokens": estimate.tokens,
                "chunks": estimate.chunks,
                "context": context,
                "file": file,
            }
            click.echo(json.dumps(report))
        else:
            click.echo(
                f"perplexity {estimate.perplexity:.4f} +/- {estimate.error:.4f} "
                f"({estimate.tokens} tokens scored in {estimate.chunks} chunks of {context})"
            )
        if verbose:
            print_counters({name: value for name, value in engine.counters().items() if value})


def _number(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _model_context(model: str | None) -> int:
    """How many positions the model was made for."""
    from edgemoe.formats.read import read_index
    from edgemoe.model_files import resolve

    with progress_bar("converting") as advance:
        return read_index(resolve(model, announce=note, progress=advance)).spec.context
