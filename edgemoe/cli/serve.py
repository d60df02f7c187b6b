"""Serve a model over HTTP.

edgemoe serve                            the bundled model at http://127.0.0.1:8080
edgemoe serve MODEL --port 9000 -c 32768 -np 4
edgemoe serve MODEL --host 0.0.0.0 --api-key-file keys.txt
"""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

import click

from edgemoe.cli import EXIT_INTERRUPTED
from edgemoe.cli._terminal import note
from edgemoe.cli.options import (
    chosen_template,
    context_option,
    load_option,
    memory_size,
    model_options,
    open_model,
    predict_option,
    read_text,
    template_options,
)

if TYPE_CHECKING:
    pass

# For models that were never taught to hold a conversation.
_PARAGRAPHS = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ message.content + '\\n\\n' }}
{%- endfor -%}"""

# What a request may have by default: more than a text that fills the context takes as JSON, with all that is around it.
LEAST_BODY = 4 << 20
BYTES_PER_TOKEN = 32


@click.command()
@click.argument("words", nargs=-1, metavar="[MODEL]")
@click.option("-m", "--model", metavar="PATH", help="The model, in place of the argument.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="NAME", help="Where to listen.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N", help="0 for a free one."
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="EDGEMOE_API_KEY",
    metavar="KEY",
    help="Every request but /health must have it. Repeatable.  [env: EDGEMOE_API_KEY]",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Keys, one in a line; # begins a comment.",
)
@load_option("parallel", "-np", "--parallel", metavar="N")
@load_option("max_gap", "--max-gap", metavar="SECONDS", type=float, show_default=True)
@load_option("queue", "--queue", metavar="N")
@load_option("prompt_cache_dir", "--prompt-cache-dir", metavar="DIR", type=click.Path(file_okay=False))
@load_option("prompt_cache_size", "--prompt-cache-size", metavar="SIZE", callback=memory_size, show_default=True)
@context_option
@predict_option("No answer is longer, whatever a request says; -1 for no limit.")
@model_options
@load_option("eviction", "--eviction")
@load_option("prefetch", "--no-prefetch", help="Read no expert before it is known to be needed.")
@click.option("-a", "--alias", metavar="NAME", help="What responses call the model.  [default: its file's name]")
@template_options
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A name that clients may know this server by; on a loopback address localhost is one. Repeatable.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="URL",
    help="A web page's origin that may use the server; * for all. Repeatable.",
)
@click.option(
    "--max-request-size",
    "max_body",
    callback=memory_size,
    metavar="auto|SIZE",
    help="Bytes that a request may have.  [default: 4 MiB and 32 for each token of -c]",
)
@click.option(
    "--timeout",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="SECONDS",
    help="An answer that takes longer is an error; 0 for no limit.",
)
@click.option("-v", "--verbose", is_flag=True, help="A line on stderr for each request.")
def command(
    words: tuple[str, ...],
    model: str | None,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    api_key_file: str | None,
    parallel: int | None,
    max_gap: float,
    queue: int,
    prompt_cache_dir: str | None,
    prompt_cache_size: int,
    context: int | None,
    max_tokens: int | None,
    memory: int | None,
    threads: int | None,
    gpu: str,
    gpu_layers: int | None,
    vram: int | None,
    cache_type_k: str,
    cache_type_v: str,
    quality: str,
    eviction: str,
    prefetch: bool,
    alias: str | None,
    chat_template: str | None,
    chat_template_file: str | None,
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    max_body: int | None,
    timeout: int,
    verbose: bool,
) -> int:
    """Serve a model to apps, agents and editors: OpenAI's chat completions, completions and responses, Anthropic's
    messages, and a page at /.

    MODEL is a pack (.emoe), a GGUF file, or a Hugging Face folder, which is converted once; without one the bundled
    model answers, whatever name requests give it. Ctrl-C ends it.
    """
    if len(words) + (model is not None) > 1:
        raise click.UsageError("more than one model")
    keys = (*api_keys, *_keys(api_key_file))
    template = chosen_template(chat_template, chat_template_file)
    if any(not key.strip() or not key.isascii() for key in keys):
        raise click.UsageError("an API key is not empty, and of ASCII characters")
    try:
        from edgemoe.server.service import bind, serve
        from edgemoe.server.settings import LOOPBACK_NAMES, ServerSettings
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("starlette", "uvicorn", "anyio"):
            raise
        raise click.UsageError(f"{missing} is missing; pip install 'edgemoe[server]' brings it") from None
    bound = bind(host, port)  # before a model is loaded for nothing
    with bound:
        loopback = _is_loopback(bound)
        if not loopback and not keys:
            note(f"warning: {host} can be reached from other machines, and there is no --api-key")
        names = (*LOOPBACK_NAMES, _bracketed(host), *allowed_hosts) if loopback else allowed_hosts
        opened = open_model(
            model or (words[0] if words else None),
            memory=memory,
            threads=threads,
            gpu=gpu,
            gpu_layers=gpu_layers,
            vram=vram,
            context=context,
            parallel=parallel,
            max_gap=max_gap,
            queue=queue,
            prompt_cache_dir=prompt_cache_dir,
            prompt_cache_size=prompt_cache_size,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
            quality=quality,
            eviction=eviction,
            prefetch=prefetch,
        )
        with opened as engine:
            if template is None and engine.tokenizer.chat_template is None:
                note("the model has no chat template: it continues what the messages say, a paragraph each")
                template = _PARAGRAPHS
            if template is not None:
                engine.tokenizer.use_chat_template(template)
            settings = ServerSettings(
                model_name=alias or engine.path.stem,
                api_keys=keys,
                allowed_hosts=names or None,
                cors_origins=cors_origins,
                max_tokens=max_tokens,
                max_body=max_body or LEAST_BODY + BYTES_PER_TOKEN * engine.context,
                request_seconds=timeout or None,
            )
            address, number = bound.getsockname()[:2]

            def ready() -> None:
                from edgemoe.memory import format_size

                note(f"model     {engine.path} ({engine.spec.family}, quality {engine.quality})")
                note(f"memory    {format_size(engine.budget.limit)}")
                if engine.device is not None:
                    note(f"gpu       {engine.device}")
                note(f"context   {engine.context} tokens, {engine.options.sequences} in parallel")
                note(f"listening at http://{_bracketed(address)}:{number}")

            ended_by = serve(engine, settings, bound, ready, verbose)
    return EXIT_INTERRUPTED if ended_by == signal.SIGINT else 0


def _keys(file: str | None) -> list[str]:
    lines = [] if file is None else [line.strip() for line in read_text(file).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if file is not None and not keys:
        raise click.UsageError(f"{file} has no key")
    return keys


def _is_loopback(bound: socket.socket) -> bool:
    import ipaddress

    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
