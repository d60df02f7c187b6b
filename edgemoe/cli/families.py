"""List the model families that run, and what each one has."""

from __future__ import annotations

import json
import textwrap

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of objects.")
def command(as_json: bool) -> None:
    """List the model families that run: `model_type` of a config.json, `general.architecture` of a GGUF file, models,
    and what they have."""
    from edgemoe.families import describe, family_names

    families = [describe(name) for name in family_names()]
    if as_json:
        click.echo(json.dumps(families, indent=1))
        return
    types = max(len(family["model_type"]) for family in families) + 2
    architectures = max(len(family["gguf_architecture"] or "") for family in families) + 2
    for family in families:
        head = f"{family['model_type']:<{types}}{family['gguf_architecture'] or '-':<{architectures}}"
        click.echo(f"{head}{family['name']} ({', '.join(family['models'])})")
        click.echo(textwrap.fill(family["features"], 116, initial_indent="    ", subsequent_indent="    "))
