"""From plan to tensors, against a slow twin in plain Python loops, over random plans."""

import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.batch import StepBatch, upload_layout
from common.engine.device import CpuDevice
from common.engine.step_layout import ON_DEVICE, StepLayout, lay_out
from common.kernels.attention import AttentionPlan
from common.memory.layout import slots_of
from common.memory.request_table import RequestTable
from common.messages import Generate, RequestOptions, SamplingParams
from common.models.forward import ForwardBatch
from common.scheduling.request import Request
from common.scheduling.step_plan import StepEntry, StepPlan

NUM_ROWS = 7
PAGES_PER_ROW = 40
LOGIT_CHANGES: list[dict[str, Any]] = [
    *[{}] * 20,
    {"repetition_penalty": 1.5},
    {"frequency_penalty": -1.0},
    {"presence_penalty": 0.5},
    {"logit_bias": {3: 1.0}},
    {"min_new_tokens": 1},
]
UNCHANGED: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "min_new_tokens": 0,
}


class Nothing:
    """Takes no routing."""

    def target(self, moe_layer: int, num_tokens: int) -> torch.Tensor:
        raise AssertionError("a batch is built, not run")


class PlanKept:
    """An attention backend that keeps the plan it was given."""

    def plan(self, plan: AttentionPlan, upload: Callable[[npt.NDArray[Any]], torch.Tensor]) -> "PlanKept":
        self.kept = plan
        return self

    def __call__(self, q_THd: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a batch is built, not run")


def make_batch(plan: StepPlan, table: RequestTable, page_size: int) -> tuple[StepLayout, ForwardBatch, StepBatch]:
    layout = lay_out(plan, table, page_size)
    return layout, *upload_layout(layout, CpuDevice().begin_step(), table.last_tokens, PlanKept(), Nothing())


def seat(request: Request, table: RequestTable) -> None:
    """What `Seats.take` does, without an allocator."""
    request.row = table.allocate(
        request.pages, request.message.options, seed=request.seed, num_prompt_tokens=request.num_prompt_tokens
    )


def random_plan(rng: random.Random, page_size: int, table: RequestTable) -> StepPlan:
    """Chunks of prompts, single tokens of generations whose last one only the device knows, and recomputed stretches of both."""
    all_pages = rng.sample(range(1000), NUM_ROWS * PAGES_PER_ROW)
    entries = []
    for index in range(rng.randrange(1, NUM_ROWS + 1)):
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.5, 1.0]),
            top_p=rng.choice([0.5, 1.0]),
            top_k=rng.choice([-1, 4]),
            min_p=rng.choice([0.0, 0.25]),
            seed=rng.choice([rng.randrange(2**63), 2**63 - 1]),
            **rng.choice(LOGIT_CHANGES),
        )
        prompt = [rng.randrange(5000) for _ in range(rng.randrange(1, 12))]
        options = RequestOptions(
            sampling=sampling,
            return_logprob=rng.random() < 0.7,
            logprob_start_len=rng.randrange(-1, len(prompt) + 1),
            top_logprobs_num=rng.randrange(3),
        )
        request = Request.of(Generate(rid=str(index), input_ids=prompt, options=options), index=rng.randrange(3))
        request.output_ids += [rng.randrange(5000) for _ in range(rng.randrange(4))]
        known = request.num_known_tokens
        start = rng.randrange(known + 1)
        stop = rng.randrange(start + 1, known + 2)
        request.pages = [all_pages.pop() for _ in range(-(-stop // page_size) + rng.randrange(3))]
        seat(request, table)
        entries.append(StepEntry(request, start, stop, samples=rng.choice([0, 1, 1, 3])))
    rng.shuffle(entries)
    return StepPlan(tuple(entries))


def slow_batch(plan: StepPlan, last_tokens: list[int], page_size: int) -> dict[str, list[Any]]:
    """What `build_batch` must make of the plan, one token after the other."""
    out: dict[str, list[Any]] = {
        name: [] for name in ("tokens", "known", "positions", "slots", "pages", "token_rows", "rows", "lasts")
    }
    out["query_starts"], out["page_starts"] = [0], [0]
    for entry in plan.entries:
        request = entry.request
        known = list(request.message.input_ids) + request.output_ids
        for position in range(entry.start, entry.stop):
            out["tokens"].append(known[position] if position < len(known) else last_tokens[request.row])
            out["known"].append(known[position] if position < len(known) else ON_DEVICE)
            out["token_rows"].append(request.row)
            out["positions"].append(position)
            out["slots"].append(request.pages[position // page_size] * page_size + position % page_size)
        num_pages = 0
        while num_pages * page_size < entry.stop:
            out["pages"].append(request.pages[num_pages])
            num_pages += 1
        out["query_starts"].append(len(out["tokens"]))
        out["page_starts"].append(len(out["pages"]))
        for _ in range(entry.samples):
            out["rows"].append(request.row)
            out["lasts"].append(len(out["tokens"]) - 1)
    return out


def as_lists(layout: StepLayout, forward: ForwardBatch, batch: StepBatch) -> dict[str, list[Any]]:
    assert isinstance(forward.attention, PlanKept)
    attention = forward.attention.kept
    return {
        "tokens": forward.token_ids_T.tolist(),
        "known": layout.tokens.token_ids.tolist(),
        "positions": forward.positions_T.tolist(),
        "slots": forward.slots_T.tolist(),
        "pages": attention.pages.tolist(),
        "token_rows": layout.tokens.rows.tolist(),
        "rows": batch.draws.rows.tolist(),
        "lasts": batch.draws.last_tokens.tolist(),
        "query_starts": attention.query_starts.tolist(),
        "page_starts": attention.page_starts.tolist(),
    }


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), page_size=st.sampled_from([1, 3, 16]))
def test_random_plans_equal_the_twin(seed: int, page_size: int):
    rng = random.Random(seed)
    table = RequestTable(NUM_ROWS, PAGES_PER_ROW, torch.device("cpu"))
    table.last_tokens[:] = torch.arange(NUM_ROWS) + 9000  # no token that the host knows
    plan = random_plan(rng, page_size, table)
    check(plan, table, page_size)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), num_known=st.integers(0, 3))
def test_decode_steps_equal_the_twin(seed: int, num_known: int):
    """Steps as a decode engine runs them: one token and one draw an entry, so that the layout is one matrix."""
    rng = random.Random(seed)
    table = RequestTable(NUM_ROWS, PAGES_PER_ROW, torch.device("cpu"))
    table.last_tokens[:] = torch.arange(NUM_ROWS) + 9000
    entries = []
    for i, entry in enumerate(random_plan(rng, 4, table).entries):
        position = entry.request.num_known_tokens - (i < num_known)
        table.pages[entry.request.row, : PAGES_PER_ROW // 2] = entry.request.pages = rng.sample(range(1000), 20)
        entries.append(StepEntry(entry.request, position, position + 1, 1))
    layout = check(StepPlan(tuple(entries)), table, 4)
    matrix = layout.ints.reshape(9, len(entries))
    for row, column in zip(matrix, [*layout.tokens, *layout.draws], strict=True):
        assert np.shares_memory(row, column)
        assert row.tolist() == column.tolist()
    assert layout.draws.last_tokens.tolist() == list(range(len(entries)))


def check(plan: StepPlan, table: RequestTable, page_size: int) -> StepLayout:
    layout, forward, batch = make_batch(plan, table, page_size)
    assert as_lists(layout, forward, batch) == slow_batch(plan, table.last_tokens.tolist(), page_size)
    assert isinstance(forward.attention, PlanKept)
    attention = forward.attention.kept
    assert attention.context_tokens.tolist() == [entry.stop for entry in plan.entries]
    for array in (attention.query_starts, attention.context_tokens, attention.page_starts, attention.pages):
        assert array.dtype == np.int32
    for tensor in (forward.token_ids_T, forward.positions_T, forward.slots_T, *batch.draws):
        assert tensor.dtype == torch.int64
    check_sampling(plan, layout, batch)
    check_scored(plan, layout, batch)
    return layout


def check_sampling(plan: StepPlan, layout: StepLayout, batch: StepBatch) -> None:
    """Each draw's own parameters, at the position of the token that is drawn; the n-th draw of an entry has a seed of its own."""
    sampling = [entry for entry in plan.entries for _ in range(entry.samples)]
    assert [plan.entries[i] for i in layout.draw_entries] == sampling
    params = [entry.request.message.options.sampling for entry in sampling]
    assert layout.top_count == max((entry.request.message.options.top_logprobs_num for entry in sampling), default=0)
    changed = [p != msgspec.structs.replace(p, **UNCHANGED) for p in params]
    assert layout.any_logit_changes == any(changed)
    if not sampling:
        assert batch.sampling is None
        return
    assert batch.sampling is not None
    assert batch.sampling.positions_S.tolist() == [entry.stop for entry in sampling]
    seeds = [
        (entry.request.message.options.sampling.seed + entry.request.index + draw) % 2**63
        for entry in plan.entries
        for draw in range(entry.samples)
    ]
    assert batch.sampling.seeds_S.tolist() == seeds
    assert batch.sampling.temperatures_S.tolist() == [p.temperature for p in params]
    assert batch.sampling.top_ps_S.tolist() == [p.top_p for p in params]
    assert batch.sampling.min_ps_S.tolist() == [p.min_p for p in params]
    top_ks = zip(batch.sampling.top_ks_S.tolist(), params, strict=True)
    assert all(top_k == p.top_k if p.top_k > 0 else top_k > 10**6 for top_k, p in top_ks)
    assert batch.sampling.all_greedy == all(p.temperature == 0 for p in params)
    assert batch.sampling.any_filtered == any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params)


def check_scored(plan: StepPlan, layout: StepLayout, batch: StepBatch) -> None:
    """A prompt token's logprob, if asked for, comes from the position before it, in the step that computes that position."""
    hidden, tokens, counts, top_counts = [], [], [], [0]
    offset = 0
    for entry in plan.entries:
        options, prompt = entry.request.message.options, entry.request.message.input_ids
        count = 0
        for position in range(entry.start, entry.stop):
            predicted = position + 1
            asked = options.return_logprob and 0 <= options.logprob_start_len <= predicted
            if asked and predicted < len(prompt):
                hidden.append(offset + position - entry.start)
                tokens.append(prompt[predicted])
                top_counts.append(options.top_logprobs_num)
                count += 1
        counts.append(count)
        offset += entry.num_tokens
    if not hidden:
        assert batch.scored is None
        assert layout.scored is None
        return
    assert batch.scored is not None
    assert layout.scored is not None
    assert batch.scored.hidden_N.tolist() == hidden
    assert batch.scored.next_tokens_N.tolist() == tokens
    assert layout.scored.counts == tuple(counts)
    assert batch.scored.top_count == max(top_counts)


def test_the_last_token_comes_from_the_device_as_it_is_when_the_step_runs():
    """A generation's step n + 1 is planned before step n has settled: it takes what the sampler has left in the table."""
    table = RequestTable(2, 4, torch.device("cpu"))
    options = RequestOptions(sampling=SamplingParams(max_new_tokens=9))
    request = Request.of(Generate(rid="r", input_ids=[11, 12], options=options))
    request.output_ids.append(13)
    request.pages = [3, 5]
    seat(request, table)
    table.last_tokens[request.row] = 77
    entries = [StepEntry(request, 2, 3, 1), StepEntry(request, 3, 4, 1)]
    tokens = [make_batch(StepPlan((entry,)), table, 2)[1].token_ids_T for entry in entries]
    assert [t.tolist() for t in tokens] == [[13], [77]]
    table.last_tokens[request.row] = 78
    assert tokens[1].tolist() == [77], "the batch owns its tokens"


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_slots_against_a_recount(page_size: int):
    pages = [7, 2, 9, 4]
    order = [page * page_size + offset for page in pages for offset in range(page_size)]
    for start in range(4 * page_size):
        for stop in range(start, 4 * page_size + 1):
            assert slots_of(pages, start, stop, page_size).tolist() == order[start:stop]
    assert slots_of(np.array(pages, dtype=np.int32), 0, 1, page_size).dtype == np.int64
