"""The profile of a trace, its report and the command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgemoe.cli import main
from edgemoe.profiling import Trace, hit_rates, sch_fixed, sch_future, srp
from edgemoe.profiling.analysis import RATIOS, profile, slots_at
from edgemoe.profiling.metrics import affinity, bootstrap_interval, bootstrap_srp, recall
from edgemoe.profiling.report import to_html, to_json, verdict
from edgemoe.profiling.simulate import simulate_engine

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_trace(texts: int = 6, tokens: int = 40, parts: int = 2, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    experts, top_k = (0, 16, 10), (0, 3, 2)
    columns = []
    for count, k in zip(experts[1:], top_k[1:], strict=True):
        drift = np.cumsum(rng.normal(size=(texts, tokens, count)), 1) * 0.3 + rng.normal(size=(texts, tokens, count))
        columns.append(np.argsort(-drift, axis=2)[:, :, :k].reshape(texts * tokens, k))
    return Trace(
        "a <model> & more",
        "a test",
        experts,
        top_k,
        tuple(f"part {i}" for i in range(parts)),
        np.repeat(np.arange(texts) * parts // texts, tokens).astype(np.int32),
        np.tile(np.arange(tokens), texts).astype(np.int32),
        np.concatenate(columns, axis=1).astype(np.uint16),
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_one_text_gives_what_the_plain_functions_give(threads: int) -> None:
    trace = make_trace(texts=1, tokens=90, parts=1)
    result = profile(trace, threads=threads)
    assert [score.length for score in result.scores] == [4, 16, 64]
    for report, layer in zip(result.layers, (1, 2), strict=True):
        picks, experts = trace.layer_picks(layer), trace.experts[layer]
        slots = [slots_at(ratio, trace.top_k[layer], experts) - 1 for ratio in RATIOS]
        for policy in ("lru", "lfu", "belady"):
            assert report.hit_rates[policy] == hit_rates(picks, experts, policy).tolist()
        for score in report.scores:
            assert (score.srp, score.rho) == srp(picks, experts, score.length)
            assert score.sch_fixed == sch_fixed(picks, experts, score.length)[slots].tolist()
            assert score.sch_future == sch_future(picks, experts, score.length)[slots].tolist()
            assert score.srp_interval is None
        assert sum(report.load) == pytest.approx(trace.top_k[layer])
    # One cache for all layers sees the picks of all layers, experts numbered through.
    both = trace.ids.astype(np.int64)
    both[:, 3:] += 16
    expected = hit_rates(both, 26, "lru")
    assert all(rate == expected[int(slots) - 1] for slots, rate in result.shared["lru"])
    assert result.scores[1].sch_future == sch_future(both, 26, 16)[[slots_at(r, 5, 26) - 1 for r in RATIOS]].tolist()


def test_texts_are_pooled_and_never_run_into_each_other() -> None:
    trace = make_trace()
    result = profile(trace, lengths=[4, 16])
    layer, picks = result.layers[0], trace.layer_picks(1)
    texts = [picks[begin : begin + 40] for begin in range(0, 240, 40)]
    expected = np.mean([hit_rates(text, 16, "belady") for text in texts], axis=0)
    np.testing.assert_allclose(layer.hit_rates["belady"], expected, rtol=1e-12)
    fixed = np.mean([sch_fixed(text, 16, 16) for text in texts], axis=0)
    slots = [slots_at(ratio, 3, 16) - 1 for ratio in RATIOS]
    np.testing.assert_allclose(layer.scores[1].sch_fixed, fixed[slots], rtol=1e-12)
    assert layer.scores[1].srp_interval is not None
    low, high = layer.scores[1].srp_interval
    assert low < high
    assert [part.tokens for part in result.parts] == [120, 120]
    assert result.distances[0][0] == 0
    assert 0 < result.distances[0][1] == result.distances[1][0] < 1


def test_parts_may_alternate() -> None:
    trace = make_trace(texts=4)
    mixed = Trace(
        trace.model,
        trace.source,
        trace.experts,
        trace.top_k,
        trace.parts,
        np.repeat([0, 1, 0, 1], 40).astype(np.int32),
        trace.position,
        trace.ids,
    )
    result = profile(mixed, lengths=[4])
    texts = [mixed.layer_picks(1)[begin : begin + 40] for begin in range(0, 160, 40)]
    expected = np.mean([hit_rates(text, 16, "lru") for text in texts], axis=0)
    np.testing.assert_allclose(result.layers[0].hit_rates["lru"], expected, rtol=1e-12)
    assert [part.tokens for part in result.parts] == [80, 80]


def test_engine_counters_and_bytes() -> None:
    trace = make_trace()
    result = profile(trace, expert_bytes=1000)
    slots = [int(point["slots"]) for point in result.engine]
    assert slots[0] == 3
    assert slots[-1] == 26
    for point, counters in zip(result.engine, simulate_engine(trace, slots, expert_bytes=1000), strict=True):
        assert point["hit_rate"] == counters.hit_rate
        assert point["bytes_read_per_token"] == counters.bytes_read_per_token


def test_next_layer_and_predictions() -> None:
    trace = make_trace(texts=2, tokens=60, parts=1)
    trace.ids[:, 3:] = trace.ids[:, :2] % 10
    trace.ids[:, 4] = (trace.ids[:, 3] + 1) % 10
    guesses = trace.ids.copy()
    guesses[:, :3] = 0xFFFF
    guesses[::2, 3] = 11
    known = Trace(
        trace.model, "", trace.experts, trace.top_k, trace.parts, trace.part, trace.position, trace.ids, None, guesses
    )
    result = profile(known, lengths=[4])
    table = affinity(trace.layer_picks(1)[:60], 16, trace.layer_picks(2)[:60], 10)
    guess = np.argsort(-table[trace.layer_picks(1)[60:]].sum(axis=1), axis=1)[:, :2]
    assert result.layers[1].next_layer == recall(trace.layer_picks(2)[60:], guess)
    assert result.layers[0].next_layer is None
    assert result.layers[0].predicted is None
    assert result.layers[1].predicted == 0.75


def test_bootstrap_is_the_basic_interval() -> None:
    rng = np.random.default_rng(0)
    hits, sizes = rng.integers(20, 60, (30, 2)), np.full(30, 100)
    low, high = bootstrap_interval(hits, sizes, resamples=4000)
    mean = hits.sum(axis=0) / sizes.sum()
    spread = 1.96 * (hits / 100).std(axis=0) / np.sqrt(30)
    np.testing.assert_allclose(low, mean - spread, atol=0.006)
    np.testing.assert_allclose(high, mean + spread, atol=0.006)
    same = np.tile(np.array([50, 30, 20]), (5, 1))
    score_low, score_high = bootstrap_srp(same)
    assert score_low == score_high == 2 * 70 / (2 * 50 + 70)


def test_a_trace_shorter_than_any_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than any segment"):
        profile(make_trace(texts=2, tokens=3))


def test_verdicts_are_words() -> None:
    local = verdict(profile(make_trace()))
    assert "suits offloading" in local[0]
    even = make_trace()
    even.ids[:, :3] = np.argsort(np.random.default_rng(1).random((240, 16)), axis=1)[:, :3]
    assert all(line.endswith(".") for line in local + verdict(profile(even)))


@pytest.fixture(name="trace_file")
def _trace_file(tmp_path: Path) -> Path:
    make_trace().save(tmp_path / "trace")
    return tmp_path / "trace"


def test_the_command(trace_file: Path) -> None:
    run = CliRunner().invoke(main, ["profile", str(trace_file), "--expert-size", "2MB"], standalone_mode=False)
    assert run.exception is None
    assert "suits offloading" in run.output
    assert "bytes per token" in run.output
    run = CliRunner().invoke(main, ["profile", str(trace_file), "--json"], standalone_mode=False)
    data = json.loads(run.stdout)
    assert data["experts"] == [16, 10]
    assert data["verdict"]
    assert data["ratios"] == list(RATIOS)


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"hello")
    run = CliRunner().invoke(main, ["profile", str(tmp_path / "t")])
    assert run.exit_code == 1
    assert run.stderr == f"edgemoe: error: {tmp_path / 't'}: not a routing trace\n"
    run = CliRunner().invoke(main, ["profile", str(tmp_path)])
    assert "--top-k" in run.stderr


def test_the_page_stands_alone_and_escapes(trace_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    run = CliRunner().invoke(main, ["profile", str(trace_file), "--html", str(page)], standalone_mode=False)
    assert run.exception is None
    text = page.read_text()
    assert "a &lt;model&gt; &amp; more" in text
    assert "<model>" not in text
    assert not re.search(r"""(src|href)=|url\(|@import|https?://""", text)
    assert "prefers-color-scheme: dark" in text
    data = re.search(r'<script type="application/json" id="profile">(.*)</script>', text)
    assert data is not None
    assert json.loads(data[1])["model"] == "a <model> & more"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_the_page_without_overflow(tmp_path: Path, width: int) -> None:
    page = tmp_path / "report.html"
    result = profile(make_trace(), expert_bytes=2_500_000)
    assert json.loads(json.dumps(to_json(result)))
    # The page is shown in a frame: a window of a browser without a head has a least width of its own.
    probe = """<script>addEventListener("load", () => {
        const root = document.documentElement;
        document.title = [root.scrollWidth, root.clientWidth, document.querySelectorAll("polyline").length].join(" ");
        parent.postMessage(document.title, "*");
    })</script>"""
    page.write_text(to_html(result).replace("</body>", probe + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="report.html" style="width:{width}px;height:800px;border:0"></iframe><p id="out"></p>'
        '<script>addEventListener("message", (e) => { document.getElementById("out").textContent = e.data; })</script>'
    )
    assert CHROMIUM is not None
    run = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"),
            *(f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    out = re.search(r'<p id="out">(\d+) (\d+) (\d+)</p>', run.stdout)
    assert out is not None, run.stdout[-2000:] + run.stderr[-2000:]
    scroll, client, curves = map(int, out.groups())
    assert width - 20 <= client <= width  # a scroll bar may stand in it
    assert scroll <= client
    assert curves == 6
