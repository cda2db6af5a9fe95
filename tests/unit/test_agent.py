"""The agent of one rank over a NIXL that the test holds: what it writes where, and when a write of several parts is over (R11)."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from common.errors import TransferError
from common.process import own_mark
from common.ranks import kv_heads_at
from tests.support.transfer_bench import LAYOUT, MEMORY
from transfer.agent import NixlAgent, WriteState, describe
from transfer.messages import PoolInfo, PoolPart

NUM_HEADS = 4
HEAD_BYTES = LAYOUT.head_bytes
PEER = "decode-0"
TAG = b"tag"


class Handle:
    """Of descriptors, or of a posted write."""

    def __init__(self, what: Any) -> None:
        self.what = what
        self.state = "PROC"
        self.is_released = False

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True


class FakeNixl:
    """In the place of `nixl_agent`."""

    def __init__(self, name: str, config: Any) -> None:
        self.name = name
        self.remote: list[str] = []
        self.posted: list[Handle] = []
        self.notified: list[tuple[str, bytes]] = []
        self.lists: list[Handle] = []
        self.refused: set[str] = set()
        """Agents to which nothing can be sent."""

    def register_memory(self, *arguments: Any) -> None:
        pass

    def get_agent_metadata(self) -> bytes:
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        self.remote.append(metadata.decode())
        return metadata

    def remove_remote_agent(self, name: str) -> None:
        self.remote.remove(name)

    def make_connection(self, name: str) -> None:
        self._check(name)

    def prep_xfer_dlist(self, name: str, pages: Any, memory: str) -> Handle:
        self.lists.append(Handle((name, pages.tolist())))
        return self.lists[-1]

    def make_prepped_xfer(self, kind: str, own: Handle, local: Any, peer: Handle, remote: Any, tag: bytes) -> Handle:
        assert kind == "WRITE"
        return Handle((own, np.asarray(local).tolist(), peer, np.asarray(remote).tolist(), tag))

    def transfer(self, handle: Handle) -> str:
        self._check(handle.what[2].what[0])
        self.posted.append(handle)
        return handle.state

    def check_xfer_state(self, handle: Handle) -> str:
        assert not handle.is_released
        if handle.state == "raise":
            raise RuntimeError("disconnected")
        return handle.state

    def send_notif(self, name: str, tag: bytes) -> None:
        self._check(name)
        self.notified.append((name, tag))

    def _check(self, name: str) -> None:
        if name in self.refused:
            raise RuntimeError(f"{name} is gone")


def pool_of(num_ranks: int) -> PoolInfo:
    parts: list[PoolPart] = []
    for place in range(num_ranks):
        heads = kv_heads_at(place, num_ranks, NUM_HEADS)
        part = PoolPart(
            agent=f"decode-{place}",
            agent_metadata=f"decode-{place}".encode(),
            process=own_mark(),
            base_address=1000 * (place + 1),
            device_id=place,
            first_head=heads.start,
            num_heads=len(heads),
        )
        parts.append(part)
    return describe(replace(MEMORY, layout=replace(LAYOUT, num_kv_heads=NUM_HEADS)), parts)


@pytest.fixture(autouse=True)
def fake_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(nixl_agent_config=lambda **options: None, nixl_agent=FakeNixl)
    monkeypatch.setattr("transfer.agent.nixl", fake)


def agent_of(num_receivers: int, *, place: int = 0, group_size: int = 1) -> tuple[NixlAgent, Any]:
    heads = kv_heads_at(place, group_size, NUM_HEADS)
    layout = replace(LAYOUT, num_kv_heads=len(heads), first_kv_head=heads.start, model_kv_heads=NUM_HEADS)
    agent = NixlAgent(f"prefill-{place}", replace(MEMORY, layout=layout), place=place, group_size=group_size)
    agent.connect(PEER, pool_of(num_receivers))
    return agent, agent._agent


def test_heads_are_cut_out_of_every_page_on_both_sides():
    """The second of two ranks has heads 2 and 3, and the last two of four ranks want one each."""
    agent, nixl = agent_of(4, place=1, group_size=2)
    page, peer_page = 2 * HEAD_BYTES, HEAD_BYTES
    assert [handle.what for handle in nixl.lists] == [
        ("NIXL_INIT_AGENT", [[0, HEAD_BYTES, 0, page, MEMORY.num_pages]]),
        ("decode-2", [[3000, HEAD_BYTES, 2, peer_page, MEMORY.num_pages]]),
        ("NIXL_INIT_AGENT", [[HEAD_BYTES, HEAD_BYTES, 0, page, MEMORY.num_pages]]),
        ("decode-3", [[4000, HEAD_BYTES, 3, peer_page, MEMORY.num_pages]]),
    ]
    write = agent.write(PEER, [1, 2], [5, 6], TAG)
    assert write.num_bytes == 2 * 2 * HEAD_BYTES
    own, local, peer, remote, _ = nixl.posted[1].what
    assert (own, local, peer, remote) == (nixl.lists[2], [1, 2], nixl.lists[3], [5, 6])


def test_one_part_carries_the_tag_itself():
    agent, nixl = agent_of(1)
    write = agent.write(PEER, [1], [5], TAG)
    [handle] = nixl.posted
    assert handle.what[-1] == TAG
    assert agent.poll(write) is WriteState.IN_PROGRESS
    handle.state = "DONE"
    assert agent.poll(write) is WriteState.DONE
    assert agent.poll(write) is WriteState.DONE
    assert handle.is_released
    assert nixl.notified == []


def test_several_parts_are_over_together_and_then_the_leader_is_told():
    agent, nixl = agent_of(2)
    write = agent.write(PEER, [1], [5], TAG)
    first, second = nixl.posted
    assert (first.what[-1], second.what[-1]) == (b"", b"")
    second.state = "DONE"
    assert agent.poll(write) is WriteState.IN_PROGRESS
    assert nixl.notified == []
    first.state = "DONE"
    assert agent.poll(write) is WriteState.DONE
    assert agent.poll(write) is WriteState.DONE
    assert nixl.notified == [(PEER, TAG)]


def test_without_a_tag_nobody_is_told():
    agent, nixl = agent_of(2)
    write = agent.write(PEER, [1], [5], b"")
    for handle in nixl.posted:
        handle.state = "DONE"
    assert agent.poll(write) is WriteState.DONE
    assert nixl.notified == []


@pytest.mark.parametrize("failure", ["ERR", "raise"])
def test_a_failed_part_fails_the_write_when_nothing_is_in_progress(failure: str):
    agent, nixl = agent_of(2)
    write = agent.write(PEER, [1], [5], TAG)
    first, second = nixl.posted
    first.state = failure
    assert agent.poll(write) is WriteState.IN_PROGRESS, "the other part may still land"
    second.state = "DONE"
    assert agent.poll(write) is WriteState.FAILED
    assert nixl.notified == []
    assert first.is_released
    assert second.is_released


def test_a_part_that_cannot_be_posted_does_not_end_those_that_are():
    agent, nixl = agent_of(2)
    nixl.refused.add("decode-1")
    write = agent.write(PEER, [1], [5], TAG)
    assert agent.poll(write) is WriteState.IN_PROGRESS
    nixl.posted[0].state = "DONE"
    assert agent.poll(write) is WriteState.FAILED
    assert nixl.notified == []


def test_a_write_of_which_nothing_could_be_posted_raises():
    agent, nixl = agent_of(2)
    nixl.refused.add("decode-0")
    with pytest.raises(TransferError, match="decode-0 is gone"):
        agent.write(PEER, [1], [5], TAG)
    assert nixl.posted == []


def test_a_peer_that_cannot_be_told_has_not_got_it():
    agent, nixl = agent_of(2)
    write = agent.write(PEER, [1], [5], TAG)
    for handle in nixl.posted:
        handle.state = "DONE"
    nixl.refused.add("decode-0")
    assert agent.poll(write) is WriteState.FAILED


def test_a_forgotten_peer_leaves_nothing_behind():
    agent, nixl = agent_of(2)
    agent.forget(PEER)
    assert nixl.remote == []
    assert [handle.is_released for handle in nixl.lists if handle.what[0] != "NIXL_INIT_AGENT"] == [True, True]
    with pytest.raises(TransferError, match="not connected"):
        agent.write(PEER, [1], [5], TAG)
    agent.forget(PEER)


def test_a_peer_of_which_one_rank_cannot_be_reached_is_not_connected():
    agent, nixl = agent_of(1)
    agent.forget(PEER)
    nixl.refused.add("decode-1")
    with pytest.raises(TransferError, match="decode-1 is gone"):
        agent.connect(PEER, pool_of(2))
    assert "decode-0" not in nixl.remote
    with pytest.raises(TransferError, match="not connected"):
        agent.write(PEER, [1], [5], TAG)


def test_metadata_of_another_agent_is_refused():
    agent, _ = agent_of(1)
    pool = pool_of(1)
    with pytest.raises(TransferError, match="not of other"):
        agent.connect("other", replace(pool, parts=(replace(pool.parts[0], agent="other"),)))
