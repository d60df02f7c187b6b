"""Options that several commands have: the model and its memory, sampling. Spellings are llama.cpp's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgemoe.cli._terminal import progress_bar
from edgemoe.errors import OptionError, TokenizerError
from edgemoe.options import LoadOptions, Meaning, parse_size
from edgemoe.text.named_templates import NAMED_TEMPLATES

if TYPE_CHECKING:
    from edgemoe.model import Model

Function = TypeVar("Function", bound=Callable[..., Any])


def memory_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option `auto|SIZE`: 8GB is 8 * 10^9 bytes, 6GiB is 6 * 2^30. Gives bytes, None for auto."""
    try:
        return None if value is None else parse_size(value, param.name or "memory")
    except OptionError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def layer_count(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option `N|auto`. Gives None for auto."""
    if value is None or value == "auto":
        return None
    if not (value.isascii() and value.isdigit()):
        raise click.BadParameter(f"{value!r} is neither a number of layers nor auto", ctx, param)
    return int(value)


def token_limit(ctx: click.Context, param: click.Parameter, value: int) -> int | None:
    """Callback of an option that limits a number of tokens. Gives None for -1, no limit."""
    if value < -1:
        raise click.BadParameter(f"{value} is negative; -1 is for no limit", ctx, param)
    return None if value == -1 else value


def _apply(function: Function, decorators: list[Callable[[Function], Function]]) -> Function:
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def load_option(name: str, *flags: str, metavar: str | None = None, **changes: Any) -> Callable[[Function], Function]:
    """A command's option that is a field of LoadOptions, with its default, choices, bounds and help. A flag turns on
    what is off, or off what is on. changes: what click is told otherwise."""
    field = LoadOptions.__dataclass_fields__[name]
    meaning: Meaning = field.metadata["meaning"]
    settings: dict[str, Any] = {"help": meaning.help, "default": field.default, "metavar": metavar}
    if meaning.choices:
        settings |= {"type": click.Choice(meaning.choices), "show_default": True}
    elif meaning.least is not None:
        settings["type"] = click.IntRange(meaning.least, meaning.most)
        settings["show_default"] = field.default is not None
    elif isinstance(field.default, bool):
        # The flag says the opposite of a default that is true. Versions of click differ in what a flag's value means
        # beside a default; a callback means the same in all of them.
        turns_off = field.default
        settings |= {"is_flag": True, "default": False, "callback": lambda ctx, param, given: given != turns_off}
    if meaning.automatic:
        settings["help"] += f"  [default: {meaning.automatic}]"
    return click.option(*flags, name, **{**settings, **changes})


def predict_option(help: str) -> Callable[[Function], Function]:
    """-n: how many tokens there may be, None for any number."""
    return click.option(
        "-n",
        "--predict",
        "--max-tokens",
        "max_tokens",
        type=int,
        default=-1,
        callback=token_limit,
        metavar="N",
        help=f"{help}  [default: -1]",
    )


def memory_option(function: Function) -> Function:
    """-M: the bytes that the process may take, None for what is free."""
    return load_option("memory", "-M", "--memory", metavar="auto|SIZE", callback=memory_size)(function)


def context_option(function: Function) -> Function:
    """-c: the positions of a sequence, 0 for all that the model was made for."""
    return load_option("context", "-c", "--ctx-size", metavar="N")(function)


def gpu_options(function: Function) -> Function:
    """--gpu -ngl --vram: what computes beside the processor, and with how much."""
    spellings = ("-ngl", "--gpu-layers", "--n-gpu-layers")
    layers = load_option("gpu_layers", *spellings, metavar="N|auto", type=str, callback=layer_count)
    vram = load_option("vram", "--vram", metavar="auto|SIZE", callback=memory_size)
    return _apply(function, [load_option("gpu", "--gpu"), layers, vram])


def model_options(function: Function) -> Function:
    """-M -t --gpu -ngl --vram -ctk -ctv --quality (and -c, whose meaning the command says): the keyword
    arguments of `open_model`."""
    return _apply(
        function,
        [
            memory_option,
            load_option("threads", "-t", "--threads", metavar="N"),
            gpu_options,
            load_option("cache_type_k", "-ctk", "--cache-type-k"),
            load_option("cache_type_v", "-ctv", "--cache-type-v"),
            load_option("quality", "--quality"),
        ],
    )


def template_options(function: Function) -> Function:
    """--chat-template, --chat-template-file: what `chosen_template` is given."""
    names = ", ".join(NAMED_TEMPLATES)
    file = click.Path(exists=True, dir_okay=False)
    return _apply(
        function,
        [
            click.option(
                "--chat-template",
                metavar="NAME|JINJA",
                help=f"In place of the model's own: {names}, or a template itself.",
            ),
            click.option("--chat-template-file", type=file, metavar="FILE", help="The same, from a file."),
        ],
    )


def sampling_options(function: Function) -> Function:
    """Every option of sampling, each None (or empty) where it is not given: then the model's generation_config.json
    decides, and after it the default shown (llama.cpp's). `check_sampling` makes the options of `generate` of them."""

    def option(*names: str, kind: Any, shown: str, text: str, metavar: str = "X") -> Callable[[Function], Function]:
        help_text = f"{text}  [{shown}]" if shown else text
        return click.option(*names, type=kind, default=None, metavar=metavar, help=help_text)

    def several(*names: str, metavar: str, text: str) -> Callable[[Function], Function]:
        return click.option(*names, multiple=True, metavar=metavar, help=text)

    file = click.Path(exists=True, dir_okay=False)
    return _apply(
        function,
        [
            option("--temp", "temperature", kind=float, shown="0.8", text="Temperature; 0 takes the likeliest token."),
            option("--top-k", kind=int, shown="40", text="Only the k likeliest tokens; 0 for all."),
            option("--top-p", kind=float, shown="0.95", text="Only the likeliest tokens that reach this together."),
            option("--min-p", kind=float, shown="0.05", text="Only tokens this likely relative to the likeliest."),
            option("--typical", "--typical-p", "typical_p", kind=float, shown="1.0", text="Locally typical sampling."),
            option(
                *("--top-nsigma", "--top-n-sigma", "top_n_sigma"),
                kind=float,
                shown="-1.0",
                text="Only logits at most so many standard deviations below the largest.",
            ),
            option("--xtc-probability", kind=float, shown="0.0", text="How often the top choices are excluded."),
            option("--xtc-threshold", kind=float, shown="0.1", text="From what probability on they are."),
            option("--repeat-penalty", kind=float, shown="1.0", text="Makes tokens seen lately less likely."),
            option("--presence-penalty", kind=float, shown="0.0", text="The same, subtracted once."),
            option("--frequency-penalty", kind=float, shown="0.0", text="The same, for each time it was seen."),
            option("--repeat-last-n", kind=int, shown="64", text="How far back those look; 0 for off, -1 for all."),
            option("--dry-multiplier", kind=float, shown="0.0", text="Makes it less likely to repeat a passage."),
            option("--dry-base", kind=float, shown="1.75", text="How that grows with the passage's length."),
            option("--dry-allowed-length", kind=int, shown="2", text="How long a passage may be repeated."),
            option(
                "--dry-penalty-last-n", kind=int, shown="-1", text="How far back that looks; 0 for off, -1 for all."
            ),
            several(
                *("--dry-sequence-breaker", "dry_sequence_breakers"),
                metavar="TEXT",
                text='What passages do not reach across; \\n is a line end; none for nothing. Repeatable.  [\\n : " *]',
            ),
            option(
                "--mirostat", kind=int, shown="0", text="Mirostat 1 or 2 in place of the other samplers; 0 for off."
            ),
            option("--mirostat-lr", "mirostat_eta", kind=float, shown="0.1", text="Its learning rate."),
            option("--mirostat-ent", "mirostat_tau", kind=float, shown="5.0", text="Its target surprise, in bits."),
            option(
                "--samplers",
                kind=str,
                shown="",
                text="Which samplers, in which order.  "
                "[penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature]",
                metavar="NAMES",
            ),
            several(
                *("-l", "--logit-bias"),
                metavar="ID(+|-)X",
                text="Adds X to a token's logit: 15043+1, 15043-inf. Repeatable.",
            ),
            click.option("--ignore-eos", is_flag=True, help="Never end by itself: the tokens that end are forbidden."),
            option("--grammar", kind=str, shown="", text="The answer is in this GBNF grammar.", metavar="GBNF"),
            option("--grammar-file", kind=file, shown="", text="The same, from a file.", metavar="FILE"),
            option(
                *("-j", "--json-schema"),
                kind=str,
                shown="",
                text="The answer is JSON of this schema; {} for any.",
                metavar="JSON",
            ),
            option("-jf", "--json-schema-file", kind=file, shown="", text="The same, from a file.", metavar="FILE"),
            option("-s", "--seed", kind=int, shown="-1", text="Of the draws; -1 for a random one."),
        ],
    )


def check_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate` from those of `sampling_options` that were given. Refuses nonsense as a usage error,
    before a model is loaded."""
    from edgemoe.text.sampling import SamplingOptions

    given = {name: value for name, value in values.items() if value is not None and value is not False and value != ()}
    for name in ("grammar", "json_schema"):
        file = given.pop(f"{name}_file", None)
        if file is not None:
            if name in given:
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option} and --{option}-file exclude each other")
            given[name] = read_text(file)
    if "logit_bias" in given:
        given["logit_bias"] = dict(_bias(text) for text in given["logit_bias"])
    if "dry_sequence_breakers" in given:
        breakers = [_unescape(text) for text in given["dry_sequence_breakers"] if text != "none"]
        given["dry_sequence_breakers"] = tuple(breakers)
    try:
        options = SamplingOptions.merged(given, {})
        if options.grammar is not None or options.json_schema is not None:
            from edgemoe.text.grammar import check_language, language

            check_language(language(options.grammar, options.json_schema))
    except OptionError as error:
        raise click.UsageError(str(error)) from None
    return given


def chosen_template(source: str | None, file: str | None) -> str | None:
    """The template that was asked for, known to compile; None where none was."""
    if source is not None and file is not None:
        raise click.UsageError("--chat-template and --chat-template-file exclude each other")
    if file is not None:
        source = read_text(file)
    elif source is not None and "{" not in source:
        if source not in NAMED_TEMPLATES:
            known = ", ".join(NAMED_TEMPLATES)
            raise click.UsageError(f"--chat-template {source!r} is neither a template nor one of {known}")
        source = NAMED_TEMPLATES[source]
    if source is not None:
        from edgemoe.text.template import ChatTemplate

        try:
            ChatTemplate(source, "--chat-template")
        except TokenizerError as error:
            raise click.UsageError(str(error)) from None
    return source


def read_text(path: str, limit: int = 1 << 20) -> str:
    """The text of a file that is named as an option. Refuses as a usage error what is none, or too long."""
    with Path(path).open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise click.UsageError(f"{path} has more than {limit} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)([+-])(\d+(?:\.\d*)?(?:e[+-]?\d+)?|inf)", text, re.IGNORECASE)
    if not match:
        raise click.UsageError(f"--logit-bias {text!r} is not of the form 15043+1, 15043-0.5 or 15043-inf")
    return int(match[1]), float(match[2] + match[3])


def _unescape(text: str) -> str:
    meanings = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "'": "'"}
    return re.sub(r"\\([nrt\\\"'])", lambda match: meanings[match[1]], text)


def open_model(path: str | None, **options: Any) -> Model:
    """`edgemoe.load`, saying on stderr what it does where that takes a while (converting a folder).

    A command has one text at a time, unless the options say how many in `parallel`."""
    import edgemoe

    options.setdefault("parallel", 1)

    with progress_bar("converting") as advance:
        model = edgemoe.load(path, announce=lambda text: click.echo(text, err=True), progress=advance, **options)
    if not model.direct_io:
        click.echo(
            f"{model.path}: the filesystem refuses direct reads; its pages are dropped after each read", err=True
        )
    return model
