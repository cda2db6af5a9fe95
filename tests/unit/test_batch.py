"""From plan to tensors, against a slow twin in plain Python loops, over random plans."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.batch import StepBatch, build_batch
from common.engine.device import CpuDevice
from common.memory.layout import slots_of
from common.memory.request_table import RequestTable
from common.messages import Generate, RequestOptions, SamplingParams
from common.scheduling.request import Request
from common.scheduling.step_plan import StepEntry, StepPlan

NUM_ROWS = 7
PAGES_PER_ROW = 40


class Nothing:
    """Takes no routing."""

    def record(self, moe_layer: int, expert_ids_TK: torch.Tensor) -> None:
        raise AssertionError("a batch is built, not run")


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
        request.row = table.allocate(request.pages)
        entries.append(StepEntry(request, start, stop, samples=rng.choice([0, 1, 1, 3])))
    rng.shuffle(entries)
    return StepPlan(tuple(entries))


def slow_batch(plan: StepPlan, last_tokens: list[int], page_size: int) -> dict[str, list[Any]]:
    """What `build_batch` must make of the plan, one token after the other."""
    out: dict[str, list[Any]] = {name: [] for name in ("tokens", "positions", "slots", "pages", "rows", "lasts")}
    out["query_starts"], out["page_starts"] = [0], [0]
    for entry in plan.entries:
        request = entry.request
        known = list(request.message.input_ids) + request.output_ids
        for position in range(entry.start, entry.stop):
            out["tokens"].append(known[position] if position < len(known) else last_tokens[request.row])
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


def as_lists(batch: StepBatch) -> dict[str, list[Any]]:
    forward = batch.forward
    return {
        "tokens": forward.token_ids_T.tolist(),
        "positions": forward.positions_T.tolist(),
        "slots": forward.slots_T.tolist(),
        "pages": forward.attention.pages.tolist(),
        "rows": batch.sampled_rows_S.tolist(),
        "lasts": batch.last_tokens_S.tolist(),
        "query_starts": list(forward.attention.query_starts),
        "page_starts": list(forward.attention.page_starts),
    }


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), page_size=st.sampled_from([1, 3, 16]))
def test_random_plans_equal_the_twin(seed: int, page_size: int):
    rng = random.Random(seed)
    table = RequestTable(NUM_ROWS, PAGES_PER_ROW, torch.device("cpu"))
    table.last_tokens[:] = torch.arange(NUM_ROWS) + 9000  # no token that the host knows
    plan = random_plan(rng, page_size, table)
    batch = build_batch(plan, table, CpuDevice(), page_size, Nothing())
    assert as_lists(batch) == slow_batch(plan, table.last_tokens.tolist(), page_size)
    assert batch.slots.tolist() == batch.forward.slots_T.tolist()
    assert list(batch.forward.attention.context_tokens) == [entry.stop for entry in plan.entries]
    for tensor in (batch.forward.token_ids_T, batch.forward.positions_T, batch.forward.slots_T, batch.last_tokens_S):
        assert tensor.dtype == torch.int64
    check_sampling(plan, batch)
    check_scored(plan, batch)


def check_sampling(plan: StepPlan, batch: StepBatch) -> None:
    """Each draw's own parameters, at the position of the token that is drawn; the n-th draw of an entry has a seed of its own."""
    sampling = [entry for entry in plan.entries for _ in range(entry.samples)]
    assert batch.draws == tuple(sampling)
    if not sampling:
        assert batch.sampling is None
        return
    assert batch.sampling is not None
    params = [entry.request.message.options.sampling for entry in sampling]
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


def check_scored(plan: StepPlan, batch: StepBatch) -> None:
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
        return
    assert batch.scored is not None
    assert batch.scored.hidden_N.tolist() == hidden
    assert batch.scored.next_tokens_N.tolist() == tokens
    assert batch.scored.counts == tuple(counts)
    assert batch.scored.top_count == max(top_counts)


def test_the_last_token_comes_from_the_device_as_it_is_when_the_step_runs():
    """A generation's step n + 1 is planned before step n has settled: it takes what the sampler has left in the table."""
    table = RequestTable(2, 4, torch.device("cpu"))
    options = RequestOptions(sampling=SamplingParams(max_new_tokens=9))
    request = Request.of(Generate(rid="r", input_ids=[11, 12], options=options))
    request.output_ids.append(13)
    request.pages = [3, 5]
    request.row = table.allocate(request.pages)
    table.last_tokens[request.row] = 77
    entries = [StepEntry(request, 2, 3, 1), StepEntry(request, 3, 4, 1)]
    tokens = [
        build_batch(StepPlan((entry,)), table, CpuDevice(), 2, Nothing()).forward.token_ids_T for entry in entries
    ]
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
