"""A child of the benchmarks: loads a model with edgemoe, then answers requests, a line of JSON each, from stdin.

Its argument is JSON: path, threads, context. A request names `prompt` (tokens to compute in one call) or `generate`
(tokens to generate one by one, greedily, after one token). Answers begin with @: {"tokens": n, "seconds": s}. Another
request ({}) is answered without numbers.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

import edgemoe


def prompt(model: edgemoe.Model, count: int) -> float:
    tokens = np.random.default_rng(count).integers(0, model.spec.vocab_size, count)
    begin = time.perf_counter()
    model.forward(tokens, np.arange(count), np.zeros(count), [count - 1])
    return time.perf_counter() - begin


def generate(model: edgemoe.Model, count: int) -> float:
    token = int(model.forward([1], [0], [0], [0]).argmax())
    begin = time.perf_counter()
    for position in range(1, count + 1):
        token = int(model.forward([token], [position], [0], [0]).argmax())
    return time.perf_counter() - begin


def main() -> None:
    options = json.loads(sys.argv[1])
    # Everything in memory, whatever the planner would leave to others.
    with edgemoe.load(
        options["path"], gpu="none", memory=1 << 50, threads=options["threads"], context=options["context"]
    ) as model:
        empty = model.snapshot()
        for line in sys.stdin:
            request = json.loads(line)
            answer: dict[str, Any] = {}
            for kind, run in (("prompt", prompt), ("generate", generate)):
                if kind in request:
                    model.restore(empty)
                    answer = {"tokens": request[kind], "seconds": run(model, request[kind])}
            print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
