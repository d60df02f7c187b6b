from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Philox
from numpy.typing import NDArray

from edgemoe.errors import EdgemoeError, OptionError
from edgemoe.text.samplers import dry_breakers, largest
from edgemoe.text.sampling import SAMPLERS, Sampler, SamplingOptions
from edgemoe.text.tokenizer import Tokenizer

# -- llama.cpp's samplers once more, one token at a time ----------------------------------------------------------

Pairs = list[tuple[int, float]]  # (token, logit)


def ordered(pairs: Pairs) -> Pairs:
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def probabilities(pairs: Pairs) -> list[float]:
    peak = max(logit for _, logit in pairs)
    weights = [math.exp(logit - peak) for _, logit in pairs]
    total = sum(weights)
    return [weight / total for weight in weights]


def reference_penalties(pairs: Pairs, o: SamplingOptions, history: Sequence[int]) -> Pairs:
    recent = [] if o.repeat_last_n == 0 else list(history if o.repeat_last_n < 0 else history[-o.repeat_last_n :])
    result = []
    for token, value in pairs:
        logit, count = np.float32(value), recent.count(token)
        if count:
            logit = logit * np.float32(o.repeat_penalty) if logit <= 0 else logit / np.float32(o.repeat_penalty)
            logit -= np.float32(count) * np.float32(o.frequency_penalty) + np.float32(o.presence_penalty)
        result.append((token, float(logit)))
    return result


def reference_dry(pairs: Pairs, o: SamplingOptions, history: Sequence[int]) -> Pairs:
    recent = list(history if o.dry_penalty_last_n < 0 else history[len(history) - o.dry_penalty_last_n :])
    if o.dry_multiplier == 0 or o.dry_base < 1 or o.dry_penalty_last_n == 0 or len(recent) <= o.dry_allowed_length:
        return pairs
    lengths: dict[int, int] = {}
    for end in range(len(recent) - 1):
        length = 0
        while length <= end and recent[end - length] == recent[len(recent) - 1 - length]:
            length += 1
        if length >= o.dry_allowed_length:
            lengths[recent[end + 1]] = max(lengths.get(recent[end + 1], 0), length)
    return [
        (token, logit - o.dry_multiplier * o.dry_base ** (lengths[token] - o.dry_allowed_length))
        if token in lengths
        else (token, logit)
        for token, logit in pairs
    ]


def reference_top_n_sigma(pairs: Pairs, o: SamplingOptions, _: Sequence[int]) -> Pairs:
    if o.top_n_sigma <= 0 or len(pairs) <= 1:
        return pairs
    logits = [logit for _, logit in pairs]
    mean = sum(logits) / len(logits)
    deviation = math.sqrt(sum((logit - mean) ** 2 for logit in logits) / len(logits))
    return ordered([pair for pair in pairs if pair[1] >= max(logits) - o.top_n_sigma * deviation])


def reference_top_k(pairs: Pairs, o: SamplingOptions, _: Sequence[int]) -> Pairs:
    return ordered(pairs)[: o.top_k] if o.top_k > 0 else pairs


def reference_typ_p(pairs: Pairs, o: SamplingOptions, _: Sequence[int]) -> Pairs:
    if o.typical_p >= 1:
        return pairs
    pairs = ordered(pairs)
    p = probabilities(pairs)
    entropy = -sum(value * math.log(value) for value in p if value)
    order = sorted(range(len(p)), key=lambda i: abs(-math.log(max(p[i], 1e-300)) - entropy))
    kept, total = [], 0.0
    for i in order:
        kept.append(pairs[i])
        total += p[i]
        if total > o.typical_p:
            break
    return kept


def reference_top_p(pairs: Pairs, o: SamplingOptions, _: Sequence[int]) -> Pairs:
    if o.top_p >= 1:
        return pairs
    pairs, kept, total = ordered(pairs), [], 0.0
    for pair, p in zip(pairs, probabilities(pairs), strict=True):
        kept.append(pair)
        total += p
        if total >= o.top_p:
            break
    return kept


def reference_min_p(pairs: Pairs, o: SamplingOptions, _: Sequence[int]) -> Pairs:
    if o.min_p <= 0:
        return pairs
    peak = max(logit for _, logit in pairs)
    return [pair for pair in pairs if pair[1] >= peak + math.log(o.min_p) - 1e-9]


def reference_xtc(pairs: Pairs, o: SamplingOptions, _: Sequence[int]) -> Pairs:
    """For a probability of 0 or 1, which leave nothing to chance."""
    if o.xtc_probability == 0 or o.xtc_threshold > 0.5 or len(pairs) < 2:
        return pairs
    pairs = ordered(pairs)
    last = -1
    for p in probabilities(pairs):
        if p < o.xtc_threshold:
            break
        last += 1
    return pairs[max(last, 0) :]


def reference_temperature(pairs: Pairs, o: SamplingOptions, _: Sequence[int]) -> Pairs:
    if o.temperature <= 0:
        return ordered(pairs)[:1]
    return [(token, logit / o.temperature) for token, logit in pairs]


def reference(logits: NDArray[np.float32], o: SamplingOptions, history: Sequence[int]) -> Pairs:
    pairs: Pairs = [(token, float(logit)) for token, logit in enumerate(logits)]
    for name in o.samplers:
        pairs = globals()[f"reference_{name}"](pairs, o, history)
    return ordered(pairs)


OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, -1.0, 0.3, 0.8, 2.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 10, 40, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.951, 1.0]),
    min_p=st.sampled_from([0.0, 0.0511, 0.3, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.5, 0.93]),
    top_n_sigma=st.sampled_from([-1.0, -1.0, 1.0, 2.5]),
    xtc_probability=st.sampled_from([0.0, 1.0]),
    xtc_threshold=st.sampled_from([0.01, 0.1, 0.6]),
    repeat_penalty=st.sampled_from([1.0, 1.1, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -0.3]),
    frequency_penalty=st.sampled_from([0.0, 0.25]),
    repeat_last_n=st.sampled_from([-1, 0, 1, 4]),
    dry_multiplier=st.sampled_from([0.0, 0.8]),
    dry_base=st.sampled_from([1.75, 1.0, 0.5]),
    dry_allowed_length=st.integers(0, 3),
    dry_penalty_last_n=st.sampled_from([-1, 0, 5, 12]),
    dry_sequence_breakers=st.just(()),
    samplers=st.one_of(st.just(SAMPLERS), st.permutations(SAMPLERS), st.lists(st.sampled_from(SAMPLERS), max_size=4)),
    seed=st.integers(0, 100),
)


@pytest.mark.slow
@settings(deadline=None)
@given(options=OPTIONS, size=st.sampled_from([1, 7, 300, 3000]), seed=st.integers(0, 1000), spread=st.floats(0.5, 8))
def test_every_chain_is_llama_cpps(options: SamplingOptions, size: int, seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(size) * spread).astype(np.float32)
    history = random.integers(0, min(size, 3), 30).tolist()  # few tokens, so that they repeat
    expected = reference(logits, options, history)
    tokens, values = Sampler(options).candidates(logits, history)
    got = sorted(zip(tokens.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    if options.temperature <= 0 and "temperature" in options.samplers:
        assert len(got) >= 1 and got[0][0] == expected[0][0]
        return
    assert sorted(token for token, _ in got) == sorted(token for token, _ in expected)
    assert np.allclose([value for _, value in got], [value for _, value in expected], rtol=1e-5, atol=1e-5)


@given(size=st.integers(1, 3000), count=st.integers(1, 300), levels=st.integers(1, 50), seed=st.integers(0, 99))
def test_largest_with_many_equal_ones(size: int, count: int, levels: int, seed: int) -> None:
    logits = np.random.default_rng(seed).integers(0, levels, size).astype(np.float32)
    count = min(count, size)
    assert largest(logits, count).tolist() == np.argsort(-logits, kind="stable")[:count].tolist()


@pytest.mark.slow
def test_draws_follow_the_probabilities() -> None:
    logits = np.array([1.0, 3.0, 2.0, -1.0, 2.5, 0.0], np.float32)
    options = SamplingOptions(temperature=0.7, top_k=5, top_p=0.99, min_p=0.01, seed=3)
    sampler, draws = Sampler(options), 20_000
    counts = Counter(sampler.sample(logits) for _ in range(draws))
    pairs = reference(logits, options, [])
    expected = {token: p for (token, _), p in zip(pairs, probabilities(pairs), strict=True)}
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[token] / draws - probability) < 5 * deviation


def test_a_seed_fixes_the_draws() -> None:
    logits = np.random.default_rng(0).standard_normal(5000).astype(np.float32)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(seed=seed))
        return [sampler.sample(logits) for _ in range(30)]

    assert draws(1) == draws(1) != draws(2)
    # These must not change from one version to the next.
    sampler = Sampler(SamplingOptions(seed=42, top_k=0, top_p=1, min_p=0, temperature=1))
    assert [sampler.sample(np.zeros(1000, np.float32)) for _ in range(4)] == [86, 141, 270, 874]
    a, b = Sampler(SamplingOptions()), Sampler(SamplingOptions())
    assert a.seed != b.seed
    assert Sampler(SamplingOptions(seed=(1 << 64) - 1)).sample(logits) >= 0


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy_takes_the_lowest_of_equals(temperature: float) -> None:
    logits = np.array([0, 5, 1, 5], np.float32)
    assert Sampler(SamplingOptions(temperature=temperature)).sample(logits) == 1
    # The penalty comes first.
    assert Sampler(SamplingOptions(temperature=temperature, repeat_penalty=1.5)).sample(logits, [1]) == 3
    assert Sampler(SamplingOptions(temperature=temperature, mirostat=2)).sample(logits) == 1


def test_the_order_of_the_samplers_matters() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)

    def kept(*samplers: str) -> list[int]:
        options = SamplingOptions(samplers=samplers, top_k=3, top_p=0.94, temperature=3, min_p=0.55)
        return sorted(Sampler(options).candidates(logits)[0].tolist())

    assert kept("top_k", "top_p") == [0, 1, 2]
    assert kept("min_p") == kept("min_p", "temperature") == [0, 1]
    assert kept("temperature", "min_p") == [0, 1, 2]
    assert kept() == [0, 1, 2, 3]


def test_sampler_names() -> None:
    assert SamplingOptions(samplers="top-k; temp;nucleus;typical;").samplers == (  # type: ignore[arg-type]
        *("top_k", "temperature", "top_p", "typ_p"),
    )
    assert SamplingOptions(samplers=["min_p"]).samplers == ("min_p",)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown sampler 'magic'"):
        SamplingOptions(samplers="top_k;magic")  # type: ignore[arg-type]


def test_xtc_happens_as_often_as_asked() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2])).astype(np.float32)
    options = SamplingOptions(samplers=("xtc",), xtc_probability=0.3, xtc_threshold=0.25, seed=5)
    sampler = Sampler(options)
    sizes = Counter(len(sampler.candidates(logits)[0]) for _ in range(5000))
    assert set(sizes) == {2, 3} and abs(sizes[2] / 5000 - 0.3) < 0.03


def test_dry_stops_at_breakers(byte_level: Tokenizer) -> None:
    encode = byte_level.encode
    options = SamplingOptions(dry_multiplier=1.0, samplers=("dry",), dry_sequence_breakers=("\n",))
    logits = np.zeros(byte_level.vocab_size, np.float32)

    def penalized(text: str, options: SamplingOptions = options) -> dict[int, float]:
        values = Sampler(options, byte_level).candidates(logits, encode(text))[1]
        return {token: round(-float(values[token]), 4) for token in np.flatnonzero(values).tolist()}

    z, q = encode("z")[0], encode("q")[0]
    assert penalized("xyvz xyv") == {z: 1.75}
    assert penalized("kxyvz kxyv") == {z: 1.75**2}
    assert penalized("kxyvz k\nxyv") == {z: 1.75}  # no further back than the line's begin
    assert penalized("xyvz x\nv") == {}
    assert penalized("xyvz vq xyv", dataclasses.replace(options, dry_penalty_last_n=6)) == {}
    assert penalized("xyvz xyvq xyv") == {z: 1.75, q: 1.75**2}
    # A breaker itself is never made less likely, and one may be several tokens long.
    assert penalized("xyv\n xyv") == {}
    long = dataclasses.replace(options, dry_sequence_breakers=("\n\n",))
    assert penalized("kxyvz k\nxyv", long) == {z: 1.75} and penalized("xyvz xy\n\nv", long) == {}
    found = dry_breakers(byte_level, ("\n\n",))
    assert {byte_level.spelling(token)[-1:] for token, tails in found.items() if () not in tails} == {b"\n"}


def test_dry_is_fast_in_a_long_repetition() -> None:
    sampler = Sampler(SamplingOptions(dry_multiplier=0.8, dry_sequence_breakers=(), seed=0))
    begin = time.process_time()
    sampler.candidates(np.zeros(100, np.float32), [7] * 50_000)
    assert time.process_time() - begin < 20


# -- mirostat -----------------------------------------------------------------------------------------------------


def reference_mirostat(logits: NDArray[np.float32], options: SamplingOptions, steps: int) -> list[int]:
    """Draws with the numbers that a Sampler draws with."""
    bits, limit, tokens = Philox(options.seed), 2 * options.mirostat_tau, []
    pairs = ordered([(token, float(logit) / options.temperature) for token, logit in enumerate(logits)])
    p = probabilities(pairs)
    for _ in range(steps):
        if options.mirostat == 1:
            shape = above = 0.0
            for i in range(min(99, len(p) - 1)):
                step = math.log((i + 2) / (i + 1))
                above += step * math.log(p[i] / p[i + 1])
                shape += step * step
            exponent = above / shape
            epsilon = exponent - 1
            count = ((epsilon * 2**limit) / (1 - len(p) ** -epsilon)) ** (1 / exponent)
            size = max(min(int(count), len(p)), 1)
        else:
            size = max(sum(-math.log2(value) <= limit for value in p), 1)
        total = sum(p[:size])
        kept = [value / total for value in p[:size]]
        index = 0
        if size > 1:
            point = float((int(bits.random_raw()) >> 11) * 2.0**-53)
            while sum(kept[: index + 1]) <= point:
                index += 1
        tokens.append(pairs[index][0])
        limit -= options.mirostat_eta * (-math.log2(kept[index]) - options.mirostat_tau)
    return tokens


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("tau", [2.0, 5.0])
def test_mirostat(version: int, temperature: float, tau: float) -> None:
    logits = (np.random.default_rng(version).standard_normal(400) * 2.5).astype(np.float32)
    # What limits the choice otherwise does nothing here.
    options = SamplingOptions(
        mirostat=version, mirostat_tau=tau, mirostat_eta=0.2, temperature=temperature, top_k=1, seed=9
    )
    sampler = Sampler(options)
    assert [sampler.sample(logits) for _ in range(100)] == reference_mirostat(logits, options, 100)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_with_few_tokens(version: int) -> None:
    sampler = Sampler(SamplingOptions(mirostat=version, seed=1))
    one = np.array([-np.inf, 1, -np.inf], np.float32)
    assert [sampler.sample(one) for _ in range(3)] == [1, 1, 1]
    assert {sampler.sample(np.zeros(3, np.float32)) for _ in range(60)} <= {0, 1, 2}
    assert sampler.sample(np.zeros(1, np.float32)) == 0


# -- biases, masks, extremes ----------------------------------------------------------------------------------------


def test_logit_bias(byte_level: Tokenizer) -> None:
    logits = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    greedy = {"temperature": 0}
    assert Sampler(SamplingOptions(logit_bias={0: -math.inf}, **greedy)).sample(logits) == 1  # type: ignore[arg-type]
    assert Sampler(SamplingOptions(logit_bias=[(3, 5.5)], **greedy)).sample(logits) == 3  # type: ignore[arg-type]
    assert Sampler(SamplingOptions(logit_bias={"2": 5}, mirostat=2, **greedy)).sample(logits) == 2  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="token 4, but the vocabulary has 4"):
        Sampler(SamplingOptions(logit_bias={4: 1})).sample(logits)  # type: ignore[arg-type]
    ends = set(byte_level.end_ids)
    assert ends
    most = np.zeros(byte_level.vocab_size, np.float32)
    most[list(ends)] = 10
    assert Sampler(SamplingOptions(**greedy), byte_level).sample(most) in ends  # type: ignore[arg-type]
    assert Sampler(SamplingOptions(ignore_eos=True, **greedy), byte_level).sample(most) not in ends  # type: ignore[arg-type]


def test_logits_are_not_changed() -> None:
    logits = np.arange(50, dtype=np.float32)
    logits.flags.writeable = False
    options = SamplingOptions(repeat_penalty=2.0, dry_multiplier=1, dry_sequence_breakers=(), logit_bias=((1, 1.0),))
    Sampler(options).sample(logits, [49, 48, 49, 48, 49, 48])


def test_masked_tokens_never_come() -> None:
    logits = np.full(2000, -np.inf, np.float32)
    logits[[7, 1200]] = 1.0, 1.5
    for changes in (
        *({}, {"top_k": 40}, {"top_p": 0.95}, {"top_k": 40, "top_p": 0.95}, {"typical_p": 0.9999}),
        *({"top_n_sigma": 5.0}, {"mirostat": 1}, {"mirostat": 2}),
    ):
        options = {"temperature": 5, "top_k": 0, "top_p": 1.0, "min_p": 0, "seed": 1, **changes}
        sampler = Sampler(SamplingOptions(**options))  # type: ignore[arg-type]
        assert {sampler.sample(logits) for _ in range(50)} == {7, 1200}, changes


def test_extreme_temperatures() -> None:
    logits = np.array([1.0, 2.0, 1.999], np.float32)
    assert Sampler(SamplingOptions(temperature=1e-300, seed=0)).sample(logits) == 1
    assert Sampler(SamplingOptions(temperature=5e-324, seed=0)).sample(logits) == 1
    assert Sampler(SamplingOptions(temperature=1e300, seed=0)).sample(logits) in (0, 1, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mirostat", [0, 1, 2])
def test_unusable_logits(value: float, mirostat: int) -> None:
    logits = np.zeros(10, np.float32)
    logits[3] = value
    if value == -math.inf:
        logits[:] = value
    for temperature in (0, 0.8):
        with pytest.raises(EdgemoeError, match="not usable"):
            Sampler(SamplingOptions(temperature=temperature, mirostat=mirostat)).sample(logits)


# -- options --------------------------------------------------------------------------------------------------------


def test_defaults_are_llama_cpps() -> None:
    assert dataclasses.asdict(SamplingOptions()) == {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "xtc_probability": 0.0,
        "xtc_threshold": 0.1,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repeat_last_n": 64,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": -1,
        "dry_sequence_breakers": ("\n", ":", '"', "*"),
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
        "samplers": ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"),
        "logit_bias": (),
        "ignore_eos": False,
        "grammar": None,
        "json_schema": None,
        "seed": -1,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("min_p", 2),
        ("typical_p", -1),
        ("top_n_sigma", math.nan),
        ("xtc_probability", 1.5),
        ("xtc_threshold", -0.5),
        ("repeat_penalty", 0),
        ("repeat_penalty", math.inf),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("repeat_last_n", -2),
        ("dry_multiplier", math.nan),
        ("dry_base", -1),
        ("dry_allowed_length", -1),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", "abc"),
        ("dry_sequence_breakers", ["a", ""]),
        ("dry_sequence_breakers", 5),
        ("mirostat", 3),
        ("mirostat_tau", -1),
        ("mirostat_eta", math.nan),
        ("samplers", 7),
        ("logit_bias", 5),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("ignore_eos", 1),
        ("grammar", " "),
        ("grammar", 5),
        ("json_schema", "{"),
        ("json_schema", "5"),
        ("json_schema", object()),
        ("seed", -2),
        ("seed", 1 << 64),
    ],
)
def test_nonsense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name) as error:
        SamplingOptions(**{name: value})
    assert "\n" not in str(error.value)


def test_numpy_numbers_and_whole_numbers_are_numbers() -> None:
    options = SamplingOptions(temperature=1, top_k=np.int64(5), top_p=np.float64(0.5))  # type: ignore[arg-type]
    assert (options.temperature, options.top_k, options.top_p) == (1.0, 5, 0.5)


def test_precedence() -> None:
    generation = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": 3, "min_p": None}
    merged = SamplingOptions.merged({"top_k": 5, "temperature": None}, generation)
    assert merged == SamplingOptions(temperature=0.6, top_k=5, repeat_penalty=1.05)
    assert SamplingOptions.merged({}, {"do_sample": False, "temperature": 0.6}).temperature == 0
    assert SamplingOptions.merged({"temperature": 0.5}, {"do_sample": False}).temperature == 0.5
    # A model's file has a say in numbers only.
    assert SamplingOptions.merged({}, {"seed": 7, "grammar": "x", "logit_bias": {1: 1}, "mirostat": 2}) == (
        SamplingOptions()
    )


def test_bad_model_defaults_are_named_and_can_be_overridden() -> None:
    with pytest.raises(OptionError, match="generation defaults: temperature = 'hot'"):
        SamplingOptions.merged({}, {"temperature": "hot"})
    assert SamplingOptions.merged({"temperature": 1}, {"temperature": "hot"}).temperature == 1
    with pytest.raises(OptionError, match="unknown sampling option 'temp'"):
        SamplingOptions.merged({"temp": 1}, {})


EXTREMES = {
    "temperature": [0, 1e-320, 1e-40, 1, 1e300],
    "repeat_penalty": [1, 1e-320, 1e-40, 1e300],
    "presence_penalty": [0, 1e-320, 3e38, -3e38, 1e300, -1e300],
    "frequency_penalty": [0, 1e-320, 3e38, -3e38, 1e300, -1e300],
    "top_k": [0, 1, 40],
    "top_p": [0, 1e-320, 0.5, 1],
    "min_p": [0, 1e-320, 1],
    "typical_p": [0, 0.5, 1],
    "top_n_sigma": [-1, 1e-320, 1, 1e300],
    "xtc_probability": [0, 1],
    "xtc_threshold": [0, 0.1],
    "dry_multiplier": [0, 1e300],
    "dry_base": [1, 1e300],
    "mirostat": [0, 0, 0, 1, 2],
    "mirostat_tau": [0, 5, 1e300],
    "mirostat_eta": [0.1, 1e300],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_extreme_options_give_a_token_or_an_error_of_the_options() -> None:
    random = np.random.default_rng(1)
    drawn = 0
    for _ in range(2000):
        options: dict[str, Any] = {
            name: values[random.integers(len(values))] for name, values in EXTREMES.items() if random.random() < 0.5
        }
        samplers = tuple(random.permutation(SAMPLERS).tolist())
        logits = (10 * random.standard_normal(50)).astype(np.float32)
        logits[random.integers(0, 50, 20)] = -np.inf
        history = [1, 2, 3, 1, 2, 3, 1, 2]
        try:
            sampler = Sampler(SamplingOptions(**options, samplers=samplers, seed=1))
            for _ in range(3):
                history.append(sampler.sample(logits, history))
                assert logits[history[-1]] > -np.inf, (options, samplers)
                drawn += 1
        except OptionError:
            pass
    assert drawn > 1000
