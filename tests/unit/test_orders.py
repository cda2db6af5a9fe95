"""Orders over real engines, one rank and several: pauses, weights that are taken whole, in part, or not at all."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine.build import EngineParts
from common.engine.fake import RacingDevice, RacingEngine
from common.engine.orders import RankOrders, Verdict
from common.messages import RequestOptions
from common.models.weight_files import _OpenFiles
from common.orders import (
    CheckWeights,
    Continue,
    Done,
    LeaveWeightGroup,
    LoadWeights,
    Order,
    Pause,
    SetWeightVersion,
    WeightFiles,
)
from common.process import free_port
from common.ranks import Ranks
from deploy.demo_model import write_demo_model
from tests.support.aggregated import InProcessAggregated
from tests.support.checkpoints import SHAPES
from tests.support.in_process_pair import InProcessPair, options_of
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts
from tests.support.rank_threads import AggregatedRanks, in_threads
from tests.support.trainer import Trainer, broadcast_of, joining
from transfer.config import TransferOptions

SPLITS = {
    "tp2": Ranks(tp=2),
    "tp2-ep": Ranks(tp=2, ep=True),
    "dp2": Ranks(tp=2, dp=2),
    "tp4-dp2-ep": Ranks(tp=4, dp=2, ep=True),
}
PROMPTS = random_prompts(21, 6, longest=40)


def racing() -> EngineParts:
    return EngineParts(device=RacingDevice(), engine=RacingEngine)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint with other weights."""
    folder = tmp_path_factory.mktemp("newer")
    write_demo_model(folder, **(SHAPES["plain"] | {"seed": 81}))
    return folder


@pytest.fixture(scope="module")
def newer_judge(newer: Path) -> Judge:
    return Judge(newer)


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("plain")


def greedy(count: int = 5) -> RequestOptions:
    return options_of(count, ignore_eos=True, temperature=0.0)


def judge_all(judge: Judge, answers: list[Any]) -> None:
    tally = Tally()
    for answer in answers:
        judge.add(tally, answer.prompt, answer.output_ids, answer.rows, start=answer.start)
    tally.assert_clean()


def update_from(path: Path, version: str = "new") -> list[Order]:
    source = WeightFiles(str(path))
    return [Pause(1), CheckWeights(2, source), LoadWeights(3, source, version), Continue(4)]


def carried_out(worker: InProcessAggregated, *orders: Order) -> list[Done]:
    answers: list[Done] = []
    for order in orders:
        worker.loop.order(order, answers.append)
    assert worker.loop.has_orders
    assert worker.turn()
    assert not worker.loop.has_orders
    return answers


def part_of(newer: Path, folder: Path, choose: Callable[[int], bool]) -> WeightFiles:
    """Some of a checkpoint's tensors, in one file."""
    tensors = load_file(newer / "model.safetensors")
    path = folder / "part.safetensors"
    save_file({name: tensor for index, (name, tensor) in enumerate(tensors.items()) if choose(index)}, path)
    return WeightFiles(str(path))


def every(step: int, remainder: int, index: int) -> bool:
    return index % step == remainder


class BadDisk:
    """Reads of one rank fail, after so many; `rank` None: all are well."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, rank: int | None, after: int = 20) -> None:
        self.rank, self.after = rank, after
        self._here = threading.local()
        read, carry_out = _OpenFiles.read, RankOrders.carry_out

        def carry_out_here(orders: RankOrders, order: Order) -> Verdict:
            self._here.rank, self._here.reads = orders._rank.index, 0
            return carry_out(orders, order)

        def read_here(files: _OpenFiles, *where: Any) -> torch.Tensor:
            if getattr(self._here, "rank", None) is not None and self._here.rank == self.rank:
                self._here.reads += 1
                if self._here.reads > self.after:
                    self.rank = None
                    raise OSError("the disk is gone")
            return read(files, *where)

        monkeypatch.setattr(RankOrders, "carry_out", carry_out_here)
        monkeypatch.setattr(_OpenFiles, "read", read_here)


# ------------------------------------------------------------------------------------------------ pauses


@pytest.mark.parametrize("overlap", [True, False])
def test_a_pause_settles_what_is_in_flight_and_plans_nothing(checkpoint: Path, judge_of: Any, overlap: bool):
    worker = InProcessAggregated(checkpoint, page_size=4, chunk_tokens=16, overlap=overlap, parts=racing())
    for number, prompt in enumerate(PROMPTS):
        worker.submit(f"r{number}", prompt, greedy(12))
    for pause_after in (1, 2, 3, 5):
        for _ in range(pause_after):
            worker.turn()
        assert carried_out(worker, Pause(7)) == [Done(serial=7)]
        assert worker.loop.is_held
        assert not worker.loop._in_flight
        num_steps = worker.engine.num_steps
        worker.submit(f"late{pause_after}", [pause_after], greedy(3))
        for _ in range(3):
            assert not worker.turn(), "there is nothing to do"
        assert worker.engine.num_steps == num_steps
        assert carried_out(worker, Pause(8), Continue(9)) == [Done(serial=8), Done(serial=9)]
        assert not worker.loop.is_held
    worker.settle()
    judge_all(judge_of("plain"), [worker.answer(rid) for rid in worker.legs])
    worker.check_pages()


def test_a_held_group_still_joins_the_steps_of_others(checkpoint: Path):
    """Nobody else could step otherwise: the experts are spread over all."""
    worker = InProcessAggregated(checkpoint)
    carried_out(worker, Pause(1))
    num_steps = worker.engine.num_steps
    worker.submit("r", [1, 2, 3], greedy())
    called = property(lambda engine: True)
    engine_type = type("CalledEngine", (type(worker.engine),), {"is_called": called})
    worker.engine.__class__ = engine_type
    for _ in range(3):
        worker.turn()
    assert worker.engine.num_steps == num_steps + 3
    assert worker.legs["r"].tokens == []


def test_a_paused_decode_worker_keeps_the_kv_of_newcomers(checkpoint: Path, judge_of: Any):
    """However long the pause is: the prefill worker must not think that nobody wants it."""
    pair = InProcessPair(checkpoint, page_size=4)
    answers: list[Done] = []
    pair.decode.loop.order(Pause(1), answers.append)
    pair.submit("r", PROMPTS[1], greedy())
    pair.sleep(10 * TransferOptions().lease_s)
    assert pair.decode.engine.num_steps == 0
    pair.decode.loop.order(Continue(2), answers.append)
    pair.settle()
    assert answers == [Done(serial=1), Done(serial=2)]
    judge_all(judge_of("plain"), [pair.answer("r")])
    pair.check_pages()


def test_what_is_not_known_is_said(checkpoint: Path):
    worker = InProcessAggregated(checkpoint)
    [left] = carried_out(worker, LeaveWeightGroup(2, "g"))
    assert left == Done(serial=2, error="there is no group 'g'")


# ------------------------------------------------------------------------------------------------ weights


def test_new_weights_serve_and_have_their_name(checkpoint: Path, judge_of: Any, newer: Path, newer_judge: Judge):
    worker = InProcessAggregated(checkpoint, page_size=4, chunk_tokens=16, parts=racing())
    requests = [(prompt, greedy()) for prompt in PROMPTS]
    judge_all(judge_of("plain"), worker.run(requests))
    assert worker.role.stats(0).pages.cached > 0
    assert [done.error for done in carried_out(worker, *update_from(newer))] == [None] * 4
    assert worker.engine.weight_version == "new"
    assert worker.role.stats(0).pages.cached == 0, "what the old weights have computed serves nobody"
    judge_all(newer_judge, worker.run(requests))
    carried_out(worker, SetWeightVersion(5, "renamed"))
    assert worker.engine.weight_version == "renamed"
    assert worker.role.stats(0).pages.cached == 0
    worker.check_pages()


def test_a_refused_source_changes_nothing(checkpoint: Path, judge_of: Any, newer: Path, tmp_path: Path):
    worker = InProcessAggregated(checkpoint, page_size=4, chunk_tokens=16)
    tensors = load_file(newer / "model.safetensors")
    half = part_of(newer, tmp_path, lambda index: index % 2 == 0)
    num_missing = len(tensors) - (len(tensors) + 1) // 2
    assert carried_out(worker, CheckWeights(1, half)) == [Done(serial=1, num_left=num_missing)]
    path = tmp_path / "unknown.safetensors"
    save_file(tensors | {"what": torch.ones(1)}, path)
    [done] = carried_out(worker, CheckWeights(2, WeightFiles(str(path))))
    assert done.error is not None
    assert "unknown tensor what" in done.error
    assert worker.engine.weight_version == "default"
    assert not worker.loop.is_held
    judge_all(judge_of("plain"), worker.run([(prompt, greedy()) for prompt in PROMPTS]))


def test_parts_make_a_whole(checkpoint: Path, newer: Path, newer_judge: Judge, tmp_path: Path):
    worker = InProcessAggregated(checkpoint, page_size=4, chunk_tokens=16)
    for remainder in (0, 1, 2):
        source = part_of(newer, tmp_path, partial(every, 3, remainder))
        assert carried_out(worker, LoadWeights(1, source, "new")) == [Done(serial=1)]
    judge_all(newer_judge, worker.run([(prompt, greedy()) for prompt in PROMPTS]))


def test_after_a_failure_nothing_is_planned_until_every_tensor_has_come_again(
    checkpoint: Path, newer: Path, newer_judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    worker = InProcessAggregated(checkpoint, page_size=4, chunk_tokens=16)
    BadDisk(monkeypatch, rank=0)
    num_tensors = len(load_file(newer / "model.safetensors"))
    [done] = carried_out(worker, LoadWeights(1, WeightFiles(str(newer)), "new"))
    assert done == Done(serial=1, error="OSError: the disk is gone", num_left=num_tensors)
    assert worker.engine.weight_version == "default"
    worker.submit("r", PROMPTS[1], greedy())
    for _ in range(3):
        carried_out(worker, Continue(2))
        assert worker.loop.is_held
        assert not worker.turn()
    first, second = (part_of(newer, tmp_path / f"{r}", partial(every, 2, r)) for r in made(tmp_path, 2))
    [done] = carried_out(worker, LoadWeights(3, first, "new"))
    assert (done.error, 0 < done.num_left < num_tensors) == (None, True)
    assert worker.loop.is_held
    assert carried_out(worker, LoadWeights(4, second, "new")) == [Done(serial=4)]
    assert not worker.loop.is_held
    worker.settle()
    judge_all(newer_judge, [worker.answer("r")])


def made(folder: Path, count: int) -> range:
    """Make numbered folders."""
    for number in range(count):
        (folder / f"{number}").mkdir()
    return range(count)


@pytest.mark.parametrize("name", SPLITS)
def test_every_rank_takes_its_part(checkpoint: Path, newer: Path, newer_judge: Judge, tmp_path: Path, name: str):
    ranks = SPLITS[name]
    worker = AggregatedRanks(checkpoint, ranks, tmp_path, parts=racing, chunk_tokens=24, page_size=4)
    groups = [[(prompt, greedy()) for prompt in PROMPTS[group :: ranks.dp]] for group in range(ranks.dp)]
    answers = worker.run(groups, orders=update_from(newer))
    assert all([done.error for done, _ in dones] == [None] * 4 for dones in worker.done.values())
    judge_all(newer_judge, [answer for group in answers for answer in group])
    assert {leader.engine.weight_version for leader in worker.leaders.values()} == {"new"}


@pytest.mark.parametrize(("name", "rank", "group"), [("tp2", 1, 0), ("tp2", 0, 0), ("tp4-dp2-ep", 3, 1)])
def test_one_rank_that_fails_in_the_middle_holds_its_group(
    checkpoint: Path,
    newer: Path,
    newer_judge: Judge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    rank: int,
    group: int,
):
    ranks = SPLITS[name]
    BadDisk(monkeypatch, rank=rank)
    worker = AggregatedRanks(checkpoint, ranks, tmp_path, parts=racing, chunk_tokens=24, page_size=4)
    groups = [[(prompt, greedy()) for prompt in PROMPTS[index :: ranks.dp]] for index in range(ranks.dp)]
    answers = worker.run(groups, orders=[*update_from(newer), LoadWeights(5, WeightFiles(str(newer)), "again")])
    for index, dones in worker.done.items():
        (_, _, (loaded, _), (_, is_held), (again, is_held_then)) = dones
        has_failed = index == group
        assert (loaded.error == f"rank {rank}: OSError: the disk is gone") == has_failed
        assert (loaded.num_left > 0) == is_held == has_failed
        assert (again, is_held_then) == (Done(serial=5), False)
    judge_all(newer_judge, [answer for each in answers for answer in each])


# ------------------------------------------------------------------------------------------------ broadcasts


@pytest.mark.parametrize("name", ["tp2", "tp2-ep"])
def test_ranks_of_one_process_receive_beside_their_own_groups(
    checkpoint: Path, newer: Path, newer_judge: Judge, tmp_path: Path, name: str
):
    port, tensors = free_port(), load_file(newer / "model.safetensors")
    source = broadcast_of(tensors)
    worker = AggregatedRanks(checkpoint, SPLITS[name], tmp_path, parts=racing, chunk_tokens=24, page_size=4)
    orders: list[Order] = [
        joining(port, 3),
        CheckWeights(2, source),
        LoadWeights(3, source, "new"),
        LeaveWeightGroup(4, "g"),
    ]
    answers: list[list[Any]] = []

    def train() -> None:
        trainer = Trainer(port, 3, "g")
        trainer.broadcast(tensors)
        trainer.leave()

    def serve() -> None:
        answers.extend(worker.run([[(prompt, greedy()) for prompt in PROMPTS]], orders=orders))

    in_threads(2, lambda index: train() if index else serve())
    assert [done.error for done, _ in worker.done[0]] == [None] * 4
    judge_all(newer_judge, answers[0])


def test_nobody_waits_for_ever_for_a_trainer(checkpoint: Path):
    worker = InProcessAggregated(checkpoint)
    [done] = carried_out(worker, joining(free_port(), 2, deadline_s=0.05))
    assert done.error is not None
    assert "nobody listens" in done.error
    assert not worker.loop.is_held
