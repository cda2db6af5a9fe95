"""Groups step together or not at all: random histories of who has something to run, over links that deliver late."""

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.lockstep import GroupLeft, Lockstep, Share, StepShape
from common.ranks import Ranks
from tests.support.rank_threads import in_threads


class Post:
    """All leaders' letter boxes."""

    def __init__(self, ranks: Ranks) -> None:
        self.boxes: dict[int, list[Share]] = {ranks.leader_of(group): [] for group in range(ranks.dp)}


class Link:
    """One leader's link: it hands out what has come in pieces, as a socket may."""

    def __init__(self, post: Post, rank: int, rng: random.Random) -> None:
        self._post, self._rank, self._rng = post, rank, rng

    def send(self, rank: int, message: Share) -> None:
        self._post.boxes[rank].append(message)

    def receive(self) -> list[Share]:
        box = self._post.boxes[self._rank]
        count = self._rng.randint(0, len(box))
        taken, box[:] = box[:count], box[count:]
        return taken

    def wait(self, timeout_s: float) -> None:
        """The others are threads; looking again is enough."""


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(0, 10**6))
def test_all_groups_take_the_same_steps_and_see_the_same_shapes(dp: int, seed: int):
    """Each group has some steps of its own to run, at any time; idle ones join when called, and nobody steps for nothing."""
    ranks = Ranks(tp=dp, dp=dp)
    post, rng = Post(ranks), random.Random(seed)
    own_tokens = [[rng.randint(1, 9) for _ in range(rng.randint(0, 6))] for _ in range(dp)]
    num_left, lock = [sum(map(len, own_tokens))], threading.Lock()
    shapes: list[list[StepShape]] = [[] for _ in range(dp)]
    brought: list[list[int]] = [[] for _ in range(dp)]

    def run(group: int) -> None:
        choose = random.Random(seed + group)
        lockstep = Lockstep(ranks.rank(group), Link(post, group, choose))
        todo = list(own_tokens[group])
        while num_left[0]:
            wants = bool(todo) and choose.random() < 0.3
            if not wants and not lockstep.is_called:
                continue
            num_tokens = todo.pop(0) if todo else 0
            shapes[group].append(lockstep.meet(num_tokens, fits_graph=num_tokens < 5))
            brought[group].append(num_tokens)
            if num_tokens:
                with lock:
                    num_left[0] -= 1

    in_threads(dp, run)
    num_steps = min(map(len, brought))
    for step in range(num_steps):
        tokens = tuple(brought[group][step] for group in range(dp))
        assert sum(tokens) > 0, "a step for nothing"
        expected = StepShape(tokens, all(num < 5 for num in tokens))
        assert [shapes[group][step] for group in range(dp)] == [expected] * dp
    for group in range(dp):
        assert [num for num in brought[group] if num] == own_tokens[group]


def test_one_group_needs_nobody():
    lockstep = Lockstep(Ranks(tp=2).rank(0))
    assert not lockstep.is_called
    assert lockstep.meet(3, fits_graph=True) == StepShape((3,), True)
    lockstep.leave()


def test_nobody_waits_for_a_group_that_has_left():
    ranks = Ranks(tp=2, dp=2)
    post, rng = Post(ranks), random.Random(1)
    first, second = (Lockstep(ranks.rank(group), Link(post, group, rng)) for group in range(2))
    first.leave()
    with pytest.raises(GroupLeft, match="has ended"):
        second.meet(1, fits_graph=False)
