"""The runner can complain: of a wrong expectation, a wrong row, a hung request, a leaked page; and plans with typos are none."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.fault.loopback_place import LoopbackPlace
from tests.fault.plan import Plan, read_plans
from tests.fault.runner import Outcome, check_pages, run
from tests.fault.stub_place import StubPlace
from tests.support.judge import Judge
from tests.support.stub_workers import StubWorker

PLAN = Plan(
    name="made up",
    covers=(),
    where="stubs",
    who="decode",
    stage="decode",
    fault="http-500",
    expect="error",
    leg="decode",
    error_stage=("engine", "transfer"),
    status=502,
    within_s=0.05,
)
FAILED = Outcome(end="error", leg="decode", stage="engine", status=502)


class Scripted:
    """A place where requests end as the test has it."""

    def __init__(self, *outcomes: Outcome, left: list[str] | None = None, hangs: bool = False) -> None:
        self._outcomes = list(outcomes)
        self._left = left or []
        self._hangs = hangs

    async def strike(self, plan: Plan) -> list[Outcome]:
        if self._hangs:
            await asyncio.Event().wait()
        return self._outcomes

    async def leftovers(self, plan: Plan) -> list[str]:
        return self._left


@pytest.mark.parametrize(
    "outcome",
    [
        FAILED,
        replace(FAILED, stage="transfer"),
        replace(FAILED, is_told=True, status=200, has_another_pair=True),
        Outcome(end="answer", has_another_pair=True),
    ],
)
async def test_what_a_plan_expects(outcome: Outcome) -> None:
    assert await run(PLAN, Scripted(outcome)) == []


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(end="answer"),
        Outcome(end="answer", has_another_pair=True, is_told=True),
        Outcome(end="lost"),
        replace(FAILED, leg="prefill"),
        replace(FAILED, leg=None),
        replace(FAILED, stage="decode"),
        replace(FAILED, stage=None),
        replace(FAILED, status=500),
        replace(FAILED, is_told=True),
        replace(FAILED, has_another_pair=True),
        Outcome(end="answer", wrong="a row", has_another_pair=True),
    ],
)
async def test_what_it_does_not_expect(outcome: Outcome) -> None:
    assert len(await run(PLAN, Scripted(FAILED, outcome))) == 1


async def test_requests_that_hang_and_requests_that_were_never_sent() -> None:
    assert await run(PLAN, Scripted(hangs=True)) == ["a request has not ended within 0.05 s"]
    assert await run(PLAN, Scripted()) == ["no request was sent"]
    assert await run(PLAN, Scripted(FAILED, left=["a page"])) == ["a page"]


@pytest.mark.parametrize("key", ["running", "quarantined", "unaccounted", "free", "rooms"])
def test_a_page_that_is_held(key: str) -> None:
    pages = {"total": 10, "free": 7, "cached": 3, "running": 0, "quarantined": 0, "unaccounted": 0}
    assert check_pages("prefill-0", pages, rooms=0) == []
    assert check_pages("prefill-0", pages | {key: 1}, rooms=int(key == "rooms")) != []


async def test_a_wrong_plan_over_a_real_router_fails() -> None:
    [plan] = [plan for plan in read_plans("stubs") if plan.name == "decode answers 500"]
    assert await run(plan, StubPlace()) == []
    for wrong in ({"leg": "prefill"}, {"error_stage": "transfer"}, {"status": 504}, {"expect": "answer"}):
        assert await run(msgspec.convert(msgspec.to_builtins(plan) | wrong, Plan), StubPlace()) != []


async def test_a_wrong_row_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pair, which answers, has the rows of other positions."""
    finished = StubWorker.finished

    def another(self: StubWorker, *arguments: Any, **options: Any) -> Any:
        ended, block = finished(self, *arguments, **options)
        assert block is not None
        return ended, block._replace(data=bytes(block.data)[::-1])

    monkeypatch.setattr(StubWorker, "finished", another)
    [plan] = [plan for plan in read_plans("stubs") if plan.name == "decode answers 500"]
    complaints = await run(plan, StubPlace())
    assert len(complaints) == 2
    assert all("a wrong answer" in complaint for complaint in complaints)


async def test_a_leaked_page_is_noticed(checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge]) -> None:
    [plan] = [plan for plan in read_plans("loopback") if plan.name == "KvDone is doubled"]
    place = LoopbackPlace(checkpoint_of("plain"), judge_of("plain"))
    outcomes = await place.strike(plan)
    assert [outcome.end for outcome in outcomes] == ["answer"]
    place._pair.decode.engine.allocator.allocate(1)
    complaints = await place.leftovers(plan)
    assert "decode: 1 unaccounted" in complaints


@pytest.mark.parametrize("typo", ['stream = "sometimes"', 'fualt = "drop"', 'fault = "SIGKIL engine"', "covers = 1"])
def test_a_typo_in_a_plan_is_an_error(tmp_path: Path, typo: str) -> None:
    """Each field of a good plan is written by hand here, so that the line with the typo can take the place of its field's."""
    good = {
        "name": '"a"',
        "covers": "[]",
        "where": '"stubs"',
        "who": '"decode"',
        "stage": '"decode"',
        "fault": '"drop"',
        "expect": '"answer"',
    }
    file = tmp_path / "plans.toml"
    file.write_text("\n".join(["[[plan]]", *(f"{key} = {value}" for key, value in good.items())]))
    assert len(read_plans(folder=tmp_path)) == 1
    good.pop(typo.split()[0], None)
    file.write_text("\n".join(["[[plan]]", *(f"{key} = {value}" for key, value in good.items()), typo]))
    with pytest.raises(msgspec.ValidationError):
        read_plans(folder=tmp_path)
