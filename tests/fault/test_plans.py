"""Every plan, one by one; and what the plans must cover."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fault.held_stack import held_stack
from tests.fault.loopback_place import LoopbackPlace
from tests.fault.plan import Plan, read_coverage, read_plans
from tests.fault.runner import run
from tests.fault.stack_place import StackPlace
from tests.fault.stub_place import StubPlace
from tests.support.judge import Judge
from tests.support.processes import REPOSITORY

SHAPE = "plain"


def plans(where: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("plan", read_plans(where), ids=lambda plan: plan.name)


@pytest.fixture(scope="module")
def stack_place(
    checkpoint_of: Callable[[str], Path],
    judge_of: Callable[[str], Judge],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[StackPlace]:
    log_file = tmp_path_factory.mktemp("stack") / "log"
    with held_stack(checkpoint_of(SHAPE), log_file) as (stack, gate):
        yield StackPlace(stack, gate, judge_of(SHAPE))


@plans("stubs")
async def test_over_stubs(plan: Plan) -> None:
    assert await run(plan, StubPlace()) == []


@plans("loopback")
async def test_over_the_loopback(
    plan: Plan, checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge]
) -> None:
    assert await run(plan, LoopbackPlace(checkpoint_of(SHAPE), judge_of(SHAPE))) == []


@plans("stack")
async def test_over_real_processes(plan: Plan, stack_place: StackPlace) -> None:
    assert await run(plan, stack_place) == [], stack_place.stack.read_log()[-6000:]


def test_the_plans_cover_what_they_must() -> None:
    """Each row of the failure table and each fault of the target; and nothing that is not in the list."""
    coverage, all_plans = read_coverage(), read_plans()
    assert len({plan.name for plan in all_plans}) == len(all_plans)
    covered = {what for plan in all_plans for what in plan.covers} | coverage.elsewhere.keys()
    assert covered == {*coverage.rows, *coverage.faults}
    for test in coverage.elsewhere.values():
        assert (REPOSITORY / test).is_file(), test
