"""Which rank writes which heads to whom: each receiver gets its heads once, from a rank that has them."""

from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st

from common.ranks import kv_heads_at
from transfer.heads import Piece, can_split, pieces_of


def splits_of(num_kv_heads: int) -> list[int]:
    return [size for size in range(1, 65) if can_split(num_kv_heads, size)]


SPLITS = st.integers(1, 24).flatmap(
    lambda heads: st.tuples(st.sampled_from(splits_of(heads)), st.sampled_from(splits_of(heads)), st.just(heads))
)


def heads_at(place: int, num_ranks: int, num_kv_heads: int) -> set[int]:
    span = kv_heads_at(place, num_ranks, num_kv_heads)
    return set(range(span.start, span.stop))


@given(SPLITS)
@example((4, 2, 2))
@example((2, 4, 2))
@example((8, 8, 2))
@example((2, 3, 6))
def test_each_receiver_gets_its_heads_once_from_ranks_that_have_them(split: tuple[int, int, int]):
    num_senders, num_receivers, num_kv_heads = split
    written: Counter[tuple[int, int]] = Counter()
    for piece in pieces_of(*split):
        heads = range(piece.first_head, piece.first_head + piece.num_heads)
        assert heads
        assert set(heads) <= heads_at(piece.sender, num_senders, num_kv_heads)
        written.update((piece.receiver, head) for head in heads)
    wanted = Counter(
        (place, head) for place in range(num_receivers) for head in heads_at(place, num_receivers, num_kv_heads)
    )
    assert written == wanted


@given(SPLITS)
def test_the_copies_of_a_head_are_spread_over_the_ranks_that_have_it(split: tuple[int, int, int]):
    num_senders, _, num_kv_heads = split
    for head in range(num_kv_heads):
        writers = Counter(
            piece.sender for piece in pieces_of(*split) if piece.first_head <= head < piece.first_head + piece.num_heads
        )
        loads = [writers[place] for place in range(num_senders) if head in heads_at(place, num_senders, num_kv_heads)]
        assert max(loads) - min(loads) <= 1


@given(SPLITS)
def test_two_ranks_share_one_piece_at_most_and_the_leaders_share_one(split: tuple[int, int, int]):
    """A peer's leader is connected because it is written to; the notification needs that."""
    ends = [(piece.sender, piece.receiver) for piece in pieces_of(*split)]
    assert len(set(ends)) == len(ends)
    assert (0, 0) in ends


def test_groups_that_split_alike_write_place_to_place():
    assert pieces_of(4, 4, 2) == [Piece(0, 0, 0, 1), Piece(1, 1, 0, 1), Piece(2, 2, 1, 1), Piece(3, 3, 1, 1)]
    assert pieces_of(1, 1, 4) == [Piece(0, 0, 0, 4)]
    assert pieces_of(1, 2, 4) == [Piece(0, 0, 0, 2), Piece(0, 1, 2, 2)]
    assert pieces_of(4, 1, 2) == [Piece(0, 0, 0, 1), Piece(2, 0, 1, 1)]
