"""Settle is the only door (R1), and what is behind it belongs to the step alone (R3)."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.engine.device import Arena, CpuDevice, Device
from common.engine.fake import RacingDevice
from common.engine.step import Launched, Outcome, Sampled, Scored
from common.memory.page_allocator import PageAllocator
from common.messages import Generate, RequestOptions
from common.routed_experts.capture import RoutedExpertsCapturer
from common.routed_experts.host_cache import HostCache
from common.scheduling.request import Request
from common.scheduling.step_plan import StepEntry, StepPlan
from tests.support.processes import REPOSITORY
from tests.support.rows import SPEC, make_rows


class Copies:
    """Copies that say how often they were waited for."""

    def __init__(self, **arrays: Any) -> None:
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.waits = 0

    def wait(self) -> dict[str, np.ndarray]:
        self.waits += 1
        return self.arrays


def plan_of(*entries: tuple[int, int], tops: Sequence[int] = ()) -> StepPlan:
    """Entries of so many tokens that yield so many samples, each with its number of top logprobs."""
    made = []
    for index, (num_tokens, samples) in enumerate(entries):
        options = RequestOptions(top_logprobs_num=tops[index] if tops else 0)
        request = Request.of(Generate(rid=str(index), input_ids=[1] * num_tokens, options=options))
        made.append(StepEntry(request, 0, num_tokens, samples))
    return StepPlan(tuple(made))


def launch(plan: StepPlan, copies: Copies, num_scored: tuple[int, ...] = ()) -> tuple[Launched, HostCache, np.ndarray]:
    """A launched step on slots of its own."""
    allocator = PageAllocator(plan.num_tokens)
    allocator.allocate(plan.num_tokens)
    cache = HostCache(SPEC, allocator.generations, 1)
    slots = np.arange(plan.num_tokens)
    num_scored = num_scored or (0,) * len(plan.entries)
    return Launched(plan, copies, num_scored, cache.reserve(slots), cache, "w"), cache, slots


def test_nothing_is_committed_before_settle_and_everything_by_it():
    copies = Copies(rows=make_rows(SPEC, 6), tokens=[40, 41, 42], logprobs=[-0.5, -0.25, -0.125])
    plan = plan_of((3, 1), (2, 0), (1, 2))
    launched, cache, slots = launch(plan, copies)
    assert copies.waits == 0
    assert not cache.read(slots)[1].any()
    result = launched.settle()
    assert copies.waits == 1
    rows, written = cache.read(slots)
    assert written.all()
    np.testing.assert_array_equal(rows, copies.arrays["rows"])
    assert (result.plan, result.weight_version) == (plan, "w")
    assert [[sampled[:2] for sampled in outcome.sampled] for outcome in result.outcomes] == [
        [(40, -0.5)],
        [],
        [(41, -0.25), (42, -0.125)],
    ]
    assert all(type(sampled.token_id) is int for outcome in result.outcomes for sampled in outcome.sampled)


def test_a_step_that_samples_nothing_commits_its_rows_by_the_same_door():
    launched, cache, _ = launch(plan_of((2, 0), (1, 0)), Copies(rows=make_rows(SPEC, 3)))
    assert [outcome.sampled for outcome in launched.settle().outcomes] == [(), ()]
    assert cache.rows_committed == 3


def test_scores_and_likeliest_tokens_reach_those_who_asked_for_them():
    """Each entry gets its own positions, and no more of the likeliest tokens than it asked for."""
    copies = Copies(
        rows=make_rows(SPEC, 6),
        tokens=[40, 41],
        logprobs=[-0.5, -0.25],
        top_logprobs=[[-1.0, -2.0], [-3.0, -4.0]],
        top_ids=[[1, 2], [3, 4]],
        prompt_logprobs=[-5.0, -6.0, -7.0],
        prompt_top_logprobs=[[-5.0, -5.5], [-6.0, -6.5], [-7.0, -7.5]],
        prompt_top_ids=[[5, 6], [7, 8], [9, 10]],
    )
    launched, _, _ = launch(plan_of((3, 1), (2, 0), (1, 1), tops=(1, 2, 0)), copies, (1, 2, 0))
    first, second, third = launched.settle().outcomes
    assert first.sampled == (Sampled(40, -0.5, [(-1.0, 1)]),)
    assert first.scored == Scored([-5.0], [[(-5.0, 5)]])
    assert second == Outcome((), Scored([-6.0, -7.0], [[(-6.0, 7), (-6.5, 8)], [(-7.0, 9), (-7.5, 10)]]))
    assert third == Outcome((Sampled(41, -0.25, []),), Scored([], []))


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_tokens_and_entries_must_agree(num_tokens: int):
    """One token too few or too many is a defect, not a shifted or shortened answer."""
    copies = Copies(rows=make_rows(SPEC, 2), tokens=range(num_tokens), logprobs=[0.0] * num_tokens)
    launched, cache, slots = launch(plan_of((1, 1), (1, 1)), copies)
    with pytest.raises(AssertionError):
        launched.settle()
    assert not cache.read(slots)[1].any(), "a step that failed has rows"


@pytest.mark.parametrize(("num_tokens", "num_logprobs"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_tokens_and_logprobs_must_be_as_many(num_tokens: int, num_logprobs: int):
    copies = Copies(rows=make_rows(SPEC, 2), tokens=range(num_tokens), logprobs=[0.0] * num_logprobs)
    launched, _, _ = launch(plan_of((1, 1), (1, 1)), copies)
    with pytest.raises((ValueError, AssertionError)):
        launched.settle()


@pytest.mark.parametrize("num_scored", [0, 1, 3])
def test_scores_and_entries_must_agree(num_scored: int):
    copies = Copies(rows=make_rows(SPEC, 2), prompt_logprobs=[0.0] * num_scored)
    launched, _, _ = launch(plan_of((1, 0), (1, 0)), copies, (2, 0))
    with pytest.raises(AssertionError):
        launched.settle()


def test_what_the_capturer_hands_out_is_owned():
    """The next step's rows do not reach it, nor does whatever else happens to the buffer."""
    capturer = RoutedExpertsCapturer(SPEC, 5, torch.device("cpu"))
    first, second = (torch.from_numpy(make_rows(SPEC, 4, seed)) for seed in (1, 2))
    for layer in range(SPEC.num_layers):
        capturer.target(layer, 4).copy_(first[:, layer].to(torch.int64))
    taken = capturer.take(4)
    for layer in range(SPEC.num_layers):
        capturer.target(layer, 4).copy_(second[:, layer])
    assert torch.equal(taken, first)
    assert torch.equal(capturer.take(4), second)
    capturer.buffer.fill_(255)
    assert torch.equal(taken, first)


def test_what_settle_returns_is_owned():
    """The landed arrays are worth nothing after it; tokens, logprobs and rows are still what they were."""
    rows = make_rows(SPEC, 2)
    copies = Copies(
        rows=rows.copy(), tokens=[40, 41], logprobs=[-0.5, -0.25], top_logprobs=[[-1.0], [-2.0]], top_ids=[[1], [2]]
    )
    launched, cache, slots = launch(plan_of((1, 1), (1, 1), tops=(1, 1)), copies)
    result = launched.settle()
    for array in copies.arrays.values():
        array.fill(99)
    assert [outcome.sampled for outcome in result.outcomes] == [
        (Sampled(40, -0.5, [(-1.0, 1)]),),
        (Sampled(41, -0.25, [(-2.0, 2)]),),
    ]
    np.testing.assert_array_equal(cache.read(slots)[0], rows)


# ------------------------------------------------------------------------------------------------ staging


@pytest.fixture(params=[CpuDevice, RacingDevice])
def device(request: pytest.FixtureRequest) -> Device:
    made: Device = request.param()
    return made


def test_copies_to_the_host_need_owned_sources(device: Device):
    """Why the copy is needed: what is written after the launch is what lands."""
    source = torch.zeros(3)
    copies = device.begin_step().copy_to_host({"source": source})
    source.fill_(7)
    assert (copies.wait()["source"] == 7).all()


def test_an_uploaded_array_may_be_dropped_at_once(device: Device):
    staging, array, target = device.begin_step(), np.arange(4), torch.zeros(2, 2, dtype=torch.int64)
    uploaded = [device.upload(array), staging.upload(array), staging.upload(array.reshape(2, 2))]
    staging.upload_into(array, target)
    array[:] = 9
    assert all(tensor.flatten().tolist() == [0, 1, 2, 3] for tensor in [*uploaded, target])
    assert uploaded[2].shape == (2, 2)


@pytest.mark.parametrize("array", [np.arange(3), np.arange(5), np.arange(4, dtype=np.int32)])
def test_an_array_goes_into_a_tensor_of_its_kind_alone(device: Device, array: np.ndarray):
    with pytest.raises(AssertionError):
        device.begin_step().upload_into(array, torch.zeros(4, dtype=torch.int64))


@given(sizes=st.lists(st.lists(st.integers(0, 200_000), max_size=8), min_size=1, max_size=4))
def test_pieces_of_an_arena_are_aligned_and_never_overlap(sizes: list[list[int]]):
    """Not with each other, and not with those of a memory that was outgrown; what one step needed, the next one finds."""
    arena = Arena(pinned=False)
    for step in sizes:
        pieces = [arena.take(num_bytes) for num_bytes in step]
        for i, piece in enumerate(pieces):
            piece.fill(i)
        assert all((piece == i).all() for i, piece in enumerate(pieces))
        assert [len(piece) for piece in pieces] == step
        base = torch.empty(0, dtype=torch.uint8).data_ptr()
        starts = [piece.__array_interface__["data"][0] - base for piece in pieces if len(piece)]
        assert len(set(starts)) == len(starts)
        arena.reset()


def test_a_step_keeps_its_staging_until_it_has_settled():
    """Two steps in flight have two; a settled one's goes to the next step, and what it held is gone (R3)."""
    device = RacingDevice()
    first, second = device.begin_step(), device.begin_step()
    assert first is not second
    uploads = [staging.upload(np.full(3, token)) for staging, token in ((first, 1), (second, 2))]
    copies = [staging.copy_to_host({"x": x}) for staging, x in zip((first, second), uploads, strict=True)]
    landed = copies[0].wait()["x"]
    assert landed.tolist() == [1, 1, 1]
    assert uploads[0].tolist() == [-1, -1, -1], "an upload is used after its step has settled, and nobody sees it"
    assert uploads[1].tolist() == [2, 2, 2]
    third = device.begin_step()
    assert third is first
    assert landed.tolist() == [-1, -1, -1], "landed arrays are used after the next launch, and nobody sees it"
    third.upload(np.full(3, 3))
    assert copies[1].wait()["x"].tolist() == [2, 2, 2]


def test_a_staging_that_is_handed_on_too_early_shows():
    """The check above can fail: with one staging for all steps, the second step's upload lands in the first one's result."""
    staging = RacingDevice().begin_step()
    copies = staging.copy_to_host({"x": staging.upload(np.full(3, 1))})
    staging._uploads.reset()  # type: ignore[attr-defined]  # as if the step had settled
    staging.upload(np.full(3, 2))
    assert copies.wait()["x"].tolist() == [2, 2, 2]


# ------------------------------------------------------------------------------------------------ the type checker

HANDLER = """
from common.engine.step import Launched, StepResult


def handle(result: StepResult) -> int:
    return len(result.outcomes)


def settled(launched: Launched) -> int:
    return handle(launched.settle())


def unsettled(launched: Launched) -> int:
    return handle(launched)  # the bad line


def peeks(launched: Launched) -> int:
    return len(launched.outcomes)  # nor has it anything to look at
"""


def type_errors(source: str, folder: Path) -> Sequence[tuple[int, str]]:
    """Line and code of each error that mypy --strict finds, with the repository's settings."""
    file = folder / "handler.py"
    file.write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-pretty", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert not done.stderr
    # The folder's name may be an earlier run's, from mypy's cache.
    found = [re.search(r"handler\.py:(\d+): error: .*\[([a-z-]+)\]$", line) for line in done.stdout.splitlines()]
    assert all(found), done.stdout
    return [(int(match[1]), match[2]) for match in found if match]


def test_the_type_checker_rejects_a_handler_that_is_handed_an_unsettled_step(tmp_path: Path):
    """One run over a file in which the settled call is fine and the unsettled one is not."""
    lines = HANDLER.splitlines()
    bad = next(number for number, line in enumerate(lines, 1) if "the bad line" in line)
    peek = next(number for number, line in enumerate(lines, 1) if "to look at" in line)
    assert type_errors(HANDLER, tmp_path) == [(bad, "arg-type"), (peek, "attr-defined")]
