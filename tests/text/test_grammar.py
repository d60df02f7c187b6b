from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemoe.errors import EdgemoeError, OptionError
from edgemoe.text.grammar import Constraint, check_language, language, translate_gbnf
from edgemoe.text.sampling import Sampler, SamplingOptions
from edgemoe.text.tokenizer import Tokenizer


def accepts(tokenizer: Tokenizer, grammar: str | None, text: str, schema: str | None = None) -> bool:
    """Whether the text, a byte at a time, is all of a text in the language."""
    bytes_ = {tokenizer.spelling(token): token for token in range(tokenizer.vocab_size)}
    constraint = Constraint(tokenizer, language(grammar, schema))
    for byte in text.encode():
        token = bytes_[bytes([byte])]
        if not constraint.allows(token):
            return False
        constraint.accept(token)
    return constraint.finished or constraint.allows(tokenizer.end_ids[0])


ARITHMETIC = """\
# llama.cpp's own example, more or less
root  ::= (expr "=" ws term "\\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws   # digits
ws    ::= [ \\t\\n]*
"""


@pytest.mark.parametrize(
    ("grammar", "inside", "outside"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["", "y", "yesno"]),
        # What comes first does not take what comes next: GBNF has no longest match.
        ('root ::= [a-z]* "x"', ["x", "ax", "axx"], ["a", "xa"]),
        ('root ::= ("a" | "ab") "bc"', ["abc", "abbc"], ["ab"]),
        ('root ::= a b\na ::= [a-z]+\nb ::= "x" c?\nc ::= "(" root ")"', ["ax", "abcx(dx)", "axx"], ["x", "ax("]),
        (
            'root ::= "q"{2,3} "r"{0} "s"{2} [t]{1,}',
            ["qqsst", "qqqsstt"],
            ["qsst", "qqqqsst", "qqst", "qqss", "qqrsst"],
        ),
        ("root ::= [^a-c\\n]+", ["d", "é🙂"], ["a", "d\n"]),
        ("root ::= [^]{2} .", ["a\nb"], ["ab"]),
        ('root ::= [\\u00e9-\\u00ff\\x41\\U0001F642-] "\\"\\\\\\t\\]"', ['é"\\\t]', 'A"\\\t]', '-"\\\t]'], ["a"]),
        ('root ::=\n  "a" |\n  (\n "b"\n "c")\n\n', ["a", "bc"], ["b"]),
        ('root ::= "" | "a" root', ["", "aaa"], ["b"]),
        ('my-rule_2 ::= "a"\nroot ::= my-rule_2', ["a"], ["m"]),
        (ARITHMETIC, ["1+x = y\n", "(a*3)=4\n"], ["1+=2\n", "1=2"]),
        ('%llguidance {}\nstart: "a" | "b"', ["a", "b"], ["c"]),
        ('start: "a" other\nother: "b"', ["ab"], ["a"]),
    ],
)
def test_grammars(byte_level: Tokenizer, grammar: str, inside: list[str], outside: list[str]) -> None:
    check_language(language(grammar, None))
    for text in inside:
        assert accepts(byte_level, grammar, text), text
    for text in outside:
        assert not accepts(byte_level, grammar, text), text


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('x ::= "a"', "no rule 'root'"),
        ("root ::= y", "line 1: there is no rule 'y'"),
        ('root ::= "a"\n\nroot ::= "b"', "line 3: there are two rules 'root'"),
        ("root = a", "line 1: expected ::="),
        ("root ::= [a", "the line ends within"),
        ('root ::= "a', "the line ends within"),
        ("root ::= []", r"\[\] has no characters"),
        ("root ::= [z-a]", "is no range"),
        ('root ::= "\\q"', r"unknown escape \\q"),
        ('root ::= "\\u12"', "is no character"),
        ('root ::= "\\ud800"', "is no character"),
        ('root ::= ("a"', r"expected \)"),
        ('root ::= "a")', r"unexpected '\)'"),
        ('root ::= "a"{3,2}', r"\{3,2\} is no range"),
        ('root ::= "a"{x}', r"expected \{n\}"),
        ('root ::= "a"{99999999999999}', "is no range"),
        ('root ::= "a"\n| "b"', "line 2: expected the name of a rule"),
        ("root ::= " + "(" * 5000, "too many parentheses"),
        ("root ::= " + '"a" ' * 300_000, "the limit is"),
        ("start: foo", "foo"),
    ],
)
def test_broken_grammars(grammar: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"^grammar: .*{message}") as error:
        check_language(language(grammar, None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("schema", ['{"type": "thing"}', '{"not": {}}', '{"$ref": "#/nowhere"}', '{"type": 5}'])
def test_broken_schemas(byte_level: Tokenizer, schema: str) -> None:
    with pytest.raises(OptionError, match=r"^json_schema: ") as error:
        check_language(language(None, schema))
    assert "\n" not in str(error.value)
    with pytest.raises(OptionError, match=r"^json_schema: "):
        Sampler(SamplingOptions(json_schema=schema), byte_level)


def test_white_space_of_json_is_bounded(byte_level: Tokenizer) -> None:
    for text in ("{}", "{ }", '{"a": [1,\n  2]}', '"x"', "-1.5e3", "null"):
        assert accepts(byte_level, None, text, "{}"), text
    for text in ("{  }", "[1,\n\n2]", "{'a': 1}", "[1,]", "nul"):
        assert not accepts(byte_level, None, text, "{}"), text


def generate(tokenizer: Tokenizer, logits: NDArray[np.float32], seed: int, limit: int = 3000, **options: Any) -> str:
    """A text of random logits around these."""
    random = np.random.default_rng(seed)
    sampler = Sampler(SamplingOptions(seed=seed, **options), tokenizer)
    tokens: list[int] = []
    while len(tokens) < limit:
        noise = random.standard_normal(len(logits)).astype(np.float32)
        token = sampler.sample(logits + 3 * noise, tokens)
        if token in tokenizer.end_ids:
            break
        tokens.append(token)
        if sampler.finished:
            break
    return tokenizer.decode(tokens)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,5}$"}, "minItems": 1, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "kind", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "options"), [(50, {}), (10, {"temperature": 0}), (10, {"mirostat": 1}), (10, {"mirostat": 2})]
)
def test_fifty_seeds_give_json_of_the_schema(byte_level: Tokenizer, seeds: int, options: dict[str, Any]) -> None:
    # More logits than tokens, as models with a padded vocabulary have; numbers should not go on for ever.
    logits = np.zeros(byte_level.vocab_size + 20, np.float32)
    logits[[token for token in range(byte_level.vocab_size) if byte_level.spelling(token)[:1] in b'",}]\n']] = 3
    for seed in range(seeds):
        value = json.loads(generate(byte_level, logits, seed, json_schema=SCHEMA, **options))
        assert list(value) == ["name", "kind", "age", "tags", "home"]
        assert len(value["name"]) <= 12 and value["kind"] in ("cat", "dog") and 0 <= value["age"] <= 30
        assert 1 <= len(value["tags"]) <= 3 and all(tag.isalpha() and len(tag) <= 5 for tag in value["tags"])
        assert value["home"] is None or isinstance(value["home"]["x"], (int, float))


@pytest.mark.slow
def test_fifty_seeds_give_any_json(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece):
        logits = np.zeros(tokenizer.vocab_size, np.float32)
        logits[[token for token in range(tokenizer.vocab_size) if tokenizer.spelling(token)[:1] in b'"}]']] = 7
        logits[list(tokenizer.end_ids)] = 7
        for seed in range(50):
            json.loads(generate(tokenizer, logits, seed, json_schema="{}"))


def test_a_grammar_in_gbnf_gives_texts_of_it(byte_level: Tokenizer) -> None:
    logits = np.zeros(byte_level.vocab_size, np.float32)
    grammar = 'root ::= "(" [a-c]{1,4} (", " [a-c]{1,4}){0,2} ")"'
    texts = {generate(byte_level, logits, seed, grammar=grammar) for seed in range(20)}
    assert len(texts) > 10
    for text in texts:
        assert text[0] == "(" and text[-1] == ")" and {*text[1:-1].replace(", ", "")} <= {*"abc"}


def test_likely_text_is_left_alone(byte_level: Tokenizer) -> None:
    """The grammar has a say only where it refuses: the draws are those without one."""
    words = byte_level.encode("the cat")
    free = Sampler(SamplingOptions(seed=4, top_k=2), byte_level)
    bound = Sampler(SamplingOptions(seed=4, top_k=2, grammar="root ::= [a-z ]+"), byte_level)
    logits = np.zeros(byte_level.vocab_size, np.float32)
    logits[words] = 5
    assert [free.sample(logits) for _ in range(20)] == [bound.sample(logits) for _ in range(20)]


def test_what_a_grammar_cannot_do(byte_level: Tokenizer, wordpiece: Tokenizer) -> None:
    options = SamplingOptions(grammar='root ::= "a"', logit_bias=((byte_level.encode("a")[0], -np.inf),))
    with pytest.raises(EdgemoeError, match="the grammar allows no token here"):
        Sampler(options, byte_level).sample(np.zeros(byte_level.vocab_size, np.float32))
    with pytest.raises(OptionError, match="not possible with this kind of tokenizer"):
        Sampler(options, wordpiece)
    with pytest.raises(OptionError, match="needs a tokenizer"):
        Sampler(options)


def test_a_constraint_of_ones_own(byte_level: Tokenizer) -> None:
    a, b = (byte_level.encode(text)[0] for text in "ab")
    sampler = Sampler(
        SamplingOptions(temperature=0), byte_level, Constraint(byte_level, language('root ::= "a"', None))
    )
    logits = np.zeros(byte_level.vocab_size, np.float32)
    logits[b] = 1
    assert sampler.sample(logits) == a and sampler.finished


def test_translation() -> None:
    assert translate_gbnf('root ::= "a" x*\nx ::= [b-d]') == "start: (/[\\u{61}]/) r1*\nr1: /[\\u{62}-\\u{64}]/\n"
