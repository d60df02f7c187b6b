"""A server whose model reads real prompts and writes what a script says: only the draw of each token is replaced.

For clients that need an answer of a certain form (a tool call that edits a file, a text that ends), which no small
model gives: prompts are rendered, computed and kept as ever, and answers are taken apart as ever.

    python tests/server/forced.py --port 8080 [--model MODEL] [--context N] [--answer TEXT]...

serves a model whose answers are the texts, one after the other and then always the last one, and says what it does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scripted import serving

import edgemoe
import edgemoe.model
from edgemoe.text.named_templates import NAMED_TEMPLATES
from edgemoe.text.sampling import Sampler

Script = Callable[[str], str]


def call(name: str, arguments: str) -> str:
    """A tool call as the family of the bundled model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@contextmanager
def forced(script: Script) -> Iterator[None]:
    """What models in this process write: what the script gives for the text of their prompt, and the end. It
    must be what a request's grammar allows."""

    class Forced(Sampler):
        def __init__(self, options: Any, tokenizer: Any = None, constraint: Any = None) -> None:
            super().__init__(options, tokenizer, constraint)
            self._tokenizer = tokenizer
            self._forced: list[int] | None = None

        def sample(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
            if self._forced is None:
                text = script(self._tokenizer.decode(list(history), skip_special=False))
                self._forced = [*self._tokenizer.encode(text, add_special=False), next(iter(self._tokenizer.end_ids))]
            token = self._forced.pop(0)
            if self._constraint is not None:
                assert self._constraint.allows(token), f"the grammar does not allow {self._tokenizer.decode([token])!r}"
                self._constraint.accept(token)
            return token

    before = edgemoe.model.Sampler
    edgemoe.model.Sampler = Forced  # type: ignore[misc]
    try:
        yield
    finally:
        edgemoe.model.Sampler = before  # type: ignore[misc]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--port", type=int, default=8080)
    options.add_argument("--model")
    options.add_argument("--context", type=int, default=2048)
    options.add_argument("--parallel", type=int, default=1)
    options.add_argument("--memory", default="auto")
    options.add_argument("--answer", action="append", default=[])
    options.add_argument("--seconds", type=float, default=3600)
    given = options.parse_args()
    answers = iter(given.answer[:-1])
    last = given.answer[-1] if given.answer else "Hello there, friend."

    def script(prompt: str) -> str:
        text = next(answers, last)
        print(f"== a prompt of {len(prompt)} characters; answer {text!r}", flush=True)
        return text

    with edgemoe.load(given.model, context=given.context, memory=given.memory, parallel=given.parallel) as model:
        if not model.tokenizer.chat_template:
            model.tokenizer.use_chat_template(NAMED_TEMPLATES["chatml"])
        with forced(script), serving(model, port=given.port) as url:
            print(url, flush=True)
            time.sleep(given.seconds)


if __name__ == "__main__":
    main()
