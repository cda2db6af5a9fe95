"""From a step's plan to the tensors of its forward pass. One place where positions become slots and pages."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.engine.device import Device, as_int64
from common.engine.sampler import SamplingBatch
from common.kernels.attention import AttentionPlan
from common.memory.layout import slots_of
from common.memory.request_table import RequestTable
from common.models.forward import ForwardBatch, RoutingSink
from common.scheduling.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A plan in tensors. `slots` is the host's copy of the forward's slots, `[T]`."""

    forward: ForwardBatch
    slots: npt.NDArray[np.int64]
    sampled_rows_S: torch.Tensor
    """int64: request-table rows of the entries that sample."""
    last_tokens_S: torch.Tensor
    """int64: where in the step their last token stands."""
    sampling: SamplingBatch | None
    """None when no entry samples."""


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
        pages.append(row_pages[: -(-entry.stop // page_size)])
        page_starts.append(page_starts[-1] + len(pages[-1]))

    token_ids_T = device.upload(token_ids)
    if from_device:
        token_ids_T[device.upload(as_int64(from_device))] = table.last_tokens[device.upload(as_int64(rows_from_device))]
    sampling = [(entry, query_starts[i + 1] - 1) for i, entry in enumerate(plan.entries) if entry.samples]
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
        sampled_rows_S=device.upload(as_int64([entry.request.row for entry, _ in sampling])),
        last_tokens_S=device.upload(as_int64([last for _, last in sampling])),
        sampling=SamplingBatch.of(
            [entry.request.message.options.sampling for entry, _ in sampling],
            [entry.stop for entry, _ in sampling],
            device,
        )
        if sampling
        else None,
    )
