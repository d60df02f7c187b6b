"""From logits to the next token, with llama.cpp's options, defaults and order."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

from edgemoe.errors import EdgemoeError, OptionError
from edgemoe.sampling_names import SAMPLING_NAMES
from edgemoe.text import samplers as steps
from edgemoe.text.samplers import Candidates

if TYPE_CHECKING:
    from edgemoe.text.grammar import Constraint
    from edgemoe.text.tokenizer import Tokenizer

SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
# Other spellings that llama.cpp takes; a dash is as good as an underscore.
_SAMPLER_NAMES = {"nucleus": "top_p", "typical": "typ_p", "typical_p": "typ_p", "typ": "typ_p", "temp": "temperature"}
_LARGEST_BIAS = float(np.finfo(np.float32).max)
_MIROSTAT_TOKENS = 100  # from which mirostat 1 estimates the shape of the distribution

_Step = Callable[[Candidates, Sequence[int]], Candidates]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to choose a token. Refuses values that make no sense with OptionError.

    temperature: divides the logits; 0 (or less) takes the likeliest token.
    top_k: only the k likeliest tokens; 0 or -1 for all.
    top_p: only the likeliest tokens that together reach this probability; 1 for all.
    min_p: only tokens at least this many times as likely as the likeliest one; 0 for all.
    typical_p: only the most typical tokens that together reach this probability; 1 for all.
    top_n_sigma: only tokens with a logit at most so many standard deviations below the largest; 0 or less for all.
    xtc_probability, xtc_threshold: how often all but the least likely of the tokens that reach the threshold are
        excluded; 0, or a threshold above 0.5, for never.
    repeat_penalty: divides positive and multiplies negative logits of tokens seen lately; 1 for none.
    presence_penalty, frequency_penalty: subtracted from the logits of such tokens, once or for every time.
    repeat_last_n: how many tokens back "lately" reaches; 0 for none, -1 for all.
    dry_multiplier, dry_base, dry_allowed_length: a token that lengthens a repetition of n tokens loses
        multiplier * base^(n - allowed_length); 0 (multiplier) or a base below 1 for off.
    dry_penalty_last_n: how many tokens back repetitions are looked for; 0 for off, -1 for all.
    dry_sequence_breakers: texts that repetitions do not reach across.
    mirostat, mirostat_tau, mirostat_eta: 1 or 2 for that version of Mirostat, which takes the place of `samplers` but
        the temperature; its target surprise in bits and its learning rate. 0 for off.
    samplers: names of the steps in their order, a sequence or one string with semicolons. SAMPLERS are the names.
    logit_bias: what is added to a token's logit, as a map or pairs; -inf forbids the token.
    ignore_eos: the tokens that end a text are forbidden.
    grammar: the text is in this language (GBNF, or llguidance's Lark where it says `%llguidance` or `start:`).
    json_schema: the text is JSON of this schema, given as JSON text or as what it means; `{}` for any JSON.
    seed: of the draws, -1 for a random one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    samplers: tuple[str, ...] = SAMPLERS
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    grammar: str | None = None
    json_schema: str | None = None
    seed: int = -1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
                object.__setattr__(self, field.name, _number(field.name, getattr(self, field.name), field.default))
        for name in ("dry_sequence_breakers", "samplers", "logit_bias", "json_schema"):
            object.__setattr__(self, name, _CONVERSIONS[name](getattr(self, name)))
        for name in ("top_p", "min_p", "typical_p", "xtc_probability", "xtc_threshold"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("temperature", "top_n_sigma", "presence_penalty", "frequency_penalty", "dry_multiplier"):
            self._require(name, math.isfinite(getattr(self, name)), "finite")
        for name in ("dry_base", "mirostat_tau", "mirostat_eta"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._require("top_k", self.top_k >= -1, "1 or more, 0 or -1 for all tokens")
        self._require("repeat_penalty", 0 < self.repeat_penalty < math.inf, "more than 0")
        self._require("repeat_last_n", self.repeat_last_n >= -1, "0 or more, -1 for all tokens")
        self._require("dry_allowed_length", self.dry_allowed_length >= 0, "0 or more")
        self._require("dry_penalty_last_n", self.dry_penalty_last_n >= -1, "0 or more, -1 for all tokens")
        self._require("mirostat", self.mirostat in (0, 1, 2), "0, 1 or 2")
        self._require("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")
        self._require("seed", -1 <= self.seed < 1 << 64, "a 64-bit number, -1 for a random one")
        if self.grammar is not None and not (isinstance(self.grammar, str) and self.grammar.strip()):
            raise OptionError("grammar is not a text with a grammar")
        if self.grammar is not None and self.json_schema is not None:
            raise OptionError("grammar and json_schema exclude each other")

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise OptionError(f"{name} = {getattr(self, name)!r} is not {expected}")

    @classmethod
    def merged(cls, explicit: Mapping[str, Any], generation: Mapping[str, Any]) -> SamplingOptions:
        """Explicit options over the model's generation_config.json over the defaults; None means "not given".

        `generation` may hold other keys as well; its `do_sample: false` means temperature 0. An unknown name in
        `explicit`, and a value that makes no sense in either, is an OptionError.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(explicit) - set(known))
        if unknown:
            raise OptionError(f"unknown sampling option {unknown[0]!r} (known: {', '.join(known)})")
        given = {name: value for name, value in explicit.items() if value is not None}
        model: dict[str, Any] = {}
        for name in SAMPLING_NAMES:
            value = generation.get(name.config, generation.get(name.option))
            if value is not None:
                model[name.option] = value
        if generation.get("do_sample") is False:
            model["temperature"] = 0.0
        try:
            cls(**{name: value for name, value in model.items() if name not in given})
        except OptionError as error:
            raise OptionError(f"the model's generation defaults: {error}") from None
        return cls(**{**model, **given})


def _number(name: str, value: Any, default: float) -> float:
    whole = isinstance(default, int)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise OptionError(f"{name} = {value!r} is not a {'whole ' if whole else ''}number")
    return value if whole else float(value)


def _breakers(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise OptionError(f"dry_sequence_breakers = {value!r} is not a list of texts")
    texts = tuple(value)
    if not all(isinstance(text, str) and text for text in texts):
        raise OptionError(f"dry_sequence_breakers = {list(texts)!r}: a sequence breaker must not be empty")
    return texts


def _sampler_names(value: Any) -> tuple[str, ...]:
    given = value.split(";") if isinstance(value, str) else value
    if not isinstance(given, Iterable):
        raise OptionError(f"samplers = {value!r} is not a list of names")
    names = []
    for item in given:
        name = str(item).strip().replace("-", "_")
        name = _SAMPLER_NAMES.get(name, name)
        if name and name not in SAMPLERS:
            raise OptionError(f"unknown sampler {str(item)!r} (known: {', '.join(SAMPLERS)})")
        names += [name] if name else []
    return tuple(names)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = list(value.items() if isinstance(value, Mapping) else value)
        biases = [(int(token), float(bias)) for token, bias in pairs]
    except (TypeError, ValueError):
        raise OptionError(f"logit_bias = {value!r} is not a map from token ids to numbers") from None
    for token, bias in biases:
        if token < 0 or math.isnan(bias) or bias > _LARGEST_BIAS:
            raise OptionError(
                f"logit_bias: token {token} with {bias} (a token is 0 or more, a bias at most {_LARGEST_BIAS:.3g})"
            )
    return tuple(sorted(dict(biases).items()))


def _schema(value: Any) -> str | None:
    if value is None:
        return None
    try:
        schema = json.loads(value) if isinstance(value, (str, bytes)) else value
        text = json.dumps(schema)
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"json_schema is not JSON: {error}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise OptionError("json_schema is not a JSON object")
    return text


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "dry_sequence_breakers": _breakers,
    "samplers": _sampler_names,
    "logit_bias": _biases,
    "json_schema": _schema,
}


class Sampler:
    """Draws the tokens of one text. The same seed, options, logits and history give the same tokens.

    options: how; tokenizer: needed for dry, ignore_eos, grammar and json_schema.
    constraint: what the text may be, in place of the options' grammar or json_schema.
    seed: the seed in use, also where the options asked for a random one.
    Raises OptionError for a grammar that is none, and where the tokenizer does not fit the options.
    """

    def __init__(
        self,
        options: SamplingOptions,
        tokenizer: Tokenizer | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.options = options
        self.seed = options.seed if options.seed >= 0 else secrets.randbits(32)
        # The raw stream of a bit generator is what NumPy promises to keep; its floating-point methods are not.
        self._bits = Philox(self.seed)
        self._surprise = 2 * options.mirostat_tau  # mirostat's limit, in bits
        biases = dict(options.logit_bias)
        if options.ignore_eos and tokenizer is not None:
            biases |= dict.fromkeys(tokenizer.end_ids, -math.inf)
        self._biased = np.array(list(biases), np.int64)
        self._biases = np.array(list(biases.values()), np.float32)
        if constraint is None and (options.grammar is not None or options.json_schema is not None):
            from edgemoe.text.grammar import Constraint, language

            if tokenizer is None:
                raise OptionError("a grammar needs a tokenizer")
            constraint = Constraint(tokenizer, language(options.grammar, options.json_schema))
        self._constraint = constraint
        self._steps = [] if options.mirostat else self._chain(tokenizer)
        # All that is left to do is to take the likeliest token.
        self._greedy = options.temperature <= 0 and "temperature" in options.samplers and len(self._steps) == 1

    @property
    def finished(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self._constraint is not None and self._constraint.finished

    def sample(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
        """The next token id, which then is part of the text.

        logits: float32 [vocab], not changed; -inf for a token that must not come.
        history: the tokens so far, prompt included, for the penalties.
        Raises EdgemoeError where the logits are no distribution (NaN, infinite, all -inf), OptionError where the
        grammar has failed.
        """
        logits = np.asarray(logits, dtype=np.float32)
        if len(self._biased):
            if self._biased.max() >= len(logits):
                raise OptionError(f"logit_bias: token {self._biased.max()}, but the vocabulary has {len(logits)}")
            logits = logits.copy()
            logits[self._biased] += self._biases
        before = self._surprise
        token = self._draw(logits, history)
        if self._constraint is not None:
            # As llama.cpp does: the grammar is asked about all tokens only where it refuses this one.
            if not self._constraint.allows(token):
                self._surprise = before
                token = self._draw(self._constraint.masked(logits), history)
            self._constraint.accept(token)
        return token

    def candidates(
        self, logits: NDArray[np.float32], history: Sequence[int] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(ids, logits float64) of the tokens that the draw chooses from after all steps."""
        left = Candidates(None, _checked(np.asarray(logits, dtype=np.float32)))
        for step in self._steps:
            left = step(left, history)
        tokens = np.arange(len(left)) if left.tokens is None else left.tokens
        return tokens, left.logits.astype(np.float64)

    def _chain(self, tokenizer: Tokenizer | None) -> list[_Step]:
        """The steps that do something with these options, in their order."""
        o = self.options
        greedy = o.temperature <= 0
        chain: dict[str, _Step] = {}
        if o.repeat_last_n and (o.repeat_penalty != 1 or o.presence_penalty or o.frequency_penalty):
            chain["penalties"] = lambda left, history: steps.penalties(
                left, _last(history, o.repeat_last_n), o.repeat_penalty, o.presence_penalty, o.frequency_penalty
            )
        if o.dry_multiplier and o.dry_base >= 1 and o.dry_penalty_last_n and "dry" in o.samplers:
            if tokenizer is None and o.dry_sequence_breakers:
                raise OptionError("dry_sequence_breakers need a tokenizer")
            breakers = {} if tokenizer is None else steps.dry_breakers(tokenizer, o.dry_sequence_breakers)
            chain["dry"] = lambda left, history: steps.dry(
                left,
                _last(history, o.dry_penalty_last_n),
                breakers,
                o.dry_multiplier,
                o.dry_base,
                o.dry_allowed_length,
            )
        if o.typical_p < 1:
            chain["typ_p"] = lambda left, _: steps.typical_p(left, o.typical_p)
        if o.xtc_probability > 0 and o.xtc_threshold <= 0.5:
            chain["xtc"] = self._xtc
        # These keep the likeliest token: nothing to do where it is all that is wanted.
        if not (greedy and "temperature" in o.samplers and not chain.keys() & {"typ_p", "xtc"}):
            chain["top_n_sigma"] = lambda left, _: steps.top_n_sigma(left, o.top_n_sigma)
            chain["top_k"] = lambda left, _: steps.top_k(left, o.top_k)
            chain["top_p"] = lambda left, _: steps.top_p(left, o.top_p)
            chain["min_p"] = lambda left, _: steps.min_p(left, o.min_p)
        chain["temperature"] = lambda left, _: steps.temperature(left, o.temperature)
        return [chain[name] for name in o.samplers if name in chain]

    def _xtc(self, left: Candidates, _: Sequence[int]) -> Candidates:
        if len(left) < 2 or self._uniform() > self.options.xtc_probability:
            return left
        return steps.xtc(left, self.options.xtc_threshold)

    def _draw(self, logits: NDArray[np.float32], history: Sequence[int]) -> int:
        if self.options.mirostat:
            return self._mirostat(logits)
        if self._greedy:
            return int(np.argmax(_checked(logits)))
        tokens, kept = self.candidates(logits, history)
        return int(tokens[self._pick(np.exp(kept - kept.max()))])

    def _mirostat(self, logits: NDArray[np.float32]) -> int:
        """A token whose surprise is near the target: the limit follows what came before."""
        options = self.options
        left = steps.temperature(Candidates(None, _checked(logits)), options.temperature)
        left = left.keep(np.flatnonzero(left.logits > -np.inf), left.sorted)
        assert left.tokens is not None
        weights = left.weights()
        if options.mirostat == 1:
            count = _zipf_count(weights, left, self._surprise, len(logits))
            chosen = steps.largest(left.logits, min(count, len(left)))
        else:
            with np.errstate(divide="ignore"):
                likely = np.flatnonzero(-np.log2(weights / weights.sum()) <= self._surprise)
            if not len(likely):
                likely = np.array([int(np.argmax(weights))])
            chosen = likely[steps.largest(left.logits[likely], len(likely))]
        weights = weights[chosen]
        picked = self._pick(weights)
        surprise = -math.log2(weights[picked] / weights.sum())
        self._surprise -= options.mirostat_eta * (surprise - options.mirostat_tau)
        return int(left.tokens[chosen[picked]])

    def _pick(self, weights: NDArray[np.float64]) -> int:
        """An index, drawn in proportion to the weights."""
        if len(weights) == 1:
            return 0
        cumulative = np.cumsum(weights)
        point = self._uniform() * cumulative[-1]
        # side="right" never lands on a token of weight zero; rounding could only lead past the end.
        return min(int(np.searchsorted(cumulative, point, side="right")), len(weights) - 1)

    def _uniform(self) -> float:
        return float((int(self._bits.random_raw()) >> 11) * 2.0**-53)


def _last(history: Sequence[int], count: int) -> Sequence[int]:
    """The last `count` tokens; all for -1."""
    return history if count < 0 else history[-count:]


def _checked(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    best = int(np.argmax(logits))  # the first NaN, if there is one
    if not math.isfinite(logits[best]):
        raise EdgemoeError(f"the model's logits are not usable: token {best} has {float(logits[best])}")
    return logits


def _zipf_count(weights: NDArray[np.float64], left: Candidates, surprise: float, vocabulary: int) -> int:
    """How many of the likeliest tokens mirostat 1 draws from: it takes the probabilities for a power of their rank,
    estimates the exponent from the likeliest ones, and computes where the surprise reaches its limit."""
    likeliest = weights[steps.largest(left.logits, min(_MIROSTAT_TOKENS, len(left)))]
    likeliest = likeliest[likeliest > 0]
    if len(likeliest) < 2:
        return 1
    ranks = np.arange(1, len(likeliest))
    distances, drops = np.log((ranks + 1) / ranks), np.log(likeliest[:-1] / likeliest[1:])
    exponent = float(distances @ drops / (distances @ distances))
    epsilon = exponent - 1
    with np.errstate(all="ignore"):
        base = np.float64(epsilon) * np.exp2(surprise) / (1 - np.float64(vocabulary) ** -epsilon)
        count = base ** (1 / np.float64(exponent))
    return vocabulary if count >= vocabulary or math.isnan(count) else max(int(count), 1)
