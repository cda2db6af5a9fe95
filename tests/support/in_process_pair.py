"""1P+1D in one process and one thread, over the loopback transfer: every schedule is reproducible, every fault on demand."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.config import EngineOptions, ModelOptions
from common.engine.build import EngineParts, build_engine
from common.engine.engine import Engine
from common.engine.loop import Loop, Role
from common.messages import Abort, Bootstrap, Generate, RequestOptions, RowHeader, SamplingParams
from common.routed_experts.spec import rows_of
from decode_worker.worker import DecodeWorker
from prefill_worker.config import PrefillOptions
from prefill_worker.worker import PrefillWorker
from router.merge import merge
from tests.support.recorder import Leg, Recorder
from transfer.config import TransferOptions
from transfer.endpoint import Mailbox
from transfer.loopback import FaultPolicy, LoopbackAgent, LoopbackLink, LoopbackNetwork, no_faults
from transfer.messages import DecodeToPrefill, PrefillToDecode
from transfer.receiver import Receiver
from transfer.sender import Sender

PREFILL = "prefill:1"
DECODE = "decode-0"


def nothing() -> None:
    """Wakes nobody: the test turns everything itself."""


@dataclass
class Side:
    """One worker of the pair."""

    engine: Engine
    role: Role
    loop: Loop
    endpoint: Sender | Receiver
    recorder: Recorder

    @property
    def legs(self) -> dict[str, Leg]:
        return self.recorder.legs


class Answer:
    """A merged reply of both legs, of one sample."""

    def __init__(self, prompt: list[int], start: int, prefill: Leg, decode: Leg, index: int = 0) -> None:
        assert prefill.finished is not None, prefill.failed
        assert index in decode.ends, decode.failed
        finished = decode.ends[index]
        self.prompt = prompt
        self.start = start
        self.output_ids = finished.token_ids
        self.logprobs = finished.logprobs
        self.top_logprobs = finished.top_logprobs
        self.prompt_logprobs = prefill.finished.prompt_logprobs
        self.finish_reason = finished.finish_reason
        self.cached_tokens = prefill.finished.cached_tokens
        assert prefill.finished.token_ids[index : index + 1] == self.output_ids[:1]
        self.rows: np.ndarray | None = None
        if 0 in prefill.blocks and index in decode.blocks:
            stop = len(prompt) + len(self.output_ids) - 1
            block = merge([prefill.blocks[0], decode.blocks[index]], start=start, stop=stop)
            self.rows = rows_of(np.frombuffer(block.data, dtype=np.uint8), block.header)


class InProcessPair:
    """Build it, `submit` or `run` requests, `turn` the crank, and `check_pages` at the end."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        page_size: int = 16,
        chunk_tokens: int = 8192,
        overlap: bool = True,
        prefix_cache: bool = True,
        pool_tokens: int = 8192,
        max_running: int = 32,
        verify_rows: bool = True,
        faults: FaultPolicy = no_faults,
        transfer: TransferOptions = TransferOptions(),
        parts: EngineParts = EngineParts(),
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        model = ModelOptions(model=str(checkpoint))
        options = EngineOptions(
            device=device,
            page_size=page_size,
            kv_pool_tokens=pool_tokens,
            max_running_requests=max_running,
            overlap=overlap,
            cpu_threads=1,
        )
        self.network = LoopbackNetwork(faults)
        self.now = 0.0
        self._rooms = itertools.count(1)
        self.prompts: dict[str, list[int]] = {}
        links: dict[str, Any] = {}

        engine = build_engine(model, options, chunked_prefill_tokens=chunk_tokens, parts=parts)
        agent = LoopbackAgent("prefill-0", engine.kv_pool.pages, engine.kv_pool.info(), self.network)
        link: LoopbackLink[DecodeToPrefill, PrefillToDecode] = LoopbackLink(PREFILL, links, self.network)
        links[PREFILL] = link
        sender = Sender(
            agent,
            link,
            Mailbox(nothing),
            transfer,
            peer_id="prefill-0",
        )
        recorder = Recorder()
        prefill_role = PrefillWorker(
            engine,
            PrefillOptions(chunked_prefill_tokens=chunk_tokens, prefix_cache=prefix_cache),
            sender.mailbox,
            sender.counts,
            recorder,
            verify_rows=verify_rows,
        )
        self.prefill = Side(engine, prefill_role, Loop(engine, prefill_role, overlap=overlap), sender, recorder)

        engine = build_engine(model, options, chunked_prefill_tokens=0, parts=parts)
        decode_agent = LoopbackAgent(DECODE, engine.kv_pool.pages, engine.kv_pool.info(), self.network)
        decode_link: LoopbackLink[PrefillToDecode, DecodeToPrefill] = LoopbackLink(DECODE, links, self.network)
        links[DECODE] = decode_link
        receiver = Receiver(
            decode_agent,
            decode_link,
            Mailbox(nothing),
            transfer,
            peer_id=DECODE,
        )
        recorder = Recorder()
        decode_role = DecodeWorker(engine, receiver.mailbox, receiver.counts, recorder, verify_rows=verify_rows)
        self.decode = Side(engine, decode_role, Loop(engine, decode_role, overlap=overlap), receiver, recorder)
        self.sides: tuple[Side, ...] = (self.prefill, self.decode)
        """Those that turn; a test takes one out to stop it."""
        self.sender = sender
        self.receiver = receiver
        self.decode_role = decode_role
        self.prefill_link = link
        self.decode_link = decode_link

    # ---------------------------------------------------------------------------------------- driving

    def submit(
        self,
        rid: str,
        prompt: list[int],
        options: RequestOptions,
        *,
        decode_first: bool = False,
        legs: tuple[str, ...] = ("prefill", "decode"),
    ) -> None:
        """Start both legs of one sample, in either order, or one of them alone."""
        n = options.sampling.n
        bootstrap = Bootstrap(host="prefill", port=1, rooms=tuple(itertools.islice(self._rooms, n)))
        self.prompts[rid] = prompt
        message = Generate(rid=rid, input_ids=prompt, options=options, bootstrap=bootstrap)
        sides = [side for name, side in (("prefill", self.prefill), ("decode", self.decode)) if name in legs]
        for side in reversed(sides) if decode_first else sides:
            side.legs[rid] = Leg(num_ends=n if side is self.decode else 1)
            side.role.handle(message)

    def abort(self, rid: str) -> None:
        """The client is gone: the router closes both legs."""
        for side in self.sides:
            side.role.handle(Abort(rid))

    def turn(self) -> bool:
        """One turn of everything; False when there was nothing to compute."""
        busy = False
        for side in self.sides:
            side.endpoint.turn(self.now)
            side.role.poll()
            busy |= side.loop.turn()
        return busy

    def sleep(self, seconds: float, step_s: float = 0.5) -> None:
        """Let time pass, in steps that are short beside heartbeats and deadlines."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step_s)
            self.settle()

    def settle(self, turns: int = 6) -> None:
        """Turn until nothing has happened for a few turns."""
        idle = 0
        while idle < turns:
            idle = 0 if self.turn() else idle + 1

    def answer(self, rid: str, index: int = 0) -> Answer:
        """The merged reply of a sample that both legs have ended."""
        prefill, decode = self.prefill.legs[rid], self.decode.legs[rid]
        assert prefill.finished is not None, prefill.failed
        header = prefill.finished.rows
        start = header.start if isinstance(header, RowHeader) else 0
        return Answer(self.prompts[rid], start, prefill, decode, index)

    def run(self, requests: Iterable[tuple[list[int], RequestOptions]], *, concurrency: int = 16) -> list[Answer]:
        """Run requests, at most `concurrency` at once, to their end; answers in order."""
        queue = list(enumerate(requests))
        open_rids: set[str] = set()
        count = len(queue)
        queue.reverse()
        idle = 0
        while queue or open_rids:
            while queue and len(open_rids) < concurrency:
                index, (prompt, options) = queue.pop()
                self.submit(f"r{index}", prompt, options, decode_first=index % 2 == 1)
                open_rids.add(f"r{index}")
            idle = 0 if self.turn() else idle + 1
            assert idle < 50, f"stuck: {sorted(open_rids)}"
            open_rids = {rid for rid in open_rids if not all(side.legs[rid].ended for side in self.sides)}
        self.settle()
        return [self.answer(f"r{index}") for index in range(count)]

    # ---------------------------------------------------------------------------------------- checks

    def check_pages(self) -> None:
        """Recount both pools: nothing is held, nothing leaked, no row of the table lost."""
        for side in self.sides:
            self.check_nothing_held(side)

    def check_nothing_held(self, side: Side) -> None:
        """Recount one pool."""
        pages = side.role.stats(0).pages
        assert pages.unaccounted == 0
        assert pages.running == 0
        assert pages.quarantined == 0
        assert pages.free + pages.cached == pages.total
        assert side.engine.table.num_free == side.engine.capacity.max_running_requests
        assert side.endpoint.num_rooms == 0


def options_of(
    max_new_tokens: int,
    *,
    rows: bool = True,
    start_len: int = 0,
    stream: bool = False,
    logprobs: dict[str, Any] | None = None,
    **sampling: Any,
) -> RequestOptions:
    """Options of a test request, greedy unless told otherwise."""
    sampling.setdefault("temperature", 0.0)
    return RequestOptions(
        **({"return_logprob": True, **logprobs} if logprobs is not None else {}),
        sampling=SamplingParams(max_new_tokens=max_new_tokens, **sampling),
        return_routed_experts=rows,
        routed_experts_start_len=start_len,
        stream=stream,
    )
