"""A worker of several ranks in one process, each rank in a thread of its own; tensors travel by gloo, messages by ZMQ."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.config import EngineOptions, ModelOptions
from common.engine.background import NoBackground
from common.engine.build import EngineParts, Follower, build_follower
from common.engine.mates import Mates, find_mates
from common.messages import RequestOptions
from common.orders import Done, Order
from common.ranks import Rank, Ranks
from tests.support.aggregated import InProcessAggregated, WholeAnswer

_DEADLINE_S = 240.0


def in_threads(count: int, run: Callable[[int], None]) -> None:
    """Run `run(i)` for every i at once; raises what the first one to fail has raised."""
    errors: list[BaseException] = []

    def attempt(index: int) -> None:
        try:
            run(index)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:
            thread.join(0.1 if len(threads) > 1 else _DEADLINE_S)
    if errors:
        raise errors[0]


class AggregatedRanks:
    """One aggregated worker: `run` gives each attention group requests of its own."""

    def __init__(
        self,
        checkpoint: Path,
        ranks: Ranks,
        folder: Path,
        *,
        parts: Callable[[], EngineParts] = EngineParts,
        **options: Any,
    ) -> None:
        """`options` are those of `InProcessAggregated`."""
        self._checkpoint, self.ranks, self._folder = checkpoint, ranks, folder
        self._parts, self._options = parts, options
        self.leaders: dict[int, InProcessAggregated] = {}
        """By group."""
        self.followers: dict[int, Follower] = {}
        """By rank."""
        self.done: dict[int, list[tuple[Done, bool]]] = {}
        """By group: how each order went, and whether the loop was held then."""

    def run(
        self,
        requests: Sequence[Sequence[tuple[list[int], RequestOptions]]],
        *,
        concurrency: int = 16,
        orders: Sequence[Order] = (),
    ) -> list[list[WholeAnswer]]:
        """Run each group's requests, all groups at once; the first samples' answers, group by group, in order.

        Every group carries out `orders` before.
        """
        answers: list[list[WholeAnswer]] = [[] for _ in requests]
        groups_left = threading.Semaphore(0)
        all_done = threading.Event()

        def run_rank(index: int) -> None:
            rank = self.ranks.rank(index)
            mates = find_mates(rank, str(self._folder))
            try:
                run_with(rank, mates)
            finally:
                mates.close()

        def run_with(rank: Rank, mates: Mates) -> None:
            if not rank.is_leader:
                self._follow(mates)
                return
            leader = InProcessAggregated(self._checkpoint, mates=mates, parts=self._parts(), **self._options)
            self.leaders[rank.group] = leader
            self._carry_out(orders, leader, self.done.setdefault(rank.group, []))
            answers[rank.group] = leader.run(requests[rank.group], concurrency=concurrency)
            groups_left.release()
            while not all_done.is_set():
                leader.turn()  # the others may still need this one for their steps
            leader.settle()
            leader.engine.close()

        def watch() -> None:
            for _ in requests:
                groups_left.acquire()
            all_done.set()

        assert len(requests) == self.ranks.dp
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        in_threads(self.ranks.tp, run_rank)
        return answers

    @staticmethod
    def _carry_out(orders: Sequence[Order], leader: InProcessAggregated, answers: list[tuple[Done, bool]]) -> None:
        for order in orders:
            leader.loop.order(order, lambda done: answers.append((done, leader.loop.is_held)))
            leader.turn()

    def _follow(self, mates: Mates) -> None:
        options = self._options
        engine_options = EngineOptions(
            device="cpu",
            page_size=options.get("page_size", 16),
            kv_pool_tokens=options.get("pool_tokens", 8192),
            max_running_requests=options.get("max_running", 32),
            cpu_threads=1,
        )
        model = ModelOptions(model=str(self._checkpoint), dtype=options.get("dtype", "auto"))
        chunk_tokens = options.get("chunk_tokens", 8192)
        follower = build_follower(
            model, engine_options, chunked_prefill_tokens=chunk_tokens, mates=mates, parts=self._parts()
        )
        self.followers[mates.rank.index] = follower
        follower.run(NoBackground())
