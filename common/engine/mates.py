"""The other ranks of a worker, as one rank reaches them: for tensors, for steps, and from leader to followers.

Ranks meet in a folder that the worker's frontend makes for them; all live on one host.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from common.engine.follower import Followers, FromFollower, ToFollower
from common.engine.lockstep import Lockstep, Share
from common.kernels.collectives import Collectives
from common.ranks import Rank
from common.wire import EngineChannel, RankLink


class Mates(NamedTuple):
    """A rank and its ways to the others. The default is a worker of one rank."""

    rank: Rank = Rank()
    folder: str = ""
    """Where they meet, and their frontend."""
    store: Store | None = None
    lockstep_link: RankLink[Share, Share] | None = None
    """A leader's, to the other groups' leaders; None if there are none."""
    step_link: RankLink[FromFollower, ToFollower] | None = None
    """A leader's, to its followers; None if it has none."""
    leader_link: RankLink[ToFollower, FromFollower] | None = None
    """A follower's, to its leader."""

    def collectives(self, device: torch.device) -> Collectives:
        """Meet all the others; blocks until they are there."""
        if self.store is None:
            return Collectives.alone()
        return Collectives.connect(self.rank, self.store, device)

    def lockstep(self) -> Lockstep:
        """A leader's place among the groups."""
        return Lockstep(self.rank, self.lockstep_link)

    def followers(self) -> Followers:
        """A leader's word to its followers."""
        return Followers(self.rank.followers, self.step_link)

    def wake(self, channel: EngineChannel) -> None:
        """Let a leader's loop hear of the other groups' steps while it waits for the frontend."""
        if self.lockstep_link is not None:
            channel.watch(self.lockstep_link)

    def wake_follower(self) -> None:
        """Any thread: end a follower's wait for its leader."""
        if self.leader_link is not None:
            self.leader_link.wake()

    def close(self) -> None:
        """Send what is queued, and close this rank's ends."""
        for link in (self.lockstep_link, self.step_link, self.leader_link):
            if link is not None:
                link.close()


def find_mates(rank: Rank, folder: str) -> Mates:
    """Open this rank's ends of the ways to the others in `folder`."""
    if rank.of.tp == 1:
        return Mates(folder=folder)
    return Mates(
        rank=rank,
        folder=folder,
        store=dist.FileStore(str(Path(folder) / "ranks"), rank.of.tp),  # type: ignore[attr-defined]
        lockstep_link=RankLink(folder, "lockstep", rank.index, Share) if rank.is_leader and rank.of.dp > 1 else None,
        step_link=RankLink(folder, "steps", rank.index, FromFollower) if rank.followers else None,
        leader_link=None if rank.is_leader else RankLink(folder, "steps", rank.index, ToFollower),
    )
