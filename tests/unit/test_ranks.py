"""What each rank holds: together they hold everything once, or say why they cannot."""

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.errors import UsageError
from common.ranks import Ranks, Span, check_fits, choose_ranks

RANKS = st.builds(
    lambda size, dp, ep: Ranks(tp=size * dp, dp=dp, ep=ep), st.integers(1, 8), st.integers(1, 5), st.booleans()
)


def held(spans: list[Span]) -> list[int]:
    """All items of the spans, in the ranks' order."""
    return [item for span in spans for item in range(span.start, span.stop)]


@given(RANKS, st.integers(1, 6), st.integers(1, 400))
def test_each_group_and_all_ranks_hold_everything_once(ranks: Ranks, times: int, vocab_size: int):
    size = ranks.group_size
    all_ranks = [ranks.rank(index) for index in range(ranks.tp)]
    for group in range(ranks.dp):
        own = [rank for rank in all_ranks if rank.group == group]
        assert [rank.place for rank in own] == list(range(size))
        assert [rank.is_leader for rank in own] == [True] + [False] * (size - 1)
        assert own[0].index == ranks.leader_of(group)
        assert list(own[0].followers) == [rank.index for rank in own[1:]]
        assert not any(rank.followers for rank in own[1:])
        total = times * size
        assert held([rank.heads(total) for rank in own]) == list(range(total))
        assert held([rank.width_in_group(total) for rank in own]) == list(range(total))
        vocabulary = [rank.vocabulary(vocab_size) for rank in own]
        assert held(vocabulary) == list(range(vocab_size))
        assert all(len(span) <= len(vocabulary[0]) for span in vocabulary)
    total = times * ranks.tp
    experts, widths = [r.experts(total) for r in all_ranks], [r.expert_width(total) for r in all_ranks]
    split, whole = (experts, widths) if ranks.ep else (widths, experts)
    assert held(split) == list(range(total))
    assert all(span == Span(0, total) for span in whole)


@given(st.integers(1, 16), st.integers(1, 16))
def test_every_key_value_head_is_held_by_as_many_ranks(size: int, num_kv_heads: int):
    assume(max(size, num_kv_heads) % min(size, num_kv_heads) == 0)
    num_heads = 4 * max(size, num_kv_heads)
    ranks = Ranks(tp=size)
    holders: Counter[int] = Counter()
    for rank in map(ranks.rank, range(size)):
        own = rank.kv_heads(num_kv_heads)
        holders.update(range(own.start, own.stop))
        # A rank has the key/value head of each of its query heads, and no other.
        queries = rank.heads(num_heads)
        assert {head * num_kv_heads // num_heads for head in range(queries.start, queries.stop)} == {*held([own])}
    assert set(holders) == set(range(num_kv_heads))
    assert len(set(holders.values())) == 1


@pytest.mark.parametrize(("asked", "ranks"), [((0, 1), (1, 1)), ((0, 4), (4, 4)), ((4, 2), (4, 2)), ((4, 1), (4, 1))])
def test_dp_alone_is_tp_too(asked: tuple[int, int], ranks: tuple[int, int]):
    chosen = choose_ranks(tp=asked[0], dp=asked[1], ep=False)
    assert (chosen.tp, chosen.dp) == ranks


@pytest.mark.parametrize(("tp", "dp"), [(2, 3), (3, 2), (1, 2)])
def test_groups_must_come_out_even(tp: int, dp: int):
    with pytest.raises(UsageError, match=f"--dp {dp}: does not divide --tp {tp}"):
        choose_ranks(tp=tp, dp=dp, ep=False)


MODEL = {
    "num_heads": 32,
    "num_kv_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
}


@pytest.mark.parametrize(
    ("ranks", "changed", "what"),
    [
        (Ranks(tp=2), {"num_heads": 31, "num_kv_heads": 31}, "31 attention heads over 2 ranks"),
        (Ranks(tp=6), {"num_heads": 48}, "4 key/value heads over 6 ranks"),
        (Ranks(tp=2), {"intermediate_size": 6145}, "a dense layer's width of 6145 over 2 ranks"),
        (Ranks(tp=4, dp=4), {"moe_intermediate_size": 766}, "an expert's width of 766 over 4 ranks"),
        (Ranks(tp=4, dp=4, ep=True), {"num_experts": 126}, "126 experts over 4 ranks"),
    ],
)
def test_models_that_cannot_be_split(ranks: Ranks, changed: dict[str, int], what: str):
    with pytest.raises(UsageError, match=f"cannot split {what}"):
        check_fits(ranks, **MODEL | changed)
