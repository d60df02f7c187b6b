"""A child of `bench.alternate`: runs one job with the package that PYTHONPATH names and prints one line of JSON.

Its argument is JSON too: `job`, and the options of that job's function. Only what every state of the package has is
used: `edgemoe.load`, `logits`, `generate`, and the budget's parts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import edgemoe

EVERYTHING = 1 << 50
"""Bytes of memory that hold any model."""
PROMPT = 8


def limit(path: str, threads: int, context: int, share: float) -> dict[str, Any]:
    """Bytes that hold `share` of the experts."""
    with edgemoe.load(path, memory=EVERYTHING, threads=threads, context=context) as model:
        budget = model.budget
        rest = budget.base + budget.dense + budget.state + budget.scratch
        return {"limit": rest + int(share * budget.expert_slots) * budget.slot_bytes}


def generate(path: str, threads: int, context: int, tokens: int, memory: int | None, repeats: int) -> dict[str, Any]:
    """Greedily, after a short prompt that is known. memory: None for everything, and then all of it is computed once
    before, so that the experts in use are in memory."""
    with edgemoe.load(path, memory=memory or EVERYTHING, threads=threads, context=context) as model:
        prompt = np.random.default_rng(1).integers(0, model.spec.vocab_size, PROMPT).tolist()
        rates, text = [], ""
        for number in range(repeats + (memory is None)):
            begin = time.perf_counter()
            text = "".join(model.generate(prompt, max_tokens=tokens, temperature=0, ignore_eos=True))
            if number or memory is not None:
                rates.append(tokens / (time.perf_counter() - begin))
        return {"rate": statistics.median(rates), "result": text}


def prompt(path: str, threads: int, context: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Random tokens in one call, and the logits of the last, once all experts are in memory."""
    with edgemoe.load(path, memory=EVERYTHING, threads=threads, context=context) as model:
        text = np.random.default_rng(2).integers(0, model.spec.vocab_size, tokens).astype(np.int32)
        model.logits(text, first=0)  # the last layer computes all tokens, too
        rates = []
        for _ in range(repeats):
            begin = time.perf_counter()
            logits = model.logits(text, first=tokens - 1)
            rates.append(tokens / (time.perf_counter() - begin))
        return {"rate": statistics.median(rates), "result": logits.tobytes().hex()[:64]}


def start(path: str, threads: int, context: int, repeats: int) -> dict[str, Any]:
    """Processes per second that import the package."""
    return {"rate": 1 / statistics.median(_seconds("import edgemoe; print(1)") for _ in range(repeats)), "result": ""}


def first_token(path: str, threads: int, context: int, repeats: int) -> dict[str, Any]:
    """Processes per second: from the start of `edgemoe run -n 1` to its first character."""
    code = f"import sys; from edgemoe.cli import main; sys.argv[1:] = {['run', path, 'The old man', '-n', '1']}; main()"
    return {"rate": 1 / statistics.median(_seconds(code) for _ in range(repeats)), "result": ""}


def _seconds(code: str) -> float:
    """To the first byte that a new interpreter writes."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=tempfile.gettempdir())
    assert process.stdout is not None
    first = process.stdout.read(1)
    seconds = time.perf_counter() - begin
    process.communicate()
    if not first or process.returncode:
        raise SystemExit(f"{code} ended with exit code {process.returncode}")
    return seconds


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    jobs = {"limit": limit, "generate": generate, "prompt": prompt, "start": start, "first_token": first_token}
    found = jobs[arguments.pop("job")](**arguments)
    print(json.dumps({**found, "package": str(Path(edgemoe.__file__).resolve().parents[1])}))
