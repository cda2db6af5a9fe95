"""Which rank of a prefill group writes which key/value heads to which rank of a decode group; pure.

A page is whole only in a group: each rank has some of its heads, and ranks beyond the number of heads have one that others have
too. Both sides' heads are those of `kv_heads_at`. Neighbours: `transfer.agent` and `transfer.group`, which write so.
"""

from typing import NamedTuple

from common.ranks import kv_heads_at


class Piece(NamedTuple):
    """Heads `[first_head, first_head + num_heads)` of every page, from one rank to another, by their places in their groups."""

    sender: int
    receiver: int
    first_head: int
    num_heads: int


def can_split(num_kv_heads: int, num_ranks: int) -> bool:
    """Whether so many ranks can hold a model's heads evenly."""
    return max(num_kv_heads, num_ranks) % min(num_kv_heads, num_ranks) == 0


def pieces_of(num_senders: int, num_receivers: int, num_kv_heads: int) -> list[Piece]:
    """Each receiver's heads exactly once, by receiver and head; no two pieces have the same two ends.

    The copies of a head are dealt out in turn to the senders that have it, the first copy to the first sender. So the leaders
    always write to each other.
    """
    senders, receivers = _ranks_with(num_senders, num_kv_heads), _ranks_with(num_receivers, num_kv_heads)
    pieces: list[Piece] = []
    for receiver in range(num_receivers):
        heads = kv_heads_at(receiver, num_receivers, num_kv_heads)
        for head in range(heads.start, heads.stop):
            sender = senders[head][receivers[head].index(receiver) % len(senders[head])]
            last = pieces[-1] if pieces else None
            if last is not None and (last.sender, last.receiver) == (sender, receiver):
                pieces[-1] = last._replace(num_heads=last.num_heads + 1)
            else:
                pieces.append(Piece(sender, receiver, head, 1))
    return pieces


def _ranks_with(num_ranks: int, num_kv_heads: int) -> list[list[int]]:
    """For each head, the places of the ranks that hold it."""
    places: list[list[int]] = [[] for _ in range(num_kv_heads)]
    for place in range(num_ranks):
        heads = kv_heads_at(place, num_ranks, num_kv_heads)
        for head in range(heads.start, heads.stop):
            places[head].append(place)
    return places
