"""A profile for people: a verdict in words, tables for the terminal, and one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from edgemoe.memory import format_size
from edgemoe.printable import printable
from edgemoe.profiling.analysis import RATIOS, Profile, Scores

# SRP at 16 tokens of published models (arXiv 2505.16056, table 1), to compare with.
PUBLISHED = {
    "LLaMA-MoE-v2": 0.7816,
    "Yuan2.0-M32": 0.6348,
    "PowerMoE-3B": 0.5517,
    "Qwen3-30B-A3B": 0.5414,
    "Phi-3.5-MoE": 0.5198,
    "OLMoE-1B-7B": 0.5091,
    "Mixtral-8x7B": 0.4936,
    "JetMoE-8B": 0.4745,
    "LLaMA-MoE-v1": 0.4529,
    "XVERSE-MoE": 0.3858,
    "Jamba-Mini": 0.3808,
    "DeepSeek-V2-Lite": 0.3792,
    "DeepSeekMoE-16B": 0.3694,
    "Qwen2-57B-A14B": 0.3674,
    "Qwen1.5-MoE-A2.7B": 0.3071,
    "OpenMoE-8B": 0.2877,
}


def to_json(profile: Profile) -> dict[str, Any]:
    """Everything in the profile as plain values, the verdict with it."""
    return {**dataclasses.asdict(profile), "ratios": list(RATIOS), "verdict": verdict(profile)}


def verdict(profile: Profile) -> list[str]:
    """What the figures mean, in sentences."""
    score = middle(profile)
    name, value = min(PUBLISHED.items(), key=lambda item: abs(item[1] - score.srp))
    if score.srp > 0.48:
        suits = "suits offloading well: consecutive tokens use largely the same experts"
    elif score.srp > 0.35:
        suits = "suits offloading moderately: consecutive tokens share some of their experts"
    else:
        suits = "suits offloading poorly: consecutive tokens use mostly different experts"
    lines = [
        f"{profile.model or 'The model'} {suits} (SRP {score.srp:.3f} over {score.length} tokens, "
        f"like {name} with {value:.3f})."
    ]
    working, total = profile.active_experts, profile.total_experts
    if "lru" in profile.shared and total > working:
        slots = min(2 * working, total)
        recent, best = profile.shared_rate("lru", slots), profile.shared_rate("belady", slots)
        lines.append(
            f"A cache of {slots} experts ({slots / total:.0%} of all, twice what one token uses) serves {recent:.0%} "
            f"of the requests if it keeps the most recently used, and {best:.0%} if it knew the future."
        )
    recent, frequent = profile.mean_rate("lru", 2), profile.mean_rate("lfu", 2)
    if abs(recent - frequent) > 0.02:
        better, worse = ("recency", "frequency") if recent > frequent else ("frequency", "recency")
        lines.append(
            f"Keep by {better}, not by {worse}: {max(recent, frequent):.0%} against {min(recent, frequent):.0%}."
        )
    small = [point for point in profile.engine if point["hit_rate"] < 0.02]
    if small:
        lines.append(
            f"Below about {working} experts in memory, one token's own experts push each other out: a cache of "
            f"{int(small[-1]['slots'])} serves practically nothing."
        )
    unused = sum(share == 0 for layer in profile.layers for share in layer.load)
    if unused:
        lines.append(f"{unused} of {total} experts were never used in these texts.")
    if len(profile.parts) > 1:
        low, high = (f(profile.parts, key=lambda part: part.srp[score.length]) for f in (min, max))
        if high.srp[score.length] - low.srp[score.length] > 0.02:
            lines.append(
                f"The kind of text matters: SRP {high.srp[score.length]:.3f} on {high.name}, "
                f"{low.srp[score.length]:.3f} on {low.name}."
            )
    if profile.tokens < 2000:
        lines.append(f"{profile.tokens} tokens are few; take the figures as a first impression.")
    return lines


def middle(profile: Profile) -> Scores:
    """The scores at 16 tokens, or at the longest segment below."""
    return max((s for s in profile.scores if s.length <= 16), key=lambda s: s.length, default=profile.scores[0])


def _texts(profile: Profile) -> str:
    return "1 text" if profile.texts == 1 else f"{profile.texts:,} texts"


def terminal(profile: Profile) -> Group:
    """The summary that `edgemoe profile` prints."""
    head = Text()
    head.append(printable(profile.model) or "model", style="bold")
    head.append(
        f": {profile.tokens:,} tokens in {_texts(profile)}, {len(profile.layers)} layers with experts, "
        f"{_span(profile.experts)} experts, {_span(profile.top_k)} per token\n"
    )
    for line in verdict(profile):
        head.append(f"\n{printable(line)}")
    head.append("\n")

    segments = Table(title="Local routing consistency", title_justify="left", title_style="bold")
    segments.add_column("segment", justify="right")
    segments.add_column("SRP")
    segments.add_column("rho", justify="right")
    for ratio in RATIOS:
        segments.add_column(f"SCH {ratio:g}x", justify="right")
    for score in profile.scores:
        interval = f" ({score.srp_interval[0]:.3f}-{score.srp_interval[1]:.3f})" if score.srp_interval else ""
        rates = score.sch_future or score.sch_fixed
        segments.add_row(
            f"{score.length}", f"{score.srp:.3f}{interval}", f"{score.rho:.2f}", *(f"{rate:.1%}" for rate in rates)
        )

    caches = Table(title="Hit rate of a cache per layer", title_justify="left", title_style="bold")
    caches.add_column("policy")
    for ratio in RATIOS:
        caches.add_column(f"{ratio:g}x", justify="right")
    for policy, label in (("lru", "recently used"), ("lfu", "often used"), ("belady", "knows the future")):
        caches.add_row(label, *(f"{profile.mean_rate(policy, ratio):.1%}" for ratio in RATIOS))

    engine = Table(
        title=f"The engine's cache, all layers together ({profile.engine_tokens:,} tokens)",
        title_justify="left",
        title_style="bold",
    )
    for name in ("experts in memory", "of all", "hit rate", "reads per token"):
        engine.add_column(name, justify="right")
    if profile.expert_bytes:
        engine.add_column("memory", justify="right")
        engine.add_column("bytes per token", justify="right")
    for point in profile.engine:
        row = [
            f"{int(point['slots'])}",
            f"{point['slots'] / profile.total_experts:.0%}",
            f"{point['hit_rate']:.1%}",
            f"{point['experts_read_per_token']:.1f}",
        ]
        if profile.expert_bytes:
            row += [format_size(point["slots"] * profile.expert_bytes), format_size(point["bytes_read_per_token"])]
        engine.add_row(*row)

    pieces: list[Any] = [head, segments, caches, engine]
    if len(profile.parts) > 1:
        parts = Table(title="Kinds of text", title_justify="left", title_style="bold")
        for name in ("part", "tokens", f"SRP {middle(profile).length}", "LRU 2x"):
            parts.add_column(name, justify="left" if name == "part" else "right")
        for part in profile.parts:
            parts.add_row(
                Text(printable(part.name)),
                f"{part.tokens:,}",
                f"{part.srp[middle(profile).length]:.3f}",
                f"{part.lru[RATIOS.index(2.0)]:.1%}",
            )
        pieces.append(parts)
    pieces += [Text(note, style="dim") for note in profile.notes]
    return Group(*pieces)


def _span(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


# -- HTML -----------------------------------------------------------------------------------------------------------

_STYLE = """
:root { --ink: #1b1f24; --soft: #5b6570; --line: #d7dce1; --paper: #ffffff; --panel: #f5f7f9;
  --a: #1f6feb; --b: #c2571a; --c: #1a7f4b; --heat: 31, 111, 235; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #343b43; --paper: #14181c;
  --panel: #1d2329; --a: #6aa8ff; --b: #f0935a; --c: #5fcf93; --heat: 106, 168, 255; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 36px 0 4px; }
p { margin: 4px 0 12px; }
.soft { color: var(--soft); font-size: .9rem; }
.verdict { background: var(--panel); border-left: 4px solid var(--a); padding: 12px 16px; margin: 16px 0; }
.verdict p { margin: 4px 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 8px 32px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--soft); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.entry { white-space: nowrap; }
.key { display: inline-block; width: 14px; height: 3px; vertical-align: middle; margin: 0 6px 0 14px; }
"""

_COLOURS = {
    "recently used": "var(--a)",
    "knows the future": "var(--c)",
    "the engine's own counters": "var(--b)",
    "SRP": "var(--b)",
}


def to_html(profile: Profile) -> str:
    """One page, nothing loaded from anywhere; light and dark."""
    title = html.escape(profile.model or "model")
    score = middle(profile)
    body = [
        f"<h1>{title}</h1>",
        f'<p class="soft">Routing of {profile.tokens:,} tokens in {_texts(profile)}; '
        f"{len(profile.layers)} layers with {_span(profile.experts)} experts, {_span(profile.top_k)} per token. "
        f"{html.escape(profile.source)}</p>",
        '<div class="verdict">' + "".join(f"<p>{html.escape(line)}</p>" for line in verdict(profile)) + "</div>",
        '<div class="grid"><section>',
    ]
    if profile.shared:
        total = profile.total_experts
        curves = [
            (label, [(slots / total, rate) for slots, rate in profile.shared[policy]])
            for policy, label in (("lru", "recently used"), ("belady", "knows the future"))
        ]
        curves.append(
            ("the engine's own counters", [(point["slots"] / total, point["hit_rate"]) for point in profile.engine])
        )
        body += [
            "<h2>One cache for all layers</h2>",
            '<p class="soft">Hit rate by the share of all experts in memory. The mark is what one token uses.</p>',
            _lines(curves, "experts in memory", mark=profile.active_experts / total),
        ]
    body += ["</section><section>", "<h2>Layers</h2>"]
    body += [
        f'<p class="soft">SRP over {score.length} tokens, and hit rates of caches of twice the active experts.</p>',
        _lines(
            [
                (
                    "SRP",
                    [
                        (layer.layer, s.srp)
                        for layer in profile.layers
                        for s in layer.scores
                        if s.length == score.length
                    ],
                ),
                ("recently used", [(layer.layer, _rate(layer, "lru")) for layer in profile.layers]),
                ("knows the future", [(layer.layer, _rate(layer, "belady")) for layer in profile.layers]),
            ],
            "layer",
            percent=False,
        ),
        "</section></div>",
        "<h2>Segments</h2>",
        '<p class="soft">SRP: how well the experts of a stretch can be told from one choice for all; rho: '
        "the cache that asks for, in units of the experts one token uses. SCH: hit rate of a cache of so many times "
        f"the experts one token uses that knows the segment. From {profile.sampled} texts.</p>",
        _table(
            ["tokens", "SRP", "95 % interval", "rho", *(f"SCH {ratio:g}x" for ratio in RATIOS)],
            [
                [
                    str(s.length),
                    f"{s.srp:.3f}",
                    f"{s.srp_interval[0]:.3f} to {s.srp_interval[1]:.3f}" if s.srp_interval else "",
                    f"{s.rho:.2f}",
                    *(f"{rate:.1%}" for rate in s.sch_future or s.sch_fixed),
                ]
                for s in profile.scores
            ],
        ),
        "<h2>Memory and reads</h2>",
        f'<p class="soft">The engine\'s cache over the first {profile.engine_tokens:,} tokens, one at a time.</p>',
        _table(
            ["experts in memory", "of all", "hit rate", "reads per token"]
            + (["memory", "bytes per token"] if profile.expert_bytes else []),
            [
                [
                    f"{int(point['slots']):,}",
                    f"{point['slots'] / profile.total_experts:.0%}",
                    f"{point['hit_rate']:.1%}",
                    f"{point['experts_read_per_token']:.1f}",
                ]
                + (
                    [
                        format_size(point["slots"] * profile.expert_bytes),
                        format_size(point["bytes_read_per_token"]),
                    ]
                    if profile.expert_bytes
                    else []
                )
                for point in profile.engine
            ],
        ),
        "<h2>Load</h2>",
        '<p class="soft">Each row is a layer, each cell an expert, most used first; darker: more tokens use it.</p>',
        _heat(
            [sorted(layer.load, reverse=True) for layer in profile.layers], [layer.layer for layer in profile.layers]
        ),
    ]
    if len(profile.parts) > 1:
        names = [part.name for part in profile.parts]
        body += [
            "<h2>Kinds of text</h2>",
            _table(
                ["part", "tokens", f"SRP {score.length}", *(f"LRU {ratio:g}x" for ratio in RATIOS)],
                [
                    [
                        part.name,
                        f"{part.tokens:,}",
                        f"{part.srp[score.length]:.3f}",
                        *(f"{rate:.1%}" for rate in part.lru),
                    ]
                    for part in profile.parts
                ],
            ),
            '<p class="soft">How differently two kinds use the experts (0 the same, 1 none in common):</p>',
            _table(
                ["", *names],
                [
                    [name, *(f"{value:.2f}" for value in row)]
                    for name, row in zip(names, profile.distances, strict=True)
                ],
            ),
        ]
    body += [
        "<h2>By layer</h2>",
        '<p class="soft">Hit rates of caches of twice the active experts; and how many of the picks could be told from '
        "the token before, from the picks of the layer before, and by the layer's router one layer early.</p>",
        _table(
            [
                "layer",
                f"SRP {score.length}",
                "LRU 2x",
                "LFU 2x",
                "best 2x",
                "as the token before",
                "from the layer before",
                "by its router, early",
            ],
            [
                [
                    str(layer.layer),
                    f"{next(s.srp for s in layer.scores if s.length == score.length):.3f}",
                    *(f"{_rate(layer, policy):.1%}" for policy in ("lru", "lfu", "belady")),
                    f"{layer.repetition:.1%}",
                    "" if layer.next_layer is None else f"{layer.next_layer:.1%}",
                    "" if layer.predicted is None else f"{layer.predicted:.1%}",
                ]
                for layer in profile.layers
            ],
        ),
    ]
    body += [f'<p class="soft">{html.escape(note)}</p>' for note in profile.notes]
    data = json.dumps(to_json(profile), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}: routing profile</title><style>{_STYLE}</style></head><body><main>"
        + "\n".join(body)
        + f'</main><script type="application/json" id="profile">{data}</script></body></html>\n'
    )


def _rate(layer: Any, policy: str) -> float:
    slots = max(1, min(2 * layer.k, layer.experts))
    return float(layer.hit_rates[policy][slots - 1])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _lines(
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    label: str,
    *,
    mark: float | None = None,
    percent: bool = True,
) -> str:
    """Curves of y in 0..1 over x; x from 0 to 1 in percent, or between the first and the last number."""
    width, height, left, right, top, bottom = 480, 280, 46, 20, 10, 38
    xs = [x for _, points in curves for x, _ in points]
    low, high = (0.0, 1.0) if percent else (min(xs), max(max(xs), min(xs) + 1))
    ys = [y for _, points in curves for _, y in points]
    floor = min(0.0, *ys)

    def at(x: float, y: float) -> str:
        across = left + (x - low) / (high - low) * (width - left - right)
        return f"{across:.1f},{top + (1 - (y - floor) / (1 - floor)) * (height - top - bottom):.1f}"

    parts = []
    for step in range(6):
        y = at(low, step / 5).split(",")[1]
        parts.append(f'<line x1="{left}" y1="{y}" x2="{width - right}" y2="{y}" stroke="var(--line)"/>')
        name = f"{step * 20} %" if percent else f"{step / 5:.1f}"
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{name}</text>')
    ticks = [low + (high - low) * step / 4 for step in range(5)]
    for value in ticks if percent else sorted({float(round(tick)) for tick in ticks}):
        x = at(value, 0).split(",")[0]
        name = f"{value:.0%}".replace("%", " %") if percent else f"{value:.0f}"
        parts.append(f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{name}</text>')
    parts.append(
        f'<text x="{(left + width) / 2:.0f}" y="{height - 3}" text-anchor="middle">{html.escape(label)}</text>'
    )
    if mark is not None:
        x = at(mark, 0).split(",")[0]
        parts.append(
            f'<line x1="{x}" y1="{top}" x2="{x}" y2="{height - bottom}" stroke="var(--soft)" stroke-dasharray="3 3"/>'
        )
    for name, points in curves:
        colour = _COLOURS[name]
        path = " ".join(at(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(points) == 1:
            x, y = at(*points[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
    key = "".join(
        f'<span class="entry"><span class="key" style="background:{_COLOURS[name]}"></span>{html.escape(name)}</span> '
        for name, _ in curves
    )
    names = html.escape(", ".join(name for name, _ in curves))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{names} over {html.escape(label)}">'
        + "".join(parts)
        + f'</svg><p class="soft">{key}</p>'
    )


def _heat(rows: Sequence[Sequence[float]], names: Sequence[int]) -> str:
    """Rows of cells in 0.., the largest value of all darkest; neighbours of the same shade are one rectangle."""
    widest = max(len(row) for row in rows)
    largest = max(max(row) for row in rows) or 1.0
    height = max(4, min(14, 420 // len(rows)))
    parts = []
    for number, row in enumerate(rows):
        begin = 0
        shades = [round(20 * (value / largest) ** 0.5) for value in row]
        for i in range(1, len(row) + 1):
            if i < len(row) and shades[i] == shades[begin]:
                continue
            x, size = 34 + begin * 900 / widest, (i - begin) * 900 / widest
            parts.append(
                f'<rect x="{x:.1f}" y="{number * height}" width="{size + 0.3:.1f}" height="{height - 0.5}" '
                f'fill="rgba(var(--heat),{max(shades[begin], 1) / 20:g})"/>'
            )
            begin = i
        if number % max(1, 14 // height) == 0:
            parts.append(f'<text x="28" y="{number * height + height - 1}" text-anchor="end">{names[number]}</text>')
    return (
        f'<svg viewBox="0 0 936 {len(rows) * height + 2}" role="img" aria-label="use of the experts by layer">'
        + "".join(parts)
        + "</svg>"
    )
