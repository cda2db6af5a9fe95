"""What may go on when the weights change, and what the prefix cache forgets; the router's part is in `test_router_versions`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.messages import ErrorReport, FinishNow, RequestOptions, VersionSpan
from common.orders import Pause
from common.scheduling.request import RequestState
from tests.support.aggregated import InProcessAggregated
from tests.support.in_process_pair import InProcessPair, Side, options_of
from tests.support.recorder import Leg
from tests.support.stamped import change_weights, check_stamps, order, stamping

PROMPT = list(range(30))


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("plain")


def pair_of(checkpoint: Path, **options: Any) -> InProcessPair:
    pair = InProcessPair(checkpoint, parts=stamping(), verify_rows=False, page_size=4, **options)
    for side in pair.sides:
        side.engine.weight_version = "v0"
    return pair


def whole_of(checkpoint: Path, **options: Any) -> InProcessAggregated:
    whole = InProcessAggregated(checkpoint, parts=stamping(), verify_rows=False, page_size=4, **options)
    whole.engine.weight_version = "v0"
    return whole


def change(side: Side, number: int) -> None:
    change_weights(side.loop, number)


def change_whole(whole: InProcessAggregated, number: int) -> None:
    change_weights(whole.loop, number)


def options(num_tokens: int, *, mixes: bool = False, **fields: Any) -> RequestOptions:
    return replace(options_of(num_tokens, ignore_eos=True, **fields), allow_mixed_versions=mixes)


def swapping_pair(checkpoint: Path, *, mixes: bool) -> InProcessPair:
    """A pair that has just swapped somebody out while others run."""
    pair = pair_of(checkpoint, pool_tokens=96)
    for index in range(4):
        pair.submit(f"r{index}", PROMPT[: 20 + index], options(40, mixes=mixes))
    for _ in range(100):
        pair.turn()
        if pair.decode_role._scheduler.swapped:
            break
    states = {request.state for samples in pair.decode_role._generation._open.values() for request in samples}
    assert {RequestState.RUNNING, RequestState.SWAPPED} <= states
    return pair


def check_mixed(leg: Leg) -> ErrorReport:
    """It failed by nobody's fault, and named the versions."""
    assert leg.failed is not None
    error = leg.failed.error
    assert (error.code, error.status, error.leg, error.stage) == ("mixed_versions", 503, None, "versions")
    assert not leg.ends
    return error


# ------------------------------------------------------------------------------------------------ the prefix cache


def test_a_prefill_workers_cache_is_emptied(checkpoint: Path):
    pair = pair_of(checkpoint)
    [cold, warm] = pair.run([(PROMPT, options(3)), (PROMPT, options(3))], concurrency=1)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 28)
    for side in pair.sides:
        change(side, 1)
    assert pair.prefill.role.stats(0).pages.cached == 0
    [again, warm] = pair.run([(PROMPT, options(3)), (PROMPT, options(3))], concurrency=1)
    assert (again.cached_tokens, warm.cached_tokens) == (0, 28)
    for rid in ("r0", "r1"):
        leg = pair.prefill.legs[rid]
        assert leg.finished is not None
        assert leg.finished.weight_versions == (VersionSpan(0, 30, "v1"),)
        assert set(check_stamps(leg.blocks[0], leg.finished.weight_versions)) == {1}
    pair.check_pages()


def test_an_aggregated_workers_cache_is_emptied_while_its_pages_are_shared(checkpoint: Path):
    """A request that goes on keeps the pages that it found there; they only are no longer anybody else's to find."""
    whole = whole_of(checkpoint)
    whole.run([(PROMPT, options(1))])
    whole.submit("goes on", PROMPT, options(20, mixes=True, n=2))
    for _ in range(5):
        whole.turn()
    change_whole(whole, 1)
    pages = whole.role.stats(0).pages
    assert (pages.cached, pages.unaccounted) == (0, 0)
    assert pages.running > 0
    whole.submit("new", PROMPT, options(3))
    whole.settle()
    for index in (0, 1):
        end = whole.legs["goes on"].ends[index]
        assert (end.cached_tokens, end.weight_versions[0].weight_version) == (28, "v0")
        assert end.weight_versions[-1] == VersionSpan(end.weight_versions[0].stop, 49, "v1")
        check_stamps(whole.legs["goes on"].blocks[index], end.weight_versions)
    new = whole.legs["new"]
    assert new.ends[0].cached_tokens == 0
    assert set(check_stamps(new.blocks[0], new.ends[0].weight_versions)) == {1}
    whole.check_pages()


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_prompt_of_two_versions_is_not_cached(checkpoint: Path, is_whole: bool):
    """It began under the old weights and ended under the new ones: its pages are good for nobody else."""
    answers = []
    if is_whole:
        whole = whole_of(checkpoint, chunk_tokens=8)
        whole.submit("r", PROMPT, options(2, mixes=True))
        whole.turn()
        change_whole(whole, 1)
        whole.settle()
        assert [span.weight_version for span in whole.legs["r"].ends[0].weight_versions] == ["v0", "v1"]
        check_stamps(whole.legs["r"].blocks[0], whole.legs["r"].ends[0].weight_versions)
        answers = [whole.run([(PROMPT, options(2))])[0].cached_tokens for _ in range(2)]
    else:
        pair = pair_of(checkpoint, chunk_tokens=8)
        pair.submit("r", PROMPT, options(2, mixes=True))
        pair.turn()
        [request] = pair.decode_role._generation._open["r"]
        for side in pair.sides:
            change(side, 1)
        pair.settle()
        assert request.prompt_versions == ("v0", "v1")
        leg = pair.prefill.legs["r"]
        assert leg.finished is not None
        assert [span.weight_version for span in leg.finished.weight_versions] == ["v0", "v1"]
        check_stamps(leg.blocks[0], leg.finished.weight_versions)
        assert pair.decode.legs["r"].finished is not None
        answers = [pair.run([(PROMPT, options(2))])[0].cached_tokens for _ in range(2)]
    assert answers == [0, 28]


# ------------------------------------------------------------------------------------------------ the engine's check


def test_a_prompt_that_was_begun_fails_and_its_decode_leg_hears_why(checkpoint: Path):
    pair = pair_of(checkpoint, chunk_tokens=8)
    pair.submit("r", PROMPT, options(4))
    pair.submit("queued behind it", PROMPT, options(4))
    pair.turn()
    for side in pair.sides:
        change(side, 1)
    error = check_mixed(pair.prefill.legs["r"])
    assert "'v0', 'v1'" in error.message
    pair.settle()
    told = pair.decode.legs["r"].failed
    assert told is not None
    assert told.error.code == "mixed_versions"
    assert pair.answer("queued behind it").output_ids
    pair.check_pages()


@pytest.mark.parametrize("resumed_tokens", [0, 5])
def test_a_resumed_prompt_that_was_begun_begins_again(checkpoint: Path, resumed_tokens: int):
    """Its answer says of the last token alone what has computed it; what the KV below is of, nobody would ever learn."""
    asked = replace(options(4, mixes=True), resumed_tokens=resumed_tokens)
    pair, whole = pair_of(checkpoint, chunk_tokens=8), whole_of(checkpoint, chunk_tokens=8)
    pair.submit("begun", PROMPT, asked)
    pair.submit("queued", PROMPT, asked)
    whole.submit("begun", PROMPT, asked)
    whole.submit("queued", PROMPT, asked)
    pair.turn()
    whole.turn()
    for side in pair.sides:
        change(side, 1)
    change_whole(whole, 1)
    pair.settle()
    whole.settle()
    for legs in (pair.prefill.legs, whole.legs):
        begun, queued = legs["begun"].finished, legs["queued"].finished
        assert begun is not None
        assert queued is not None
        assert begun.finish_reason.is_retracted == (resumed_tokens > 0)
        assert begun.token_ids == [] or resumed_tokens == 0
        assert {span.weight_version for span in queued.weight_versions} == {"v1"}
    lost = pair.decode.legs["begun"].failed
    assert (lost.error.code if lost else "") == ("retracted" if resumed_tokens else "")
    pair.check_pages()
    whole.check_pages()


@pytest.mark.parametrize("mixes", [False, True])
def test_running_and_swapped_samples_fail_or_go_on(checkpoint: Path, mixes: bool):
    pair = swapping_pair(checkpoint, mixes=mixes)
    begun = [rid for rid, leg in pair.decode.legs.items() if leg.finished is None]
    change(pair.decode, 1)
    if not mixes:
        for rid in begun:
            if pair.decode.legs[rid].failed is not None:
                check_mixed(pair.decode.legs[rid])
        assert not pair.decode_role._scheduler.swapped
        assert not pair.decode_role._scheduler.running
    change(pair.prefill, 1)
    pair.settle()
    for rid in begun if mixes else ():
        finished = pair.decode.legs[rid].finished
        assert finished is not None
        check_stamps(pair.decode.legs[rid].blocks[0], finished.weight_versions)
    pair.check_pages()


def test_a_sample_that_ends_while_swapped_knows_its_versions(checkpoint: Path):
    pair = swapping_pair(checkpoint, mixes=True)
    change(pair.decode, 1)
    for _ in range(6):
        pair.turn()
    [*swapped] = pair.decode_role._scheduler.swapped
    pair.decode.role.handle(FinishNow(swapped[0].rid))
    leg = pair.decode.legs[swapped[0].rid]
    assert leg.finished is not None
    assert leg.finished.token_ids
    check_stamps(leg.blocks[0], leg.finished.weight_versions)
    pair.settle()
    pair.check_pages()


@pytest.mark.parametrize("mixes", [False, True])
def test_a_sample_whose_kv_came_while_the_worker_was_paused(checkpoint: Path, mixes: bool):
    """Nothing of it has been computed there yet; but its prompt has."""
    pair = pair_of(checkpoint, chunk_tokens=4)
    pair.submit("r", PROMPT, options(4, mixes=mixes))
    for _ in range(3):
        pair.turn()
    order(pair.decode.loop, Pause(0))
    pair.settle()
    [request] = pair.decode_role._generation._open["r"]
    assert (request.state, request.versions) == (RequestState.RUNNING, ("v0",))
    change(pair.decode, 1)
    if mixes:
        assert pair.decode.legs["r"].failed is None
    else:
        check_mixed(pair.decode.legs["r"])


@pytest.mark.parametrize("turns", [1, 3, 6])
def test_samples_of_an_aggregated_worker_fail_together(checkpoint: Path, turns: int):
    """In chunks or in tokens; those in the queue have nothing to lose."""
    whole = whole_of(checkpoint, chunk_tokens=16, max_running=3)
    whole.submit("r", PROMPT, options(9, n=3))
    whole.submit("queued", PROMPT, options(2, n=3))
    for _ in range(turns):
        whole.turn()
    change_whole(whole, 1)
    check_mixed(whole.legs["r"])
    whole.settle()
    assert [end.weight_versions for end in whole.legs["queued"].ends.values()] == [(VersionSpan(0, 31, "v1"),)] * 3
    whole.check_pages()


def test_what_has_computed_all_goes_on(checkpoint: Path):
    """A prompt whose pages wait for the decode worker to ask is of one version, and stays so."""
    pair = pair_of(checkpoint)
    pair.submit("r", PROMPT, options(4), legs=("prefill",))
    pair.settle()
    change(pair.prefill, 1)
    [room] = pair.prefill.role._rooms  # type: ignore[attr-defined]
    assert room
    leg = pair.prefill.legs["r"]
    assert leg.finished is not None
    assert leg.finished.weight_versions == (VersionSpan(0, 30, "v0"),)
    assert leg.failed is None


# ------------------------------------------------------------------------------------------------ the hand-over


def test_kv_that_names_no_version_is_not_gone_on_with(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    pair = pair_of(checkpoint)
    arrived = pair.decode_role._on_arrived
    nameless = lambda request, event: arrived(request, replace(event, prompt_versions=()))  # noqa: E731
    monkeypatch.setattr(pair.decode_role, "_on_arrived", nameless)
    pair.submit("r", PROMPT, options(4))
    pair.settle()
    check_mixed(pair.decode.legs["r"])
    pair.check_pages()


def test_samples_that_arrive_before_the_one_they_follow_fail_with_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    pair, events = pair_of(checkpoint), list[Any]()
    change(pair.decode, 1)
    with monkeypatch.context() as patched:
        patched.setattr(pair.decode_role, "_on_arrived", lambda request, event: events.append((request, event)))
        pair.submit("r", PROMPT, options(4, n=3))
        while len(events) < 3:
            pair.turn()
    for request, event in sorted(events, key=lambda each: each[0].index, reverse=True):
        pair.decode_role._on_arrived(request, event)
    pair.settle()
    check_mixed(pair.decode.legs["r"])
    pair.check_pages()


@pytest.mark.parametrize("changed", ["prefill", "decode"])
@pytest.mark.parametrize("n", [1, 2])
def test_kv_of_another_version_is_not_gone_on_with(checkpoint: Path, changed: str, n: int):
    """It fails before its first token is emitted, unless it may mix them."""
    for mixes in (False, True):
        pair = pair_of(checkpoint)
        change(getattr(pair, changed), 1)
        pair.submit("r", PROMPT, options(4, mixes=mixes, n=n, stream=True))
        pair.settle()
        leg = pair.decode.legs["r"]
        if mixes:
            versions = ["v1", "v0"] if changed == "prefill" else ["v0", "v1"]
            prefill = pair.prefill.legs["r"].finished
            assert prefill is not None
            for end in leg.ends.values():
                assert [*prefill.weight_versions, *end.weight_versions] == [
                    VersionSpan(0, 30, versions[0]),
                    VersionSpan(30, 33, versions[1]),
                ]
            assert len(leg.tokens) == 4
        else:
            check_mixed(leg)
            assert leg.tokens == []
        pair.check_pages()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("mixes", [False, True])
def test_what_other_weights_have_begun_elsewhere_is_not_gone_on_with(checkpoint: Path, n: int, mixes: bool):
    """It fails before its first token is emitted, unless it may mix them."""
    pair, whole = pair_of(checkpoint), whole_of(checkpoint)
    asked = replace(options(4, mixes=mixes, n=n, stream=True), resumed_tokens=5)
    for rid, versions in (("the same", ("v0",)), ("older", ("v", "v0"))):
        pair.submit(rid, PROMPT, replace(asked, resumed_versions=versions))
        pair.settle()
        whole.submit(rid, PROMPT, replace(asked, resumed_versions=versions))
        whole.settle()
    for legs in (pair.decode.legs, whole.legs):
        assert len(legs["the same"].ends) == n
        if mixes:
            assert len(legs["older"].ends) == n
        else:
            assert "'v', 'v0'" in check_mixed(legs["older"]).message
            assert legs["older"].tokens == []
    pair.check_pages()
    whole.check_pages()
