"""The simulated cache against the engine's own counters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import finished

import edgemoe
from edgemoe.formats.pack import Pack
from edgemoe.model_files import bundled_model
from edgemoe.profiling import read_trace
from edgemoe.profiling.simulate import simulate_engine

try:
    MODEL: Path | None = bundled_model()
except edgemoe.SourceError:
    MODEL = None


@pytest.mark.skipif(MODEL is None, reason="no bundled model")
def test_the_simulated_counters_are_the_engines(tmp_path: Path) -> None:
    assert MODEL is not None
    with pytest.raises(edgemoe.MemoryBudgetError) as caught:
        edgemoe.load(MODEL, memory=1_000_000)
    least = re.search(r"least that works is (\d+)MB", str(caught.value))
    assert least is not None
    memory = (int(least[1]) + 4) * 1_000_000
    with edgemoe.load(MODEL, memory=memory, eviction="lru", prefetch=False, threads=1) as model:
        assert model.budget.expert_slots < sum(layer.experts for layer in model.spec.layers)
        prompt = model.tokenizer.encode("It was a bright cold day")
        with model.trace(tmp_path / "trace"):
            result = finished(model.generate(prompt, max_tokens=60, temperature=0, ignore_eos=True))
        counters, slots = result.counters, model.budget.expert_slots
    trace = read_trace(tmp_path / "trace")
    passes = [len(prompt)] + [1] * (trace.tokens - len(prompt))
    (found,) = simulate_engine(trace, [slots], passes=passes)
    assert (found.experts_requested, found.experts_hit) == (counters.experts_requested, counters.experts_hit)
    # The simulation counts experts. At full width all levels of one come and leave together.
    levels = len(Pack.open(MODEL).index.experts[0].levels)
    assert levels * found.sections_read == counters.sections_read
    assert levels * found.evictions == counters.evictions
    assert found.evictions > 0
