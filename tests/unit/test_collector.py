"""Rows that are gathered while their request goes on: the same answer as gathered at its end, whatever happens to its pages."""

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine import collector as collector_module
from common.engine.collector import RowCollector, Rows
from common.errors import RowsError
from common.memory.layout import slots_of
from common.memory.page_allocator import PageAllocator
from common.messages import Generate, RequestOptions, RowBlock
from common.routed_experts.host_cache import HostCache
from common.routed_experts.spec import RowSpec
from common.scheduling.request import Request

SPEC = RowSpec(num_experts=16, top_k=4, layer_ids=(0, 1), num_hidden_layers=2)
PAGE_SIZE = 4


class LaterExecutor:
    """Runs what was submitted when the test says so, or when somebody waits for it."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.jobs.append(lambda: future.set_result(function(*arguments)))
        return future

    def run(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()


class Case:
    """A pool of 40 pages, a collector whose threads are the test's, and requests of random rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, cache: type[HostCache] = HostCache) -> None:
        monkeypatch.setattr(collector_module, "_SMALL_BYTES", 1)
        self.rng = np.random.default_rng(seed)
        self.allocator = PageAllocator(40)
        self.cache = cache(SPEC, self.allocator.generations, PAGE_SIZE)
        engine: Any = SimpleNamespace(host_cache=self.cache, capacity=SimpleNamespace(page_size=PAGE_SIZE))
        self.collector = RowCollector(engine, verified=True, wake=lambda: None)
        self.executor = LaterExecutor()
        self.collector._executor = self.executor  # type: ignore[assignment]
        self.answers: list[Rows] = []

    def request(self, num_tokens: int) -> tuple[Request, np.ndarray]:
        """A request with pages for its tokens, all of whose rows are committed."""
        options = RequestOptions(return_routed_experts=True)
        request = Request.of(Generate(rid="r", input_ids=[1] * num_tokens, options=options))
        pages = self.allocator.allocate(-(-num_tokens // PAGE_SIZE))
        assert pages is not None
        request.pages = pages
        for position in range(num_tokens):
            request.settle(position, position + 1, version_of(position))
        return request, self.commit(request, num_tokens)

    def commit(self, request: Request, num_tokens: int, rows: np.ndarray | None = None) -> np.ndarray:
        if rows is None:
            rows = np.argsort(self.rng.random((num_tokens, 2, 16)), axis=-1)[..., :4].astype(np.uint8)
        slots = slots_of(request.pages, 0, num_tokens, PAGE_SIZE)
        self.cache.commit(self.cache.reserve(slots), rows)
        return rows

    def collect(self, request: Request, start: int, stop: int) -> Rows:
        self.collector.collect(request, start, stop, self.answers.append)
        self.executor.run()
        self.collector.poll()
        return self.answers.pop()


def version_of(position: int) -> str:
    """Weights change every seven positions, somewhere in a page."""
    return f"v{position // 7}"


def check(block: Rows, rows: np.ndarray, start: int) -> None:
    assert isinstance(block, RowBlock)
    assert (block.header.start, block.header.stop) == (start, start + len(rows))
    assert bytes(block.data) == rows.tobytes()
    versions = [span.weight_version for span in block.header.weight_versions for _ in range(span.start, span.stop)]
    assert versions == [version_of(position) for position in range(start, start + len(rows))]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_tokens=st.integers(1, 40),
    cuts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    is_run_early=st.booleans(),
    is_moved=st.booleans(),
)
def test_gathered_early_or_not_the_rows_are_the_same(
    seed: int, num_tokens: int, cuts: tuple[int, int], is_run_early: bool, is_moved: bool
):
    """Also when the request is moved to other pages meanwhile, and somebody else writes rows of his own to its old ones."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        case = Case(monkeypatch, seed)
        request, rows = case.request(num_tokens)
        start, middle = sorted(min(cut, num_tokens) for cut in cuts)
        case.collector.begin(request, start, middle)
        if is_run_early:
            case.executor.run()
        if is_moved:
            case.allocator.release(request.pages)
            case.request(40)  # takes the freed pages, if any
            pages = case.allocator.allocate(-(-num_tokens // PAGE_SIZE))
            assert pages is not None
            request.pages = pages
            case.commit(request, num_tokens, rows)
        check(case.collect(request, start, num_tokens), rows[start:], start)


class TornCache(HostCache):
    """Between copying rows and answering, lets something happen to their pages."""

    meanwhile: Callable[[], None] | None = None

    def read(self, slots: Any) -> Any:
        result = super().read(slots)
        happen, self.meanwhile = self.meanwhile, None
        if happen is not None:
            happen()
        return result


def test_a_copy_during_which_pages_change_hands_is_not_used(monkeypatch: pytest.MonkeyPatch):
    case = Case(monkeypatch, 7, TornCache)
    request, _ = case.request(12)
    case.collector.begin(request, 0, 12)
    early = case.collector._early[request]
    assert isinstance(case.cache, TornCache)

    def change_hands() -> None:
        case.allocator.release(request.pages)
        case.request(40)

    case.cache.meanwhile = change_hands
    case.executor.run()
    assert early.rows.result() is None
    assert case.collector.num_refused == 0


def test_an_early_copy_ends_with_its_request(monkeypatch: pytest.MonkeyPatch):
    case = Case(monkeypatch, 8)
    request, _ = case.request(12)
    case.collector.begin(request, 0, 12)
    assert not case.collector.holds(request)
    case.collector.forget(request)
    assert not case.collector._early


# ------------------------------------------------------------------------------------------------ whatever goes wrong


@pytest.mark.parametrize("is_begun", [False, True])
@pytest.mark.parametrize("in_thread", [False, True])
def test_any_error_fails_the_request_alone(monkeypatch: pytest.MonkeyPatch, in_thread: bool, is_begun: bool):
    """Not the process: what cannot be gathered is answered with an error, and the next one's rows come as ever."""

    class Broken(HostCache):
        is_broken = True

        def read(self, slots: Any) -> Any:
            if self.is_broken:
                raise MemoryError("no room")
            return super().read(slots)

    case = Case(monkeypatch, 9, Broken)
    if not in_thread:
        monkeypatch.setattr(collector_module, "_SMALL_BYTES", 1 << 20)
    request, rows = case.request(12)
    if is_begun:
        case.collector.begin(request, 0, 8)
    answer = case.collect(request, 0, 12)
    assert isinstance(answer, RowsError)
    assert (answer.status, "MemoryError: no room" in str(answer)) == (500, True)
    assert not case.collector.holds(request)
    assert case.collector.num_refused == 1
    assert isinstance(case.cache, Broken)
    case.cache.is_broken = False
    check(case.collect(request, 0, 12), rows, 0)
