"""The circuit breaker's table, by a clock of the test's own."""

import pytest

from router.breaker import Breaker, BreakerState
from router.leg_run import leg_on
from router.worker import Worker

PAUSE_S = 5.0


class Clock:
    """Stands still until it is told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker(max_failures=3, pause_s=PAUSE_S, clock=clock)


def fail(breaker, times=1):
    for _ in range(times):
        breaker.failed(is_trial=breaker.begin())


def test_failures_in_a_row_open_it(breaker):
    fail(breaker, 2)
    assert breaker.lets_through
    fail(breaker)
    assert (breaker.state, breaker.lets_through) == (BreakerState.OPEN, False)


def test_a_success_begins_the_count_anew(breaker):
    for _ in range(3):
        fail(breaker, 2)
        breaker.succeeded(is_trial=breaker.begin())
    assert breaker.state is BreakerState.CLOSED


def test_a_leg_that_was_let_go_counts_for_nothing(breaker):
    fail(breaker, 2)
    breaker.let_go(is_trial=breaker.begin())
    assert breaker.state is BreakerState.CLOSED
    fail(breaker)
    assert breaker.state is BreakerState.OPEN


def test_after_the_pause_one_leg_is_tried(breaker, clock):
    fail(breaker, 3)
    clock.now += PAUSE_S - 0.1
    assert not breaker.lets_through
    clock.now += 0.1
    assert breaker.lets_through
    assert breaker.begin()
    assert (breaker.state, breaker.lets_through) == (BreakerState.HALF_OPEN, False)
    breaker.succeeded(is_trial=True)
    assert breaker.state is BreakerState.CLOSED
    fail(breaker, 2)
    assert breaker.lets_through


def test_a_failed_trial_is_another_pause(breaker, clock):
    fail(breaker, 3)
    clock.now += PAUSE_S
    fail(breaker)
    assert not breaker.lets_through
    clock.now += PAUSE_S
    assert breaker.lets_through


def test_a_trial_that_was_let_go_is_followed_by_another_at_once(breaker, clock):
    fail(breaker, 3)
    clock.now += PAUSE_S
    breaker.let_go(is_trial=breaker.begin())
    assert breaker.state is BreakerState.OPEN
    assert breaker.begin()


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "let_go"])
def test_legs_from_before_say_nothing(breaker, clock, outcome):
    """Legs that began while it was closed and end while it is open, or while the trial runs."""
    old = [breaker.begin(), breaker.begin()]
    fail(breaker, 3)
    getattr(breaker, outcome)(is_trial=old[0])
    assert breaker.state is BreakerState.OPEN
    clock.now += PAUSE_S
    breaker.begin()
    getattr(breaker, outcome)(is_trial=old[1])
    assert breaker.state is BreakerState.HALF_OPEN


def test_every_leg_tells_its_breaker_how_it_went(breaker, clock):
    """Well, badly, or, if nobody said so before it was over, neither."""
    worker = Worker("http://a:1", "decode", breaker)
    for _ in range(3):
        with leg_on(worker) as run:
            run.failed()
    assert worker.obstacle == "its circuit breaker is open"
    clock.now += PAUSE_S
    for _ in range(2):
        assert worker.obstacle is None
        with leg_on(worker):
            assert (worker.obstacle, worker.outstanding) == ("its circuit breaker is half_open", 1)
    with leg_on(worker) as run:
        run.succeeded()
    assert (breaker.state, worker.outstanding) == (BreakerState.CLOSED, 0)
