"""The two schedulers: who runs, in which order, how full a step is; and over random histories nothing leaks."""

import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.memory.request_table import RequestTable
from common.scheduling.request import Request, RequestState
from common.scheduling.step_plan import StepPlan
from tests.support.schedulers import DecodeRun, PrefillRun


def spans(plan: StepPlan | None) -> list[tuple[str, int, int, int]]:
    """A plan as (rid, start, stop, samples)."""
    return [] if plan is None else [(e.request.rid, e.start, e.stop, e.samples) for e in plan.entries]


# ------------------------------------------------------------------------------------------------ prefill


def test_prompts_fill_each_step_exactly_in_the_order_they_came():
    run = PrefillRun(chunk_tokens=10)
    for rid, length in (("a", 4), ("b", 13), ("c", 1), ("d", 5)):
        run.add([ord(rid)] * length, rid=rid)
    assert spans(run.launch()) == [("a", 0, 4, 1), ("b", 0, 6, 0)]
    # The next step is planned before the first has settled.
    assert spans(run.launch()) == [("b", 6, 13, 1), ("c", 0, 1, 1), ("d", 0, 2, 0)]
    run.settle()
    assert spans(run.launch()) == [("d", 2, 5, 1)]
    assert run.launch() is None
    run.settle()
    run.settle()
    assert [request.rid for request in run.ended] == ["a", "b", "c", "d"]
    assert run.recount() == 0


def test_a_prompt_that_is_only_scored_samples_nothing():
    run = PrefillRun(chunk_tokens=4)
    run.add([1] * 6, max_new_tokens=0)
    assert spans(run.launch()) == [("r", 0, 4, 0)]
    assert spans(run.launch()) == [("r", 4, 6, 0)]


def test_a_prefix_hit_leaves_less_to_compute():
    """Full pages of an earlier prompt are shared; the last token is computed even if all of it is cached."""
    run = PrefillRun(page_size=4, chunk_tokens=100)
    first = run.add(list(range(10)), rid="a")
    run.launch()
    run.settle()
    assert first.cached_tokens == 0
    for rid, prompt, cached in (
        ("same", list(range(10)), 8),
        ("longer", list(range(30)), 8),
        ("whole pages", list(range(8)), 4),
        ("other", [*range(6), 99, 99, 99], 4),
        ("stranger", [5, 6, 7, 8, 9], 0),
    ):
        request = run.add(prompt, rid=rid)
        assert spans(run.launch()) == [(rid, cached, len(prompt), 1)]
        assert request.cached_tokens == cached
        assert request.pages[: cached // 4] == first_pages(run, prompt[:cached])
        run.settle()
        assert run.recount() == 0


def first_pages(run: PrefillRun, prefix: list[int]) -> list[int]:
    """The cache's pages of a prefix, without keeping a reference."""
    assert run.cache is not None
    pages = run.cache.match(run.add([*prefix, -1], rid="probe").prompt)
    run.allocator.release(pages)
    run.scheduler.waiting.pop()
    return pages


def test_nothing_is_shared_before_it_has_settled():
    run = PrefillRun(page_size=4, chunk_tokens=100)
    run.add(list(range(10)), rid="a")
    run.launch()
    later = run.add(list(range(10)), rid="b")
    run.launch()
    assert later.cached_tokens == 0
    run.settle()
    run.settle()
    assert run.recount() == 0


def test_nobody_is_admitted_to_a_step_that_is_full():
    """So that the second of two equal prompts finds the first one's pages, and holds none before."""
    run = PrefillRun(page_size=4, chunk_tokens=10)
    run.add(list(range(10)), rid="a")
    second = run.add(list(range(10)), rid="b")
    assert spans(run.launch()) == [("a", 0, 10, 1)]
    assert (second.state, second.pages) == (RequestState.QUEUED, [])
    run.settle()
    assert spans(run.launch()) == [("b", 8, 10, 1)]


def test_a_prompt_that_does_not_fit_waits_and_keeps_its_place():
    """Of 6 pages the first takes 4; the second needs 3, and the third, though small, waits behind it."""
    run = PrefillRun(num_pages=6, page_size=4, chunk_tokens=100, prefix_cache=False)
    run.add([1] * 16, rid="a")
    run.add([2] * 12, rid="b")
    run.add([3] * 4, rid="c")
    assert spans(run.launch()) == [("a", 0, 16, 1)]
    for _ in range(3):
        assert run.launch() is None
        assert run.recount() == 0
        assert run.allocator.num_free == 2
    run.settle()
    assert spans(run.launch()) == [("b", 0, 12, 1), ("c", 0, 4, 1)]
    run.settle()
    assert run.allocator.num_free == 6


def test_a_hit_that_does_not_fit_gives_its_reference_back():
    run = PrefillRun(num_pages=4, page_size=4, chunk_tokens=100)
    run.add(list(range(4)), rid="seed")
    run.launch()
    run.settle()
    run.add([9] * 12, rid="big")
    assert spans(run.launch()) == [("big", 0, 12, 1)]
    run.add([0, 1, 2, 3, 4, 5], rid="hit")  # one page cached, one missing, none free
    assert run.launch() is None
    assert run.recount() == 0
    run.settle()
    assert spans(run.launch()) == [("hit", 4, 6, 1)]


def test_the_cache_makes_room_for_prompts():
    run = PrefillRun(num_pages=4, page_size=4, chunk_tokens=100)
    run.add([1] * 16, rid="a")
    run.launch()
    run.settle()
    assert run.cache is not None
    assert run.cache.num_pages == 4
    run.add([2] * 12, rid="b")
    assert spans(run.launch()) == [("b", 0, 12, 1)]
    assert run.recount() == 0


def test_no_more_requests_than_rows():
    run = PrefillRun(max_running=2, chunk_tokens=100)
    for rid in "abc":
        run.add([ord(rid)] * 3, rid=rid)
    assert [span[0] for span in spans(run.launch())] == ["a", "b"]
    assert run.launch() is None
    run.settle()
    assert [span[0] for span in spans(run.launch())] == ["c"]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "launch", "launch", "settle", "settle", "abort", "arrive", "arrive"]),
        st.integers(0, 10**6),
    ),
    min_size=20,
    max_size=80,
)


def drain(actions: list[str], unfinished: Callable[[], bool]) -> Iterator[tuple[str, int]]:
    """These actions in turn until all is done."""
    for _ in range(1000):
        if not unfinished():
            return
        yield from ((action, 0) for action in actions)
    raise AssertionError("stuck")


@settings(max_examples=100, deadline=None)
@given(
    page_size=st.sampled_from([1, 2, 5]),
    chunk_tokens=st.sampled_from([1, 4, 11, 100]),
    max_running=st.integers(1, 5),
    prefix_cache=st.booleans(),
    history=ACTIONS,
)
def test_random_prefill_histories(
    page_size: int, chunk_tokens: int, max_running: int, prefix_cache: bool, history: list[tuple[str, int]]
):
    """Arrivals, steps two deep, aborts: order kept, budget kept, every position planned once, an exact recount."""
    run = PrefillRun(
        num_pages=20,
        page_size=page_size,
        chunk_tokens=chunk_tokens,
        max_running=max_running,
        prefix_cache=prefix_cache,
    )
    requests: list[Request] = []
    planned_until: dict[str, int] = {}
    started: list[int] = []
    rest = drain(["launch", "settle"], lambda: len(run.ended) < len(requests))
    for action, number in itertools.chain(history, rest):
        if action == "add":
            # Of two tokens, so that prefixes are often shared; never longer than the pool.
            length = 1 + number % min(18, 20 * page_size)
            prompt = [(number >> i) % 2 for i in range(length)]
            requests.append(run.add(prompt, number % 3, rid=str(len(requests)), n=1 + number % 2))
        elif action == "launch":
            if len(run.in_flight) == 2:
                run.settle()
            check_prefill_step(run.launch(), page_size, chunk_tokens, max_running, planned_until, started)
        elif action == "settle" and run.in_flight:
            run.settle()
        elif action == "abort" and requests:
            victim = requests[number % len(requests)]
            if victim.state in (RequestState.QUEUED, RequestState.RUNNING):
                run.abort(victim)
        assert run.recount() == 0
    assert all(request.state is RequestState.ENDED for request in requests)
    assert started == sorted(started), "first come, first served"
    assert run.table.num_free == max_running
    assert run.allocator.num_free + (0 if run.cache is None else run.cache.num_pages) == 20


def check_prefill_step(
    plan: StepPlan | None,
    page_size: int,
    chunk_tokens: int,
    max_running: int,
    planned_until: dict[str, int],
    started: list[int],
) -> None:
    if plan is None:
        return
    assert 0 < plan.num_tokens <= chunk_tokens
    assert len(plan.entries) <= max_running
    assert len({entry.request for entry in plan.entries}) == len(plan.entries)
    for entry in plan.entries:
        request = entry.request
        if request.rid not in planned_until:
            started.append(int(request.rid))
            planned_until[request.rid] = request.cached_tokens
        assert entry.start == planned_until[request.rid] < entry.stop <= request.num_prompt_tokens
        assert entry.stop <= len(request.pages) * page_size
        planned_until[request.rid] = entry.stop
        last = entry.stop == request.num_prompt_tokens
        sampling = request.message.options.sampling
        assert entry.samples == (sampling.n if last and sampling.max_new_tokens > 0 else 0)
    # A step with budget left over ends with prompts that are complete.
    if plan.num_tokens < chunk_tokens:
        assert all(entry.stop == entry.request.num_prompt_tokens for entry in plan.entries)


# ------------------------------------------------------------------------------------------------ decode


@pytest.mark.parametrize(
    ("prompt_tokens", "n", "pages", "pages_in_all"),
    [(1, 1, 1, 1), (3, 1, 1, 1), (4, 1, 2, 2), (8, 1, 3, 3), (3, 2, 1, 2), (4, 2, 2, 3), (9, 3, 3, 5)],
)
def test_admission_takes_pages_for_the_prompt_and_a_token(prompt_tokens: int, n: int, pages: int, pages_in_all: int):
    """The samples of a prompt share its full pages, and each has what follows of its own."""
    run = DecodeRun(page_size=4)
    siblings = run.add([1] * prompt_tokens, 9, n=n)
    assert run.scheduler.pages_to_admit(siblings) == pages_in_all
    assert run.admit() == list(siblings)
    assert [len(request.pages) for request in siblings] == [pages] * n
    assert run.allocator.num_pages - run.allocator.num_free == pages_in_all
    num_shared = prompt_tokens // 4 if n > 1 else 0
    assert {tuple(request.pages[:num_shared]) for request in siblings} == {tuple(siblings[0].pages[:num_shared])}
    assert [run.scheduler.num_shared_pages(r) for r in siblings] == [0, *[num_shared] * (n - 1)]
    assert all(request.state is RequestState.RECEIVING for request in siblings)
    assert run.recount() == 0


def test_one_token_for_every_request_and_none_past_the_last():
    run = DecodeRun()
    for rid, prompt_tokens, max_new_tokens in (("a", 3, 4), ("b", 1, 2), ("c", 5, 1)):
        run.add([1] * prompt_tokens, max_new_tokens, rid=rid)
    for request in run.admit():
        run.arrive(request)
    assert [request.rid for request in run.ended] == ["c"], "one token was asked for, and it came with the KV"
    assert spans(run.launch()) == [("a", 3, 4, 1), ("b", 1, 2, 1)]
    assert spans(run.launch()) == [("a", 4, 5, 1)]
    run.settle()
    assert spans(run.launch()) == [("a", 5, 6, 1)]
    assert run.launch() is None
    run.settle()
    run.settle()
    assert [request.rid for request in run.ended] == ["c", "b", "a"]
    assert [len(request.output_ids) for request in run.ended] == [1, 2, 4]
    assert run.allocator.num_free == run.allocator.num_pages


def test_pages_are_taken_as_the_tokens_come():
    run = DecodeRun(page_size=2)
    [request] = run.add([1], 8)
    run.admit()
    run.arrive(request)
    sizes = []
    while run.launch() is not None:
        sizes.append(len(request.pages))
        run.settle()
    assert sizes == [1, 2, 2, 3, 3, 4, 4]
    assert run.allocator.num_free == run.allocator.num_pages


def test_pages_run_out_for_some_and_the_elder_ones_get_on():
    """Three requests want a page at once: there is one left, the eldest's, and the youngest gives way for the second."""
    run = DecodeRun(num_pages=7, page_size=2)
    for rid in "abc":
        run.add([1, 1, 1], 5, rid=rid)
    first, second, third = run.admit()
    for request in (first, second, third):
        run.arrive(request)
    assert [len(request.pages) for request in (first, second, third)] == [2, 2, 2]
    assert [span[0] for span in spans(run.launch())] == ["a", "b", "c"]
    run.settle()
    assert [span[0] for span in spans(run.launch())] == ["a", "b"]
    assert run.swap_space.swapped_out == [third]
    assert [len(request.pages) for request in (first, second)] == [3, 3]
    assert run.recount() == 0


def test_only_what_has_arrived_takes_part():
    run = DecodeRun()
    [first], [second] = run.add([1], 5, rid="a"), run.add([2], 5, rid="b")
    assert run.admit() == [first, second]
    assert run.launch() is None
    run.arrive(second)
    assert [span[0] for span in spans(run.launch())] == ["b"]


def test_who_does_not_fit_waits_in_order():
    run = DecodeRun(num_pages=4, page_size=4)
    [first], [second], [third] = (run.add([1] * p, 1, rid=rid) for rid, p in (("a", 11), ("b", 7), ("c", 3)))
    assert run.admit() == [first]
    assert run.admit() == []
    assert run.allocator.num_free == 1
    run.abort(first)
    assert run.admit() == [second, third]
    run.abort(third)
    run.abort(second)
    assert run.recount() == 0


def test_seats_bound_admission_and_siblings_sit_together():
    run = DecodeRun(max_running=3)
    for rid, n in (("a", 2), ("b", 2), ("c", 1)):
        run.add([1], 2, rid=rid, n=n)
    assert [(request.rid, request.index) for request in run.admit()] == [("a", 0), ("a", 1)]
    assert run.admit() == [], "one seat is free, two are needed, and nobody overtakes"


def test_nobody_is_admitted_whom_the_next_step_would_swap_out():
    """A page for each running request is left over."""
    run = DecodeRun(num_pages=6, page_size=2)
    [first], [second] = run.add([1] * 5, 7, rid="a"), run.add([1] * 5, 7, rid="b")
    assert run.admit() == [first, second]
    run.abort(second)
    run.arrive(first)
    run.add([1] * 5, 7, rid="c")
    assert run.admit() == []
    run.abort(first)
    assert len(run.admit()) == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_the_youngest_gives_way_and_comes_back_before_anyone_new(depth: int):
    """12 slots for 3 requests that need 6 each: the eldest runs through, and the others get all their tokens too."""
    run = DecodeRun(num_pages=12, page_size=1)
    first, second, third = (run.add([1, 1], 5, rid=rid)[0] for rid in "abc")
    for request in run.admit():
        run.arrive(request)
    run.add([1, 1], 5, rid="new")
    for _ in drain(["step"], lambda: len(run.ended) < 3):
        were_swapped = bool(run.scheduler.swapped)
        newly_admitted = run.admit()
        assert not (were_swapped and newly_admitted)
        if run.launch() is None or len(run.in_flight) == depth:
            run.settle()
        assert run.recount() == 0
    assert run.swap_space.swapped_out[0] is third
    assert first not in run.swap_space.swapped_out
    assert {len(request.output_ids) for request in (first, second, third)} == {5}
    assert [request.rid for request in run.ended] == ["a", "b", "c"]


@settings(max_examples=150, deadline=None)
@given(
    num_pages=st.integers(8, 20), page_size=st.sampled_from([1, 2, 5]), max_running=st.integers(2, 5), history=ACTIONS
)
def test_random_decode_histories(num_pages: int, page_size: int, max_running: int, history: list[tuple[str, int]]):
    """Admissions, arrivals, steps two deep, swaps and aborts: one token each, on pages of their own, an exact recount."""
    run = DecodeRun(num_pages=num_pages, page_size=page_size, max_running=max_running)
    requests: list[Request] = []
    admitted: list[int] = []
    rest = drain(["arrive", "launch", "settle"], lambda: len(run.ended) < len(requests))
    for action, number in itertools.chain(history, rest):
        admitted += [int(request.rid) for request in run.admit()]
        if action == "add":
            # P + G within the pool, as the frontend sees to.
            prompt_tokens, max_new_tokens = 1 + number % 3, 1 + number % 5
            requests += run.add([1] * prompt_tokens, max_new_tokens, rid=str(len(requests)), n=1 + number % 2)
        elif action == "arrive" and run.receiving:
            run.arrive(run.receiving[number % len(run.receiving)])
        elif action == "launch":
            if len(run.in_flight) == 2:
                run.settle()
            check_decode_step(run.launch(), run.table, page_size)
        elif action == "settle" and run.in_flight:
            run.settle()
        elif action == "abort" and requests:
            rid = requests[number % len(requests)].rid
            for sample in requests:
                if sample.rid == rid and sample.state not in (RequestState.SURPLUS, RequestState.ENDED):
                    run.abort(sample)
        assert run.recount() == 0
    assert all(request.state is RequestState.ENDED for request in requests)
    assert admitted == sorted(admitted), "first come, first served"
    assert run.allocator.num_free == num_pages
    assert run.table.num_free == max_running


def check_decode_step(plan: StepPlan | None, table: RequestTable, page_size: int) -> None:
    """One token for each of these, none past the last, and no slot that two of them could write."""
    slots = []
    for entry in () if plan is None else plan.entries:
        request = entry.request
        assert (entry.samples, entry.num_tokens) == (1, 1)
        assert request.state is RequestState.RUNNING
        assert entry.start <= request.num_known_tokens, "the token before it has been drawn, or is about to be"
        assert entry.stop <= request.max_total_tokens - 1
        assert table.pages[request.row, : len(request.pages)].tolist() == request.pages
        slots.append(request.pages[entry.start // page_size] * page_size + entry.start % page_size)
    assert len(set(slots)) == len(slots)


def test_the_recount_can_fail():
    """A page that is kept back is one that the recount names."""
    run = DecodeRun()
    [request] = run.add([1] * 9, 9)
    run.admit()
    request.pages.pop()
    assert run.recount() == 1
