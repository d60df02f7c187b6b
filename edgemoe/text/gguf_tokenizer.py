"""The tokenizer inside a GGUF file, built from its metadata as an object of the `tokenizers` library.

Two kinds of vocabulary are known, by `tokenizer.ggml.model`: byte-level BPE ("gpt2"), whose text is first cut into
words by the pre-tokenizer that `tokenizer.ggml.pre` names, and SentencePiece ("llama"; "gemma4" with explicit merges),
which works on characters with a sign for the space and falls back to bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from edgemoe.errors import SourceError, TokenizerError, quote
from edgemoe.text.tokenizer import Tokenizer

SPACE = "\u2581"
"""What stands for a space in a SentencePiece vocabulary."""

MAX_TOKENS = 1 << 20
MAX_MERGES = 1 << 20
"""Gemma, whose vocabularies are the largest, has 262 144 tokens and 580 604 merges."""
MAX_TOKEN_LENGTH = 1 << 10
"""Characters of one token."""
MAX_CUTS = 8 << 20
"""Ways to make tokens from two parts that are looked at where a file has scores instead of merges."""

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# -- pre-tokenizers -----------------------------------------------------------------------------------------------

# English contractions, in both cases by hand: a case-insensitive group would also fold signs such as the long s.
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HANGUL_AND_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def _words(
    digits: str,
    *,
    contraction: str = _CONTRACTION + "|",
    letters: str = r"\p{L}+",
    symbols: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    breaks: str = r"\s*[\r\n]+",
    spaces: str = r"\s+(?!\S)|\s+",
) -> str:
    """The form that GPT-4's pre-tokenizer has and most others follow."""
    return rf"{contraction}[^\r\n\p{{L}}\p{{N}}]?{letters}|\p{{N}}{digits}|{symbols}|{breaks}|{spaces}"


def _cased_words(digits: str, upper: str, lower: str, contraction: str, symbols: str) -> str:
    """The form that GPT-4o's has: a word is capitals, then small letters, then a contraction."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{upper}*{lower}+{contraction}|{start}{upper}+{lower}*{contraction}"
        rf"|\p{{N}}{digits}|{symbols}|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SYMBOLS_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGIT_THEN_GPT2 = (r"\p{N}", *_GPT2)
_LLAMA3 = (_words("{1,3}"),)
_QWEN2 = (_words(""),)
_GPT4O = (_cased_words("{1,3}", _UPPER, _LOWER, _CONTRACTION + "?", _SYMBOLS_AND_SLASH),)
_DEEPSEEK3_WORDS = (
    _ASCII_PUNCTUATION
    + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (r"\p{N}{1,3}", _CJK, _DEEPSEEK3_WORDS)
# Groups of three counted from the end: 1 234 567.
_DIGITS_FROM_THE_END = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
# DeepSeek-LLM lists the letters of the scripts with upper and lower case instead of naming the property.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
# Scripts that AFMoE keeps apart: Han, kana, Thai, Lao, Khmer, Myanmar, Hangul.
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _CJK
)


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """patterns: applied one after the other, each to the pieces the one before left; what a pattern matches becomes a
    piece of its own. whole_words: a piece that is in the vocabulary is one token, whatever the merges say. add_bos: a
    text begins with BOS unless the file says otherwise."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {}


def _define(names: str, patterns: Iterable[str], *, whole_words: bool = False, add_bos: bool = False) -> None:
    for name in names.split():
        _PRE_TOKENIZERS[name] = _PreTokenizer(tuple(patterns), whole_words, add_bos)


_define("default", (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_define("gpt-2 phi-2 olmo mpt jais trillion granite-docling gigachat a.x-4.0 mellum exaone4", _GPT2)
_define("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _DIGIT_THEN_GPT2)
_define("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", _LLAMA3, whole_words=True, add_bos=True)
_define("dbrx smaug-bpe glm4 chatglm-bpe", _LLAMA3)
_define("qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open grok-2 kormo", _QWEN2)
_define("qwen35", (_words("", letters=r"[\p{L}\p{M}]+", symbols=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),))
_define("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3)
_define("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HANGUL_AND_HAN, r"\p{N}"))
_define(
    "deepseek-llm",
    (
        r"[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _HANGUL_AND_HAN,
        r"\p{N}+",
    ),
)
_define("gpt-4o llama4 kanana2 minimax-m2", _GPT4O)
_define("tiny_aya cohere2moe", (r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O))
_define("tekken", (_cased_words("", _UPPER, _LOWER, "", _SYMBOLS_AND_SLASH),), whole_words=True, add_bos=True)
_define(
    "youtu",
    (_YOUTU_SCRIPTS, _cased_words("", _UPPER, _LOWER, _CONTRACTION + "?", _SYMBOLS_AND_SLASH)),
    whole_words=True,
)
_define(
    "kimi-k2",
    (
        r"\p{Han}+",
        _cased_words(
            "{1,3}",
            r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
            _CONTRACTION + "?",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        ),
    ),
)
_define("bailingmoe bailingmoe2 llada-moe", (_words("", breaks=r"\s*[\r\n]"),))
_define("seed-coder", (_words("", symbols=r" ?[^\s\p{L}\p{N}\r\n]+"),))
_define("afmoe", (_DIGITS_FROM_THE_END, _AFMOE_SCRIPTS, _DEEPSEEK3_WORDS))
_define("laguna", (r"[^\n]+|[\n]+", *_QWEN2))
_define(
    "exaone-moe",
    (
        _words(
            "",
            letters=r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
            symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
            breaks=r"\s*[\r\n]",
        ),
    ),
)
_define("minicpm5", (r"\p{N}{1,3}", _words("+")), whole_words=True)
_SENTENCEPIECE_BPE = {"gemma4", "sarvam-moe"}

# Tokens that end a generation by their text, whether or not the file declares them so.
_END_OF_GENERATION = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
)
# The frame of gpt-oss's answers: text that the program reads, not to be hidden as other control tokens are.
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>")


def pre_tokenizer_names() -> list[str]:
    """The known values of `tokenizer.ggml.pre`, sorted."""
    return sorted({*_PRE_TOKENIZERS, *_SENTENCEPIECE_BPE})


# -- reading the metadata -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The facts of the metadata, checked.

    backend: the tokenizer itself. bos_ids, eos_ids: as in `Tokenizer`. special_names: "bos_token" etc. -> text.
    add_bos: whether a text begins with BOS. chat_template: its source, or None.
    """

    backend: tokenizers.Tokenizer
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    special_names: dict[str, str]
    add_bos: bool
    chat_template: str | None


def tokenizer_from_gguf(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata (`GgufModel.metadata`); `name` is what messages call it.

    Raises TokenizerError for a kind of vocabulary or a pre-tokenizer that is not known, and for one that is broken.
    """
    vocabulary = read_vocabulary(metadata, name)
    config = {**vocabulary.special_names, "add_bos_token": vocabulary.add_bos}
    generation = {"bos_token_ids": list(vocabulary.bos_ids), "eos_token_ids": list(vocabulary.eos_ids)}
    return Tokenizer(vocabulary.backend, config, generation, vocabulary.chat_template, name)


def tokenizer_files(metadata: Mapping[str, Any], name: str) -> dict[str, bytes]:
    """The same as the files of a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja (where
    there is one). The ids that end a generation are not in them: `read_special_ids`."""
    vocabulary = read_vocabulary(metadata, name)
    config = {**vocabulary.special_names, "add_bos_token": vocabulary.add_bos}
    files = {
        "tokenizer.json": vocabulary.backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode(),
    }
    if vocabulary.chat_template is not None:
        files["chat_template.jinja"] = vocabulary.chat_template.encode()
    return files


def read_vocabulary(metadata: Mapping[str, Any], name: str) -> GgufVocabulary:
    """Raises TokenizerError."""
    try:
        return _Reader(metadata, name).vocabulary()
    except SourceError as error:  # a string that is not UTF-8
        raise TokenizerError(str(error)) from None


def read_special_ids(metadata: Mapping[str, Any], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`bos_ids` and `eos_ids` alone, without building the tokenizer. Raises TokenizerError."""
    try:
        return _Reader(metadata, name).special_ids()
    except SourceError as error:
        raise TokenizerError(str(error)) from None


class _Reader:
    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self._metadata = metadata
        self._name = name

    def special_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ids that begin a text, ids that end a generation)."""
        return self._special_ids({token: number for number, token in enumerate(self._tokens())})

    def vocabulary(self) -> GgufVocabulary:
        tokens = self._tokens()
        ids = {token: number for number, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            number, token = next((i, token) for i, token in enumerate(tokens) if ids[token] != i)
            raise self._error(f"tokenizer.ggml.tokens[{number}] = {quote(token)} appears twice")
        bos_ids, eos_ids = self._special_ids(ids)
        pre, unknown = self._pre(), self._special("unknown", len(tokens))
        add_bos = True
        if self._model() == "llama":
            backend = self._sentencepiece(tokens, ids, self._scored_merges(tokens, ids), unknown)
        elif pre in _SENTENCEPIECE_BPE:
            backend = self._sentencepiece(tokens, ids, self._merges(ids), unknown, bpe=True)
        elif pre in _PRE_TOKENIZERS:
            add_bos = _PRE_TOKENIZERS[pre].add_bos
            backend = self._byte_level(ids, _PRE_TOKENIZERS[pre])
        else:
            known = ", ".join(pre_tokenizer_names())
            raise self._error(f"tokenizer.ggml.pre = {quote(pre)} is not supported (known: {known})")
        if pre not in _SENTENCEPIECE_BPE:  # early files of Gemma 4 say false, which is wrong
            add_bos = self._get("add_bos_token", bool, add_bos)

        types = self._types(len(tokens))
        for number in eos_ids:
            types[number] = _CONTROL
        if "<|return|>" in ids:
            for token in _ALWAYS_SHOWN:
                if token in ids:
                    types[ids[token]] = _USER_DEFINED
        self._add_special_tokens(backend, tokens, types)

        names = {"eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        special = {name: self._special(kind, len(tokens)) for name, kind in names.items()}
        special["bos_token"] = bos_ids[0] if bos_ids else None
        return GgufVocabulary(
            backend=backend,
            bos_ids=bos_ids,
            eos_ids=eos_ids,
            special_names={name: tokens[number] for name, number in special.items() if number is not None},
            add_bos=add_bos,
            chat_template=self._template(),
        )

    # -- values -------------------------------------------------------------------------------------------------

    def _model(self) -> str:
        model: str = self._get("model", str)
        if model not in ("gpt2", "llama", "gemma4"):
            raise self._error(f"tokenizer.ggml.model = {quote(model)} is not supported (known: gemma4, gpt2, llama)")
        return model

    def _pre(self) -> str:
        pre: str = self._get("pre", str, "gemma4" if self._model() == "gemma4" else "default")
        return pre

    def _error(self, message: str) -> TokenizerError:
        return TokenizerError(f"{self._name}: {message}")

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise self._error(f"tokenizer.ggml.{key} is missing")
        if type(value) is not kind:
            raise self._error(f"tokenizer.ggml.{key} = {quote(value)} is not of type {kind.__name__}")
        return value

    def _strings(self, key: str) -> Sequence[str]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            raise self._error(f"tokenizer.ggml.{key} is missing")
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self._error(f"tokenizer.ggml.{key} is not a list of strings")
        return value

    def _numbers(self, key: str, count: int) -> list[Any] | None:
        """One number for each token, or None if the key is absent."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        length = len(value) if isinstance(value, (list, np.ndarray)) else 0
        if length < count:
            raise self._error(f"tokenizer.ggml.{key} has {length} entries for {count} tokens")
        numbers: list[Any] = value[:count].tolist() if isinstance(value, np.ndarray) else value[:count]
        return numbers

    def _tokens(self) -> list[str]:
        strings = self._strings("tokens")
        if not 1 <= len(strings) <= MAX_TOKENS:
            raise self._error(f"tokenizer.ggml.tokens has {len(strings)} entries (1 to {MAX_TOKENS} are allowed)")
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(strings)]
        longest = max(range(len(tokens)), key=lambda number: len(tokens[number]))
        if len(tokens[longest]) > MAX_TOKEN_LENGTH:
            raise self._error(
                f"tokenizer.ggml.tokens[{longest}] has {len(tokens[longest])} characters (at most {MAX_TOKEN_LENGTH})"
            )
        return tokens

    def _types(self, count: int) -> list[int]:
        types = self._numbers("token_type", count)
        return [_NORMAL] * count if types is None else types

    def _special(self, kind: str, count: int) -> int | None:
        """The id of a special token; one beyond the vocabulary counts as absent, as there are such files."""
        value = self._metadata.get(f"tokenizer.ggml.{kind}_token_id")
        return value if type(value) is int and 0 <= value < count else None

    def _template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise self._error("tokenizer.chat_template is not a string")
        return template

    # -- special tokens -----------------------------------------------------------------------------------------

    def _special_ids(self, ids: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        bos = None if self._pre() in ("glm4", "chatglm-bpe") else self._special("bos", len(ids))
        return () if bos is None else (bos,), self._endings(ids, self._types(len(ids)))

    def _endings(self, ids: Mapping[str, int], types: list[int]) -> tuple[int, ...]:
        """The ids that end a generation: those the file names, then those known by their text."""
        by_text = {token: ids[token] for token in _END_OF_GENERATION if token in ids}
        # The others are no words that merges could form, whatever type the file gives them; this is HTML too.
        if "</s>" in by_text and types[by_text["</s>"]] == _NORMAL:
            del by_text["</s>"]
        # gpt-oss and Solar end a message, not the answer, with <|end|>; in Gemma 4 </s> is text like any other.
        if {"<|return|>", "<|call|>"} <= by_text.keys() or {"<|calls|>", "<|flush|>"} <= by_text.keys():
            by_text.pop("<|end|>", None)
        if "<|tool_response>" in by_text:
            by_text.pop("</s>", None)
        named = [self._special(kind, len(types)) for kind in ("eos", "eot", "eom")]
        return tuple(dict.fromkeys(number for number in (*named, *by_text.values()) if number is not None))

    def _add_special_tokens(self, backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
        """Control tokens (only where the text may spell them) and user-defined ones (always) are found in the text
        before anything else is done with it."""
        # Phi-3 was trained with the white space after its tokens removed; its files do not say so.
        general = self._metadata.get("general.name")
        strips = isinstance(general, str) and any(name in general.lower() for name in ("phi-3", "phi3"))
        control, user_defined = [], []
        for token, kind in zip(tokens, types, strict=False):
            if kind in (_CONTROL, _UNKNOWN):
                rstrip = strips and token not in ("<unk>", "<s>", "<|endoftext|>")
                control.append(tokenizers.AddedToken(token, normalized=False, special=True, rstrip=rstrip))
            elif kind == _USER_DEFINED:
                user_defined.append(tokenizers.AddedToken(token, normalized=False, special=False, rstrip=strips))
        self._guard(backend.add_special_tokens, control)
        self._guard(backend.add_tokens, user_defined)

    # -- models -------------------------------------------------------------------------------------------------

    def _byte_level(self, ids: dict[str, int], pre: _PreTokenizer) -> tokenizers.Tokenizer:
        model = self._guard(models.BPE, ids, self._merges(ids), ignore_merges=pre.whole_words)
        backend = tokenizers.Tokenizer(model)
        cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns]
        # The byte-to-character step is also a pre-tokenizer; its own way of cutting (GPT-2's) is switched off.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        return backend

    def _sentencepiece(
        self,
        tokens: list[str],
        ids: dict[str, int],
        merges: list[tuple[str, str]],
        unknown: int | None,
        *,
        bpe: bool = False,
    ) -> tokenizers.Tokenizer:
        """bpe: with merges of its own, as Gemma 4 has, and no space put in front."""
        backend = tokenizers.Tokenizer(
            self._guard(
                models.BPE,
                ids,
                merges,
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        prefix = self._get("add_space_prefix", bool, not bpe)
        escape = normalizers.Replace(" ", SPACE)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
        if bpe:
            # A run of line feeds is a piece of its own; no merge crosses its border.
            backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\n+"), "isolated")
        steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
        return backend

    def _merges(self, ids: Mapping[str, int]) -> list[tuple[str, str]]:
        strings, merges = self._strings("merges"), []
        if len(strings) > MAX_MERGES:
            raise self._error(f"tokenizer.ggml.merges has {len(strings)} entries (at most {MAX_MERGES})")
        for number, merge in enumerate(strings):
            space = merge.find(" ", 1)
            left, right = merge[:space], merge[space + 1 :]
            if space < 0 or left not in ids or right not in ids or left + right not in ids:
                raise self._error(
                    f"tokenizer.ggml.merges[{number}] = {quote(merge)} does not join two tokens to a third"
                )
            merges.append((left, right))
        return merges

    def _scored_merges(self, tokens: list[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
        """SentencePiece joins any two neighbours that are a token together, the token of the highest score first: the
        same as merges in the order of the scores. Among the ways to make one token the longest left part comes first,
        as it does where a run of equal signs is joined from the left."""
        scores = self._numbers("scores", len(tokens))
        if scores is None:
            raise self._error("tokenizer.ggml.scores is missing")
        if any(not isinstance(score, (int, float)) or score != score for score in scores):
            raise self._error("tokenizer.ggml.scores has an entry that is no number")
        cuts = sum(map(len, tokens))
        if cuts > MAX_CUTS:
            raise self._error(f"tokenizer.ggml.tokens has {cuts} characters (at most {MAX_CUTS})")
        merges = []
        for number in sorted(range(len(tokens)), key=lambda number: -scores[number]):
            token = tokens[number]
            for cut in range(len(token) - 1, 0, -1):
                left, right = ids.get(token[:cut]), ids.get(token[cut:])
                if left is not None and right is not None:
                    merges.append((tokens[left], tokens[right]))  # the strings that are there, no copies
            if len(merges) > MAX_MERGES:
                raise self._error(f"tokenizer.ggml.tokens has more than {MAX_MERGES} pairs that make a token")
        return merges

    def _guard(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Calls into the tokenizers library, whose panics derive from BaseException alone."""
        try:
            return function(*arguments, **options)
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise self._error(f"the vocabulary cannot be used: {error}") from None
            raise
