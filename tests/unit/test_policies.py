"""How one worker is picked of several: what each policy promises, over random loads and prompts."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RequestError
from common.messages import RequestOptions, SamplingParams, WorkerKind
from common.protocol.generate import GenerateCall
from router.config import PolicyName, RouterOptions
from router.leg_run import estimated_tokens
from router.policy import CacheAware, PowerOfTwo, make_policy
from router.prefixes import CHUNK_CHARS, CHUNK_TOKENS, Prefixes, prefixes_of
from router.routing_key import keyed
from tests.support.prompts import sample

NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
ROLES: tuple[WorkerKind, ...] = get_args(WorkerKind)


@dataclass(eq=False)
class Place:
    url: str
    outstanding: int = 0
    outstanding_tokens: int = 0


def places(num: int) -> list[Place]:
    return [Place(f"http://worker-{index}:8000") for index in range(num)]


def tokens(num_chunks: float, *, of: int) -> tuple[int, ...]:
    """A prompt of so many chunks, the beginning of an endless one."""
    return tuple(random.Random(of).choices(range(30_000), k=int(num_chunks * CHUNK_TOKENS)))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", NAMES)
def test_every_policy_picks_a_candidate_and_the_only_one_if_there_is_but_one(name: PolicyName, role: WorkerKind):
    policy, among = make_policy(RouterOptions(policy=name), role), places(3)
    for one in (sample(), sample(text="a" * 999), sample(messages=({"role": "user", "content": "a"},))):
        assert policy(among, one) in among
        assert policy(among[1:2], one) is among[1]


def test_round_robin_takes_turns():
    among, policy = places(3), make_policy(RouterOptions(policy="round_robin"), "decode")
    assert [policy(among, sample()) for _ in range(4)] == [*among, among[0]]


@pytest.mark.parametrize("name", ["least_loaded", "consistent_hashing"])
def test_the_least_loaded_has_the_fewest_legs_and_equals_take_turns(name: PolicyName):
    among, policy = places(3), make_policy(RouterOptions(policy=name), "decode")
    among[0].outstanding, among[1].outstanding = 2, 1
    assert policy(among, sample()) is among[2]
    among[0].outstanding = among[1].outstanding = 0
    assert {policy(among, sample()).url for _ in range(3)} == {place.url for place in among}


# ------------------------------------------------------------------------------------------------ power of two


@given(loads=st.lists(st.integers(0, 100), min_size=2, max_size=8), seed=st.integers())
def test_of_two_the_one_with_more_tokens_is_never_picked(loads: list[int], seed: int):
    rng, drawn = random.Random(seed), list[int]()

    def draw(among: int) -> list[int]:
        drawn[:] = rng.sample(range(among), 2)
        return drawn

    among = [Place(str(index), outstanding_tokens=load) for index, load in enumerate(loads)]
    picked = PowerOfTwo(draw)(among)
    assert picked.outstanding_tokens == min(loads[index] for index in drawn)


def test_the_two_are_two_and_all_are_drawn():
    among = [Place(str(index), outstanding_tokens=index) for index in range(5)]
    picked = Counter(PowerOfTwo()(among).url for _ in range(2000))
    # The most loaded one is never the better of two; the others are now and then.
    assert set(picked) == {"0", "1", "2", "3"}
    assert all(picked[more] < picked[fewer] for fewer, more in pairwise("0123"))


def test_a_leg_counts_its_prompt_and_all_that_it_may_generate():
    sampling = RequestOptions(sampling=SamplingParams(max_new_tokens=10, n=3))
    assert estimated_tokens(sample(input_ids=tuple(range(7)), options=sampling)) == 37
    assert estimated_tokens(sample(text="abcd" * 7, options=sampling)) == 37
    said = ({"role": "user", "content": "abcd"}, {"role": "user", "content": "abcd" * 6})
    assert estimated_tokens(sample(messages=said, options=sampling)) == 37


# ------------------------------------------------------------------------------------------------ routing keys


@given(num=st.integers(2, 10), gone=st.integers(0, 9), keys=st.sets(st.text(max_size=20), min_size=1, max_size=50))
def test_when_a_worker_goes_only_its_keys_move(num: int, gone: int, keys: set[str]):
    policy, among = make_policy(RouterOptions(policy="consistent_hashing"), "decode"), places(num)
    left = among[gone % num]
    others = [place for place in among if place is not left]
    for key in keys:
        before, after = (policy(those, sample(routing_key=key)) for those in (among, others))
        assert after is before or before is left
        assert policy(list(reversed(among)), sample(routing_key=key)) is before


def test_keys_are_spread_evenly():
    policy, among = make_policy(RouterOptions(policy="consistent_hashing"), "prefill"), places(4)
    counts = Counter(policy(among, sample(routing_key=str(key))).url for key in range(4000))
    assert len(counts) == 4
    assert min(counts.values()) > 800


@pytest.mark.parametrize("name", NAMES)
def test_a_key_goes_by_hashing_whatever_the_policy_and_the_load(name: PolicyName):
    policy, among = make_policy(RouterOptions(policy=name), "prefill"), places(5)
    one = make_policy(RouterOptions(policy="consistent_hashing"), "decode")(among, sample(routing_key="k"))
    one.outstanding = one.outstanding_tokens = 1000
    assert {policy(among, sample(routing_key="k", input_ids=(n,))).url for n in range(20)} == {one.url}


@pytest.mark.parametrize("headers", [{"X-SMG-Routing-Key": "a", "x-session-id": "b"}, {"x-session-id": "a"}])
def test_the_key_is_that_of_the_first_header(headers: dict[str, str]):
    call = keyed(GenerateCall((sample(), sample()), is_list=True, stream=False), headers)
    assert [one.routing_key for one in call.samples] == ["a", "a"]


def test_no_key_and_a_key_that_is_too_long():
    call = GenerateCall((sample(),), is_list=False, stream=False)
    assert keyed(call, {"x-session-id": ""}) == call
    assert keyed(call, {"x-session-id": "k" * 512}).samples[0].routing_key == "k" * 512
    with pytest.raises(RequestError, match="x-session-id: has 513 characters"):
        keyed(call, {"x-session-id": "k" * 513})


# ------------------------------------------------------------------------------------------------ cache-aware


def aware(*, abs_threshold: int = 10**9, rel_threshold: float = 1.0, max_prefixes: int = 1000) -> CacheAware:
    return CacheAware(abs_threshold=abs_threshold, rel_threshold=rel_threshold, max_prefixes=max_prefixes)


def prompts_like(kind: str) -> Callable[[float, int], dict[str, object]]:
    """How to write a prompt of so many chunks in one of its forms: those of one seed begin alike."""

    def write(num_chunks: float, seed: int) -> dict[str, object]:
        if kind == "input_ids":
            return {"input_ids": tokens(num_chunks, of=seed)}
        letters = random.Random(seed).choices("abc\U0001f600\ud800", k=int(num_chunks * CHUNK_CHARS))
        return {"text": "".join(letters)}

    return write


@pytest.mark.parametrize("kind", ["input_ids", "text"])
def test_who_had_the_longest_prefix_gets_what_begins_like_it(kind: str):
    policy, among, prompt = aware(), places(3), prompts_like(kind)
    first = policy(among, sample(**prompt(4, 1)))
    first.outstanding = 5
    assert policy(among, sample(**prompt(4, 1))) is first
    assert policy(among, sample(**prompt(2.5, 1))) is first
    longer = policy([place for place in among if place is not first], sample(**prompt(9, 1)))
    assert longer is not first
    # It has had these chunks last, the longer ones alone.
    assert policy(among, sample(**prompt(9, 1))) is longer
    others = {policy(among, sample(**prompt(4, seed))).url for seed in range(2, 40)}
    assert first.url not in others, "what nobody had goes to the least loaded"


def test_a_candidate_that_is_none_any_more_leaves_the_shorter_prefix_to_another():
    policy, among = aware(), places(3)
    a, b, c = among
    b.outstanding = c.outstanding = 1
    assert policy(among, sample(input_ids=tokens(6, of=1))) is a
    c.outstanding = 2
    assert policy([b, c], sample(input_ids=tokens(2, of=1))) is b
    a.outstanding = b.outstanding = 9
    assert policy(among, sample(input_ids=tokens(6, of=1))) is a
    assert policy([b, c], sample(input_ids=tokens(6, of=1))) is c, "a had all of these prefixes last"
    assert policy([a, b], sample(input_ids=tokens(1.5, of=1))) is not c


@pytest.mark.parametrize(
    ("legs", "fewest", "stays"), [(10, 0, True), (11, 0, False), (30, 20, True), (31, 20, True), (41, 20, False)]
)
def test_too_many_legs_are_more_than_both_thresholds(legs: int, fewest: int, stays: bool):
    policy, among = aware(abs_threshold=10, rel_threshold=2.0), places(2)
    chosen = policy(among, sample(input_ids=tokens(3, of=1)))
    other = next(place for place in among if place is not chosen)
    chosen.outstanding, other.outstanding = legs, fewest
    assert (policy(among, sample(input_ids=tokens(3, of=1))) is chosen) is stays
    # It has the prefix now, and keeps it.
    chosen.outstanding = other.outstanding = 0
    assert (policy(among, sample(input_ids=tokens(3, of=1))) is chosen) is stays


def test_the_options_are_the_thresholds_and_a_decode_worker_is_aware_of_none():
    options = RouterOptions(policy="cache_aware", balance_abs_threshold=3, balance_rel_threshold=1.0)
    for role, num_legs in (("prefill", 3), ("aggregated", 3), ("decode", 0)):
        policy, among = make_policy(options, role), places(2)
        chosen = policy(among, sample(input_ids=tokens(3, of=1)))
        chosen.outstanding = num_legs
        assert (policy(among, sample(input_ids=tokens(3, of=1))) is chosen) is (role != "decode")
        chosen.outstanding = 4
        assert policy(among, sample(input_ids=tokens(3, of=1))) is not chosen


def test_a_conversation_goes_where_its_beginning_went():
    policy, among = aware(), places(3)
    said = [{"role": "user", "content": "a" * 1000}, {"role": "assistant", "content": "b" * 1000}]
    first = policy(among, sample(messages=said[:1]))
    first.outstanding = 5
    assert policy(among, sample(messages=said)) is first
    assert policy(among, sample(messages=said[1:])) is not first


def test_a_text_that_reads_like_a_conversation_is_no_prefix_of_it():
    said = [{"role": "user", "content": "a" * 1000}]
    text = msgspec.json.encode(said).decode()
    assert len(prefixes_of(sample(messages=said))) == len(prefixes_of(sample(text=text))) > 0
    assert not set(prefixes_of(sample(messages=said))) & set(prefixes_of(sample(text=text)))


@given(num=st.floats(0, 5), other=st.floats(0, 5), kind=st.sampled_from(["input_ids", "text"]))
def test_digests_are_equal_where_and_only_where_prefixes_are(num: float, other: float, kind: str):
    prompt, shared = prompts_like(kind), min(int(num), int(other))
    one, two = prefixes_of(sample(**prompt(num, 1))), prefixes_of(sample(**prompt(other, 1)))
    assert (len(one), len(two)) == (int(num), int(other))
    assert one[:shared] == two[:shared]
    assert not set(one) & set(prefixes_of(sample(**prompt(other, 2))))


def test_a_huge_prompt_is_looked_at_in_part():
    assert len(prefixes_of(sample(input_ids=(1,) * 10**6))) == len(prefixes_of(sample(text="a" * 10**7))) == 1024


def test_what_was_not_seen_for_long_is_forgotten_and_the_long_prefixes_first():
    prefixes, urls = Prefixes(4), {"a", "b"}
    one, two = prefixes_of(sample(input_ids=tokens(3, of=1))), prefixes_of(sample(input_ids=tokens(3, of=2)))
    prefixes.note(one, "a")
    prefixes.note(two, "b")
    assert len(prefixes) == 4
    assert prefixes.find(two, urls) == "b"
    assert prefixes.find(one, urls) == "a"
    assert prefixes.find(one[1:], urls) is None
    prefixes.note(prefixes_of(sample(input_ids=tokens(4, of=3))), "a")
    assert prefixes.find(one, urls) is prefixes.find(two, urls) is None
