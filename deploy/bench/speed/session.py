"""One engine alone, in this process: requests in at once, turns of the loop until all are answered, and what was seen.

There is no HTTP, no tokenizer and no other process: what is left is what the engine and its worker cost. Neighbours:
`deploy.aggregated` (the worker), `common.engine.loop` (its turns), `offline` (says what to run).
"""

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from common.engine.engine import Engine
from common.engine.loop import Loop, Reply
from common.engine.step import StepResult
from common.messages import Abort, EngineToFrontend, Failed, Finished, Generate, RowBlock
from common.scheduling.step_plan import StepPlan
from deploy.aggregated import AggregatedWorker
from deploy.bench.options import BenchError
from deploy.bench.speed.results import Spread, Steps, spread_of

_WAIT_S = 1.0
_STUCK_S = 120.0
_STEADY_STEPS = 4


class Settled(NamedTuple):
    """A step that the worker was told of, and when, by `time.perf_counter`."""

    at_s: float
    plan: StepPlan

    @property
    def is_decode(self) -> bool:
        """Whether every request in it only decoded."""
        return all(entry.start >= entry.request.num_prompt_tokens for entry in self.plan.entries)


class Answered(NamedTuple):
    """A run: when it began and ended, its answers and their rows by rid, and its steps."""

    began_s: float
    ended_s: float
    finished: dict[str, Finished]
    blocks: dict[str, RowBlock]
    steps: list[Settled]

    @property
    def wall_s(self) -> float:
        """From the first submission to the last answer."""
        return self.ended_s - self.began_s


class _WatchedWorker(AggregatedWorker):
    """Notes every settled step; what is to be known of it is worked out after the clock has stopped."""

    def __init__(
        self, engine: Engine, reply: Reply, wake: threading.Event, *, chunked_prefill_tokens: int, verify_rows: bool
    ) -> None:
        super().__init__(
            engine,
            chunked_prefill_tokens=chunked_prefill_tokens,
            prefix_cache=False,
            reply=reply,
            verify_rows=verify_rows,
            wake=wake.set,
        )
        self.steps: list[Settled] = []

    def on_settled(self, result: StepResult) -> None:
        """Note the step, then do with it what the worker does."""
        self.steps.append(Settled(time.perf_counter(), result.plan))
        super().on_settled(result)


class Session:
    """Runs of one engine with or without overlap. Only one session of an engine may have open requests."""

    def __init__(self, engine: Engine, *, chunked_prefill_tokens: int, verify_rows: bool, overlap: bool) -> None:
        self._engine = engine
        self._wake = threading.Event()
        self._worker = _WatchedWorker(
            engine,
            self._take,
            self._wake,
            chunked_prefill_tokens=chunked_prefill_tokens,
            verify_rows=verify_rows,
        )
        self._loop = Loop(engine, self._worker, overlap=overlap)
        self._open: set[str] = set()
        self._finished: dict[str, Finished] = {}
        self._blocks: dict[str, RowBlock] = {}
        self._failures: list[str] = []

    @property
    def num_launched(self) -> int:
        """Steps that the engine has launched since it was built."""
        return self._engine.num_steps

    @property
    def num_open(self) -> int:
        """Requests that have not been answered."""
        return len(self._open)

    @property
    def is_decoding(self) -> bool:
        """Whether some steps in a row had nothing but decoding requests, so that no prompts are left to be computed."""
        last = self._worker.steps[-_STEADY_STEPS:]
        return len(last) == _STEADY_STEPS and all(step.is_decode for step in last)

    def run(self, messages: Sequence[Generate]) -> Answered:
        """Submit all messages at once and turn until all are answered. Raises BenchError if a request fails."""
        self._forget()
        began_s = time.perf_counter()
        self.submit(messages)
        while self._open:
            self.turn()
        ended_s = time.perf_counter()
        self.drain()
        if self._failures:
            raise BenchError(f"{len(self._failures)} of {len(messages)} requests failed: {self._failures[0]}")
        # What is left of the last answers, launched before their end was known.
        steps = [step for step in self._worker.steps if step.at_s <= ended_s]
        answered = Answered(began_s, ended_s, self._finished, self._blocks, steps)
        self._forget()
        return answered

    def submit(self, messages: Sequence[Generate]) -> None:
        """Hand the messages to the worker."""
        self._open |= {message.rid for message in messages}
        for message in messages:
            self._worker.handle(message)

    def turn(self) -> None:
        """Do as the engine process does in one turn: take what other threads have done, launch and settle, or wait."""
        self._worker.poll()
        if self._loop.turn():
            return
        began_s = time.perf_counter()
        # What came with the poll above may have been all there was to wait for.
        while self._open and not self._wake.wait(_WAIT_S):
            if time.perf_counter() - began_s > _STUCK_S:
                raise BenchError(f"{len(self._open)} requests are open, and nothing has happened for {_STUCK_S:g} s")
        self._wake.clear()

    def abandon(self) -> None:
        """Abort whatever is open, and wait until nothing is in flight."""
        for rid in self._open:
            self._worker.handle(Abort(rid))
        self._open.clear()
        self.drain()
        self._forget()

    def drain(self) -> None:
        """Turn until no step is in flight."""
        self._worker.poll()
        while self._loop.turn():
            self._worker.poll()

    def _forget(self) -> None:
        self._finished, self._blocks, self._failures = {}, {}, []
        self._worker.steps.clear()

    def _take(self, message: EngineToFrontend, /, *frames: bytes | memoryview) -> None:
        match message:
            case Finished():
                self._finished[message.rid] = message
                if message.rows is not None:
                    # The frame's owner is the block that was collected: nobody writes it again.
                    self._blocks[message.rid] = RowBlock(message.rows, frames[0] if frames else b"")
                self._open.discard(message.rid)
            case Failed():
                self._failures.append(message.error.message)
                self._open.discard(message.rid)
            case _:
                pass  # tokens on their way, which nobody has asked for


def latencies_of(answered: Answered, output_tokens: int) -> tuple[Spread | None, Spread | None]:
    """Times to the first token of each request, and between two tokens of one, in milliseconds.

    A token is there when its step has settled; a request's tokens beyond `output_tokens` are surplus and do not count.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for at_s, plan in answered.steps:
        for entry in plan.entries:
            if entry.samples:
                times[entry.request.rid].append(at_s)
    kept = [each[:output_tokens] for each in times.values()]
    ttft_ms = [1e3 * (each[0] - answered.began_s) for each in kept]
    itl_ms = [1e3 * (later - earlier) for each in kept for earlier, later in itertools.pairwise(each)]
    return spread_of(ttft_ms), spread_of(itl_ms)


def steps_of(answered: Answered) -> Steps:
    """Tell decode steps from others, and how long they took: from one step's settling to the next one's."""
    steps = answered.steps
    decode_s = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(steps) if later.is_decode]
    return Steps(
        count=len(steps),
        decode_count=sum(step.is_decode for step in steps),
        decode_s=sum(decode_s),
        decode_ms=spread_of([1e3 * each for each in decode_s]),
    )
