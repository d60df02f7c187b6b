"""A child of the benchmarks: runs a model with edgemoe on given tokens and prints one line of JSON.

Its argument is JSON too: `job`, and the options of that job's function.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import edgemoe


def sequence(path: str, text: str, tokens: int, trace: str, threads: int, context: int) -> dict[str, Any]:
    """A text of the model's own, `tokens` token ids; which experts they take goes to the file `trace`."""
    with edgemoe.load(path, gpu="none", threads=threads, context=context) as model:
        begin = model.tokenizer.encode(text)
        with model.trace(trace):
            # One more: a token's routing is known when the next one is computed.
            generation = model.generate(begin, max_tokens=max(1, tokens - len(begin)) + 1, ignore_eos=True, seed=1)
            for _ in generation:
                pass
        return {"tokens": [*begin, *generation.result.tokens][:tokens]}


def plan(path: str, threads: int, context: int) -> dict[str, Any]:
    """The bytes of each part of the budget when nothing has to give way."""
    with edgemoe.load(path, gpu="none", memory=1 << 50, threads=threads, context=context) as model:
        budget = model.budget
        return {
            "rest": budget.base + budget.dense + budget.state + budget.scratch,
            "slot": budget.slot_bytes,
            "experts": budget.expert_slots,
            "top_k": sum(layer.top_k for layer in model.spec.layers),
            "layer_experts": [layer.experts for layer in model.spec.layers],
        }


WARM_TOKENS = 16
"""Whose logits are in memory at a time before a run with everything held."""


def decode(
    path: str,
    memory: int | None,
    threads: int,
    context: int,
    prompt: list[int],
    tokens: list[int],
    eviction: str,
    prefetch: bool,
    warm: bool = False,
    quality: str = "exact",
) -> dict[str, Any]:
    """Computes the prompt, then one token at a time. Sampling is not part of it.

    warm: everything is computed once before, so that a memory that holds all experts does hold those that are used.
    """
    begin = time.perf_counter()
    with edgemoe.load(
        path,
        gpu="none",
        memory=memory,
        threads=threads,
        context=context,
        eviction=eviction,
        prefetch=prefetch,
        quality=quality,
    ) as model:
        load_seconds = time.perf_counter() - begin
        if warm:
            empty, everything = model.snapshot(), [*prompt, *tokens]
            for first in range(0, len(everything), WARM_TOKENS):
                part = everything[first : first + WARM_TOKENS]
                # The last layer only works on tokens whose logits are asked for.
                model.forward(part, np.arange(first, first + len(part)), np.zeros(len(part)), range(len(part)))
            model.restore(empty)
        start, digest = _counters(model), hashlib.sha256()
        zeros, last = np.zeros(len(prompt), np.int32), np.asarray([len(prompt) - 1], np.int32)
        begin = time.perf_counter()
        digest.update(model.forward(prompt, np.arange(len(prompt)), zeros, last).tobytes())
        prompt_seconds = time.perf_counter() - begin
        before, seconds = _counters(model), []
        for position, token in enumerate(tokens, len(prompt)):
            begin = time.perf_counter()
            logits = model.forward([token], [position], [0], [0])
            seconds.append(time.perf_counter() - begin)
            digest.update(logits.tobytes())
        after = _counters(model)
        budget = model.budget
        return {
            "load_seconds": load_seconds,
            "prompt_seconds": prompt_seconds,
            "prompt": {name: before[name] - start[name] for name in before},
            "token_seconds": seconds,
            "decode": {name: after[name] - before[name] for name in after},
            "mean_bits": model.counters()["mean_bits"],
            "logits_sha256": digest.hexdigest(),
            "expert_slots": budget.expert_slots,
            "slot_bytes": budget.slot_bytes,
            "chunk": budget.chunk,
            "isa": model.isa,
            "rss_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _counters(model: edgemoe.Model) -> dict[str, float]:
    """Sums since the model was loaded."""
    stats = model.counters()
    names = ("experts_requested", "experts_hit", "sections_read", "bytes_read", "stall_ms", "compute_ms", "evictions")
    names += ("prefetch_issued", "prefetch_used", "prefetch_late", "prefetch_wasted")
    sums = {name: float(stats[name]) for name in names}
    sums["read_seconds"] = stats["bytes_read"] / (1e6 * stats["disk_mb_s"]) if stats["disk_mb_s"] else 0.0
    return sums | {"storage_bytes": storage_bytes()}


def storage_bytes() -> float:
    """Bytes that this process has had read from storage so far (Linux)."""
    if platform.system() != "Linux":
        return 0.0
    lines = Path("/proc/self/io").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    jobs = {"sequence": sequence, "plan": plan, "decode": decode}
    print(json.dumps(jobs[arguments.pop("job")](**arguments)))
