"""Samples that are retracted and go on from their tokens: what comes out is what an uninterrupted run gives."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.messages import Bootstrap, EndCause, ErrorReport, FinishNow, Generate, RequestOptions
from common.protocol.generate import Sample
from common.versions import whole
from router.combine import Answer, Logprobs
from router.seam import continuation
from tests.support.aggregated import InProcessAggregated
from tests.support.in_process_pair import InProcessPair, options_of
from tests.support.prompts import random_prompts
from tests.support.recorder import Leg

PROMPTS = [prompt for prompt in random_prompts(3, 12, longest=60) if len(prompt) > 20][:3]
NEW_TOKENS = 14
VERSION = "default"
"""What an engine's weights are called if nobody says."""

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7},
    "penalties": {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.3},
    "seeded penalties": {"temperature": 0.8, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.5},
    # Every token that was drawn so far decides between these two.
    "frequency": {"logit_bias": {5: 90.0, 6: 91.0}, "frequency_penalty": 2.0},
    "repetition": {"logit_bias": {5: 90.0, 6: 91.0, 7: 92.0}, "repetition_penalty": 2.0},
    "biased": {"temperature": 1.0, "seed": 1, "logit_bias": {5: 4.0, 6: 4.0}, "frequency_penalty": 1.0},
}


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("plain")


class Sum:
    """What the legs of one sample have given so far."""

    def __init__(self) -> None:
        self.output_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[float, int]]] = []
        self.rows: list[np.ndarray] = []

    def add(self, answer: Any) -> None:
        self.output_ids += answer.output_ids
        self.logprobs += answer.logprobs
        self.top_logprobs += answer.top_logprobs
        self.rows.append(answer.rows)


def going_on(prompt: list[int], options: RequestOptions, index: int, output_ids: list[int]) -> Sample:
    """What the router asks for next."""
    sample = Sample(rid="r", options=options, input_ids=tuple(prompt))
    answer = Answer(
        rid="r",
        prompt_tokens=len(prompt),
        cached_tokens=0,
        text="",
        output_ids=output_ids,
        finish_reason=None,  # type: ignore[arg-type]
        weight_version=VERSION,
        weight_versions=whole(0, len(prompt), VERSION),
        logprobs=Logprobs(),
        rows=None,
        timings={},
        prompt_ids=prompt,
    )
    return continuation(sample, index, answer)


def interrupted(
    engine: Any, prompt: list[int], options: RequestOptions, index: int, turns: int, name: str = "part"
) -> Sum:
    """Run one of a prompt's samples, and retract it every so many turns; of several samples only while they are together."""
    rids, total = (f"{name}-{index}-{number}" for number in itertools.count()), Sum()
    next_prompt, next_options, number = prompt, options, index
    while True:
        rid = next(rids)
        engine.submit(rid, next_prompt, next_options)
        for _ in range(turns):
            engine.turn()
        retract(engine, rid)
        engine.settle()
        turns += 2
        answer = last_of(engine, rid, number)
        if answer is not None and answer.output_ids:
            total.add(answer)
            if answer.finish_reason.type != "abort":
                return total
            part = going_on(prompt, options, index, total.output_ids)
            next_prompt, next_options, number = list(part.input_ids or ()), part.options, 0


def retract(engine: Any, rid: str, cause: EndCause = "retracted") -> None:
    for side in engine.sides if isinstance(engine, InProcessPair) else [engine]:
        if not side.legs[rid].ended:
            side.role.handle(FinishNow(rid, cause))


def last_of(engine: Any, rid: str, number: int) -> Any:
    """The sample's answer; none if a leg has nothing, by itself or because the other one's room has closed."""
    legs: list[Leg] = [side.legs[rid] for side in (engine.sides if isinstance(engine, InProcessPair) else [engine])]
    for leg in legs:
        if leg.failed is not None:
            assert leg.failed.error.code == "retracted"
            return None
    if any(end.finish_reason.is_retracted and not end.token_ids for leg in legs for end in leg.ends.values()):
        return None
    return engine.answer(rid, number)


def check_equal(total: Sum, expected: Any) -> None:
    assert total.output_ids == expected.output_ids
    np.testing.assert_allclose(total.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    tops = [[token_id for _, token_id in top] for top in total.top_logprobs]
    assert tops == [[token_id for _, token_id in top] for top in expected.top_logprobs]
    np.testing.assert_array_equal(np.concatenate(total.rows), expected.rows)


@pytest.mark.parametrize("turns", [1, 6])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", [InProcessPair, InProcessAggregated])
def test_it_goes_on_as_if_nothing_had_happened(checkpoint: Path, kind: Any, name: str, turns: int):
    engine = kind(checkpoint, page_size=4, chunk_tokens=8)
    for index, (start, prompt) in enumerate(zip((0, len(PROMPTS[1])), PROMPTS[:2], strict=True)):
        options = options_of(
            NEW_TOKENS, ignore_eos=True, start_len=start, logprobs={"top_logprobs_num": 2}, **OPTIONS[name]
        )
        engine.submit(f"whole-{index}", prompt, options)
        engine.settle()
        total = interrupted(engine, prompt, options, 0, turns, name=f"part-{index}")
        check_equal(total, engine.answer(f"whole-{index}"))
    engine.check_pages()


@pytest.mark.parametrize("turns", [8, 12])
@pytest.mark.parametrize("kind", [InProcessPair, InProcessAggregated])
def test_each_of_several_samples_goes_on_with_its_own_seed(checkpoint: Path, kind: Any, turns: int):
    prompt = PROMPTS[0]
    options = options_of(NEW_TOKENS, ignore_eos=True, logprobs={}, n=3, temperature=1.0, seed=5, presence_penalty=0.5)
    engine = kind(checkpoint, page_size=4, chunk_tokens=64)
    engine.submit("r", prompt, options)
    engine.settle()
    expected = [engine.answer("r", index) for index in range(3)]
    assert len({tuple(answer.output_ids) for answer in expected}) == 3
    for index in range(3):
        check_equal(interrupted(engine, prompt, options, index, turns), expected[index])
    engine.check_pages()


@pytest.mark.parametrize("turns", [7, 10])
def test_a_stop_may_not_come_before_its_time_in_whatever_leg(checkpoint: Path, turns: int):
    """`min_new_tokens` counts the tokens of all legs: the stop comes where it would have come."""
    prompt = PROMPTS[1]
    options = options_of(NEW_TOKENS, ignore_eos=True)
    [free] = InProcessPair(checkpoint, page_size=4, chunk_tokens=8).run([(prompt, options)])
    stop = free.output_ids[2]
    options = options_of(NEW_TOKENS, ignore_eos=True, stop_token_ids=(stop,), min_new_tokens=9, logit_bias={stop: 50.0})
    [expected] = InProcessPair(checkpoint, page_size=4, chunk_tokens=8).run([(prompt, options)])
    assert expected.output_ids.index(stop) == 9
    engine = InProcessPair(checkpoint, page_size=4, chunk_tokens=8)
    total = interrupted(engine, prompt, options, 0, turns)
    assert total.output_ids == expected.output_ids


# ------------------------------------------------------------------------------------------------ rooms


def legs_of(pair: InProcessPair, prompt: list[int], n: int = 1) -> Generate:
    """A message that both legs are begun with, each at the test's time."""
    rooms = tuple(itertools.islice(pair._rooms, n))
    options = options_of(NEW_TOKENS, ignore_eos=True, n=n)
    pair.prompts["r"] = prompt
    for side in pair.sides:
        side.legs["r"] = Leg(num_ends=n if side is pair.decode else 1)
    return Generate(rid="r", input_ids=prompt, options=options, bootstrap=Bootstrap("prefill", 1, rooms))


def failure(leg: Leg) -> ErrorReport:
    assert leg.failed is not None
    return leg.failed.error


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(("cause", "code"), [("retracted", "retracted"), ("requested", "leg_failed")])
def test_a_retracted_prompt_s_decode_leg_hears_why(checkpoint: Path, cause: EndCause, code: str, is_late: bool, n: int):
    """Whether it has asked for its room before or comes after."""
    pair = InProcessPair(checkpoint, page_size=4, chunk_tokens=4)
    message = legs_of(pair, PROMPTS[0], n)
    pair.prefill.role.handle(message)
    if not is_late:
        pair.decode.role.handle(message)
    for _ in range(4):
        pair.turn()
    pair.prefill.role.handle(FinishNow("r", cause))
    pair.settle()
    if is_late:
        pair.decode.role.handle(message)
        pair.settle()
    assert pair.prefill.legs["r"].ends[0].finish_reason.cause == cause
    report = failure(pair.decode.legs["r"])
    assert (report.code, report.leg, report.stage) == (code, "prefill", "transfer")
    pair.check_pages()


@pytest.mark.parametrize("max_running", [1, 8])
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(("cause", "code"), [("retracted", "retracted"), ("requested", "leg_failed")])
def test_a_retracted_sample_s_prefill_leg_hears_why(
    checkpoint: Path, cause: EndCause, code: str, is_late: bool, max_running: int
):
    """Whether the sample had a seat or waited for one, and whether the prompt is there or comes after."""
    pair = InProcessPair(checkpoint, page_size=4, chunk_tokens=4, max_running=max_running)
    pair.submit("first", [1, 2, 3], options_of(40, ignore_eos=True))
    while not pair.decode.legs["first"].tokens and pair.decode.engine.num_steps < 3:
        pair.turn()
    message = legs_of(pair, PROMPTS[0])
    pair.decode.role.handle(message)
    if not is_late:
        pair.prefill.role.handle(message)
    for _ in range(3):
        pair.turn()
    pair.decode.role.handle(FinishNow("r", cause))
    if is_late:
        for _ in range(3):
            pair.turn()
        pair.prefill.role.handle(message)
    pair.settle()
    end = pair.decode.legs["r"].ends[0]
    assert (end.finish_reason.cause, end.token_ids) == (cause, [])
    report = failure(pair.prefill.legs["r"])
    assert (report.code, report.leg) == (code, "decode")
    pair.check_pages()


def test_a_decode_leg_is_retracted_while_its_prompt_s_rows_are_on_their_way(checkpoint: Path):
    """The prompt is computed: its leg answers as ever, and nothing of it is lost."""
    pair = InProcessPair(checkpoint, page_size=4, chunk_tokens=64)
    pair.submit("r", PROMPTS[0], options_of(NEW_TOKENS, ignore_eos=True))
    while not pair.prefill.legs["r"].ended:
        pair.turn()
    retract(pair, "r")
    pair.settle()
    end = pair.decode.legs["r"].ends[0]
    assert end.finish_reason.is_retracted
    assert pair.prefill.legs["r"].failed is None
    pair.check_pages()
