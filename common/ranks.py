"""Who does what among the ranks of one worker: tensor-parallel ranks, the attention groups that they form, and what each holds.

A worker has `tp` ranks, each with a process and a GPU of its own. They form `dp` attention groups of `tp / dp` ranks. A group has
requests, KV pages and rows of its own; its ranks split attention heads and vocabulary, and its first rank, the leader, schedules
for all of them. The experts are split over all ranks of the worker: each one's inner width, or, with `ep`, whole experts.

Pure arithmetic. It knows no device; neighbours: `common.engine` (runs a rank), `common.server` (starts the ranks), `transfer`
(moves KV between ranks that hold different heads).
"""

from msgspec import Struct

from common.errors import UsageError


class Span(Struct, frozen=True):
    """The items `[start, stop)` of something that ranks split."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Ranks(Struct, frozen=True, kw_only=True):
    """All ranks of one worker."""

    tp: int = 1
    """Ranks in all."""
    dp: int = 1
    """Attention groups; divides `tp`."""
    ep: bool = False
    """Whether each rank holds whole experts rather than a part of each."""

    @property
    def group_size(self) -> int:
        """Ranks of one attention group."""
        return self.tp // self.dp

    def rank(self, index: int) -> "Rank":
        """The rank `index`, in `[0, tp)`."""
        assert 0 <= index < self.tp
        return Rank(index, self)

    def leader_of(self, group: int) -> int:
        """Index of the rank that schedules for a group."""
        return group * self.group_size

    def group_of_room(self, room: int) -> int:
        """Which group of a prefill worker has a prompt; both sides of a transfer compute it from the request's first room."""
        return room % self.dp


class Rank(Struct, frozen=True):
    """One rank. The ranks of a group follow one another: group `g` has the ranks `[g * group_size, (g + 1) * group_size)`."""

    index: int = 0
    of: Ranks = Ranks()

    @property
    def group(self) -> int:
        """Its attention group, `[0, dp)`."""
        return self.index // self.of.group_size

    @property
    def place(self) -> int:
        """Its place in the group, `[0, group_size)`."""
        return self.index % self.of.group_size

    @property
    def is_leader(self) -> bool:
        """Whether it schedules for its group, samples, and keeps the rows."""
        return self.place == 0

    @property
    def process_name(self) -> str:
        """What its process is called in logs."""
        return "engine" if self.of.tp == 1 else f"engine-{self.index}"

    @property
    def followers(self) -> range:
        """The other ranks of its group, if it is the leader; none otherwise."""
        return range(self.index + 1, self.index + self.of.group_size) if self.is_leader else range(0)

    def heads(self, num_heads: int) -> Span:
        """Its query heads."""
        return _part(num_heads, self.of.group_size, self.place)

    def kv_heads(self, num_kv_heads: int) -> Span:
        """Its key/value heads; with more ranks in the group than heads, several ranks have the same one."""
        return kv_heads_at(self.place, self.of.group_size, num_kv_heads)

    def width_in_group(self, width: int) -> Span:
        """Its part of a dense layer's inner width."""
        return _part(width, self.of.group_size, self.place)

    def vocabulary(self, vocab_size: int) -> Span:
        """Its part of the vocabulary; every rank's is equally long but for the last ones', which may be cut short."""
        size = -(-vocab_size // self.of.group_size)
        return Span(min(vocab_size, self.place * size), min(vocab_size, (self.place + 1) * size))

    def expert_width(self, width: int) -> Span:
        """Its part of each expert's inner width: all of it with `ep`."""
        return Span(0, width) if self.of.ep else _part(width, self.of.tp, self.index)

    def experts(self, num_experts: int) -> Span:
        """Its experts: all of them without `ep`."""
        return _part(num_experts, self.of.tp, self.index) if self.of.ep else Span(0, num_experts)


def choose_ranks(*, tp: int, dp: int, ep: bool) -> Ranks:
    """Make sense of the options `--tp` (0: as many as `--dp`), `--dp` and `--ep`.

    Raises UsageError if the groups do not come out even.
    """
    tp = tp or dp
    if tp % dp:
        raise UsageError(f"--dp {dp}: does not divide --tp {tp}")
    return Ranks(tp=tp, dp=dp, ep=ep)


def check_fits(
    ranks: Ranks,
    *,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    moe_intermediate_size: int,
    num_experts: int,
) -> None:
    """Raise UsageError if a model cannot be split over these ranks."""
    size = ranks.group_size
    problems = [
        (num_heads % size, f"{num_heads} attention heads over {size} ranks"),
        (max(num_kv_heads, size) % min(num_kv_heads, size), f"{num_kv_heads} key/value heads over {size} ranks"),
        (intermediate_size % size, f"a dense layer's width of {intermediate_size} over {size} ranks"),
        (
            not ranks.ep and moe_intermediate_size % ranks.tp,
            f"an expert's width of {moe_intermediate_size} over {ranks.tp} ranks",
        ),
        (ranks.ep and num_experts % ranks.tp, f"{num_experts} experts over {ranks.tp} ranks"),
    ]
    for remainder, what in problems:
        if remainder:
            raise UsageError(f"--tp {ranks.tp} --dp {ranks.dp}: cannot split {what}")


def kv_heads_at(place: int, group_size: int, num_kv_heads: int) -> Span:
    """The key/value heads of the rank at `place` in a group."""
    if group_size <= num_kv_heads:
        return _part(num_kv_heads, group_size, place)
    head = place * num_kv_heads // group_size
    return Span(head, head + 1)


def _part(total: int, parts: int, index: int) -> Span:
    assert total % parts == 0, f"{total} does not come out even over {parts}"
    size = total // parts
    return Span(index * size, (index + 1) * size)
