"""The ranks of an attention group that do not lead: they run what the leader runs, on their own part of the model and of the KV.

The leader tells them, in order, of everything that touches the device: each step's layout, and pages that are copied or swapped.
They know no request and keep no rows. The order of the messages is the order of the leader's launches, so the
ranks meet inside the same collectives. Two things they answer: that pages have been swapped out or in, since a peer may write to
them as soon as their owner has lost them (R11), and how they have carried out an order of the frontend.

    leader: Engine --Followers--> RankLink --> follow(): follower
                        <-- PagesMoved, Verdict --
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from msgspec import Struct

from common.engine.background import Background, carry_out_beside
from common.engine.device import Device, HostCopies
from common.engine.forward_pass import ForwardPass
from common.engine.host_pages import HostPages
from common.engine.lockstep import StepShape
from common.engine.orders import RankOrders, Verdict
from common.engine.step_layout import ScoredLayout, StepLayout, split_ints
from common.kernels.attention import AttentionPlan
from common.memory.kv_pool import KvPool
from common.orders import Order

_MAX_IN_FLIGHT = 2
_WAIT_S = 1.0


class RunStep(Struct, frozen=True, tag=True, kw_only=True):
    """A step's layout and shape; arrays as little-endian bytes."""

    num_tokens: int
    num_draws: int
    ints: bytes
    params: bytes
    query_starts: bytes
    context_tokens: bytes
    page_starts: bytes
    pages: bytes
    scored: bytes | None
    group_tokens: tuple[int, ...]
    all_fit_graph: bool


class CopyPage(Struct, frozen=True, tag=True):
    """`KvPool.copy`."""

    page: int
    copies: list[int]


class StashPages(Struct, frozen=True, tag=True):
    """`HostPages.stash`."""

    key: int
    pages: list[int]


class RestorePages(Struct, frozen=True, tag=True):
    """`HostPages.restore`."""

    key: int
    pages: list[int]


class DropPages(Struct, frozen=True, tag=True):
    """`HostPages.drop`."""

    key: int


class Obey(Struct, frozen=True, tag=True):
    """Carry out an order of the frontend, once no step is in flight; answered by a `Verdict`."""

    order: Order


class End(Struct, frozen=True, tag=True):
    """The leader has ended."""


class PagesMoved(Struct, frozen=True, tag=True):
    """A follower has done what a `StashPages` or a `RestorePages` asked for."""

    rank: int
    key: int


ToFollower = RunStep | CopyPage | StashPages | RestorePages | DropPages | Obey | End
FromFollower = PagesMoved | Verdict


class LeaderLink(Protocol):
    """The way to the followers; `common.wire.RankLink` is the real one."""

    def send(self, rank: int, message: ToFollower) -> None:
        """Queue a message; never blocks."""

    def receive(self) -> list[FromFollower]:
        """All messages that are here."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until a message is here."""


class FollowerLink(Protocol):
    """The way from the leader and back; `common.wire.RankLink` is the real one."""

    def send(self, rank: int, message: FromFollower) -> None:
        """Queue a message; never blocks."""

    def receive(self) -> list[ToFollower]:
        """All messages that are here."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until a message is here."""


@dataclass(frozen=True, slots=True)
class Followers:
    """The leader's word to the followers of its group; says nothing if there are none."""

    ranks: range = range(0)
    link: LeaderLink | None = None

    def tell(self, message: ToFollower) -> None:
        """Queue a message to each."""
        if self.link is not None:
            for rank in self.ranks:
                self.link.send(rank, message)

    def wait_moved(self, key: int) -> None:
        """Wait until each has swapped these pages: a step or two at most, by which a follower is behind."""
        missing = set(self.ranks) if self.link is not None else set()
        while missing:
            assert self.link is not None
            self.link.wait(_WAIT_S)
            answers = self.link.receive()
            missing -= {answer.rank for answer in answers if isinstance(answer, PagesMoved) and answer.key == key}

    def wait_verdicts(self) -> list[Verdict]:
        """Wait until each has carried out the order that it was told of last."""
        verdicts: list[Verdict] = []
        while self.link is not None and len(verdicts) < len(self.ranks):
            self.link.wait(_WAIT_S)
            verdicts += [answer for answer in self.link.receive() if isinstance(answer, Verdict)]
        return verdicts

    def run(self, layout: StepLayout, shape: StepShape) -> None:
        """Have them launch a step."""
        if self.link is not None:
            self.tell(_message_of(layout, shape))


def follow(forward: ForwardPass, device: Device, link: FollowerLink, background: Background) -> None:
    """Do what the leader says until it ends. Raises what is wrong elsewhere in this process, now and then."""
    host_pages = HostPages(forward.kv_pool)
    rank = forward.collectives.rank
    leader = rank.of.leader_of(rank.group)
    orders = RankOrders(forward, rank, device.torch_device)
    in_flight: deque[HostCopies] = deque()
    while True:
        for message in link.receive():
            match message:
                case RunStep():
                    with orders.profiler.step():
                        in_flight.append(_run(message, forward, device))
                    if len(in_flight) == _MAX_IN_FLIGHT:
                        in_flight.popleft().wait()
                case Obey():
                    while in_flight:
                        in_flight.popleft().wait()
                    link.send(leader, carry_out_beside(background, message.order, orders.carry_out))
                case End():
                    return
                case _:
                    apply(message, forward.kv_pool, host_pages)
                    if isinstance(message, StashPages | RestorePages):
                        link.send(leader, PagesMoved(rank.index, message.key))
        background.check()
        link.wait(_WAIT_S)


def apply(message: CopyPage | StashPages | RestorePages | DropPages, kv_pool: KvPool, host_pages: HostPages) -> None:
    """Copy, swap out, swap in or drop pages, in the leader as in its followers."""
    match message:
        case CopyPage():
            kv_pool.copy(message.page, message.copies)
        case StashPages():
            host_pages.stash(message.key, message.pages)
        case RestorePages():
            host_pages.restore(message.key, message.pages)
        case DropPages():
            host_pages.drop(message.key)


@torch.inference_mode()
def _run(message: RunStep, forward: ForwardPass, device: Device) -> HostCopies:
    staging = device.begin_step()
    shape = StepShape(message.group_tokens, message.all_fit_graph)
    batch, hidden_TD = forward.run(_layout_of(message), shape, staging)
    if batch.sampling is not None:
        forward.logits(hidden_TD[batch.draws.last_tokens])
        forward.keep_draws(batch, torch.empty_like(batch.draws.rows))
    if batch.scored is not None:
        for _ in forward.scored_logits(batch.scored, hidden_TD):
            pass
    # Nothing is wanted on the host but to know when the step is over, and its staging free.
    return staging.copy_to_host({"end": hidden_TD.new_zeros(1, dtype=torch.float32)})


def _message_of(layout: StepLayout, shape: StepShape) -> RunStep:
    attention = layout.attention
    return RunStep(
        num_tokens=layout.num_tokens,
        num_draws=layout.num_draws,
        ints=layout.ints.tobytes(),
        params=layout.params_3S.tobytes(),
        query_starts=attention.query_starts.tobytes(),
        context_tokens=attention.context_tokens.tobytes(),
        page_starts=attention.page_starts.tobytes(),
        pages=attention.pages.tobytes(),
        scored=None if layout.scored is None else layout.scored.ints_2N.tobytes(),
        group_tokens=shape.group_tokens,
        all_fit_graph=shape.all_fit_graph,
    )


def _layout_of(message: RunStep) -> StepLayout:
    """The layout as far as the forward pass and the logits need it; what only sampling asks for is left out."""
    ints = np.frombuffer(message.ints, dtype=np.int64)
    tokens, draws = split_ints(ints, message.num_tokens, message.num_draws)
    params_3S = np.frombuffer(message.params, dtype=np.float32).reshape(3, message.num_draws)
    arrays = (message.query_starts, message.context_tokens, message.page_starts, message.pages)
    scored = None
    if message.scored is not None:
        ints_2N = np.frombuffer(message.scored, dtype=np.int64).reshape(2, -1)
        scored = ScoredLayout(ints_2N=ints_2N, top_count=0, counts=())
    return StepLayout(
        ints=ints,
        tokens=tokens,
        draws=draws,
        params_3S=params_3S,
        # Torch warns of arrays that it may not write to.
        attention=AttentionPlan(*(np.frombuffer(bytearray(array), dtype=np.int32) for array in arrays)),
        draw_entries=np.zeros(0, dtype=np.int64),
        all_known=False,
        all_greedy=False,
        any_filtered=False,
        any_logit_changes=False,
        top_count=0,
        scored=scored,
    )
