"""What ranks compute together, in threads over gloo, against plain sums and concatenations."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kernels.collectives import Collectives, Gathering, Routed
from common.kernels.interface import Lanes
from common.kernels.torch_kernels import TorchKernels
from common.ranks import Ranks
from tests.support.rank_threads import in_threads

CPU = torch.device("cpu")
HIDDEN = 12

RANKS = st.sampled_from([Ranks(tp=2), Ranks(tp=2, dp=2), Ranks(tp=3, dp=3), Ranks(tp=4, dp=2), Ranks(tp=4, dp=4)])


def together(ranks: Ranks, run: Any) -> list[Any]:
    """What `run(collectives)` returns on every rank."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=60))
    results: list[Any] = [None] * ranks.tp

    def run_rank(index: int) -> None:
        results[index] = run(Collectives.connect(ranks.rank(index), store, CPU))

    in_threads(ranks.tp, run_rank)
    return results


def routed(seed: int, num_tokens: int, top_k: int, dtype: torch.dtype, id_dtype: torch.dtype) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    return Routed(
        torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype),
        torch.randint(0, 200, (num_tokens, top_k), generator=generator).to(id_dtype),
        torch.rand(num_tokens, top_k, generator=generator).to(dtype),
    )


@settings(max_examples=25, deadline=None)
@given(
    RANKS,
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([torch.uint8, torch.uint16, torch.int32]),
    st.integers(0, 3),
    st.booleans(),
)
def test_tokens_of_all_groups_come_together_and_go_back(
    ranks: Ranks,
    counts: list[int],
    top_k: int,
    dtype: torch.dtype,
    id_dtype: torch.dtype,
    spare_lanes: int,
    padded: bool,
):
    """Each rank sees every group's tokens once, in the groups' order, and each group gets back the sum of all ranks' shares."""
    counts = counts[: ranks.dp]
    per_group = max(1, *counts) + spare_lanes
    owns = [routed(group, num, top_k, dtype, id_dtype) for group, num in enumerate(counts)]
    lanes = Lanes(torch.tensor(counts), per_group) if padded else None
    gathering = Gathering(per_group, tuple(counts), lanes) if ranks.dp > 1 else None

    def run(collectives: Collectives) -> tuple[Routed, torch.Tensor]:
        own = owns[collectives.rank.group]
        seen = collectives.gather(own, gathering)
        # A share that tells the ranks apart; whole numbers, so that no order of adding them matters.
        share = torch.arange(len(seen.hidden)).view(-1, 1).expand(-1, HIDDEN) + 100.0 * 2**collectives.rank.index
        return seen, summed(collectives, collectives.scatter_sum(share.clone(), gathering, len(own.hidden)))

    total_weight = 100.0 * (2**ranks.tp - 1)
    for index, (seen, back) in enumerate(together(ranks, run)):
        group = ranks.rank(index).group
        num_lanes = per_group if padded and ranks.dp > 1 else None
        first = 0
        for other, own in enumerate(owns):
            num = counts[other]
            for ours, theirs in zip(seen, own, strict=True):
                assert torch.equal(ours[first : first + num], theirs)
            if other == group:
                numbers = torch.arange(first, first + num).view(-1, 1).expand(-1, HIDDEN)
                assert torch.equal(back, numbers * float(ranks.tp) + total_weight)
            first += num_lanes or num
        assert len(seen.hidden) == first


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([Ranks(tp=2), Ranks(tp=4, dp=2), Ranks(tp=4)]), st.integers(1, 5), st.integers(1, 9))
def test_a_groups_vocabulary_sums_and_draws(ranks: Ranks, num_rows: int, width: int):
    logits = torch.randn(ranks.dp, num_rows, width * ranks.group_size)

    def run(collectives: Collectives) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        rank = collectives.rank
        part = logits[rank.group][:, rank.place * width : (rank.place + 1) * width]
        drawn = torch.full((num_rows,), 10 * rank.group if rank.is_leader else -1)
        total = summed(collectives, torch.full((2, 3), 2.0**rank.index))
        return collectives.gather_vocabulary(part), collectives.share_draws(drawn), total, _smallest(collectives)

    for index, (gathered, drawn, total, smallest) in enumerate(together(ranks, run)):
        rank = ranks.rank(index)
        assert torch.equal(gathered, logits[rank.group])
        assert drawn.tolist() == [10 * rank.group] * num_rows
        first = ranks.leader_of(rank.group)
        assert total.unique().tolist() == [sum(2.0 ** (first + place) for place in range(ranks.group_size))]
        assert smallest == 7


def summed(collectives: Collectives, partial: torch.Tensor) -> torch.Tensor:
    """The sum over a group's ranks, as a layer gets it: added to what it has, here zeros."""
    weight = torch.ones(partial.shape[1], dtype=partial.dtype)
    return collectives.add_norm(TorchKernels(), torch.zeros_like(partial), partial, weight, 1e-6)[0]


def _smallest(collectives: Collectives) -> int:
    return collectives.smallest(7 + collectives.rank.index, CPU)


def test_one_rank_alone_changes_nothing():
    alone = Collectives.alone()
    own = routed(1, 4, 2, torch.float32, torch.uint8)
    assert alone.gather(own, None) is own
    assert torch.equal(alone.scatter_sum(own.hidden, None, 4), own.hidden)
    assert torch.equal(summed(alone, own.hidden), own.hidden)
    assert torch.equal(alone.gather_vocabulary(own.hidden), own.hidden)
    assert alone.smallest(3, CPU) == 3
