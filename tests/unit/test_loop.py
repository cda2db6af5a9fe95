"""A step that fails takes its own requests with it and nothing else: neither rows, nor pages, nor the engine."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.engine.build import EngineParts
from common.engine.fake import RacingDevice, RacingEngine
from common.engine.loop import MAX_FAILED_STEPS, Loop
from common.engine.step import Launched, StepResult
from common.messages import ErrorReport, RequestOptions
from common.ranks import Rank, Ranks
from common.scheduling.step_plan import StepPlan
from tests.support.aggregated import InProcessAggregated
from tests.support.in_process_pair import InProcessPair, options_of
from tests.support.prompts import random_prompts


class Unsettled(Launched):
    """A launched step whose results never come."""

    def __init__(self) -> None:
        """It has nothing."""

    def settle(self) -> StepResult:
        raise RuntimeError("settle went wrong")


class FaultyEngine(RacingEngine):
    """Fails the launches and the settles of the steps with these numbers, once their work has been queued."""

    bad_launches: tuple[int, ...] = ()
    bad_settles: tuple[int, ...] = ()
    num_launches = 0
    num_synchronized = 0

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.hit: set[str] = set()
        """The rids of those in failed steps."""

    def launch(self, plan: StepPlan) -> Launched:
        number = self.num_launches
        self.num_launches += 1
        launched = super().launch(plan)
        if number in (*self.bad_launches, *self.bad_settles):
            self.hit |= {entry.request.rid for entry in plan.entries}
        if number in self.bad_launches:
            raise RuntimeError("launch went wrong")
        return Unsettled() if number in self.bad_settles else launched

    def synchronize(self) -> None:
        assert self.seats.holders, "what the step was for has been given back before the device was done"
        self.num_synchronized += 1
        super().synchronize()


FAULTY = EngineParts(device=RacingDevice(), engine=FaultyEngine)
FAULTS: list[dict[str, tuple[int, ...]]] = [
    {"bad_launches": (0,)},
    {"bad_launches": (3, 9)},
    {"bad_settles": (0,)},
    {"bad_settles": (2, 7, 8)},
    {"bad_launches": (5,), "bad_settles": (4,)},
    {"bad_launches": (4,), "bad_settles": (5,)},
]


def requests_of(count: int) -> list[tuple[list[int], RequestOptions]]:
    return [
        (prompt, options_of(2 + i % 9, ignore_eos=True, temperature=1.0, seed=i, n=1 + i % 3, stream=i % 2 == 0))
        for i, prompt in enumerate(random_prompts(3, count, longest=40))
    ]


def check_failure(report: ErrorReport, leg: str | None) -> None:
    assert (report.status, report.stage, report.leg, report.code) == (500, "step", leg, "internal")
    assert "RuntimeError: " in report.message
    assert "went wrong" in report.message


def same(answer: Any, expected: Any) -> None:
    assert answer.output_ids == expected.output_ids
    assert np.array_equal(np.sort(answer.rows), np.sort(expected.rows))


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("plain")


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("faults", FAULTS, ids=str)
def test_in_an_aggregated_engine(checkpoint: Path, faults: dict[str, tuple[int, ...]], overlap: bool):
    requests = requests_of(14)
    clean = InProcessAggregated(checkpoint, page_size=4, chunk_tokens=48, overlap=overlap)
    clean.run(requests)
    worker = InProcessAggregated(checkpoint, page_size=4, chunk_tokens=48, overlap=overlap, parts=FAULTY)
    engine: Any = worker.engine
    vars(engine).update(faults)
    for number, request in enumerate(requests):
        worker.submit(f"r{number}", *request)
        for _ in range(2):
            worker.turn()
            assert worker.role.stats(0).pages.unaccounted == 0
    worker.settle()
    assert engine.num_synchronized == worker.role.stats(0).failed_steps == sum(map(len, faults.values()))
    failed = {rid for rid, leg in worker.legs.items() if leg.failed is not None}
    # A sample that was in a failed step as surplus had its answer already.
    assert failed
    assert failed <= engine.hit
    for number, (_, options) in enumerate(requests):
        leg = worker.legs[f"r{number}"]
        if leg.failed is not None:
            check_failure(leg.failed.error, None)
            continue
        for index in range(options.sampling.n):
            same(worker.answer(f"r{number}", index), clean.answer(f"r{number}", index))
    worker.check_pages()
    # All are well again, in the same rows of the table and the same pages.
    vars(engine).update(bad_launches=(), bad_settles=())
    for number, (again, (_, options)) in enumerate(zip(worker.run(requests), requests, strict=True)):
        if options.sampling.n == 1:
            same(again, clean.answer(f"r{number}"))
    worker.check_pages()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("side_name", ["prefill", "decode"])
@pytest.mark.parametrize("faults", FAULTS, ids=str)
def test_in_a_pair(checkpoint: Path, side_name: str, faults: dict[str, tuple[int, ...]], overlap: bool):
    """The other leg of a failed request is aborted, as the router does it."""
    requests = requests_of(14)
    clean = InProcessPair(checkpoint, page_size=4, chunk_tokens=24, overlap=overlap)
    clean.run(requests)
    pair = InProcessPair(checkpoint, page_size=4, chunk_tokens=24, overlap=overlap, parts=FAULTY)
    side = getattr(pair, side_name)
    vars(side.engine).update(faults)
    aborted: set[str] = set()
    for number, request in enumerate(requests):
        pair.submit(f"r{number}", *request)
        for _ in range(8 if number == len(requests) - 1 else 2):
            pair.turn()
            assert side.role.stats(0).pages.unaccounted == 0
            for rid, leg in side.legs.items():
                if leg.failed is not None and rid not in aborted:
                    aborted.add(rid)
                    pair.abort(rid)
    pair.settle()
    for rid in {rid for rid, leg in side.legs.items() if leg.failed is not None} - aborted:
        pair.abort(rid)
    pair.settle()
    assert side.engine.num_synchronized == side.role.stats(0).failed_steps == sum(map(len, faults.values()))
    failed = {rid for rid, leg in side.legs.items() if leg.failed is not None}
    assert failed
    assert failed <= side.engine.hit
    for number, (_, options) in enumerate(requests):
        leg = side.legs[f"r{number}"]
        if leg.failed is not None:
            check_failure(leg.failed.error, side_name)
            continue
        for index in range(options.sampling.n):
            same(pair.answer(f"r{number}", index), clean.answer(f"r{number}", index))
    pair.check_pages()


def test_what_is_in_flight_behind_a_failed_step_is_surplus(checkpoint: Path):
    """With overlap the next step is launched already; its requests end at once, and let go when it has settled."""
    worker = InProcessAggregated(checkpoint, parts=FAULTY)
    engine: Any = worker.engine
    engine.bad_settles = (2,)
    worker.submit("r", [1, 2, 3], options_of(20, ignore_eos=True, stream=True))
    while worker.legs["r"].failed is None:
        worker.turn()
    tokens = list(worker.legs["r"].tokens)
    assert engine.num_launches == 4
    assert worker.role.stats(0).pages.running == 1, "a step may still write into its page"
    worker.settle()
    assert worker.legs["r"].tokens == tokens
    assert engine.num_launches == 4
    worker.check_pages()


# ------------------------------------------------------------------------------------------------ what ends the process


def test_too_many_in_a_row_end_the_process(checkpoint: Path):
    worker = InProcessAggregated(checkpoint, parts=FAULTY, overlap=False)
    engine: Any = worker.engine
    engine.bad_launches = (*range(1, MAX_FAILED_STEPS), *range(10, 10 + MAX_FAILED_STEPS))

    def serve() -> None:
        for number in range(100):
            worker.submit(f"r{number}", [number], options_of(2))
            worker.turn()

    with pytest.raises(RuntimeError, match="launch went wrong"):
        serve()
    assert engine.num_launches == 10 + MAX_FAILED_STEPS, "a good step begins the count anew"


class Fake:
    """An engine and a role at once, which do what the test says."""

    def __init__(self, **raises: Exception) -> None:
        self.raises = raises
        self.num_failed_steps = 0
        self.num_unsure_weights = 0
        self.is_released = False
        self.rank = Rank()
        self.is_called = False
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*_: object) -> Any:
            self.calls.append(name)
            if name in self.raises:
                raise self.raises[name]
            return SimpleNamespace(settle=self.settle) if name == "launch" else name

        return call


@pytest.mark.parametrize("step", ["launch", "settle"])
def test_a_broken_device_ends_the_process_before_anything_is_given_back(step: str):
    fake: Any = Fake(synchronize=OSError("broken"), **{step: ValueError("step")})
    with pytest.raises(OSError, match="broken") as raised:
        Loop(fake, fake, overlap=False).turn()
    assert isinstance(raised.value.__context__, ValueError)
    assert "on_failed" not in fake.calls


@pytest.mark.parametrize("step", ["launch", "settle"])
def test_with_other_ranks_the_first_failed_step_ends_the_process(step: str):
    """Nobody knows how far they are in it; the requests fail with the process."""
    fake: Any = Fake(**{step: ValueError("step")})
    fake.rank = Ranks(tp=2).rank(0)
    with pytest.raises(ValueError, match="step"):
        Loop(fake, fake, overlap=False).turn()
    assert "on_failed" not in fake.calls


def test_an_idle_group_joins_the_others_with_an_empty_plan():
    class Idle(Fake):
        def plan(self) -> None:
            """There is nothing to run."""

        def launch(self, plan: StepPlan) -> SimpleNamespace:
            launched.append(plan)
            return SimpleNamespace(settle=self.settle)

    launched: list[StepPlan] = []
    fake: Any = Idle()
    loop = Loop(fake, fake, overlap=False)
    assert not loop.turn()
    assert launched == []
    fake.is_called = True
    assert loop.turn()
    assert launched == [StepPlan(())]
    assert fake.calls[-2:] == ["settle", "on_settled"]


def test_a_step_for_others_is_not_waited_for():
    """While the device runs it, the others may want the next one: to wait for it would undo their overlap."""

    class Idle(Fake):
        def plan(self) -> None:
            """There is nothing to run."""

    fake: Any = Idle()
    fake.is_called = True
    loop = Loop(fake, fake, overlap=True)
    assert loop.turn()
    fake.is_called = False
    assert not loop.turn(), "it may sleep until it is called again"
    assert "settle" not in fake.calls
    fake.is_called = True
    assert loop.turn()
    assert fake.calls.count("settle") == 1, "no more than two are ever in flight"


@pytest.mark.parametrize("name", ["plan", "on_settled", "on_failed"])
def test_a_defect_of_the_bookkeeping_ends_the_process(name: str):
    faults = {"settle": ValueError("step")} if name == "on_failed" else {}
    fake: Any = Fake(**{name: KeyError("defect")}, **faults)
    with pytest.raises(KeyError, match="defect"):
        Loop(fake, fake, overlap=False).turn()


@pytest.mark.parametrize("step", ["launch", "settle"])
def test_the_device_is_done_before_requests_are_failed(step: str):
    fake: Any = Fake(**{step: ValueError("step")})
    assert Loop(fake, fake, overlap=False).turn()
    assert fake.calls[-2:] == ["synchronize", "on_failed"]
    assert fake.num_failed_steps == 1
