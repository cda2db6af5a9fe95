"""The aggregated role: tokens and rows against transformers and against a pair, pages under random histories and small pools."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.engine.build import EngineParts
from common.engine.fake import RacingDevice, RacingEngine
from common.memory.kv_pool import KvPool
from common.messages import FinishNow, FlushCache, RequestOptions, StopAt
from deploy.aggregated import MAX_CHUNK_STEPS
from tests.support.aggregated import InProcessAggregated, WholeAnswer
from tests.support.in_process_pair import InProcessPair, options_of
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

NUM_PROMPTS = 40
WHOLE = 8192
RACING = EngineParts(device=RacingDevice(), engine=RacingEngine)


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("plain")


@pytest.fixture
def judge(judge_of: Callable[[str], Judge]) -> Judge:
    return judge_of("plain")


def judged(judge: Judge, answers: list[WholeAnswer], *, greedy: bool = True) -> None:
    tally = Tally()
    for answer in answers:
        assert answer.rows is not None
        judge.add(tally, answer.prompt, answer.output_ids, answer.rows, start=answer.start, greedy=greedy)
    tally.assert_clean()


# ------------------------------------------------------------------------------------------------ the promise


@pytest.mark.parametrize(
    ("chunk_tokens", "page_size", "overlap"), list(itertools.product([7, WHOLE], [1, 16], [True, False]))
)
def test_rows_and_tokens_against_transformers(
    checkpoint_of: Callable[[str], Path],
    judge_of: Callable[[str], Judge],
    shape: str,
    chunk_tokens: int,
    page_size: int,
    overlap: bool,
):
    worker = InProcessAggregated(
        checkpoint_of(shape), chunk_tokens=chunk_tokens, page_size=page_size, overlap=overlap, parts=RACING
    )
    prompts = random_prompts(0, NUM_PROMPTS)
    answers = worker.run((p, options_of(1 if i % 4 == 0 else 2 + i % 11)) for i, p in enumerate(prompts))
    judged(judge_of(shape), answers)
    assert any(answer.cached_tokens for answer in answers)
    assert worker.engine.num_tokens_computed < sum(len(a.prompt) + len(a.output_ids) - 1 for a in answers)
    worker.check_pages()


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3, "n": 2},
    {"temperature": 1.3, "top_k": 20, "frequency_penalty": 1.1, "presence_penalty": 0.4, "n": 4},
    {"temperature": 0.9, "min_p": 0.05, "min_new_tokens": 3},
    {"temperature": 5.0, "top_k": 3, "stop_token_ids": tuple(range(0, 500, 2))},
    {"temperature": 1.0, "frequency_penalty": 2.0},
]


def requests_of(seed: int) -> list[tuple[list[int], RequestOptions]]:
    return [
        (
            prompt,
            options_of(
                1 + i % 9,
                start_len=i % 2 * len(prompt) // 2,
                seed=2**62 + 1000 * i,
                ignore_eos=i % 2 == 0,
                logprobs={"logprob_start_len": len(prompt) // 3, "top_logprobs_num": 2} if i % 3 == 0 else None,
                **SAMPLING[i % len(SAMPLING)],
            ),
        )
        for i, prompt in enumerate(random_prompts(seed, 28, longest=90))
    ]


@pytest.mark.parametrize(("page_size", "pool_tokens"), [(1, 8192), (4, 8192), (4, 240), (16, 480)])
def test_the_same_answers_as_a_pair(checkpoint: Path, judge: Judge, page_size: int, pool_tokens: int):
    """Every sample of n, with penalties, seeds and logprobs, whether it is swapped or not."""
    requests = requests_of(7)
    pair = InProcessPair(checkpoint, page_size=page_size)
    pair.run(requests)
    worker = InProcessAggregated(
        checkpoint, page_size=page_size, chunk_tokens=40, pool_tokens=pool_tokens, max_running=12, parts=RACING
    )
    worker.run(requests)
    for number, (_, options) in enumerate(requests):
        for index in range(options.sampling.n):
            mine, theirs = worker.answer(f"r{number}", index), pair.answer(f"r{number}", index)
            assert mine.output_ids == theirs.output_ids, (number, index)
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
            assert [t for _, t in itertools.chain(*mine.top_logprobs)] == [
                t for _, t in itertools.chain(*theirs.top_logprobs)
            ]
            assert (mine.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
            if mine.prompt_logprobs is not None and theirs.prompt_logprobs is not None:
                assert mine.prompt_logprobs.token_ids == theirs.prompt_logprobs.token_ids
                for one, other in zip(mine.prompt_logprobs.logprobs, theirs.prompt_logprobs.logprobs, strict=True):
                    assert one == pytest.approx(other, abs=1e-4)
            assert mine.finish_reason == theirs.finish_reason
            assert mine.start == options.routed_experts_start_len
            np.testing.assert_array_equal(np.sort(mine.rows), np.sort(theirs.rows))  # type: ignore[arg-type]
            judged(judge, [mine], greedy=False)
    worker.check_pages()


# ------------------------------------------------------------------------------------------------ n samples


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 15, 16, 37])
def test_samples_share_the_prompt(checkpoint: Path, judge: Judge, page_size: int, length: int):
    """The prompt is computed once; full pages are shared, and the last one copied with its rows."""
    prompt = random_prompts(7, 2)[1][:length]
    worker = InProcessAggregated(checkpoint, page_size=page_size, parts=RACING)
    for warm in (False, True):
        before = worker.engine.num_tokens_computed
        worker.submit(f"r{warm}", prompt, options_of(9, n=4, temperature=1.0, seed=11, ignore_eos=True))
        worker.turn()
        shared, own = length // page_size, -(-(length + 1) // page_size) - length // page_size
        assert worker.role.stats(0).pages.running == shared + 4 * own
        worker.settle()
        answers = [worker.answer(f"r{warm}", index) for index in range(4)]
        judged(judge, answers, greedy=False)
        cached = (length - 1) // page_size * page_size if warm else 0
        assert {answer.cached_tokens for answer in answers} == {cached}
        assert worker.engine.num_tokens_computed - before == length - cached + 4 * 8
        assert len({tuple(answer.output_ids) for answer in answers}) > 1
    worker.check_pages()


def test_a_sample_is_penalised_for_its_own_tokens_alone(checkpoint: Path):
    """Each repeats its first token for ever; the others' first tokens, drawn in the same step, are not its own."""
    worker = InProcessAggregated(checkpoint)
    for seed in range(6):
        worker.submit(f"r{seed}", [seed, 2, 3], options_of(6, n=4, temperature=1.0, seed=seed, frequency_penalty=-80.0))
    worker.settle()
    answers = [worker.answer(f"r{seed}", index) for seed in range(6) for index in range(4)]
    assert all(len(set(answer.output_ids)) == 1 for answer in answers)
    assert len({answer.output_ids[0] for answer in answers}) > 3


def test_without_the_copied_page_the_comparison_fails(checkpoint: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch):
    """The check can fail: samples whose last prompt page was not copied compute other rows than transformers."""
    monkeypatch.setattr(KvPool, "copy", lambda self, page, copies: None)
    worker = InProcessAggregated(checkpoint, parts=RACING)
    prompt = random_prompts(7, 2)[1][:30]
    worker.submit("r", prompt, options_of(9, n=2, temperature=1.0, seed=11, ignore_eos=True))
    worker.settle()
    judged(judge, [worker.answer("r", 0)], greedy=False)
    with pytest.raises(AssertionError):
        judged(judge, [worker.answer("r", 1)], greedy=False)


def test_more_samples_than_fit_are_refused(checkpoint: Path):
    worker = InProcessAggregated(checkpoint, pool_tokens=64, page_size=4)
    worker.submit("r", list(range(30)), options_of(4, n=20))
    failed = worker.legs["r"].failed
    assert failed is not None
    assert (failed.error.status, failed.error.leg) == (400, None)
    assert "sampling_params.n" in failed.error.message
    worker.check_pages()


# ------------------------------------------------------------------------------------------------ scored prompts


def test_a_scored_prompt_may_fill_the_pool(checkpoint: Path, judge: Judge):
    """No token is generated, so none needs a place; P - 1 rows, and none from beyond them on."""
    worker = InProcessAggregated(checkpoint, pool_tokens=64, page_size=4, chunk_tokens=10)
    prompt = list(range(100, 164))
    worker.submit("r", prompt, options_of(0, logprobs={"logprob_start_len": 0}))
    worker.submit("s", prompt, options_of(0, start_len=len(prompt)))
    worker.settle()
    answer, empty = worker.answer("r"), worker.answer("s")
    assert (answer.output_ids, answer.finish_reason.type, answer.finish_reason.length) == ([], "length", 0)
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs.logprobs) == len(prompt)
    assert answer.rows is not None
    tally = Tally()
    judge.add(tally, prompt[:-1], prompt[-1:], answer.rows, greedy=False)
    tally.assert_clean()
    assert empty.rows is not None
    assert len(empty.rows) == 0
    worker.check_pages()


# ------------------------------------------------------------------------------------------------ ends that somebody asks for


def test_stop_at_cuts_the_answer(checkpoint: Path, judge: Judge):
    worker = InProcessAggregated(checkpoint)
    [whole] = worker.run([([5, 6, 7], options_of(30, ignore_eos=True))])
    worker.submit("r", [5, 6, 7], options_of(30, ignore_eos=True, stop=("x",)))
    while len(worker.legs["r"].tokens) < 6:
        worker.turn()
    worker.role.handle(StopAt(rid="r", index=0, num_tokens=4, matched="x"))
    worker.role.handle(StopAt(rid="r", index=0, num_tokens=2, matched="x"))
    worker.settle()
    answer = worker.answer("r")
    assert answer.output_ids == whole.output_ids[:4]
    assert (answer.finish_reason.type, answer.finish_reason.matched) == ("stop", "x")
    judged(judge, [answer])
    worker.check_pages()


@pytest.mark.parametrize("turns", range(0, 24, 2))
def test_finish_now_answers_with_what_there_is(checkpoint: Path, judge: Judge, turns: int):
    worker = InProcessAggregated(checkpoint, chunk_tokens=8, page_size=4)
    worker.submit("r", list(range(40)), options_of(60, ignore_eos=True, n=2, temperature=1.0))
    for _ in range(turns):
        worker.turn()
    worker.role.handle(FinishNow("r"))
    worker.settle()
    for index in (0, 1):
        answer = worker.answer("r", index)
        assert (answer.finish_reason.type, answer.finish_reason.cause) == ("abort", "requested")
        if answer.output_ids:
            judged(judge, [answer], greedy=False)
        else:
            assert answer.rows is None
    worker.check_pages()


def test_streamed_tokens_are_all_tokens(checkpoint: Path):
    worker = InProcessAggregated(checkpoint)
    [answer] = worker.run([([5, 6, 7], options_of(12, stream=True))])
    assert worker.legs["r0"].tokens == answer.output_ids


def test_flush(checkpoint: Path):
    """Refused while requests run; what has been aborted, but is still in a step, is waited for."""
    worker = InProcessAggregated(checkpoint)
    prompt = list(range(50))
    worker.run([(prompt, options_of(3))])
    worker.submit("busy", prompt, options_of(30, ignore_eos=True))
    for _ in range(5):
        worker.turn()
    worker.role.handle(FlushCache(1))
    assert worker.recorder.flushed[-1].refusal == "1 requests are running"
    worker.abort("busy")
    worker.role.handle(FlushCache(2))
    assert len(worker.recorder.flushed) == 1
    worker.settle()
    assert worker.recorder.flushed[-1].refusal is None
    assert worker.role.stats(0).pages.cached == 0
    [after] = worker.run([(prompt, options_of(3))])
    assert after.cached_tokens == 0


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_tiny_pool_swaps_and_changes_nothing(checkpoint: Path, judge: Judge, overlap: bool, page_size: int):
    prompts = random_prompts(10, 12, longest=24)
    requests = [
        (p, options_of(20 + i, ignore_eos=True, temperature=1.0, seed=i, repetition_penalty=1.2, n=1 + (i % 5 == 0)))
        for i, p in enumerate(prompts)
    ]
    large = InProcessAggregated(checkpoint, page_size=page_size, overlap=overlap)
    expected = large.run(requests)
    assert large.role.stats(0).swaps == 0
    tiny = InProcessAggregated(checkpoint, page_size=page_size, overlap=overlap, pool_tokens=120, parts=RACING)
    answers = tiny.run(requests)
    assert tiny.role.stats(0).swaps > 5
    for answer, other in zip(answers, expected, strict=True):
        assert answer.output_ids == other.output_ids
        assert np.array_equal(np.sort(answer.rows), np.sort(other.rows))  # type: ignore[arg-type]
    judged(judge, answers, greedy=False)
    tiny.check_pages()


def test_the_cache_gives_way_before_a_request(checkpoint: Path):
    """A request grows into pages that were cached; nobody is swapped for them."""
    worker = InProcessAggregated(checkpoint, page_size=1, pool_tokens=128)
    worker.run([(list(range(100, 200)), options_of(1))])
    assert worker.role.stats(0).pages.cached == 100
    worker.run([([1, 2], options_of(50, ignore_eos=True)), ([3], options_of(50, ignore_eos=True))])
    assert worker.role.stats(0).swaps == 0
    assert worker.role.stats(0).pages.cached < 40
    worker.check_pages()


def test_twins_of_cached_pages_do_not_hold_the_cache(checkpoint: Path, judge: Judge):
    """Two prompts with one beginning are computed side by side; each request may still fill the pool in the end."""
    worker = InProcessAggregated(checkpoint, page_size=4, pool_tokens=128)
    begin = list(range(40))
    worker.submit("a", [*begin, *range(200, 210)], options_of(1))
    worker.submit("b", [*begin, *range(300, 310)], options_of(78, ignore_eos=True))
    worker.settle()
    judged(judge, [worker.answer("a"), worker.answer("b")])
    worker.check_pages()


def test_tokens_come_however_many_prompts_there_are(checkpoint: Path):
    """Prompts that want one token or none come without end, and the one that wants more gets on."""
    worker = InProcessAggregated(checkpoint, chunk_tokens=8, page_size=4)
    worker.submit("long", [1, 2, 3], options_of(6, ignore_eos=True))
    turns = 0
    for turns in range(10 * MAX_CHUNK_STEPS):
        if worker.legs["long"].ended:
            break
        worker.submit(f"r{turns}", [turns, *range(20)], options_of(turns % 2))
        worker.turn()
    assert worker.legs["long"].ended
    assert MAX_CHUNK_STEPS < turns < 7 * (MAX_CHUNK_STEPS + 1)
    worker.settle()
    worker.check_pages()


@pytest.mark.parametrize("seed", range(12))
def test_random_histories(checkpoint: Path, judge: Judge, seed: int):
    """Small pools, aborts, ends and flushes at any moment: answers are right, and in the end nothing is held."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 4, 16])
    worker = InProcessAggregated(
        checkpoint,
        page_size=page_size,
        chunk_tokens=rng.choice([5, 16, 100]),
        overlap=rng.random() < 0.7,
        pool_tokens=rng.choice([96, 160, 320]),
        max_running=rng.choice([3, 8]),
        prefix_cache=rng.random() < 0.8,
        parts=RACING,
    )
    prompts = random_prompts(seed, 20, longest=40)
    open_rids: list[str] = []
    for number in range(40):
        max_new_tokens = rng.choice([0, 1, 2, 9, 40])
        options = options_of(
            max_new_tokens,
            n=rng.choice([1, 1, 2, 3]) if max_new_tokens else 1,
            temperature=rng.choice([0.0, 1.0]),
            seed=number,
            repetition_penalty=rng.choice([1.0, 1.2]),
        )
        open_rids.append(f"r{number}")
        worker.submit(open_rids[-1], rng.choice(prompts), options)
        for _ in range(rng.randrange(6)):
            worker.turn()
            assert worker.role.stats(0).pages.unaccounted == 0
        match rng.randrange(6):
            case 0:
                worker.abort(rng.choice(open_rids))
            case 1:
                worker.role.handle(FinishNow(rng.choice(open_rids)))
            case 2:
                worker.role.handle(FlushCache(number))
    worker.settle()
    worker.check_pages()
    tally = Tally()
    for rid, leg in worker.legs.items():
        for index in leg.ends:
            answer = worker.answer(rid, index)
            if answer.rows is not None and len(answer.rows) > 0:
                tokens = [*answer.prompt, *answer.output_ids]
                judge.add(tally, tokens[:-1], tokens[-1:], answer.rows, greedy=False)
    tally.assert_clean()
    assert sum(leg.ended for leg in worker.legs.values()) > 25
