"""Figures of a server in Prometheus's text format."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from edgemoe.serving.generation import GenerationResult

_TTFT_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_SPEED_BOUNDS = (0.3, 1.0, 3.0, 10.0, 20.0, 30.0, 50.0, 100.0, 200.0, 500.0)


class Histogram:
    """How many values lie up to each bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterable[str]:
        bounds = [*map(str, self._bounds), "+Inf"]
        sums = list(itertools.accumulate(self._counts))
        for bound, count in zip(bounds, sums, strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self._sum!r}"
        yield f"{name}_count {sums[-1]}"


class Metrics:
    """What a server counts itself; the engine's counters are the model's."""

    def __init__(self) -> None:
        self.running = 0  # answers that are being made, or wait for their turn
        self.prompt_tokens = 0
        self.computed_prompt_tokens = 0
        self.generated_tokens = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self._ends: Counter[str] = Counter()
        self._ttft = Histogram(_TTFT_BOUNDS)
        self._speed = Histogram(_SPEED_BOUNDS)

    def count_request(self, path: str, status: int) -> None:
        self._requests[path, status] += 1

    def count_answer(self, result: GenerationResult) -> None:
        """An answer is at its end, whichever."""
        self._ends[result.finish_reason or "cancelled"] += 1
        self.generated_tokens += result.generated_tokens
        if result.ttft_seconds is None:
            return
        self.prompt_tokens += result.prompt_tokens
        self.computed_prompt_tokens += result.computed_prompt_tokens
        self._ttft.add(result.ttft_seconds)
        if result.generated_tokens > 1 and result.seconds > 0:
            self._speed.add((result.generated_tokens - 1) / result.seconds)

    def text(
        self,
        counters: Mapping[str, float],
        status: Mapping[str, int],
        memory: Mapping[str, int],
        generated_tokens: int,
        device: Mapping[str, Any] | None = None,
    ) -> str:
        """counters: `Model.counters()`. status: `Model.status()`. memory: limit, peak and cache in bytes.
        generated_tokens: with those of answers that are not at their end. device: name, layers, experts and memory."""
        lines: list[str] = []

        def add(name: str, kind: str, text: str, *samples: str) -> None:
            lines.extend((f"# HELP edgemoe_{name} {text}", f"# TYPE edgemoe_{name} {kind}", *samples))

        def value(name: str, kind: str, text: str, number: float) -> None:
            add(name, kind, text, f"edgemoe_{name} {number!r}")

        requests = (
            f'edgemoe_requests_total{{path="{path}",status="{code}"}} {count}'
            for (path, code), count in sorted(self._requests.items())
        )
        ends = (f'edgemoe_answers_total{{reason="{name}"}} {count}' for name, count in sorted(self._ends.items()))
        add("requests_total", "counter", "Requests by path and status.", *requests)
        add("answers_total", "counter", "Answers by why they ended.", *ends)
        value("answers_running", "gauge", "Answers under way, waiting ones included.", self.running)
        for name, number in status.items():
            value(f"scheduler_{name}", "gauge", f"The scheduler's {name.replace('_', ' ')}.", number)
        value("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens)
        value("computed_prompt_tokens_total", "counter", "Those that were not known yet.", self.computed_prompt_tokens)
        value("generated_tokens_total", "counter", "Tokens of answers.", generated_tokens)
        add("ttft_seconds", "histogram", "Time to an answer's first token.", *self._ttft.lines("edgemoe_ttft_seconds"))
        speed = self._speed.lines("edgemoe_answer_tokens_per_second")
        add("answer_tokens_per_second", "histogram", "An answer's tokens after its first, per second.", *speed)
        busy = (counters["stall_ms"] + counters["compute_ms"]) / 1e3
        mean_speed = generated_tokens / busy if busy else 0.0
        value("tokens_per_second", "gauge", "Tokens of answers per second of the engine's work.", mean_speed)
        value("expert_requests_total", "counter", "Experts that layers asked for.", counters["experts_requested"])
        value("expert_hits_total", "counter", "Those that were in memory.", counters["experts_hit"])
        value("expert_hit_rate", "gauge", "Hits per request since the start.", counters["hit_rate"])
        value("read_bytes_total", "counter", "Bytes read from disk.", counters["bytes_read"])
        value("stall_seconds_total", "counter", "Time that passes waited for reads.", counters["stall_ms"] / 1e3)
        value("compute_seconds_total", "counter", "The rest of their time.", counters["compute_ms"] / 1e3)
        if device is not None:
            label = device["name"].replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
            info = f'edgemoe_device_info{{name="{label}"}} 1'
            add("device_info", "gauge", "What computes beside the processor.", info)
            value("device_layers", "gauge", "Layers that it computes; the head counts as one.", device["layers"])
            value("device_experts", "gauge", "Experts that its memory holds.", device["experts"])
            value("device_memory_bytes", "gauge", "Its memory that is taken.", device["memory"])
            value("device_hits_total", "counter", "Uses of experts in its memory.", counters["device_hits"])
            value("device_uploads_total", "counter", "Experts brought there.", counters["device_uploads"])
            value("device_upload_bytes_total", "counter", "Their bytes.", counters["device_upload_bytes"])
        for name, number in memory.items():
            value(f"memory_{name}_bytes", "gauge", f"Memory: {name}.", number)
        return "\n".join(lines) + "\n"
