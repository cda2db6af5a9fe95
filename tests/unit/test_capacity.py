"""Every size against those who index by it (R9): whatever the options, no index that a component can produce is out of range."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.config import EngineOptions, ModelOptions
from common.engine.build import build_engine
from common.engine.capacity import LARGEST_GRAPH, TOKEN_COUNT_BYTES, CapacityPlan, plan_capacity
from common.engine.device import CpuDevice
from common.engine.penalties import TokenCounts
from common.errors import UsageError
from common.memory.kv_pool import KvPool
from common.memory.layout import KvLayout, slots_of
from common.memory.page_allocator import PageAllocator
from common.routed_experts.capture import RoutedExpertsCapturer
from common.routed_experts.host_cache import HostCache
from common.routed_experts.spec import RowSpec
from common.scheduling.step_plan import StepPlan
from tests.support.schedulers import DecodeRun, PrefillRun

CPU = torch.device("cpu")

OPTIONS = st.builds(
    EngineOptions,
    page_size=st.sampled_from([1, 2, 3, 16, 64]),
    kv_pool_tokens=st.integers(1, 600),
    max_running_requests=st.integers(1, 12),
)
SPECS = st.builds(
    lambda num_experts, top_k, num_layers: RowSpec(
        num_experts=num_experts, top_k=top_k, layer_ids=tuple(range(num_layers)), num_hidden_layers=num_layers + 1
    ),
    st.sampled_from([4, 256, 257, 300]),
    st.integers(1, 4),
    st.integers(1, 3),
)


def layout_of(options: EngineOptions, num_layers: int = 2) -> KvLayout:
    return KvLayout(
        page_size=options.page_size,
        num_layers=num_layers,
        num_kv_heads=2,
        head_dim=4,
        dtype="float32",
        itemsize_bytes=4,
    )


SMALL_ROWS = RowSpec(num_experts=8, top_k=2, layer_ids=(0, 1), num_hidden_layers=2)


VOCAB_SIZE = 500
GATHERED_TOKEN_BYTES = 640


def plan_of(
    options: EngineOptions,
    rows: RowSpec = SMALL_ROWS,
    *,
    context_tokens: int = 64,
    chunk_tokens: int = 0,
    budget_bytes: int | None = None,
    dp: int = 1,
) -> CapacityPlan:
    return plan_capacity(
        options,
        layout_of(options),
        rows,
        vocab_size=VOCAB_SIZE,
        context_tokens=context_tokens,
        chunked_prefill_tokens=chunk_tokens,
        budget_bytes=budget_bytes,
        dp=dp,
        gathered_token_bytes=GATHERED_TOKEN_BYTES,
    )


# ------------------------------------------------------------------------------------------------ sizes are the buffers'


@given(OPTIONS, SPECS, st.integers(0, 40))
def test_the_byte_counts_are_those_of_the_real_buffers(options: EngineOptions, rows: RowSpec, chunk_tokens: int):
    assume(options.kv_pool_tokens >= options.page_size)
    capacity = plan_of(options, rows, chunk_tokens=chunk_tokens)
    pool = KvPool(layout_of(options), capacity.num_pages, CPU, torch.float32)
    assert pool.pages.nbytes == capacity.kv_pool_bytes
    assert pool.pages.nbytes == pool.info().page_bytes * (pool.info().num_pages + 1)
    assert pool.padding_page == pool.info().num_pages
    assert RoutedExpertsCapturer(rows, capacity.max_step_tokens, CPU).buffer.nbytes == capacity.capture_buffer_bytes
    cache = HostCache(rows, PageAllocator(capacity.num_pages).generations, options.page_size)
    assert cache._rows.nbytes == capacity.host_cache_bytes
    assert len(cache._rows) == capacity.kv_pool_tokens <= options.kv_pool_tokens
    counts = TokenCounts(capacity.max_running_requests, VOCAB_SIZE, CpuDevice())
    counts._own([])
    assert counts._generated_RV is not None
    assert counts._in_prompt_RV is not None
    assert counts._generated_RV.nbytes + counts._in_prompt_RV.nbytes == capacity.token_counts_bytes


@given(
    OPTIONS.map(lambda options: EngineOptions(page_size=options.page_size)),
    SPECS,
    st.integers(0, 3 * 10**6),
    st.integers(1, 4),
)
def test_pool_and_buffers_fill_the_budget_and_keep_within_it(
    options: EngineOptions, rows: RowSpec, budget_bytes: int, dp: int
):
    page_bytes = layout_of(options).page_bytes
    try:
        capacity = plan_of(options, rows, budget_bytes=budget_bytes, dp=dp)
    except UsageError:
        per_row = rows.row_bytes + VOCAB_SIZE * TOKEN_COUNT_BYTES + (dp * GATHERED_TOKEN_BYTES if dp > 1 else 0)
        assert options.max_running_requests * per_row + 2 * page_bytes > budget_bytes
        return
    used = (
        capacity.kv_pool_bytes + capacity.capture_buffer_bytes + capacity.token_counts_bytes + capacity.gathered_bytes
    )
    assert used <= budget_bytes < used + page_bytes


@given(st.integers(1, 5000))
def test_every_step_of_few_requests_has_a_graph_with_little_padding(max_running_requests: int):
    capacity = plan_of(EngineOptions(max_running_requests=max_running_requests, kv_pool_tokens=64))
    sizes = capacity.graph_sizes
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == min(max_running_requests, LARGEST_GRAPH)
    assert sizes[-1] <= capacity.max_step_tokens
    for num_requests in range(1, sizes[-1] + 1):
        size = next(size for size in sizes if size >= num_requests)
        assert size < 2 * num_requests


@given(st.integers(1, 70), st.integers(0, 300), st.integers(1, 8), st.data())
def test_what_all_groups_bring_together_fits(max_running: int, chunk_tokens: int, dp: int, data: st.DataObject):
    """Padded and unpadded, whatever each group has: the gathered batch, each group's lanes in it, and its own rows."""
    options = EngineOptions(max_running_requests=max_running, kv_pool_tokens=64)
    capacity = plan_of(options, chunk_tokens=chunk_tokens, dp=dp)
    assert capacity.max_gathered_tokens == dp * max(chunk_tokens, max_running)
    tokens = data.draw(st.lists(st.integers(0, capacity.max_step_tokens), min_size=dp, max_size=dp))
    fits_graph = max(tokens) <= capacity.graph_sizes[-1]
    lanes = next(size for size in capacity.graph_sizes if size >= max(tokens)) if fits_graph else max(1, *tokens, 1)
    assert lanes <= capacity.max_step_tokens
    assert dp * lanes <= capacity.max_gathered_tokens
    if dp > 1:
        assert capacity.gathered_bytes == capacity.max_gathered_tokens * GATHERED_TOKEN_BYTES


@pytest.mark.parametrize(("page_size", "kv_pool_tokens"), [(16, 15), (2, 1), (1024, 1023)])
def test_a_pool_without_a_page_is_the_operators_mistake(page_size: int, kv_pool_tokens: int):
    options = EngineOptions(page_size=page_size, kv_pool_tokens=kv_pool_tokens)
    with pytest.raises(UsageError, match="--kv-pool-tokens"):
        plan_of(options)
    assert plan_of(EngineOptions(page_size=page_size, kv_pool_tokens=kv_pool_tokens + 1)).num_pages == 1


@pytest.mark.parametrize("budget_bytes", [-(10**9), 0, 100])
def test_a_budget_without_a_page_is_too(budget_bytes: int):
    with pytest.raises(UsageError, match="--kv-pool-tokens"):
        plan_of(EngineOptions(), budget_bytes=budget_bytes)


def test_pool_tokens_that_are_given_outrank_the_budget():
    options = EngineOptions(page_size=4, kv_pool_tokens=40)
    assert plan_of(options, budget_bytes=10**9).num_pages == 10


def test_the_engine_has_the_plans_sizes(checkpoint_of: Callable[[str], Path]):
    options = EngineOptions(device="cpu", page_size=3, kv_pool_tokens=100, max_running_requests=5, cpu_threads=1)
    model = ModelOptions(model=str(checkpoint_of("plain")), context_tokens=50)
    engine = build_engine(model, options, chunked_prefill_tokens=9)
    capacity = engine.capacity
    assert (capacity.num_pages, capacity.context_tokens, capacity.max_step_tokens) == (33, 50, 9)
    assert engine.table.pages.shape == (5, 17)
    assert engine.table.last_tokens.shape == (5,)
    assert engine.allocator.num_pages == engine.kv_pool.num_pages == 33
    assert engine.kv_pool.pages.nbytes == capacity.kv_pool_bytes


# ------------------------------------------------------------------------------------------------ indices are within them


def check_step(plan: StepPlan | None, capacity: CapacityPlan, run: PrefillRun | DecodeRun) -> None:
    """All that a step indexes by: rows of the capture buffer, of the request table, pages, slots, positions."""
    if plan is None:
        return
    assert 0 < plan.num_tokens <= capacity.max_step_tokens
    assert len(plan.entries) <= capacity.max_running_requests
    slots: list[int] = []
    for entry in plan.entries:
        request = entry.request
        assert 0 <= request.row < capacity.max_running_requests
        assert 0 <= entry.start < entry.stop <= capacity.context_tokens
        assert entry.stop <= len(request.pages) * capacity.page_size
        assert len(request.pages) <= capacity.pages_per_request
        table_pages = run.table.pages[request.row, : len(request.pages)]
        assert table_pages.tolist() == request.pages
        assert all(0 <= page < capacity.num_pages for page in request.pages)
        slots += slots_of(table_pages, entry.start, entry.stop, capacity.page_size).tolist()
    assert all(0 <= slot < capacity.kv_pool_tokens for slot in slots)
    assert len(set(slots)) == len(slots), "two tokens of one step have one slot"


def lengths_of(numbers: Iterable[int], capacity: CapacityPlan, fewest_new: int) -> list[tuple[int, int]]:
    """(P, G) of requests that the frontend lets through: P + G within the context and the pool, the largest included."""
    most = min(capacity.context_tokens, capacity.kv_pool_tokens)
    lengths = []
    for number in numbers:
        total = most if number % 4 == 0 else 1 + number % most
        new = min(total - 1, fewest_new + (number // 7) % max(1, most))
        lengths.append((total - new, new))
    return [(p, g) for p, g in lengths if p >= 1 and g >= fewest_new]


REQUESTS = st.lists(st.integers(0, 10**6), max_size=25)


@settings(max_examples=120, deadline=None)
@given(OPTIONS, st.integers(2, 300), st.integers(1, 80), st.booleans(), REQUESTS)
def test_no_prefill_step_is_out_of_range(
    options: EngineOptions, context_tokens: int, chunk_tokens: int, prefix_cache: bool, numbers: list[int]
):
    assume(options.kv_pool_tokens >= max(2, options.page_size))
    capacity = plan_of(options, context_tokens=context_tokens, chunk_tokens=chunk_tokens)
    run = PrefillRun(
        num_pages=capacity.num_pages,
        page_size=capacity.page_size,
        max_running=capacity.max_running_requests,
        chunk_tokens=chunk_tokens,
        pages_per_row=capacity.pages_per_request,
        prefix_cache=prefix_cache,
    )
    lengths = lengths_of(numbers, capacity, 0)
    for index, (prompt_tokens, max_new_tokens) in enumerate(lengths):
        run.add([index % 2] * prompt_tokens, max_new_tokens, rid=str(index))
    while True:
        plan = run.launch()
        check_step(plan, capacity, run)
        if run.in_flight and (plan is None or len(run.in_flight) == 2):
            run.settle()
        elif plan is None:
            break
    assert len(run.ended) == len(lengths), "what the frontend lets through is served"
    assert run.recount() == 0


@settings(max_examples=120, deadline=None)
@given(OPTIONS, st.integers(2, 40), REQUESTS)
def test_no_decode_step_is_out_of_range(options: EngineOptions, context_tokens: int, numbers: list[int]):
    assume(options.kv_pool_tokens >= max(2, options.page_size))
    capacity = plan_of(options, context_tokens=context_tokens)
    run = DecodeRun(
        num_pages=capacity.num_pages,
        page_size=capacity.page_size,
        max_running=capacity.max_running_requests,
        pages_per_row=capacity.pages_per_request,
    )
    lengths = lengths_of(numbers, capacity, 1)
    num_samples = 0
    for index, (prompt_tokens, max_new_tokens) in enumerate(lengths):
        siblings = run.add([1] * prompt_tokens, max_new_tokens, rid=str(index), n=1 + index % 3)
        # What the worker refuses: more samples than fit.
        if run.scheduler.pages_to_admit(siblings) > capacity.num_pages or len(siblings) > run.seats.num_free:
            run.scheduler.remove(siblings[0])
            assert len(siblings) > 1, "one sample always fits"
        else:
            num_samples += len(siblings)
    for _ in range(5000):
        for request in run.admit():
            run.arrive(request)
        plan = run.launch()
        check_step(plan, capacity, run)
        if run.in_flight and (plan is None or len(run.in_flight) == 2):
            run.settle()
        if len(run.ended) == num_samples:
            break
    assert len(run.ended) == num_samples, "what the worker takes in is served"
    assert run.recount() == 0


def test_the_range_check_can_fail():
    """A scheduler with a larger budget than the plan was made for is noticed, and so is a table with too short rows."""
    options = EngineOptions(page_size=4, kv_pool_tokens=64, max_running_requests=2)
    capacity = plan_of(options, context_tokens=32, chunk_tokens=8)
    run = PrefillRun(num_pages=16, page_size=4, max_running=2, chunk_tokens=9, pages_per_row=8)
    run.add([1] * 9)
    with pytest.raises(AssertionError):
        check_step(run.launch(), capacity, run)
    run = PrefillRun(num_pages=16, page_size=4, max_running=2, chunk_tokens=8, pages_per_row=2)
    run.add([1] * 9)
    with pytest.raises(ValueError, match="broadcast"):
        run.launch()
