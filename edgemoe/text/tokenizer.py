"""A model's tokenizer: text to token ids and back, its special tokens, its chat template."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from edgemoe.errors import TokenizerError

if TYPE_CHECKING:
    from edgemoe.spec import ModelSpec
    from edgemoe.text.template import ChatTemplate

# Characters of a long text that are encoded at a time, and at most where there is no good place to cut.
PIECE = 1 << 14
LONGEST_PIECE = 1 << 20

# Tokens that end an answer by their text, whether or not the model's configuration names them.
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|call|>"),
    *("<|observation|>", "<|tool_response>"),  # what a result begins with, after a call
    *("<|calls|>", "<|flush|>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)

# The bytes of one token's text, made from its entry in the vocabulary.
Piece = Callable[[str], bytes]


class Tokenizer:
    """A tokenizer.json with the facts around it.

    bos_ids, eos_ids: tokens that begin a text, tokens that end one according to the model's configuration.
    end_ids: tokens that end a generation: eos_ids, and those that end a turn (<|im_end|>, <|eot_id|>, ...).
    chat_template: source of the model's chat template, or None.
    name: what messages call it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        chat_template: str | None,
        name: str,
    ) -> None:
        self.name = name
        self.chat_template = chat_template
        self._backend = backend
        self._encoding = threading.Lock()  # how special tokens are taken is the backend's, not a call's
        backend.no_truncation()
        backend.no_padding()
        self._special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._special_names = {key: _content(config[key]) for key in config if key.endswith("_token")}
        self._vocab_size: int | None = None
        self._known_pieces: dict[int, bytes] = {}  # of tokens that were asked for
        self._template: ChatTemplate | None = None
        state = backend.decoder
        self._piece, self._strip = _pieces(json.loads(state.__getstate__()) if state is not None else None)

        def ids(kind: str) -> tuple[int, ...]:
            named = backend.token_to_id(self._special_names.get(f"{kind}_token") or "")
            known = [] if named is None else [named]
            for key in (f"{kind}_token_ids", f"{kind}_token_id"):
                value = generation.get(key)
                for item in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
                        known.append(item)
            return tuple(dict.fromkeys(known))

        self.bos_ids = ids("bos")
        self.eos_ids = ids("eos")
        self.end_ids = tuple(dict.fromkeys((*self.eos_ids, *_ends(backend))))
        self._prefix = self._begin_of_text(config.get("add_bos_token"))

    @classmethod
    def from_files(
        cls,
        tokenizer_json: bytes,
        tokenizer_config: bytes | None = None,
        generation: Mapping[str, Any] | None = None,
        chat_template: bytes | None = None,
        *,
        name: str = "tokenizer.json",
    ) -> Tokenizer:
        """From the contents of the files a Hugging Face folder has (all untrusted).

        generation: bos_token_ids and eos_token_ids (lists), or generation_config.json's bos_token_id, eos_token_id.
        chat_template: contents of chat_template.jinja; it goes before the one in tokenizer_config.json.
        Raises TokenizerError.
        """
        try:
            backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except BaseException as error:
            raise _failure(error, f"{name}: not a tokenizer.json") from None
        config = _json_map(tokenizer_config, f"{name}: tokenizer_config.json") if tokenizer_config else {}
        if chat_template is not None:
            try:
                template: str | None = chat_template.decode()
            except UnicodeDecodeError as error:
                raise TokenizerError(f"{name}: chat_template.jinja is not UTF-8 at byte {error.start}") from None
        else:
            template = _configured_template(config)
        return cls(backend, config, generation or {}, template, name)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """From a Hugging Face model folder."""
        folder = Path(folder)

        def read(name: str) -> bytes | None:
            path = folder / name
            try:
                return path.read_bytes() if path.is_file() else None
            except OSError as error:
                raise TokenizerError(f"{path}: {error.strerror}") from None

        tokenizer = read("tokenizer.json")
        if tokenizer is None:
            hint = " (tokenizer.model alone is not enough)" if (folder / "tokenizer.model").exists() else ""
            raise TokenizerError(f"{folder}: no tokenizer.json{hint}")
        generation: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):  # the latter wins
            data = read(name)
            if data is not None:
                values = _json_map(data, str(folder / name))
                generation.update((key, value) for key, value in values.items() if value is not None)
        return cls.from_files(
            tokenizer, read("tokenizer_config.json"), generation, read("chat_template.jinja"), name=str(folder)
        )

    # -- text to ids --------------------------------------------------------------------------------------------

    def encode(
        self, text: str, add_special: bool = False, parse_special: bool = True, limit: int | None = None
    ) -> list[int]:
        """The ids of `text`.

        add_special: put the tokens that begin a text in front, where the model has them and the text has not.
        parse_special: text that spells a special token becomes that token; otherwise it is text like any other.
        limit: stop somewhere after this many ids: more of them than `limit` say that the text has more.
        A long text is encoded in pieces (`encode_pieces`), for the library takes 150 bytes of memory per character.
        Raises TokenizerError for text that is not Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"{self.name}: the text is not valid Unicode at character {error.start}") from None
        pieces = [text] if len(text) <= PIECE else split_text(io.StringIO(text, newline="").read)
        ids: list[int] = []
        for part in self.encode_pieces(pieces, add_special, parse_special):
            ids += part
            if limit is not None and len(ids) > limit:
                break
        return ids

    def encode_pieces(
        self, pieces: Iterable[str], add_special: bool = False, parse_special: bool = True
    ) -> Iterator[list[int]]:
        """The ids of each piece of a text that `split_text` cut: together, those of the whole text.

        A piece is encoded with the character before it, whose ids are dropped again: a tokenizer that marks the begin
        of a text (SentencePiece) marks that character. The exceptions, a line of more than a million characters and a
        tokenizer that has tokens across line ends, cost a token or two at the cuts.
        """
        before = ""
        for text in pieces:
            ids = self._encode(before + text, parse_special)
            if not before:
                prefix = list(self._prefix)
                yield prefix + ids if add_special and ids[: len(prefix)] != prefix else ids
            else:
                lead = self._encode(before, parse_special)
                yield ids[len(lead) :] if ids[: len(lead)] == lead else self._encode(text, parse_special)
            before = text[-1:] or before

    def _encode(self, text: str, parse_special: bool = True, add_special: bool = False) -> list[int]:
        with self._encoding:
            self._backend.encode_special_tokens = not parse_special
            try:
                return self._backend.encode(text, add_special_tokens=add_special).ids
            except BaseException as error:
                raise _failure(error, f"{self.name}: encoding failed") from None

    def _begin_of_text(self, add_bos: Any) -> tuple[int, ...]:
        """What goes in front of a text: a setting in the configuration, otherwise the post-processor's habit (whose
        end-of-text token, if it adds one, is not wanted: the text is to be continued)."""
        if add_bos is True:
            return self.bos_ids[:1]
        if add_bos is False:
            return ()
        plain, special = self._encode("a"), self._encode("a", add_special=True)
        for start in range(len(special) - len(plain) + 1):
            if special[start : start + len(plain)] == plain:
                return tuple(special[:start])
        return ()

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids that `encode(text, add_special=True)` puts in front of a text; empty for most models."""
        return self._prefix

    # -- ids to text --------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD; ids without a token are passed over.

        Runs of byte-fallback tokens are decoded like any bytes, so a broken byte spoils only itself (the tokenizers
        library replaces the whole run).
        """
        ids = list(ids)
        if any(i < 0 for i in ids):
            raise TokenizerError(f"{self.name}: token id {min(ids)} is negative")
        if self._piece is None:
            return str(self._backend.decode(ids, skip_special_tokens=skip_special))
        data = b"".join(self.piece(i, skip_special) for i in ids)
        for _ in range(self._strip):
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    @property
    def has_pieces(self) -> bool:
        """Whether every token has its own bytes (byte-level and SentencePiece-like tokenizers). In others, such as
        WordPiece, a token's text depends on its neighbours."""
        return self._piece is not None

    @property
    def stripped_spaces(self) -> int:
        """How many spaces at the begin of a text are not part of it (SentencePiece puts one there)."""
        return self._strip

    def piece(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes of one token, which need not be whole characters; requires `has_pieces`."""
        if skip_special and token_id in self._special:
            return b""
        piece = self._known_pieces.get(token_id)
        if piece is None:
            assert self._piece is not None
            token = self._backend.id_to_token(token_id)
            self._known_pieces[token_id] = piece = b"" if token is None else self._piece(token)
        return piece

    def spelling(self, token_id: int) -> bytes:
        """The bytes of one token, a special one spelled out; empty for an id without a token."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        return token.encode() if token_id in self._special or self._piece is None else self._piece(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary lists under this text."""
        found: int | None = self._backend.token_to_id(text) if text else None
        return found

    @property
    def vocab_size(self) -> int:
        """The highest id plus one. A model's embedding may have more rows (padding), never fewer."""
        if self._vocab_size is None:
            size = self._backend.get_vocab_size(with_added_tokens=True)
            # Asking for each id costs no memory; a map of 150 000 strings would, and only gaps make one necessary.
            if any(self._backend.id_to_token(i) is None for i in range(size)):
                size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
            self._vocab_size = size
        return self._vocab_size

    # -- chat ---------------------------------------------------------------------------------------------------

    def use_chat_template(self, source: str) -> None:
        """Takes this template from now on. Raises TokenizerError where it does not compile."""
        from edgemoe.text.template import ChatTemplate

        self._template = ChatTemplate(source, self.name)
        self.chat_template = source

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the text that the model was trained on, special tokens spelled out, the one that begins
        a text included: encode it without `add_special`.

        messages: maps with "role" and "content". variables: further variables of the template (`enable_thinking`).
        Raises TokenizerError where there is no template or it fails, OptionError for variables that it has anyway.
        """
        if self.chat_template is None:
            raise TokenizerError(f"{self.name}: the model has no chat template")
        if self._template is None:
            from edgemoe.text.template import ChatTemplate

            self._template = ChatTemplate(self.chat_template, self.name)
        names = {key: value for key, value in self._special_names.items() if value is not None}
        for kind, ids in (("bos_token", self.bos_ids), ("eos_token", self.eos_ids)):
            if kind not in names and ids:
                names[kind] = self._backend.id_to_token(ids[0]) or ""
        return self._template.render(messages, add_generation_prompt, {**names, **(variables or {})})


def split_text(read: Callable[[int], str]) -> Iterator[str]:
    """Cuts a text that `read` gives (a text file's method: up to so many characters, nothing at the end) into pieces
    that can be encoded one by one (`Tokenizer.encode_pieces`). There is always one, empty for an empty text."""
    held = read(PIECE)
    first = True
    while text := read(PIECE):
        held += text
        cut = _cut(held)
        if cut:
            yield held[:cut]
            held, first = held[cut:], False
    if held or first:
        yield held


def _cut(text: str) -> int:
    """Where to cut: after a line end without more white space around it, where no pre-tokenizer in use joins what
    comes before with what comes after (some look a character ahead in runs of white space); in an endless line before
    a lone space, or anywhere. 0 to wait for more text."""
    for mark, shift in (("\n", 1), (" ", 0)):
        at = text.rfind(mark, 1, len(text) - 1)
        while at > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + shift
            at = text.rfind(mark, 1, at)
        if len(text) < LONGEST_PIECE:
            return 0
    return len(text)


def check_vocabulary(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """Refuses a tokenizer with ids that the model's embedding has no row for."""
    highest = max(tokenizer.vocab_size - 1, *tokenizer.bos_ids, *tokenizer.eos_ids, *tokenizer.begin_ids, 0)
    if highest >= spec.vocab_size:
        raise TokenizerError(
            f"{tokenizer.name}: the tokenizer has a token {highest}, but the model's vocabulary has only "
            f"{spec.vocab_size} rows: it belongs to another model"
        )


def _pieces(decoder: Any) -> tuple[Piece | None, int]:
    """How a tokenizer.json's decoder turns one token into bytes, and how many spaces it strips from the begin of the
    text; (None, 0) if its tokens cannot be decoded one by one."""
    steps: list[Any] = [decoder]
    while any(isinstance(step, dict) and step.get("type") == "Sequence" for step in steps):
        steps = [inner for step in steps for inner in (step["decoders"] if step["type"] == "Sequence" else [step])]
    kinds = [step["type"] if isinstance(step, dict) else None for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_piece, 0
    replacements: list[tuple[str, str]] = []
    strip = 0
    for number, (kind, step) in enumerate(zip(kinds, steps, strict=True)):
        if kind == "Replace" and "String" in step["pattern"] and "ByteFallback" not in kinds[:number]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and "Fuse" in kinds[:number] and step["content"] == " " and step["stop"] == 0:
            strip += step["start"]
        elif kind not in ("ByteFallback", "Fuse"):
            return None, 0
    if "Fuse" not in kinds and "ByteFallback" not in kinds:
        return None, 0

    def piece(token: str) -> bytes:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">") and "ByteFallback" in kinds:
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        return token.encode(errors="replace")

    return piece, strip


def _ends(backend: tokenizers.Tokenizer) -> list[int]:
    """The tokens of _ENDS that the tokenizer has as tokens of their own, not as words of its vocabulary."""
    added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
    # With these an <|end|> ends a message of the answer, not the answer (gpt-oss, Solar).
    messages = {"<|return|>", "<|call|>"} <= added.keys() or {"<|calls|>", "<|flush|>"} <= added.keys()
    return [added[text] for text in _ENDS if text in added and not (messages and text == "<|end|>")]


def _byte_table() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it prints, otherwise one above U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update((chr(0x100 + number), byte) for number, byte in enumerate(others))
    return table


_BYTES = _byte_table()


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:  # an added token is spelled in plain text
        return token.encode(errors="replace")


def _content(token: Any) -> str | None:
    """The text of a special token in tokenizer_config.json, where it is a string or a map."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _configured_template(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _json_map(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{name}: not a JSON object")
    return value


def _failure(error: BaseException, message: str) -> BaseException:
    """A TokenizerError for whatever the tokenizers library raises; its panics derive from BaseException alone."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return TokenizerError(f"{message}: {error}")
    return error
