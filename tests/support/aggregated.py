"""The aggregated role in one process and one thread: every schedule is reproducible."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from common.config import EngineOptions, ModelOptions
from common.engine.build import EngineParts, build_engine
from common.engine.loop import Loop
from common.engine.mates import Mates
from common.messages import Abort, Generate, RequestOptions
from common.routed_experts.spec import rows_of
from deploy.aggregated import AggregatedWorker
from tests.support.recorder import Leg, Recorder


class WholeAnswer:
    """One sample's answer."""

    def __init__(self, prompt: list[int], leg: Leg, index: int = 0) -> None:
        assert index in leg.ends, leg.failed
        finished = leg.ends[index]
        self.prompt = prompt
        self.output_ids = finished.token_ids
        self.logprobs = finished.logprobs
        self.top_logprobs = finished.top_logprobs
        self.prompt_logprobs = finished.prompt_logprobs
        self.finish_reason = finished.finish_reason
        self.cached_tokens = finished.cached_tokens
        self.rows: np.ndarray | None = None
        self.start = 0
        if index in leg.blocks:
            block = leg.blocks[index]
            self.start = block.header.start
            assert block.header.stop == max(self.start, len(prompt) + len(self.output_ids) - 1)
            self.rows = rows_of(np.frombuffer(block.data, dtype=np.uint8), block.header)


class InProcessAggregated:
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
        parts: EngineParts = EngineParts(),
        device: Literal["cpu", "cuda"] = "cpu",
        mates: Mates = Mates(),
        dtype: Literal["auto", "bfloat16"] = "auto",
    ) -> None:
        options = EngineOptions(
            device=device,
            page_size=page_size,
            kv_pool_tokens=pool_tokens,
            max_running_requests=max_running,
            overlap=overlap,
            cpu_threads=1,
        )
        model = ModelOptions(model=str(checkpoint), dtype=dtype)
        self.engine = build_engine(model, options, chunked_prefill_tokens=chunk_tokens, mates=mates, parts=parts)
        self.recorder = Recorder()
        self.role = AggregatedWorker(
            self.engine,
            chunked_prefill_tokens=chunk_tokens,
            prefix_cache=prefix_cache,
            reply=self.recorder,
            verify_rows=verify_rows,
        )
        self.loop = Loop(self.engine, self.role, overlap=overlap)
        self.prompts: dict[str, list[int]] = {}

    @property
    def legs(self) -> dict[str, Leg]:
        """What has been said of each request."""
        return self.recorder.legs

    def submit(self, rid: str, prompt: list[int], options: RequestOptions) -> None:
        """Start all samples of a prompt."""
        self.prompts[rid] = prompt
        self.legs[rid] = Leg(num_ends=options.sampling.n)
        self.role.handle(Generate(rid=rid, input_ids=prompt, options=options))

    def abort(self, rid: str) -> None:
        """The client is gone."""
        self.role.handle(Abort(rid))

    def turn(self) -> bool:
        """One turn; False when there was nothing to compute."""
        self.role.poll()
        return self.loop.turn()

    def settle(self) -> None:
        """Turn until there is nothing to do."""
        while self.turn():
            pass

    def answer(self, rid: str, index: int = 0) -> WholeAnswer:
        """A sample's answer; it must have one."""
        return WholeAnswer(self.prompts[rid], self.legs[rid], index)

    def run(self, requests: Iterable[tuple[list[int], RequestOptions]], *, concurrency: int = 16) -> list[WholeAnswer]:
        """Run requests, at most `concurrency` at once, to their end; first samples' answers in order."""
        queue = list(enumerate(requests))
        count = len(queue)
        queue.reverse()
        open_rids: set[str] = set()
        while queue or open_rids:
            while queue and len(open_rids) < concurrency:
                index, (prompt, options) = queue.pop()
                self.submit(f"r{index}", prompt, options)
                open_rids.add(f"r{index}")
            is_busy = self.turn()
            open_rids = {rid for rid in open_rids if not self.legs[rid].ended}
            assert is_busy or not open_rids, f"stuck: {sorted(open_rids)}"
        self.settle()
        return [self.answer(f"r{index}") for index in range(count)]

    def check_pages(self) -> None:
        """Recount the pool: nothing is held, nothing leaked, no row of the table lost."""
        pages = self.role.stats(0).pages
        assert pages.unaccounted == 0
        assert pages.running == pages.quarantined == 0
        assert pages.free + pages.cached == pages.total
        assert self.engine.table.num_free == self.engine.capacity.max_running_requests
