"""From a step's plan to the tensors of its forward pass. One place where positions become slots and pages."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.engine.device import Device, as_int64
from common.engine.sampler import SamplingBatch
from common.kernels.attention import AttentionPlan
from common.memory.layout import num_pages_for, slots_of
from common.memory.request_table import RequestTable
from common.models.forward import ForwardBatch, RoutingSink
from common.scheduling.step_plan import StepEntry, StepPlan


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The positions of a step whose next prompt token's logprob is wanted, N in all."""

    hidden_N: torch.Tensor
    """int64: where in the step they stand."""
    next_tokens_N: torch.Tensor
    """int64: the prompt's own token at the position after each."""
    top_count: int
    counts: tuple[int, ...]
    """How many of the N belong to each entry of the plan."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A plan in tensors. `slots` is the host's copy of the forward's slots, `[T]`."""

    forward: ForwardBatch
    slots: npt.NDArray[np.int64]
    sampled_rows_S: torch.Tensor
    """int64: request-table rows of the entries that sample."""
    last_tokens_S: torch.Tensor
    """int64: where in the step the token stands whose logits they are drawn from."""
    draws: tuple[StepEntry, ...]
    """`[S]`: the entry of each draw; an entry with n samples stands here n times."""
    sampling: SamplingBatch | None
    """None when no entry samples."""
    scored: ScoredBatch | None
    """None when no prompt logprobs are wanted."""


def build_batch(plan: StepPlan, table: RequestTable, device: Device, page_size: int, routing: RoutingSink) -> StepBatch:
    """Lay out the plan's entries one after the other and upload them."""
    token_ids = np.zeros(plan.num_tokens, dtype=np.int64)
    positions = np.zeros(plan.num_tokens, dtype=np.int64)
    slots = np.zeros(plan.num_tokens, dtype=np.int64)
    from_device: list[int] = []
    rows_from_device: list[int] = []
    query_starts, page_starts, pages = [0], [0], []
    for entry in plan.entries:
        request, begin = entry.request, query_starts[-1]
        end = begin + entry.num_tokens
        row_pages = table.pages[request.row]
        positions[begin:end] = np.arange(entry.start, entry.stop)
        slots[begin:end] = slots_of(row_pages, entry.start, entry.stop, page_size)
        num_from_prompt = max(0, min(entry.stop, request.num_prompt_tokens) - entry.start)
        token_ids[begin : begin + num_from_prompt] = request.prompt[entry.start : entry.start + num_from_prompt]
        for position in range(entry.start + num_from_prompt, entry.stop):
            if position < request.num_known_tokens:
                token_ids[begin + position - entry.start] = request.token_at(position)
            else:
                from_device.append(begin + position - entry.start)
                rows_from_device.append(request.row)
        query_starts.append(end)
        pages.append(row_pages[: num_pages_for(entry.stop, page_size)])
        page_starts.append(page_starts[-1] + len(pages[-1]))

    token_ids_T = device.upload(token_ids)
    if from_device:
        token_ids_T[device.upload(as_int64(from_device))] = table.last_tokens[device.upload(as_int64(rows_from_device))]
    draws = [(entry, query_starts[i + 1] - 1, n) for i, entry in enumerate(plan.entries) for n in range(entry.samples)]
    return StepBatch(
        forward=ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=device.upload(positions),
            slots_T=device.upload(slots),
            attention=AttentionPlan(
                query_starts=tuple(query_starts),
                context_tokens=tuple(entry.stop for entry in plan.entries),
                page_starts=tuple(page_starts),
                pages=device.upload(as_int64(np.concatenate(pages))),
            ),
            routing=routing,
        ),
        slots=slots,
        sampled_rows_S=device.upload(as_int64([entry.request.row for entry, _, _ in draws])),
        last_tokens_S=device.upload(as_int64([last for _, last, _ in draws])),
        draws=tuple(entry for entry, _, _ in draws),
        sampling=SamplingBatch.of(
            [entry.request.message.options.sampling for entry, _, _ in draws],
            [(entry.request.seed + n) % 2**63 for entry, _, n in draws],
            [entry.stop for entry, _, _ in draws],
            device,
        )
        if draws
        else None,
        scored=_build_scored(plan, query_starts, device),
    )


def _build_scored(plan: StepPlan, query_starts: list[int], device: Device) -> ScoredBatch | None:
    """Find the positions that predict a prompt token whose logprob is wanted: token p + 1 is predicted at position p."""
    hidden: list[npt.NDArray[np.int64]] = []
    next_tokens: list[npt.NDArray[np.int32]] = []
    counts: list[int] = []
    top_count = 0
    for entry, begin in zip(plan.entries, query_starts, strict=False):
        options, prompt = entry.request.message.options, entry.request.prompt
        wanted = options.return_logprob and options.logprob_start_len >= 0
        first = max(entry.start, options.logprob_start_len - 1) if wanted else entry.stop
        last = max(first, min(entry.stop, len(prompt) - 1))
        hidden.append(np.arange(first, last) - entry.start + begin)
        next_tokens.append(prompt[first + 1 : last + 1])
        counts.append(last - first)
        if last > first:
            top_count = max(top_count, options.top_logprobs_num)
    if not any(counts):
        return None
    return ScoredBatch(
        hidden_N=device.upload(np.concatenate(hidden)),
        next_tokens_N=device.upload(as_int64(np.concatenate(next_tokens))),
        top_count=top_count,
        counts=tuple(counts),
    )
