"""What engines do beyond one plain sample, over the loopback: n samples, logprobs, penalties, stops, ends, swapping, flushes."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.engine.build import EngineParts
from common.engine.device import CpuDevice
from common.engine.fake import RacingDevice, RacingEngine
from common.engine.penalties import TokenCounts
from common.messages import Bootstrap, FinishNow, FlushCache, Generate, SamplingParams, StopAt
from common.scheduling.request import Request
from common.scheduling.step_plan import StepEntry
from tests.support.in_process_pair import Answer, InProcessPair, options_of
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts

RACING = EngineParts(device=RacingDevice(), engine=RacingEngine)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("plain")


@pytest.fixture
def judge(judge_of: Callable[[str], Judge]) -> Judge:
    return judge_of("plain")


def judged(judge: Judge, answers: list[Answer], *, greedy: bool = True) -> None:
    tally = Tally()
    for answer in answers:
        assert answer.rows is not None
        judge.add(tally, answer.prompt, answer.output_ids, answer.rows, start=answer.start, greedy=greedy)
    tally.assert_clean()


# ------------------------------------------------------------------------------------------------ n samples


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 15, 16, 37])
def test_n_samples_equal_n_requests_with_their_seeds(checkpoint: Path, judge: Judge, page_size: int, length: int):
    """Sample i is what a request with seed + i gives; the prompt is computed once and its full pages are shared."""
    prompt = random_prompts(7, 2)[1][:length]
    many = InProcessPair(checkpoint, page_size=page_size, parts=RACING, prefix_cache=False)
    many.submit("r", prompt, options_of(9, n=4, temperature=1.0, seed=11))
    many.settle()
    answers = [many.answer("r", index) for index in range(4)]
    judged(judge, answers, greedy=False)
    assert many.prefill.engine.num_tokens_computed == length
    page_bytes = many.decode.engine.kv_pool.layout.page_bytes
    shared, partial = divmod(length, page_size)
    assert many.decode.endpoint.counts.num_bytes == (shared + 4 * (partial > 0)) * page_bytes
    many.check_pages()
    single = InProcessPair(checkpoint, page_size=page_size)
    alone = single.run([(prompt, options_of(9, temperature=1.0, seed=11 + i)) for i in range(4)])
    assert [a.output_ids for a in answers] == [a.output_ids for a in alone]
    assert len({tuple(a.output_ids) for a in answers}) > 1


def test_samples_end_and_fail_together_or_alone(checkpoint: Path):
    """Samples of different lengths end one by one; an abort in the middle ends all; nothing is held afterwards."""
    pair = InProcessPair(checkpoint, page_size=4, pool_tokens=256)
    for turns in range(0, 24, 3):
        rid = f"r{turns}"
        pair.submit(rid, list(range(30)), options_of(40, n=3, temperature=1.0, seed=turns), decode_first=turns % 2 == 1)
        for _ in range(turns):
            pair.turn()
        pair.abort(rid)
        pair.settle()
        pair.check_pages()


def test_more_samples_than_fit_are_refused(checkpoint: Path):
    pair = InProcessPair(checkpoint, pool_tokens=64, page_size=4)
    pair.submit("r", list(range(30)), options_of(4, n=20))
    pair.settle()
    failed = pair.decode.legs["r"].failed
    assert failed is not None
    assert failed.error.status == 400
    assert "sampling_params.n" in failed.error.message
    pair.abort("r")
    pair.settle()
    pair.check_pages()


# ------------------------------------------------------------------------------------------------ logprobs


@pytest.mark.parametrize("chunk_tokens", [5, 64])
@pytest.mark.parametrize("start", [0, 1, 20, 39, 40])
def test_logprobs_against_transformers(checkpoint: Path, judge: Judge, chunk_tokens: int, start: int):
    """Prompt and output logprobs and the likeliest tokens equal those of the reference; a cached prefix changes nothing."""
    prompt = random_prompts(8, 2)[1][:40]
    pair = InProcessPair(checkpoint, chunk_tokens=chunk_tokens, page_size=4)
    options = options_of(5, logprobs={"logprob_start_len": start, "top_logprobs_num": 3})
    cold, warm = (pair.run([(prompt, options)])[0] for _ in range(2))
    expected = log_softmax(judge.trace([*prompt, *cold.output_ids[:-1]]).logits)
    for answer in (cold, warm):
        judged(judge, [answer])
        assert answer.prompt_logprobs is not None
        assert answer.prompt_logprobs.token_ids == prompt[start:]
        for offset, logprob in enumerate(answer.prompt_logprobs.logprobs):
            position = start + offset
            if position == 0:
                assert logprob is None
                assert answer.prompt_logprobs.top_logprobs[0] is None
                continue
            assert logprob == pytest.approx(expected[position - 1, prompt[position]], abs=1e-3)
            top = answer.prompt_logprobs.top_logprobs[offset]
            assert top is not None
            check_top(top, expected[position - 1])
        assert len(answer.prompt_logprobs.logprobs) == len(prompt) - start
        assert len(answer.logprobs) == len(answer.top_logprobs) == len(answer.output_ids)
        for offset, token in enumerate(answer.output_ids):
            row = expected[len(prompt) - 1 + offset]
            assert answer.logprobs[offset] == pytest.approx(row[token], abs=1e-3)
            check_top(answer.top_logprobs[offset], row)
    assert warm.cached_tokens <= max(0, start - 1)
    assert (warm.cached_tokens > 0) == (start >= 20)


def check_top(top: list[tuple[float, int]], expected: np.ndarray) -> None:
    assert len(top) == 3
    best = np.sort(expected)[::-1][:3]
    assert np.allclose([logprob for logprob, _ in top], best, atol=1e-3)
    assert np.allclose([expected[token] for _, token in top], best, atol=1e-3)


# ------------------------------------------------------------------------------------------------ penalties, biases, minimum


def twin(judge: Judge, prompt: list[int], params: SamplingParams, eos: set[int]) -> list[int]:
    """The slow twin: greedy decoding with transformers' logits, changed by a recount of all tokens at each step."""
    output: list[int] = []
    while len(output) < params.max_new_tokens:
        logits = judge.trace([*prompt, *output]).logits[-1].astype(np.float64)
        seen = set(prompt) | set(output)
        for token in seen:
            logits[token] = (
                logits[token] / params.repetition_penalty
                if logits[token] > 0
                else logits[token] * params.repetition_penalty
            )
        for token in set(output):
            logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        if len(output) < params.min_new_tokens:
            logits[sorted(eos)] = -np.inf
        output.append(int(logits.argmax()))
        if output[-1] in eos:
            break
    return output


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"frequency_penalty": 1.1, "presence_penalty": 0.7},
    {"repetition_penalty": 0.6, "frequency_penalty": -0.8},
    {"logit_bias": {3: 30.0, 4: -100.0}},
    {"logit_bias": {2: 60.0}, "min_new_tokens": 5, "presence_penalty": 2.0},
]


@pytest.mark.parametrize("overlap", [True, False])
def test_penalties_against_a_recount(checkpoint: Path, judge: Judge, overlap: bool):
    """Different penalties side by side in one batch, with overlap and without: each request as the slow twin has it."""
    pair = InProcessPair(checkpoint, overlap=overlap, parts=RACING)
    prompts = random_prompts(9, 11, longest=30)
    settings: list[dict[str, Any]] = list(itertools.islice(itertools.cycle([*PENALTIES, {}]), 11))
    answers = pair.run([(p, options_of(8, **s)) for p, s in zip(prompts, settings, strict=True)], concurrency=6)
    eos = set(pair.decode.engine.config.eos_token_ids)
    for answer, setting in zip(answers, settings, strict=True):
        params = SamplingParams(max_new_tokens=8, temperature=0.0, **setting)
        assert answer.output_ids == twin(judge, answer.prompt, params, eos)
    judged(judge, answers, greedy=False)


def test_min_new_tokens_holds_back_stops(checkpoint: Path):
    """An end that is biased to come at once comes right after the minimum, not before."""
    pair = InProcessPair(checkpoint)
    eos = pair.decode.engine.config.eos_token_ids[0]
    biased: dict[str, Any] = {"logit_bias": {eos: 100.0, 7: 90.0}, "stop_token_ids": (7,)}
    for minimum in (0, 1, 4):
        [answer] = pair.run([([1, 2, 3], options_of(9, min_new_tokens=minimum, **biased))])
        assert len(answer.output_ids) == minimum + 1
        assert answer.finish_reason.matched == answer.output_ids[-1] == eos


# ------------------------------------------------------------------------------------------------ ends that somebody asks for


def test_stop_at_cuts_the_answer(checkpoint: Path, judge: Judge):
    """The frontend finds a stop string late; tokens and rows end where it says."""
    pair = InProcessPair(checkpoint)
    whole = pair.run([([5, 6, 7], options_of(30, ignore_eos=True))])[0]
    pair.submit("r", [5, 6, 7], options_of(30, ignore_eos=True, stop=("x",)))
    while len(pair.decode.legs["r"].tokens) < 6:
        pair.turn()
    pair.decode.role.handle(StopAt(rid="r", index=0, num_tokens=4, matched="x"))
    pair.decode.role.handle(StopAt(rid="r", index=0, num_tokens=2, matched="x"))
    pair.settle()
    answer = pair.answer("r")
    assert answer.output_ids == whole.output_ids[:4]
    assert (answer.finish_reason.type, answer.finish_reason.matched) == ("stop", "x")
    judged(judge, [answer])
    pair.check_pages()


@pytest.mark.parametrize("turns", range(0, 30, 2))
def test_finish_now_answers_with_what_there_is(checkpoint: Path, judge: Judge, turns: int):
    """At any moment: an answer from both legs, tokens and rows that fit each other, nothing held."""
    pair = InProcessPair(checkpoint, chunk_tokens=8, page_size=4)
    pair.submit("r", list(range(40)), options_of(60, ignore_eos=True, n=2, temperature=1.0))
    for _ in range(turns):
        pair.turn()
    for side in pair.sides:
        side.role.handle(FinishNow("r"))
    pair.settle()
    for index in (0, 1):
        finished = pair.decode.legs["r"].ends[index]
        assert finished.finish_reason.type == "abort"
        assert finished.finish_reason.cause == "requested"
        if finished.token_ids:
            judged(judge, [pair.answer("r", index)], greedy=False)
        else:
            assert finished.rows is None
    pair.check_pages()


# ------------------------------------------------------------------------------------------------ swapping


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tiny_pool_swaps_and_changes_nothing(
    checkpoint: Path, judge: Judge, overlap: bool, page_size: int, temperature: float
):
    """A pool so small that requests are swapped again and again: tokens, logprobs and rows equal those of a large one."""
    prompts = random_prompts(10, 12, longest=24)
    requests = [
        (
            p,
            options_of(
                20 + i, ignore_eos=True, temperature=temperature, seed=i, repetition_penalty=1.2, n=1 + (i % 5 == 0)
            ),
        )
        for i, p in enumerate(prompts)
    ]
    large = InProcessPair(checkpoint, page_size=page_size, overlap=overlap)
    expected = large.run(requests)
    assert large.decode.role.stats(0).swaps == 0
    tiny = InProcessPair(checkpoint, page_size=page_size, overlap=overlap, pool_tokens=120, parts=RACING)
    answers = tiny.run(requests)
    assert tiny.decode.role.stats(0).swaps > 5
    for answer, other in zip(answers, expected, strict=True):
        assert answer.output_ids == other.output_ids
        assert np.allclose(answer.logprobs, other.logprobs, atol=1e-4)
        assert np.array_equal(answer.rows, other.rows)  # type: ignore[arg-type]
    judged(judge, answers, greedy=False)
    tiny.check_pages()


def test_aborts_while_swapped(checkpoint: Path, judge: Judge):
    """Swapped requests that are aborted, or asked to finish, give what they have and leave nothing behind."""
    pair = InProcessPair(checkpoint, page_size=1, pool_tokens=90)
    for index in range(6):
        pair.submit(f"r{index}", [index, 1, 2], options_of(60, ignore_eos=True))
    while len(pair.decode_role._scheduler.swapped) < 2:
        pair.turn()
    first, second = list(pair.decode_role._scheduler.swapped)[:2]
    pair.abort(first.rid)
    for side in pair.sides:
        side.role.handle(FinishNow(second.rid))
    pair.settle()
    ended = pair.answer(second.rid)
    assert ended.finish_reason.type == "abort"
    others = [pair.answer(f"r{index}") for index in range(6) if f"r{index}" != first.rid]
    judged(judge, others)
    pair.check_pages()


# ------------------------------------------------------------------------------------------------ flushing


def test_flush_waits_for_transfers_and_refuses_while_requests_run(checkpoint: Path, judge: Judge):
    """Refused with requests running; else the cache is empty afterwards, and the next hit is none: rows are computed again."""
    pair = InProcessPair(checkpoint)
    prompt = list(range(50))
    [cold] = pair.run([(prompt, options_of(3))])
    [warm] = pair.run([(prompt, options_of(3))])
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 48)
    pair.submit("busy", prompt, options_of(3))
    pair.prefill.role.handle(FlushCache(1))
    assert pair.prefill.recorder.flushed[-1].refusal == "1 requests are running"
    pair.settle()
    pair.prefill.role.handle(FlushCache(2))
    assert pair.prefill.recorder.flushed[-1].refusal is None
    [after] = pair.run([(prompt, options_of(3))])
    assert after.cached_tokens == 0
    judged(judge, [cold, warm, after])


def test_penalty_counts_survive_a_change_of_rows_and_back():
    """A request that comes back to a row after a time in another one is counted from all its tokens, not its first time's."""
    message = Generate(
        rid="r", input_ids=[1, 2], options=options_of(9, frequency_penalty=1.0), bootstrap=Bootstrap("h", 1, (1,))
    )
    request = Request.of(message)
    counts = TokenCounts(2, 8, CpuDevice())
    flat = torch.zeros(1, 8)
    for row, token in ((0, 3), (1, 4), (0, 5)):
        request.row = row
        entry = StepEntry(request, request.num_known_tokens - 1, request.num_known_tokens, 1)
        changes = counts.changes_of([entry], torch.tensor([row]), [], torch.from_numpy)
        assert changes is not None
        expected = [-float(request.output_ids.count(token_id)) for token_id in range(8)]
        assert counts.apply(flat, changes)[0].tolist() == expected
        counts.count(changes, torch.tensor([token]))
        request.output_ids.append(token)
