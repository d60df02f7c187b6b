"""Answer a prompt or hold a conversation.

edgemoe run                              a conversation with the bundled model
edgemoe run -p "Once upon a time"        one answer of the bundled model
edgemoe run MODEL                        a conversation with this model
edgemoe run MODEL "Once upon a time"     one answer
edgemoe run MODEL -f prompt.txt
edgemoe run MODEL - < prompt.txt         or without the dash: a pipe is a prompt
"""

from __future__ import annotations

import json
import secrets
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli._terminal import AnswerWriter, note, print_counters
from edgemoe.cli.options import (
    check_sampling,
    chosen_template,
    context_option,
    load_option,
    model_options,
    open_model,
    predict_option,
    sampling_options,
    template_options,
)
from edgemoe.errors import OptionError

if TYPE_CHECKING:
    from edgemoe.model import Model
    from edgemoe.serving.answer import Answer
    from edgemoe.serving.generation import Generation

# Far more text than any context holds; it bounds what is read before the prompt is found to be too long.
MAX_PROMPT = 16 * 1024**2


@click.command(
    epilog="Sampling defaults are llama.cpp's, unless the model's generation_config.json has its own; an option given "
    "here goes before both."
)
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@click.option("-m", "--model", metavar="PATH", help="The model; then the only argument is PROMPT.")
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt. Without MODEL, for the bundled model.")
@click.option("-f", "--file", metavar="FILE", help="The prompt is in this file; - is the standard input.")
@click.option("-sys", "--system-prompt", metavar="TEXT", help="Instructions before the conversation.")
@predict_option("At most N tokens; -1 until the model ends or the context is full.")
@context_option
@model_options
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer, and is not part of it. Repeatable.")
@template_options
@click.option(
    "--chat-template-kwargs",
    metavar="JSON",
    help="""Variables for the template, such as '{"enable_thinking": false}'.""",
)
@click.option(
    "--reasoning-format",
    type=click.Choice(["auto", "deepseek", "none"]),
    help="Whether thoughts are told apart from the answer, and go to stderr; none leaves them in.  [default: auto]",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template.")
@load_option("eviction", "--eviction")
@load_option("prefetch", "--no-prefetch", help="Read no expert before it is known to be needed.")
@click.option("--trace", metavar="FILE", help="Record which experts worked on each token (for edgemoe profile).")
@click.option("-v", "--verbose", is_flag=True, help="Print the counters of the run on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, reasoning_content, ..., stats.")
def command(
    words: tuple[str, ...],
    model: str | None,
    prompt: str | None,
    file: str | None,
    system_prompt: str | None,
    max_tokens: int | None,
    context: int | None,
    memory: int | None,
    threads: int | None,
    gpu: str,
    gpu_layers: int | None,
    vram: int | None,
    cache_type_k: str,
    cache_type_v: str,
    quality: str,
    stop: tuple[str, ...],
    chat_template: str | None,
    chat_template_file: str | None,
    chat_template_kwargs: str | None,
    reasoning_format: str | None,
    raw: bool,
    eviction: str,
    prefetch: bool,
    trace: str | None,
    verbose: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer a prompt, or hold a conversation.

    MODEL is a pack (.emoe), a GGUF file, or a Hugging Face folder, which is converted once; the first argument is
    always MODEL, and without one the bundled model answers. The prompt is PROMPT, -p, -f, or what comes through a
    pipe; without any of them the terminal becomes a conversation (Ctrl-C stops an answer, Ctrl-D leaves). The model's
    chat template is applied if it has one; without one, or with --raw, it continues the text.

    The text goes to the standard output, everything else, the model's thoughts included, to stderr.
    """
    options: dict[str, Any] = {**check_sampling(sampling), "max_tokens": max_tokens, "stop": stop}
    if "" in stop:
        raise click.UsageError("--stop must not be empty")
    template = chosen_template(chat_template, chat_template_file)
    chat_options = _chat_options(chat_template_kwargs, reasoning_format)
    if raw and (template is not None or chat_options or system_prompt is not None):
        raise click.UsageError("--raw is without a chat template: no --chat-template..., --reasoning-format, -sys")
    model, text = _model_and_prompt(words, model, prompt, file)
    if text is None and as_json:
        raise click.UsageError("--json needs a prompt: PROMPT, -p, -f or a pipe")
    if options.get("seed", -1) == -1:
        options["seed"] = secrets.randbits(32)  # drawn here to be reported: the same one gives the same text again
    opened = open_model(
        model,
        memory=memory,
        threads=threads,
        gpu=gpu,
        gpu_layers=gpu_layers,
        vram=vram,
        context=context,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        quality=quality,
        eviction=eviction,
        prefetch=prefetch,
    )
    with opened as engine, engine.trace(trace) if trace is not None else nullcontext():
        if template is not None:
            engine.tokenizer.use_chat_template(template)
        templated = not raw and engine.tokenizer.chat_template is not None
        if not templated and (system_prompt is not None or chat_options):
            name = "--system-prompt" if system_prompt is not None else "--" + next(iter(chat_options)).replace("_", "-")
            raise click.UsageError(f"{name} needs a model with a chat template, or --chat-template")
        if templated:
            options |= chat_options
        if text is None:
            from edgemoe.cli._chat import converse

            converse(engine, templated, system_prompt, options, verbose)
        else:
            _answer(_start(engine, templated, system_prompt, text, options), engine, options, verbose, as_json)


def _chat_options(kwargs: str | None, reasoning_format: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if reasoning_format is None else {"reasoning_format": reasoning_format}
    if kwargs is not None:
        try:
            variables = json.loads(kwargs)
        except (ValueError, RecursionError) as error:
            raise click.UsageError(f"--chat-template-kwargs is not JSON: {error}") from None
        if not isinstance(variables, dict):
            raise click.UsageError("--chat-template-kwargs is not a JSON object")
        from edgemoe.text.template import check_variables

        try:
            check_variables(variables)
        except OptionError as error:
            raise click.UsageError(f"--chat-template-kwargs: {error}") from None
        options["chat_template_kwargs"] = variables
    return options


def _model_and_prompt(
    words: tuple[str, ...], model: str | None, prompt: str | None, file: str | None
) -> tuple[str | None, str | None]:
    """(path of the model, None for the bundled one; prompt, None for a conversation)."""
    arguments = list(words)
    if model is None and arguments and words != ("-",):
        model = arguments.pop(0)
        if not Path(model).exists():
            hint = "the first argument is the model; to prompt the bundled one, use -p"
            raise click.UsageError(f"{model!r}: no such file or folder ({hint})")
    if len(arguments) > 1:
        raise click.UsageError(f"unexpected argument {arguments[1]!r}: put quotes around a prompt of several words")
    given = [source for source in (*arguments, prompt, file) if source is not None]
    if len(given) > 1:
        raise click.UsageError("more than one prompt: PROMPT, -p and -f exclude each other")
    if prompt is not None:
        text, where = prompt, "the prompt"
    elif file not in (None, "-"):
        path = Path(str(file))
        with path.open("rb") as stream:
            text, where = _decode(stream.read(MAX_PROMPT + 1), str(path)), str(path)
    elif arguments and arguments[0] != "-":
        text, where = arguments[0], "the prompt"
    elif given or sys.stdin is None or not sys.stdin.isatty():
        if sys.stdin is None:
            raise click.UsageError("there is no prompt, and no standard input to read one from")
        text, where = _decode(sys.stdin.buffer.read(MAX_PROMPT + 1), "the standard input"), "the standard input"
    else:
        return model, None
    if not text:
        raise click.UsageError(f"{where} is empty")
    return model, text


def _decode(data: bytes, where: str) -> str:
    """The text of a file or pipe, without the line end that editors and `echo` put behind it (as llama.cpp does)."""
    if len(data) > MAX_PROMPT:
        raise click.UsageError(f"{where} has more than {MAX_PROMPT} bytes: too long for a prompt")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{where} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _start(
    engine: Model, templated: bool, system_prompt: str | None, text: str, options: dict[str, Any]
) -> Answer | Generation:
    if not templated:
        return engine.generate(text, **options)
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return engine.chat_parts([*system, {"role": "user", "content": text}], **options)


def _answer(
    generation: Answer | Generation, engine: Model, options: dict[str, Any], verbose: bool, as_json: bool
) -> None:
    writer = AnswerWriter(silent=as_json)
    writer.write_all(generation)
    result = generation.result
    if as_json:
        report: dict[str, Any] = {"text": writer.content}
        if writer.reasoning:
            report["reasoning_content"] = writer.reasoning
        report |= {"stop_reason": result.finish_reason, "seed": options["seed"], "stats": engine.stats(result)}
        click.echo(json.dumps(report, ensure_ascii=False))
    else:
        writer.finish(line=sys.stdout.isatty())
    if verbose and not as_json and engine.device is not None:
        note(f"gpu {engine.device}")
    if verbose and not as_json:
        note(f"stopped by {result.finish_reason}, seed {options['seed']}")
        print_counters(engine.stats(result))
