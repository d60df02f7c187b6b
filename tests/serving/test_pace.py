"""Streams side by side or by turns: what is faster is chosen, and nobody waits too long."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgemoe.serving.pace import SLICE, Pace
from edgemoe.serving.session import LogitsDrawer, Session


def streams(count: int) -> list[Session]:
    sessions = [Session([1], LogitsDrawer()) for _ in range(count)]
    for number, session in enumerate(sessions, 1):
        session.number = number
    return sessions


def run(pace: Pace, sessions: list[Session], seconds: Callable[[int], float], steps: int) -> list[list[int]]:
    """Who decoded in each step, where one of `width` streams takes seconds(width)."""
    groups = []
    for _ in range(steps):
        chosen = pace.choose(sessions)
        groups.append([session.number for session in chosen])
        pace.measured(len(chosen), seconds(len(chosen)))
    return groups


@pytest.mark.parametrize("count", [2, 5, 16])
def test_streams_go_side_by_side_where_that_is_faster(count: int) -> None:
    groups = run(Pace(5), streams(count), lambda width: 0.01 + 0.001 * width, 2000)
    together = sum(len(group) == count for group in groups)
    assert together > 0.9 * len(groups)
    assert len(groups[-1]) == count


@pytest.mark.parametrize("count", [2, 5, 16])
def test_streams_take_turns_where_that_is_faster(count: int) -> None:
    groups = run(Pace(5), streams(count), lambda width: 0.001 * width**1.3, 4000)
    assert sum(len(group) == 1 for group in groups) > 0.9 * len(groups)
    tokens = [sum(group.count(number) for group in groups) for number in range(1, count + 1)]
    assert max(tokens) - min(tokens) < 3 * SLICE


def test_a_width_between_may_be_the_best() -> None:
    seconds = {1: 0.01, 4: 0.02, 16: 0.2}
    groups = run(Pace(60), streams(16), lambda width: seconds[width], 3000)
    assert sum(len(group) == 4 for group in groups) > 0.9 * len(groups)


def test_nobody_pauses_longer_than_allowed() -> None:
    """Turns are faster, but 8 turns of 32 tokens would take 25 seconds."""
    groups = run(Pace(2), streams(8), lambda width: 0.1 * width**1.3, 3000)
    last = dict.fromkeys(range(1, 9), 0.0)
    now, longest = 0.0, 0.0
    for step, group in enumerate(groups):
        now += 0.1 * len(group) ** 1.3
        for number in group:
            if step > 200:  # once it is known how long a step takes
                longest = max(longest, now - last[number])
            last[number] = now
    assert longest < 2 * 1.7  # the step itself included


def test_streams_come_and_go() -> None:
    pace, sessions = Pace(5), streams(6)
    for count in (6, 3, 1, 5, 2, 6):
        for group in run(pace, sessions[:count], lambda width: 0.001 * width**1.3, 200):
            assert group and set(group) <= set(range(1, count + 1))
