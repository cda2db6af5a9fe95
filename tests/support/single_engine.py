"""The obvious engine: one request at a time, the whole prompt in one step, then token after token, each step settled at once.

No scheduler, no chunks, no overlap, no batch, no transfer and no second worker: the oracle for everything that has them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import EngineOptions, ModelOptions
from common.engine.build import build_engine
from common.engine.step import Sampled
from common.memory.layout import slots_of
from common.messages import Generate, RequestOptions
from common.routed_experts.collect import collect
from common.routed_experts.spec import rows_of
from common.scheduling.request import Request
from common.scheduling.step_plan import StepEntry, StepPlan
from common.versions import whole


@dataclass(frozen=True)
class SingleAnswer:
    """What one engine alone makes of one request; rows of all P + G - 1 positions."""

    output_ids: list[int]
    logprobs: list[float]
    rows: np.ndarray


class SingleEngine:
    """Runs one request after the other."""

    def __init__(self, checkpoint: Path, *, page_size: int = 16, pool_tokens: int = 1024) -> None:
        options = EngineOptions(
            device="cpu",
            page_size=page_size,
            kv_pool_tokens=pool_tokens,
            max_running_requests=1,
            overlap=False,
            cpu_threads=1,
        )
        model = ModelOptions(model=str(checkpoint))
        self.engine = build_engine(model, options, chunked_prefill_tokens=pool_tokens)

    def run(self, prompt: list[int], options: RequestOptions) -> SingleAnswer:
        """Generate until a stop id, an end-of-sequence id or the last token asked for."""
        request = Request.of(Generate(rid="single", input_ids=prompt, options=options))
        pages = self.engine.allocator.allocate(-(-request.max_total_tokens // self.engine.capacity.page_size))
        assert pages is not None
        self.engine.seats.take(request, pages)
        self._take(request, self._step(request, 0, len(prompt)))
        while not self._has_ended(request):
            self._take(request, self._step(request, request.num_known_tokens - 1, request.num_known_tokens))
        slots = slots_of(request.pages, 0, request.num_known_tokens - 1, self.engine.capacity.page_size)
        versions = whole(0, len(slots), self.engine.weight_version)
        block = collect(self.engine.host_cache, slots, start=0, rid=request.rid, weight_versions=versions)
        self.engine.seats.give_back_row(request)
        self.engine.seats.give_back_pages(request)
        rows = rows_of(np.frombuffer(block.data, dtype=np.uint8), block.header)
        return SingleAnswer(request.output_ids, request.logprobs, rows)

    def _step(self, request: Request, start: int, stop: int) -> Sampled:
        plan = StepPlan((StepEntry(request, start, stop, samples=1),))
        [outcome] = self.engine.launch(plan).settle().outcomes
        [sampled] = outcome.sampled
        return sampled

    def _take(self, request: Request, sampled: Sampled) -> None:
        request.output_ids.append(sampled.token_id)
        request.logprobs.append(sampled.logprob)

    def _has_ended(self, request: Request) -> bool:
        sampling = request.message.options.sampling
        last = request.output_ids[-1]
        stopped = last in sampling.stop_token_ids
        ended = last in self.engine.config.eos_token_ids and not sampling.ignore_eos
        return stopped or ended or len(request.output_ids) == sampling.max_new_tokens
