"""The engine: one model on one device, with its KV pool, its page allocator and its host cache. It runs plans.

It knows no role, no queue, no network: a worker's scheduler decides what a plan holds, `common.engine.loop` when it runs.
"""

import torch

from common.engine.batch import ScoredBatch
from common.engine.capacity import CapacityPlan
from common.engine.device import Device, StepStaging
from common.engine.follower import CopyPage, DropPages, End, Followers, Obey, RestorePages, StashPages, apply
from common.engine.forward_pass import ForwardPass
from common.engine.host_pages import HostPages
from common.engine.lockstep import Lockstep
from common.engine.orders import RankOrders, Verdict
from common.engine.penalties import LogitChanges, TokenCounts
from common.engine.sampler import SamplingBatch, sample, top_logprobs
from common.engine.seats import Seats
from common.engine.step import Launched
from common.engine.step_layout import StepLayout, lay_out
from common.kernels.reference import logprobs_of
from common.memory.page_allocator import PageAllocator
from common.memory.request_table import RequestTable
from common.models.config import ModelConfig
from common.orders import Done, LoadWeights, Order, SetWeightVersion
from common.routed_experts.capture import RoutedExpertsCapturer
from common.routed_experts.host_cache import HostCache
from common.scheduling.step_plan import StepPlan


class Engine:
    """Runs steps. `launch` queues a step's work and returns at once; `Launched.settle` waits for it and commits.

    Of an attention group of several ranks this is the leader; what touches the device it also tells its followers.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        capacity: CapacityPlan,
        device: Device,
        forward: ForwardPass,
        table: RequestTable,
        allocator: PageAllocator,
        capturer: RoutedExpertsCapturer,
        host_cache: HostCache,
        weight_version: str,
        lockstep: Lockstep,
        followers: Followers,
    ) -> None:
        self.config = config
        self.capacity = capacity
        self.kv_pool = forward.kv_pool
        self.rank = forward.collectives.rank
        self.allocator = allocator
        self.host_cache = host_cache
        self.weight_version = weight_version
        """Changes between steps alone, when none is in flight."""
        self.table = table
        self.seats = Seats(allocator, table)
        self.num_steps = 0
        self.num_failed_steps = 0
        self.num_tokens_computed = 0
        self._device = device
        self._forward = forward
        self._capturer = capturer
        self._token_counts = TokenCounts(capacity.max_running_requests, config.vocab_size, device)
        self._host_pages = HostPages(forward.kv_pool)
        self._lockstep = lockstep
        self._followers = followers
        self._orders = RankOrders(forward, self.rank, device.torch_device)
        self.num_unsure_weights = 0
        """Tensors that some rank of the group has taken in part, or others have not; no step may be planned while there are any."""

    @property
    def is_called(self) -> bool:
        """Whether another attention group waits for this one to launch its next step, be it an empty one."""
        return self._lockstep.is_called

    @property
    def is_released(self) -> bool:
        """Whether memory has been given back that steps need; none may be launched."""
        return not self._orders.memory.is_warm

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Queue one forward pass and its copies to the host; the device may still be busy with the step before."""
        with self._orders.profiler.step():
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> Launched:
        forward = self._forward
        layout = lay_out(plan, self.table, self.capacity.page_size)
        shape = self._lockstep.meet(layout.num_tokens, fits_graph=forward.fits_graph(layout))
        self._followers.run(layout, shape)
        staging = self._device.begin_step()
        ticket = self.host_cache.reserve(layout.tokens.slots)
        batch, hidden_TD = forward.run(layout, shape, staging)
        results = {"rows": self._capturer.take(layout.num_tokens)}
        if batch.sampling is not None:
            logits_SV = forward.logits(hidden_TD[batch.draws.last_tokens])
            changes = self._logit_changes(plan, layout, batch.draws.rows, staging)
            drawn = self._sample(logits_SV, batch.sampling, changes, layout.top_count)
            forward.keep_draws(batch, drawn["tokens"])
            results |= drawn
        if batch.scored is not None:
            results |= self._score(batch.scored, hidden_TD)
        self.num_steps += 1
        self.num_tokens_computed += layout.num_tokens
        num_scored = layout.scored.counts if layout.scored is not None else (0,) * len(plan.entries)
        copies = staging.copy_to_host(results)
        return Launched(plan, copies, num_scored, ticket, self.host_cache, self.weight_version)

    def synchronize(self) -> None:
        """Wait until all that was ever queued on the device has been done; raises if the device is broken."""
        self._device.synchronize()

    def copy_page(self, page: int, copies: list[int]) -> None:
        """Copy one page into others on the device, behind what is launched already and before whatever is launched next."""
        self._change_pages(CopyPage(page, copies))

    def swap_out(self, key: int, pages: list[int]) -> None:
        """Copy pages to host memory under a key of the caller's; blocks until the copies of all ranks are there."""
        self._change_pages(StashPages(key, pages))
        # Whoever gets these pages next may have them written by a peer, in every rank's memory and at any time.
        self._followers.wait_moved(key)

    def swap_in(self, key: int, pages: list[int]) -> None:
        """Copy what was swapped out back into pages, as many; blocks as `swap_out` does.

        Its owner may lose the pages before any step of it has been launched.
        """
        self._change_pages(RestorePages(key, pages))
        self._followers.wait_moved(key)

    def forget_swapped(self, key: int) -> None:
        """Drop what was swapped out."""
        self._change_pages(DropPages(key))

    def carry_out(self, order: Order) -> Done:
        """Have all ranks of the group carry out an order of the frontend; no step may be in flight."""
        self._followers.tell(Obey(order))
        verdicts = [self._orders.carry_out(order), *self._followers.wait_verdicts()]
        errors = [
            _said_by(verdict) if self._followers.ranks else verdict.error for verdict in verdicts if verdict.error
        ]
        num_left = max(verdict.num_left for verdict in verdicts)
        if isinstance(order, LoadWeights):
            self.num_unsure_weights = num_left
        if isinstance(order, LoadWeights | SetWeightVersion) and not errors:
            self.weight_version = order.weight_version
        return Done(serial=order.serial, error=errors[0] if errors else None, num_left=num_left)

    def close(self) -> None:
        """Take no more steps, and let the ranks know that would wait for one."""
        self._lockstep.leave()
        self._followers.tell(End())

    def _change_pages(self, message: CopyPage | StashPages | RestorePages | DropPages) -> None:
        self._followers.tell(message)
        apply(message, self.kv_pool, self._host_pages)

    def _logit_changes(
        self, plan: StepPlan, layout: StepLayout, rows_S: torch.Tensor, staging: StepStaging
    ) -> LogitChanges | None:
        """What is done to the draws' logits before they are sampled; None, at no cost, in most steps."""
        if not layout.any_logit_changes:
            return None
        draws = [plan.entries[i] for i in layout.draw_entries]
        return self._token_counts.changes_of(draws, rows_S, self.config.eos_token_ids, staging.upload)

    def _sample(
        self, logits_SV: torch.Tensor, sampling: SamplingBatch, changes: LogitChanges | None, top_count: int
    ) -> dict[str, torch.Tensor]:
        """Draw the step's tokens."""
        kernels = self._forward.backends.kernels
        if changes is None:
            tokens_S, logprobs_S = sample(logits_SV, sampling, kernels)
        else:
            tokens_S, _ = sample(self._token_counts.apply(logits_SV, changes), sampling, kernels)
            logprobs_S = logprobs_of(logits_SV, tokens_S)
            self._token_counts.count(changes, tokens_S)
        results = {"tokens": tokens_S, "logprobs": logprobs_S}
        if top_count:
            results["top_logprobs"], results["top_ids"] = top_logprobs(logits_SV, top_count)
        return results

    def _score(self, scored: ScoredBatch, hidden_TD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take the logprobs of prompt tokens."""
        parts: dict[str, list[torch.Tensor]] = {"prompt_logprobs": [], "prompt_top_logprobs": [], "prompt_top_ids": []}
        for logits, tokens in self._forward.scored_logits(scored, hidden_TD):
            parts["prompt_logprobs"].append(logprobs_of(logits, tokens))
            if scored.top_count:
                values, ids = top_logprobs(logits, scored.top_count)
                parts["prompt_top_logprobs"].append(values)
                parts["prompt_top_ids"].append(ids)
        return {name: torch.cat(part) for name, part in parts.items() if part}


def _said_by(verdict: Verdict) -> str:
    return f"rank {verdict.rank}: {verdict.error}"
