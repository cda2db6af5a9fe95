"""Memory that is given back and taken again, over real engines: nothing is there meanwhile, and all is as before afterwards."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.engine.background import NoBackground
from common.engine.build import EngineParts
from common.engine.fake import RacingDevice, RacingEngine
from common.engine.forward_pass import ForwardPass
from common.engine.loop import Loop
from common.engine.rank_memory import RankMemory
from common.errors import TransferError, UsageError
from common.memory.device_block import DeviceBlock, blocks_of
from common.messages import RequestOptions
from common.orders import (
    AwaitIdle,
    CheckWeights,
    Continue,
    Done,
    LoadWeights,
    MemoryKind,
    Order,
    Pause,
    ReleaseMemory,
    ResumeMemory,
    SetWeightVersion,
    WarmUp,
    WeightFiles,
)
from common.ranks import Ranks
from deploy.demo_model import write_demo_model
from tests.support.aggregated import InProcessAggregated, WholeAnswer
from tests.support.checkpoints import SHAPES
from tests.support.in_process_pair import InProcessPair, options_of
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts
from tests.support.rank_threads import AggregatedRanks

PROMPTS = random_prompts(23, 6, longest=40)
BOTH: tuple[MemoryKind, ...] = ("weights", "kv_cache")
KINDS: list[tuple[MemoryKind, ...]] = [BOTH, ("weights",), ("kv_cache",)]
BUSY = "requests are open, or their KV pages are still in use"


def racing() -> EngineParts:
    return EngineParts(device=RacingDevice(), engine=RacingEngine)


@pytest.fixture(params=["plain", "mixed"])
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def worker(checkpoint_of: Callable[[str], Path]) -> InProcessAggregated:
    return InProcessAggregated(checkpoint_of("plain"), page_size=4, chunk_tokens=16, parts=racing())


def greedy() -> RequestOptions:
    return options_of(5, ignore_eos=True, temperature=0.0)


def serve(worker: InProcessAggregated) -> list[WholeAnswer]:
    return worker.run([(prompt, greedy()) for prompt in PROMPTS])


def judge_all(judge: Judge, answers: Collection[Any]) -> None:
    tally = Tally()
    for answer in answers:
        judge.add(tally, answer.prompt, answer.output_ids, answer.rows, start=answer.start)
    tally.assert_clean()


def told(worker: InProcessAggregated, *orders: Order) -> list[str | None]:
    """Have orders carried out; how each went."""
    answers: list[Done] = []
    for order in orders:
        worker.loop.order(order, answers.append)
    worker.turn()
    assert [done.serial for done in answers] == [order.serial for order in orders]
    return [done.error for done in answers]


def held_bytes(worker: InProcessAggregated) -> dict[str, int]:
    """How much memory is behind the tensors."""
    forward = worker.engine._forward
    blocks = {"weights": forward.weights, "kv_cache": [forward.kv_pool.pages]}
    return {kind: sum(tensor.untyped_storage().nbytes() for tensor in tensors) for kind, tensors in blocks.items()}


# ------------------------------------------------------------------------------------------------ blocks


def test_a_block_comes_back_with_its_content_and_its_views():
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    view, expected = tensor[1:], tensor.clone()
    block = DeviceBlock(tensor)
    block.keep()
    block.release()
    assert tensor.untyped_storage().nbytes() == view.untyped_storage().nbytes() == 0
    assert block.is_released
    block.keep()
    block.release()
    block.resume()
    block.resume()
    assert torch.equal(tensor, expected)
    assert torch.equal(view, expected[1:])
    view[0, 0] = 99
    assert tensor[1, 0] == 99


def test_what_was_not_kept_is_zero():
    tensor = torch.full((64,), 7, dtype=torch.bfloat16)
    block = DeviceBlock(tensor)
    block.release()
    block.resume()
    assert tensor.tolist() == [0.0] * 64


def test_memory_that_tensors_share_is_one_block():
    tensor, other = torch.ones(4), torch.ones(4)
    assert len(blocks_of([tensor, other, tensor[2:], tensor.view(2, 2), torch.empty(0)])) == 2


# ------------------------------------------------------------------------------------------------ one rank


@pytest.mark.parametrize("kinds", KINDS)
def test_tokens_and_rows_are_as_before(shape: str, checkpoint_of: Any, judge_of: Any, kinds: tuple[MemoryKind, ...]):
    worker = InProcessAggregated(checkpoint_of(shape), page_size=4, chunk_tokens=16, parts=racing())
    judge_all(judge_of(shape), serve(worker))
    before = held_bytes(worker)
    assert all(before.values())
    for _ in range(2):
        has_cached = worker.role.stats(0).pages.cached
        assert has_cached
        assert told(worker, Pause(1), ReleaseMemory(2, kinds)) == [None, None]
        assert held_bytes(worker) == {kind: 0 if kind in kinds else size for kind, size in before.items()}
        assert worker.role.stats(0).pages.cached == (0 if "kv_cache" in kinds else has_cached)
        assert told(worker, ReleaseMemory(3, kinds)) == [None], "it is released already"
        assert told(worker, ResumeMemory(4, kinds), WarmUp(5), Continue(6)) == [None] * 3
        assert told(worker, ResumeMemory(7, kinds), WarmUp(8)) == [None] * 2, "it is there already"
        assert held_bytes(worker) == before
        assert not worker.engine.kv_pool.pages.any() or "kv_cache" not in kinds
        judge_all(judge_of(shape), serve(worker))
    worker.check_pages()


def test_nothing_is_planned_until_all_is_back_and_warm(worker: InProcessAggregated, judge_of: Any):
    told(worker, Pause(1), ReleaseMemory(2, BOTH), Continue(3))
    worker.submit("r", PROMPTS[1], greedy())
    num_steps = worker.engine.num_steps
    for orders in ([], [ResumeMemory(4, ("weights",))], [ResumeMemory(5, ("kv_cache",))]):
        assert told(worker, *orders) == [None] * len(orders)
        assert worker.loop.is_held
        assert not worker.turn()
    assert worker.engine.num_steps == num_steps
    assert told(worker, WarmUp(6)) == [None]
    worker.settle()
    judge_all(judge_of("plain"), [worker.answer("r")])


def test_it_warms_up_once_and_not_too_early(worker: InProcessAggregated, monkeypatch: pytest.MonkeyPatch):
    warmed: list[bool] = []
    monkeypatch.setattr(ForwardPass, "warm_up", lambda forward: warmed.append(True))
    told(worker, Pause(1), ReleaseMemory(2, BOTH), ResumeMemory(3, ("kv_cache",)))
    assert told(worker, WarmUp(4)) == ["released: weights"]
    assert told(worker, ResumeMemory(5, BOTH), WarmUp(6), WarmUp(7)) == [None] * 3
    assert warmed == [True]


def test_it_is_refused_while_a_request_is_open(worker: InProcessAggregated, judge_of: Any):
    worker.submit("r", PROMPTS[1], greedy())
    worker.turn()
    assert told(worker, Pause(1), ReleaseMemory(2, BOTH)) == [None, BUSY]
    assert all(held_bytes(worker).values())
    assert not worker.engine.is_released
    told(worker, Continue(3))
    worker.settle()
    judge_all(judge_of("plain"), [worker.answer("r")])
    assert told(worker, Pause(4), ReleaseMemory(5, BOTH)) == [None, None]


def test_whoever_waits_until_it_is_idle_holds_nobody_up(worker: InProcessAggregated):
    answers: list[Done] = []
    assert told(worker, AwaitIdle(1, 0.0)) == [None]
    worker.submit("r", PROMPTS[1], greedy())
    assert told(worker, AwaitIdle(2, 0.0)) == [BUSY]
    worker.loop.order(AwaitIdle(3, 1000.0), answers.append)
    for _ in range(2):
        worker.turn()
    assert told(worker, SetWeightVersion(4, "w")) == [None]
    assert answers == []
    worker.settle()
    worker.turn()
    assert answers == [Done(serial=3)]


def test_pages_in_quarantine_have_an_owner(checkpoint_of: Callable[[str], Path]):
    """A stopped prefill worker may still write into them."""
    pair = InProcessPair(checkpoint_of("plain"), page_size=4)
    pair.submit("r", PROMPTS[1], greedy(), legs=("decode",))
    pair.settle()
    assert not pair.decode.role.is_idle
    pair.prefill.endpoint.turn(pair.now)
    pair.sides = (pair.decode,)
    pair.abort("r")
    pair.settle()
    assert pair.decode.role.stats(0).pages.quarantined > 0
    assert not pair.decode.role.is_idle
    pair.sides = (pair.prefill, pair.decode)
    pair.settle()
    assert pair.decode.role.is_idle
    assert pair.prefill.role.is_idle


def test_a_prompt_whose_transfer_is_open_is_not_idle(checkpoint_of: Callable[[str], Path]):
    pair = InProcessPair(checkpoint_of("plain"), page_size=4)
    pair.submit("r", PROMPTS[1], greedy(), legs=("prefill",))
    pair.settle()
    assert pair.prefill.legs["r"].ended
    assert not pair.prefill.role.is_idle
    pair.abort("r")
    pair.sleep(1000.0, step_s=100.0)
    assert pair.prefill.role.is_idle
    cached = pair.prefill.role.stats(0).pages.cached
    assert cached > 0
    pair.prefill.role.on_kv_lost()
    assert pair.prefill.role.stats(0).pages.cached == 0


def test_weights_that_are_away_cannot_be_changed(checkpoint_of: Callable[[str], Path], tmp_path: Path):
    """Those that are there can, while the KV pool is away."""
    worker = InProcessAggregated(checkpoint_of("plain"), page_size=4, chunk_tokens=16)
    write_demo_model(tmp_path, **(SHAPES["plain"] | {"seed": 82}))
    source = WeightFiles(str(tmp_path))
    update: list[Order] = [CheckWeights(1, source), LoadWeights(2, source, "new")]
    told(worker, Pause(3), ReleaseMemory(4, BOTH))
    refusal = "the weights' memory is released; resume it first"
    assert told(worker, *update) == [refusal] * 2
    assert worker.engine.weight_version == "default"
    assert worker.engine.num_unsure_weights == 0
    assert told(worker, ResumeMemory(5, ("weights",)), *update) == [None] * 3
    assert told(worker, ResumeMemory(6, ("kv_cache",)), WarmUp(7), Continue(8)) == [None] * 3
    judge_all(Judge(tmp_path), serve(worker))


def test_a_host_without_room_keeps_the_weights_where_they_are(
    worker: InProcessAggregated, judge_of: Any, monkeypatch: pytest.MonkeyPatch
):
    keep = DeviceBlock.keep
    kept: list[DeviceBlock] = []

    def keep_three(block: DeviceBlock) -> None:
        if len(kept) == 3:
            raise RuntimeError("no room")
        kept.append(block)
        keep(block)

    before = held_bytes(worker)
    with monkeypatch.context() as patched:
        patched.setattr(DeviceBlock, "keep", keep_three)
        assert told(worker, Pause(1), ReleaseMemory(2, BOTH)) == [None, "RuntimeError: no room"]
    assert held_bytes(worker) == before
    assert all(block._kept is None for block in kept)
    assert worker.loop.is_held
    assert told(worker, ResumeMemory(3, BOTH), WarmUp(4), Continue(5)) == [None] * 3
    judge_all(judge_of("plain"), serve(worker))


def test_a_device_without_room_may_be_asked_again(
    worker: InProcessAggregated, judge_of: Any, monkeypatch: pytest.MonkeyPatch
):
    resume = DeviceBlock.resume
    rooms = iter([True, True, False])

    def resume_two(block: DeviceBlock) -> None:
        if not next(rooms, True):
            raise torch.OutOfMemoryError("no room")
        resume(block)

    told(worker, Pause(1), ReleaseMemory(2, BOTH))
    monkeypatch.setattr(DeviceBlock, "resume", resume_two)
    assert told(worker, ResumeMemory(3, BOTH)) == ["OutOfMemoryError: no room"]
    assert told(worker, ResumeMemory(4, BOTH), WarmUp(5), Continue(6)) == [None] * 3
    judge_all(judge_of("plain"), serve(worker))


# ------------------------------------------------------------------------------------------------ beside it


class Noted(NoBackground):
    """What runs beside the loop: notes what the memory was when it was stopped and started."""

    def __init__(self, worker: InProcessAggregated) -> None:
        self.worker = worker
        self.calls: list[tuple[str, bool]] = []
        self.ends = True
        self.refuses = False

    def start(self) -> None:
        self.calls.append(("start", bool(held_bytes(self.worker)["kv_cache"])))
        if self.refuses:
            raise UsageError("the port is in use")

    def stop(self, timeout_s: float) -> bool:
        self.calls.append(("stop", bool(held_bytes(self.worker)["kv_cache"])))
        return self.ends


@pytest.fixture
def background(worker: InProcessAggregated) -> Noted:
    background = Noted(worker)
    worker.loop = Loop(worker.engine, worker.role, overlap=True, background=background)
    return background


def test_transfers_end_before_the_pool_goes_and_begin_when_it_is_back(worker: InProcessAggregated, background: Noted):
    told(worker, Pause(1), ReleaseMemory(2, ("kv_cache",)))
    assert background.calls == [("stop", True)]
    told(worker, ResumeMemory(3, BOTH))
    assert len(background.calls) == 1
    told(worker, WarmUp(4))
    assert background.calls == [("stop", True), ("start", True)]
    told(worker, ReleaseMemory(5, ("weights",)))
    assert len(background.calls) == 2, "the pages stay where they are"
    assert told(worker, WarmUp(6)) == ["released: weights"]
    assert len(background.calls) == 2


def test_a_transfer_that_does_not_end_keeps_its_memory(worker: InProcessAggregated, background: Noted):
    background.ends = False
    with pytest.raises(TransferError):
        told(worker, Pause(1), ReleaseMemory(2, BOTH))
    assert all(held_bytes(worker).values())


def test_a_transfer_that_cannot_begin_may_be_asked_again(worker: InProcessAggregated, background: Noted):
    background.refuses = True
    told(worker, Pause(1), ReleaseMemory(2, BOTH), ResumeMemory(3, BOTH))
    assert told(worker, WarmUp(4)) == ["the port is in use"]
    background.refuses = False
    assert told(worker, WarmUp(5)) == [None]


# ------------------------------------------------------------------------------------------------ several ranks


@pytest.mark.parametrize("ranks", [Ranks(tp=2), Ranks(tp=4, dp=2, ep=True)])
def test_all_ranks_release_and_resume(
    checkpoint_of: Callable[[str], Path], judge_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: Ranks
):
    sizes: list[list[int]] = []
    release = RankMemory.release

    def release_here(memory: RankMemory, kinds: Collection[MemoryKind]) -> None:
        release(memory, kinds)
        forward = memory._forward
        tensors = [*forward.weights, forward.kv_pool.pages]
        sizes.append([tensor.untyped_storage().nbytes() for tensor in tensors])

    monkeypatch.setattr(RankMemory, "release", release_here)
    worker = AggregatedRanks(checkpoint_of("plain"), ranks, tmp_path, parts=racing, chunk_tokens=24, page_size=4)
    groups = [[(prompt, greedy()) for prompt in PROMPTS[group :: ranks.dp]] for group in range(ranks.dp)]
    orders: list[Order] = [Pause(1), ReleaseMemory(2, BOTH), ResumeMemory(3, BOTH), WarmUp(4), Continue(5)]
    answers = worker.run(groups, orders=orders)
    for dones in worker.done.values():
        assert [done.error for done, _ in dones] == [None] * 5
        assert [is_held for _, is_held in dones] == [True, True, True, True, False]
    assert len(sizes) == ranks.tp
    assert all(size == 0 for rank in sizes for size in rank)
    judge_all(judge_of("plain"), [answer for group in answers for answer in group])


def test_of_several_ranks_none_is_left_alone_in_a_warm_up(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The others may wait for it inside: its process ends, and the worker with it."""
    worker = AggregatedRanks(checkpoint_of("plain"), Ranks(tp=2), tmp_path, page_size=4)
    monkeypatch.setattr(RankMemory, "warm_up", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.run(
            [[(PROMPTS[0], greedy())]], orders=[Pause(1), ReleaseMemory(2, BOTH), ResumeMemory(3, BOTH), WarmUp(4)]
        )


def refuse(_: RankMemory) -> None:
    raise RuntimeError("out of memory")


def test_nothing_of_the_model_stays_behind(checkpoint_of: Callable[[str], Path]):
    """What a model keeps beside parameters and buffers would neither be given back nor be valid afterwards."""
    for shape in SHAPES:
        forward = InProcessAggregated(checkpoint_of(shape), page_size=4, pool_tokens=64).engine._forward
        known = {tensor.untyped_storage().data_ptr() for tensor in forward.weights}
        assert isinstance(forward._model, nn.Module)
        for module in forward._model.modules():
            for value in vars(module).values():
                assert not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in known
