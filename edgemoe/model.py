"""The embedding API: `load` a model, `generate` text, ask for `logits`."""

from __future__ import annotations

import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgemoe.engine import Count, Engine
from edgemoe.errors import ContextLengthError, OptionError, OverloadedError, TokenizerError
from edgemoe.formats.index import ModelIndex
from edgemoe.formats.read import read_model
from edgemoe.loading import DeviceUse, load_engine, quality_of
from edgemoe.memory import Budget, format_size
from edgemoe.model_files import Progress, resolve
from edgemoe.options import EngineOptions, LoadOptions, Quality
from edgemoe.serving.answer import Answer
from edgemoe.serving.conversations import Conversations
from edgemoe.serving.generation import Generation, GenerationResult, Tally, TextDrawer, figures
from edgemoe.serving.scheduler import Scheduler
from edgemoe.serving.session import Session
from edgemoe.spec import ModelSpec
from edgemoe.text.sampling import Sampler, SamplingOptions
from edgemoe.text.stream import StopStrings, TextStream
from edgemoe.text.tokenizer import Tokenizer, check_vocabulary
from edgemoe.text.tokens import token_ids

# What conversations and prompt caches need is imported where it is used: a first token waits for nothing else.
if TYPE_CHECKING:
    from edgemoe.families import ToolFormat
    from edgemoe.serving.prompt_cache import PromptCache
    from edgemoe.text.tools import ToolUse

MAX_LOGPROBS = 20
"""As OpenAI's API has it."""


COUNTED = 8
"""Contexts of a text that are counted before it is found too long."""


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Model:
    """Opens a model for generation.

    path: an `.emoe` pack, a GGUF file (run where it lies), a Hugging Face folder (converted once into the cache), or
    None for the bundled model. announce, progress: told about a conversion (`edgemoe.model_files.resolve`), and
        `announce` where a GPU is there and is not used.
    options: fields of LoadOptions (memory, threads, context, parallel, quality, ...).

    Raises SourceError, PackError, UnsupportedModelError, TokenizerError, MemoryBudgetError, OptionError, DeviceError.
    """
    chosen = LoadOptions.given(options)
    return Model(resolve(path, announce=announce, progress=progress), chosen, announce)


class Model:
    """A model that is ready to generate. Use `load`; close it, or use it in a `with` statement.

    Usable from several threads and on event loops. Generations that run at the same time go through the model together;
    none of them sees the others but in time.

    engine: what computes; who changes its sequences does so through `forward`. options: what the engine was given.
    device: what computes beside the processor, and of how much; None for nothing. quality: the mode's name.
    context: positions of a sequence. threads: that compute.
    """

    path: Path
    spec: ModelSpec
    generation_defaults: dict[str, Any]
    tokenizer: Tokenizer
    engine: Engine
    options: EngineOptions
    budget: Budget
    device: DeviceUse | None
    quality: str
    context: int
    threads: int

    def __init__(self, path: Path, options: LoadOptions, announce: Callable[[str], None] | None = None) -> None:
        """From a pack or GGUF file; otherwise as `load`."""
        index, self.tokenizer = read_model(path)
        self.path = path
        self.spec = index.spec
        self.generation_defaults = dict(index.generation)
        check_vocabulary(self.tokenizer, self.spec)
        loaded = load_engine(index, options, announce)
        self.engine, self.options, self.budget = loaded.engine, loaded.options, loaded.budget
        self.device = loaded.device
        self.quality = options.quality
        self._index = index
        self.context = self.options.context
        self.threads = self.options.threads
        self._scheduler = Scheduler(
            self.engine, self.options, loaded.resident, options.max_gap, _prompt_cache(index, self.options, options)
        )
        self._queue = options.queue
        self._keeps = options.prompt_cache_dir is not None
        self._conversations = Conversations()
        self._last = Tally(0, Count())  # of the generation that computed last

    # -- text ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        add_special: bool = True,
        **sampling: Any,
    ) -> Generation:
        """The continuation of `prompt` in pieces of text, as they come.

        prompt: text (BOS is added where the model wants it, unless add_special is False) or token ids.
        max_tokens: at most this many; None until the model ends or the context is full.
        stop: strings that end the text and are not part of it.
        sampling: fields of SamplingOptions (temperature, top_k, ..., ignore_eos, grammar, json_schema, seed), and
            logprobs: the result tells of each token how likely it was, and which so many tokens were the likeliest;
            quality: the pack's mode (docs/quantization.md) for this text, in place of the model's.
        The generation's `result` describes the run.

        Raises ContextLengthError, OptionError, ReadError.
        """
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, add_special=add_special, limit=COUNTED * self.context)
        else:
            tokens = token_ids(prompt, self.spec.vocab_size, "a prompt that is not text (str)", self.context)
            if len(tokens) > self.context and isinstance(prompt, Sized):
                raise self._too_long(len(prompt))
        stream = TextStream(self.tokenizer)
        return self._start(tokens, stream, max_tokens, stop, sampling)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Generation:
        """The answer to a conversation, `[{"role": "user", "content": ...}, ...]`, by the model's own template.

        What the model thinks before it answers is part of the text, with the marks around it; `chat_parts` takes it
        apart. A conversation that goes on costs its new tokens only.
        chat_template_kwargs: further variables of the template, such as enable_thinking.
        The other options are those of `generate`. Raises TokenizerError where the model has no chat template.
        """
        from edgemoe.text.tools import ToolUse

        text = self._chat_prompt(messages, ToolUse(), chat_template_kwargs)
        return self._answer(text, ToolUse(), None, max_tokens, stop, sampling)

    def chat_parts(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        response_schema: Mapping[str, Any] | None = None,
        reasoning_format: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Answer:
        """As `chat`, in parts (`Part`): what the model thinks, the content of its answer, the tools that it calls.

        messages: OpenAI's, also an assistant's `tool_calls` and messages of the role "tool".
        tools: what the model may call, `{"type": "function", "function": {"name", "description", "parameters",
            "strict"}}`. A part of a call has its index; the first one of each its name and id; the texts of one index
            are its arguments, JSON text.
        tool_choice: "auto", "none", "required" (there is a call), or the function that is called,
            `{"type": "function", "function": {"name": ...}}`.
        parallel_tool_calls: there may be several calls in one answer.
        response_schema: the content is JSON of this schema, `{}` for any.
        reasoning_format: "auto" or "deepseek" to tell thoughts apart; "none": they are content, with their marks.

        Raises OptionError, which names the tool or the message, and as `chat`.
        """
        from edgemoe.text.answer import AnswerSplitter, check_format
        from edgemoe.text.call_syntax import CallReader
        from edgemoe.text.tool_messages import template_tools
        from edgemoe.text.tools import ToolUse

        check_format(reasoning_format)
        use = ToolUse.given(tools, tool_choice, parallel_tool_calls)
        if response_schema is not None:
            if sampling.get("grammar") is not None or sampling.get("json_schema") is not None:
                raise OptionError("response_schema, grammar and json_schema exclude each other")
            sampling["json_schema"] = response_schema
        text = self._chat_prompt(messages, use, chat_template_kwargs)
        form = template_tools(self.tokenizer, self.spec.family).form if use.tools else None
        return Answer(
            self._answer(text, use, form, max_tokens, stop, sampling),
            AnswerSplitter(text, reasoning_format, CallReader(form, use) if form is not None else None),
        )

    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **fields: Any
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """The answer to a conversation in OpenAI's shapes: a chat completion, or with `stream` an iterator of its
        chunks.

        fields: those of OpenAI's requests (tools, tool_choice, response_format, max_tokens, stop, n, logprobs,
        top_logprobs, reasoning_effort, stream_options, ...), and chat_template_kwargs, reasoning_format, quality and
        all of SamplingOptions. Raises FieldError (an OptionError), which names what is unknown or wrong, and as
        `chat_parts`.
        """
        from edgemoe.protocols import chat_completions  # not what a first token should wait for
        from edgemoe.protocols.answers import Reply

        request = chat_completions.parse_call({"messages": list(messages), "stream": stream, **fields})
        template = self.tokenizer.chat_template or ""
        answers: list[Answer] = []
        for choice in range(request.n):
            answers.append(self.chat_parts(request.messages, **request.arguments(choice, template)))
        reply = Reply(
            id=secrets.token_hex(12),
            created=int(time.time()),
            model=request.model or self.path.stem,
            prompt_tokens=answers[0].result.prompt_tokens,
            count_tokens=lambda text: len(self.tokenizer.encode(text)),
        )
        if request.stream:
            return chat_completions.chunks(request, reply, answers, self.tokenizer.end_ids)
        return chat_completions.completion(request, reply, answers, self.tokenizer.end_ids)

    def _chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], use: ToolUse, variables: Mapping[str, Any] | None
    ) -> str:
        if self.tokenizer.chat_template is None:
            raise TokenizerError(f"{self.path}: the model has no chat template; use generate()")
        from edgemoe.text.tool_messages import prepared

        told, more = prepared(messages, use, self.tokenizer, self.spec.family)
        return self.tokenizer.apply_chat_template(
            told, add_generation_prompt=True, variables={**more, **(variables or {})}
        )

    def _answer(
        self,
        prompt: str,
        use: ToolUse,
        form: ToolFormat | None,
        max_tokens: int | None,
        stop: str | Sequence[str],
        sampling: Mapping[str, Any],
    ) -> Generation:
        # The model's own words need not be the tokens that their text becomes: where the conversation goes on, they
        # stay what they were. What follows begins with a special token, so nothing joins at the seam.
        text, tokens = self._conversations.recall(prompt)
        if text:
            rest = self.tokenizer.encode(prompt[len(text) :], limit=COUNTED * self.context)
            tokens = [*tokens, *rest] if not rest or self.tokenizer.is_special(rest[0]) else []
        tokens = tokens or self.tokenizer.encode(prompt, limit=COUNTED * self.context)
        from edgemoe.text.answer import mark_ids

        stream = TextStream(self.tokenizer, spelled=mark_ids(self.tokenizer, form))
        return self._start(tokens, stream, max_tokens, stop, sampling, prompt, use, form)

    def _start(
        self,
        tokens: list[int],
        stream: TextStream,
        max_tokens: int | None,
        stop: str | Sequence[str],
        sampling: Mapping[str, Any],
        prompt: str | None = None,
        use: ToolUse | None = None,
        form: ToolFormat | None = None,
    ) -> Generation:
        """tokens: there may be more than these, if there are too many; prompt: of a conversation; use, form: its tools,
        and how the model calls them."""
        # Wrong options are refused here and now, not when the first piece is asked for.
        explicit = {name: value for name, value in sampling.items() if value is not None}
        logprobs, quality = explicit.pop("logprobs", None), explicit.pop("quality", None)
        options = SamplingOptions.merged(explicit, self.generation_defaults)
        if max_tokens is not None and max_tokens < 0:
            raise OptionError(f"max_tokens = {max_tokens} is negative")
        if logprobs is not None and (isinstance(logprobs, bool) or not 0 <= logprobs <= MAX_LOGPROBS):
            raise OptionError(f"logprobs = {logprobs!r} is not between 0 and {MAX_LOGPROBS}")
        own_quality = None if quality is None else quality_of(self._index, quality)
        if own_quality == self.options.quality:
            own_quality = None
        if self._scheduler.status()["waiting"] > self._queue:
            raise OverloadedError(f"{self._queue} texts are waiting already (queue=); try again later")
        if not tokens:
            tokens = list(self.tokenizer.bos_ids[:1])
        if not tokens:
            raise OptionError("the prompt is empty and the model has no token to begin with")
        if len(tokens) > self.context:
            raise self._too_long(len(tokens))
        for token, _ in options.logit_bias:
            if token >= self.spec.vocab_size:
                raise OptionError(f"logit_bias: token {token}, but the vocabulary has {self.spec.vocab_size}")
        constraint = None
        if prompt is not None and (form is not None or options.grammar is not None or options.json_schema is not None):
            from edgemoe.text.answer_grammar import answer_constraint
            from edgemoe.text.tools import ToolUse

            # A grammar is for the answer, not for its frame and the thoughts before it.
            constraint = answer_constraint(
                prompt, self.tokenizer, use or ToolUse(), form, options.grammar, options.json_schema
            )
        sampler = Sampler(options, self.tokenizer, constraint)

        def on_step(tally: Tally) -> None:
            self._last = tally

        def on_text(text: str, tokens: list[int]) -> None:
            if prompt is not None:
                self._conversations.remember(prompt + text, tokens)

        drawer = TextDrawer(
            sampler, self.tokenizer, stream, StopStrings(stop), max_tokens, self.context, logprobs, on_text
        )
        session = Session(tokens, drawer, own_quality)
        if max_tokens == 0:
            session.drawn.append(drawer.finish("length", tokens, 0))
            session.done = True
        return Generation(self._scheduler, session, Tally(len(tokens), session.count), on_step)

    def _too_long(self, count: int) -> ContextLengthError:
        """count: of the prompt's tokens; that of a text that is very long was counted as far as COUNTED says."""
        return ContextLengthError(
            f"a prompt of {count} tokens does not fit into the context of {self.context} (-c / context=)",
            prompt_tokens=count,
            context=self.context,
        )

    # -- numbers ------------------------------------------------------------------------------------------------

    def logits(self, tokens: ArrayLike, first: int = 0) -> NDArray[np.float32]:
        """float32 [tokens - first, vocab]: the logits after each token of a sequence of its own, from `first` on."""
        ids = np.asarray(token_ids(tokens, self.spec.vocab_size, "the text"), np.int32)
        return self._scheduler.all_logits(ids, first)

    def forward(
        self,
        tokens: ArrayLike,
        positions: ArrayLike,
        sequence_ids: ArrayLike,
        wanted: ArrayLike,
        *,
        qualities: Sequence[Quality] = (),
        quality: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """One pass of the engine: logits float32 [wanted, vocab] after those tokens whose indexes are in `wanted`.

        Token i stands at positions[i] of sequence sequence_ids[i], of 0 to parallel - 1; a sequence goes on where it
        ends, or begins anew at position 0. Generations use the same sequences; what they find changed they compute
        again. A token's experts are computed at qualities[quality[i]], or at qualities[0] without `quality`; without
        both at the model's. Raises ContextLengthError, ReadError, OptionError, ValueError.
        """
        ids = token_ids(tokens, self.spec.vocab_size, "the text")
        return self._scheduler.forward(ids, positions, sequence_ids, wanted, qualities, quality)

    def next_logits(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """float32 [vocab]: the logits after `tokens`, of which only what no sequence holds yet is computed."""
        ids = token_ids(tokens, self.spec.vocab_size, "the text", self.context)
        if not 0 < len(ids) <= self.context:
            raise ContextLengthError(f"a text of {len(ids)} tokens: 1 to {self.context} fit into the context")
        return self._scheduler.next_logits(ids)

    @contextmanager
    def trace(self, path: str | os.PathLike[str], part: str = "text") -> Iterator[None]:
        """While this context lasts, what the routers choose for every token that is computed goes to a trace file.

        Tokens of a prompt that a sequence holds are not computed, and not in it. The file has its name
        when the context ends; after an error there is none. `part` names the kind of text (docs/trace.md).
        """
        from edgemoe.profiling.trace import TraceWriter

        layers = self.spec.layers
        experts, top_k = [layer.experts for layer in layers], [layer.top_k for layer in layers]
        with TraceWriter(path, self.path.name, experts, top_k, self.spec.family, predictions=True) as writer:
            self._scheduler.record((writer, part))
            try:
                yield
            finally:
                self._scheduler.record(None)

    def snapshot(self) -> tuple[tuple[int, ...], NDArray[np.uint8]]:
        """The state of the sequence that was used last, for `restore`: its tokens and an opaque uint8 array."""
        return self._scheduler.snapshot()

    def restore(self, snapshot: tuple[tuple[int, ...], NDArray[np.uint8]]) -> None:
        """Goes back to a state that `snapshot` of a model with the same options gave. Raises ValueError."""
        self._scheduler.restore(*snapshot)

    @property
    def last_stop_reason(self) -> str:
        """Why the generation that computed last has ended (`GenerationResult.finish_reason`)."""
        return self._last.finish_reason

    def status(self) -> dict[str, int]:
        """running: generations that have a sequence; waiting: that have none yet; sequences: that there are."""
        return self._scheduler.status()

    def counters(self) -> dict[str, float]:
        """Figures of all that the engine has done since it was loaded (docs/architecture.md)."""
        return self._told(figures(self.engine.counters()))

    @property
    def last_result(self) -> GenerationResult:
        """The result of the generation that computed last; where several run at once, ask the generation itself."""
        self._scheduler.settle(self._last.count)
        return self._last.result()

    def stats(self, result: GenerationResult | None = None) -> dict[str, float]:
        """Figures of a generation, of the one that computed last by default (docs/architecture.md lists them); those of
        memory are of the process."""
        run = self.last_result if result is None else result
        ttft = run.ttft_seconds or 0.0
        later_tokens = max(run.generated_tokens - 1, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "prompt_tokens": run.prompt_tokens,
            "computed_prompt_tokens": run.computed_prompt_tokens,
            "generated_tokens": run.generated_tokens,
            "prompt_tps": run.computed_prompt_tokens / ttft if ttft else 0.0,
            "generation_tps": later_tokens / run.seconds if run.seconds else 0.0,
            "ttft_ms": 1e3 * ttft,
            **self._told(figures(run.counters)),
            "cache_bytes": self.budget.cache_bytes,
            **({} if self.device is None else {"device_memory_bytes": self.device.budget.taken}),
            "memory_limit_bytes": self.budget.limit,
            "memory_peak_bytes": peak,
        }

    def _told(self, values: dict[str, float]) -> dict[str, float]:
        """Without a device nothing is said of it."""
        return {name: value for name, value in values.items() if self.device or not name.startswith("device_")}

    @property
    def direct_io(self) -> bool:
        """Whether weights are read past the page cache."""
        return self.engine.direct_io

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self.engine.isa

    def __repr__(self) -> str:
        if self.engine.closed:
            return f"<edgemoe.Model {self.path.name}, closed>"
        status = self._scheduler.status()
        memory = format_size(self.budget.limit)
        return (
            f"<edgemoe.Model {self.path.name} ({self.spec.family}), {memory}, context {self.context}, "
            f"{'' if self.device is None else f'on {self.device}, '}"
            f"{status['running']} of {self.options.sequences} texts running, {status['waiting']} waiting>"
        )

    # -- lifetime -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends all texts where they are, as `Generation.stop` does. The model stays usable."""
        self._scheduler.cancel_all()

    def close(self) -> None:
        """Gives the memory back. A pass that is under way elsewhere ends at its next layer; generations that were not
        at their end raise EdgemoeError when they are read on. With a prompt cache it waits until states are written."""
        try:
            if self._keeps and not self.engine.closed:
                self._scheduler.keep()
        finally:
            self.engine.close()
            self._scheduler.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _prompt_cache(index: ModelIndex, engine: EngineOptions, options: LoadOptions) -> PromptCache | None:
    if options.prompt_cache_dir is None:
        return None
    from edgemoe.serving.prompt_cache import PromptCache, state_key

    goes_back = all(
        layer.attention.kind in ("full", "mla") and not layer.attention.window for layer in index.spec.layers
    )
    assert isinstance(options.prompt_cache_size, int)
    computed = replace(index, spec=index.spec.for_context(engine.context))  # some rotary angles depend on it
    return PromptCache(
        Path(options.prompt_cache_dir), options.prompt_cache_size, state_key(computed, engine), goes_back
    )
