"""Workers of several ranks, in threads, against transformers: tokens and rows, whatever is split and how."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.engine.build import EngineParts, Follower
from common.engine.fake import RacingDevice, RacingEngine
from common.engine.follower import Followers, PagesMoved, StashPages, ToFollower
from common.engine.step import Launched
from common.messages import RequestOptions
from common.ranks import Ranks
from common.scheduling.step_plan import StepPlan
from tests.support.aggregated import InProcessAggregated, WholeAnswer
from tests.support.checkpoints import edit_config, edit_tensors
from tests.support.in_process_pair import options_of
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts
from tests.support.rank_threads import AggregatedRanks

SPLITS = {
    "tp2": Ranks(tp=2),
    "tp2-ep": Ranks(tp=2, ep=True),
    "tp4": Ranks(tp=4),  # more ranks than key/value heads
    "dp2": Ranks(tp=2, dp=2),
    "dp2-ep": Ranks(tp=2, dp=2, ep=True),
    "dp4": Ranks(tp=4, dp=4),
    "tp4-dp2": Ranks(tp=4, dp=2),
    "tp4-dp2-ep": Ranks(tp=4, dp=2, ep=True),
}
ODD_VOCAB_SIZE = 997
SOME_SPLITS = ["tp2", "dp2-ep", "tp4-dp2"]

Asked = tuple[list[int], RequestOptions]


def racing() -> EngineParts:
    return EngineParts(device=RacingDevice(), engine=RacingEngine)


def greedy(max_new_tokens: int) -> RequestOptions:
    return options_of(max_new_tokens, ignore_eos=True, temperature=0.0)


def judge_all(judge: Judge, answers: Iterable[WholeAnswer]) -> None:
    tally = Tally()
    for answer in answers:
        assert answer.rows is not None
        judge.add(tally, answer.prompt, answer.output_ids, answer.rows, start=answer.start)
    tally.assert_clean()


def dealt(requests: list[Asked], dp: int) -> list[list[Asked]]:
    """Three quarters for the first group, the rest in turn: so the others are often idle while it steps."""
    groups: list[list[Asked]] = [[] for _ in range(dp)]
    for i, request in enumerate(requests):
        groups[0 if i % 4 else i // 4 % dp].append(request)
    return groups


@pytest.mark.parametrize(("shape", "overlap"), [("mixed", True), ("plain", False)])
@pytest.mark.parametrize("name", SPLITS)
def test_tokens_and_rows(
    checkpoint_of: Callable[[str], Path],
    judge_of: Callable[[str], Judge],
    tmp_path: Path,
    name: str,
    shape: str,
    overlap: bool,
):
    ranks = SPLITS[name]
    worker = AggregatedRanks(
        checkpoint_of(shape), ranks, tmp_path, parts=racing, overlap=overlap, chunk_tokens=48, page_size=4
    )
    requests = [(prompt, greedy(3 + (5 * i) % 11)) for i, prompt in enumerate(random_prompts(8, 16, longest=90))]
    answers = worker.run(dealt(requests, ranks.dp), concurrency=5)
    judge_all(judge_of(shape), [answer for group in answers for answer in group])
    for leader in worker.leaders.values():
        leader.check_pages()


@pytest.mark.parametrize(("shape", "name"), [("plain", "tp2"), ("mixed", "tp4")])
def test_a_vocabulary_that_does_not_come_out_even(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, shape: str, name: str
):
    """The last rank has a shorter part of the head, tied or not; what fills it up is never drawn."""
    checkpoint = tmp_path / "odd"
    shutil.copytree(checkpoint_of(shape), checkpoint)
    names = ["model.embed_tokens.weight", "lm_head.weight"]

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensors[name][:ODD_VOCAB_SIZE].clone() for name in names if name in tensors}

    edit_tensors(checkpoint, cut)
    edit_config(checkpoint, vocab_size=ODD_VOCAB_SIZE)
    prompts = [[token % ODD_VOCAB_SIZE for token in prompt] for prompt in random_prompts(14, 12, longest=60)]
    worker = AggregatedRanks(checkpoint, SPLITS[name], tmp_path, parts=racing, chunk_tokens=48, page_size=4)
    answers = worker.run([[(prompt, greedy(6)) for prompt in prompts]])
    judge_all(Judge(checkpoint), answers[0])


@pytest.mark.parametrize("name", SOME_SPLITS)
def test_in_bfloat16_nearly_all_rows_are_those_of_one_rank(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, name: str
):
    """Sums of parts are rounded in another order, so near ties fall otherwise here and there."""
    ranks, checkpoint = SPLITS[name], checkpoint_of("plain")
    groups = dealt([(prompt, greedy(1)) for prompt in random_prompts(13, 16, longest=60)], ranks.dp)
    worker = AggregatedRanks(checkpoint, ranks, tmp_path, parts=racing, chunk_tokens=64, dtype="bfloat16")
    single = InProcessAggregated(checkpoint, parts=racing(), chunk_tokens=64, dtype="bfloat16")
    same = total = 0
    for group, theirs in zip(groups, worker.run(groups), strict=True):
        for expected, answer in zip(single.run(group), theirs, strict=True):
            assert answer.rows is not None
            assert expected.rows is not None
            agreement = (np.sort(answer.rows) == np.sort(expected.rows)).all(axis=-1)
            same, total = same + int(agreement.sum()), total + agreement.size
    assert same >= 0.9 * total


# ------------------------------------------------------------------------------------------------ full ranks


class FullestStep(RacingEngine):
    """Remembers the most requests that one step had."""

    most_entries = 0

    def launch(self, plan: StepPlan) -> Launched:
        self.most_entries = max(self.most_entries, len(plan.entries))
        return super().launch(plan)


@pytest.mark.parametrize("name", ["dp2", "dp4", "tp4-dp2-ep"])
def test_more_running_requests_than_the_chunks_of_all_groups(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path, name: str
):
    """Every rank decodes as many requests at once as it may, more than all ranks' chunks together: buffers must hold them."""
    ranks, chunk_tokens, max_running = SPLITS[name], 8, 40
    assert max_running > chunk_tokens * ranks.dp
    worker = AggregatedRanks(
        checkpoint_of("plain"),
        ranks,
        tmp_path,
        parts=lambda: EngineParts(device=RacingDevice(), engine=FullestStep),
        chunk_tokens=chunk_tokens,
        page_size=4,
        max_running=max_running,
    )
    prompts = [prompt[:6] for prompt in random_prompts(9, (max_running + 2) * ranks.dp, longest=40)]
    groups = [[(prompt, greedy(50)) for prompt in prompts[group :: ranks.dp]] for group in range(ranks.dp)]
    answers = worker.run(groups, concurrency=max_running + 2)
    judge_all(judge_of("plain"), [answer for group in answers for answer in group])
    for leader in worker.leaders.values():
        assert isinstance(leader.engine, FullestStep)
        assert leader.engine.most_entries == max_running
        leader.check_pages()


# ------------------------------------------------------------------------------------------------ all that a request may ask for


def features() -> list[Asked]:
    """Requests that need more than a forward pass: penalties, filters, logprobs, several samples."""
    asked: list[dict[str, Any]] = [
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 0.9, "seed": 3, "top_k": 5},
        {"temperature": 1.1, "seed": 4, "n": 3},
        {"temperature": 0.0, "logprobs": {"top_logprobs_num": 3, "logprob_start_len": 0}},
        {"temperature": 0.7, "seed": 5, "min_new_tokens": 4, "logit_bias": {7: 2.0}},
    ]
    prompts = random_prompts(11, 20, longest=60)
    return [(prompt, options_of(9, **asked[i % len(asked)])) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("name", SOME_SPLITS)
def test_what_a_request_may_ask_for_is_as_with_one_rank(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, name: str
):
    ranks, checkpoint = SPLITS[name], checkpoint_of("plain")
    groups = dealt(features(), ranks.dp)
    answers = AggregatedRanks(checkpoint, ranks, tmp_path, parts=racing, chunk_tokens=32, page_size=4).run(groups)
    single = InProcessAggregated(checkpoint, parts=racing(), chunk_tokens=32, page_size=4)
    for group, theirs in zip(groups, answers, strict=True):
        for expected, answer in zip(single.run(group), theirs, strict=True):
            assert answer.output_ids == expected.output_ids
            assert np.allclose(answer.logprobs, expected.logprobs, atol=1e-3)
            assert answer.rows is not None
            assert expected.rows is not None
            assert np.array_equal(np.sort(answer.rows), np.sort(expected.rows))
            if expected.prompt_logprobs is not None:
                assert answer.prompt_logprobs is not None
                ours, wanted = answer.prompt_logprobs.logprobs, expected.prompt_logprobs.logprobs
                assert np.allclose(np.array(ours[1:], float), np.array(wanted[1:], float), atol=1e-3)


@pytest.mark.parametrize("name", SOME_SPLITS)
def test_swapped_requests_come_back_whole(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path, name: str
):
    """A pool that is too small for all: every rank swaps its own part of the pages out and in."""
    ranks = SPLITS[name]
    worker = AggregatedRanks(
        checkpoint_of("plain"),
        ranks,
        tmp_path,
        parts=racing,
        chunk_tokens=32,
        page_size=4,
        pool_tokens=200,
        prefix_cache=False,
    )
    requests = [(prompt, greedy(60)) for prompt in random_prompts(12, 16, longest=30)]
    answers = worker.run(dealt(requests, ranks.dp), concurrency=16)
    judge_all(judge_of("plain"), [answer for group in answers for answer in group])
    assert worker.leaders[0].role.stats(0).swaps > 0
    for leader in worker.leaders.values():
        leader.check_pages()


class WrittenAtOnce(RacingEngine):
    """As soon as pages have been swapped out, a peer writes to them, in the memory of every rank.

    And as soon as they have been swapped in, every rank has what it should.
    """

    followers: dict[int, Follower]
    kept: dict[int, list[torch.Tensor]]

    def swap_out(self, key: int, pages: list[int]) -> None:
        super().swap_out(key, pages)
        pools = self._pools()
        self.kept[key] = [pool[pages].clone() for pool in pools]
        for pool in pools:
            pool[pages] = torch.nan

    def swap_in(self, key: int, pages: list[int]) -> None:
        super().swap_in(key, pages)
        for pool, kept in zip(self._pools(), self.kept.pop(key), strict=True):
            # Slots that nobody has filled yet may hold what the peer has written.
            assert torch.allclose(pool[pages], kept, atol=0, rtol=0, equal_nan=True), "a rank is still to write these"

    def _pools(self) -> list[torch.Tensor]:
        followers = [self.followers[rank] for rank in self.rank.followers]
        return [self.kv_pool.pages, *(follower.forward.kv_pool.pages for follower in followers)]


def test_pages_are_nobody_else_s_until_every_rank_has_swapped_them_out(
    checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge], tmp_path: Path
):
    worker = AggregatedRanks(
        checkpoint_of("plain"),
        SPLITS["tp4"],
        tmp_path,
        parts=lambda: EngineParts(device=RacingDevice(), engine=WrittenAtOnce),
        chunk_tokens=32,
        page_size=4,
        pool_tokens=200,
        prefix_cache=False,
    )
    WrittenAtOnce.followers, WrittenAtOnce.kept = worker.followers, {}
    [answers] = worker.run([[(prompt, greedy(60)) for prompt in random_prompts(12, 16, longest=30)]])
    judge_all(judge_of("plain"), answers)
    assert worker.leaders[0].role.stats(0).swaps > 0


class LateFollowers:
    """Followers that answer one after the other, each after a wait."""

    def __init__(self, key: int) -> None:
        self.answers = [PagesMoved(2, key - 1), PagesMoved(1, key), PagesMoved(2, key)]
        self.told: list[int] = []
        self.here: list[PagesMoved] = []

    def send(self, rank: int, message: ToFollower) -> None:
        self.told.append(rank)

    def receive(self) -> list[PagesMoved]:
        here, self.here = self.here, []
        return here

    def wait(self, timeout_s: float) -> None:
        self.here.append(self.answers.pop(0))


def test_a_leader_waits_for_every_follower():
    link = LateFollowers(7)
    followers = Followers(range(1, 3), link)
    followers.tell(StashPages(7, [1, 2]))
    followers.wait_moved(7)
    assert link.told == [1, 2]
    assert link.answers == []
    Followers().wait_moved(7)
