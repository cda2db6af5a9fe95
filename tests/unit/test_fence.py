"""When a child is killed as silent, and when and whether it is started again; no process and no clock."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.fence import (
    LONGEST_PAUSE_S,
    PROBE_DEADLINE_S,
    PROBE_PERIOD_S,
    RESTART_WINDOW_S,
    Fence,
    Restarts,
)
from deploy.process_tree import Processes, children_of


def test_a_child_is_killed_once_it_has_been_silent_for_the_deadline() -> None:
    fence = Fence(5.0)
    assert [fence.is_due(is_good=False, passed_s=1.0) for _ in range(5)] == [False] * 4 + [True]


def test_a_good_answer_begins_the_count_anew() -> None:
    fence = Fence(5.0)
    for _ in range(10):
        assert not any(fence.is_due(is_good=False, passed_s=1.0) for _ in range(4))
        assert not fence.is_due(is_good=True, passed_s=1.0)


def test_a_launcher_that_was_away_does_not_hold_that_against_its_children() -> None:
    """Stopped for an hour, it finds its question unanswered: that is one question, not an hour of silence."""
    assert not Fence(60.0).is_due(is_good=False, passed_s=3600.0)


@given(st.floats(0.1, 600), st.lists(st.floats(0, 10), max_size=300))
def test_silence_is_never_overrated(deadline_s: float, passed: list[float]) -> None:
    fence = Fence(deadline_s)
    seen_s = 0.0
    for passed_s in passed:
        seen_s += passed_s
        if fence.is_due(is_good=False, passed_s=passed_s):
            assert seen_s >= deadline_s
            break
    else:
        assert sum(min(each, PROBE_PERIOD_S + PROBE_DEADLINE_S) for each in passed) < deadline_s


def test_the_pauses_grow_up_to_a_bound() -> None:
    restarts = Restarts(max_restarts=8)
    pauses = [restarts.pause_after(1.0) for _ in range(9)]
    assert pauses == [pytest.approx(each) for each in (0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0)] + [None]


def test_a_child_that_lives_for_a_while_is_started_again_for_ever() -> None:
    restarts = Restarts(max_restarts=1)
    assert {restarts.pause_after(RESTART_WINDOW_S + 1) for _ in range(100)} == {0.2}


def test_old_ends_are_forgotten_one_by_one() -> None:
    restarts = Restarts(max_restarts=2)
    pauses = [restarts.pause_after(lived_s) for lived_s in (1, 40, 40, 40, 25, 5)]
    assert pauses == [0.2, 0.4, 0.4, 0.4, 0.4, None]


@given(st.integers(0, 2000), st.lists(st.floats(0, 30), max_size=100))
def test_every_pause_is_bounded_and_the_limit_is_exact(max_restarts: int, lives_s: list[float]) -> None:
    """Against a recount from the times of the ends on the clock of the child's life."""
    restarts = Restarts(max_restarts)
    ends: list[float] = []
    for lived_s in lives_s:
        # In quarters of a second, so that the sums are exact.
        lived_s = round(lived_s * 4) / 4
        ends.append((ends[-1] if ends else 0.0) + lived_s)
        num_ends = sum(ends[-1] - end <= RESTART_WINDOW_S for end in ends)
        pause_s = restarts.pause_after(lived_s)
        if num_ends > max_restarts:
            assert pause_s is None
        else:
            assert pause_s == pytest.approx(min(0.2 * 2 ** (num_ends - 1), LONGEST_PAUSE_S))


def test_processes_are_seen_and_seen_to_be_gone() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    assert children_of(os.getpid()).count(pid) == 1
    assert children_of(pid) == []
    processes = Processes([pid])
    assert not processes.are_gone()
    os.close(writing)
    os.waitpid(pid, 0)
    assert processes.are_gone()
    processes.close()
    assert Processes([pid]).are_gone()
    assert children_of(pid) == []
