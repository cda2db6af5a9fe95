"""Workers that die, fall silent or are restarted, seen from the other end of a transfer: pages come back, but never too soon."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.process import ProcessMark, own_mark
from common.ranks import kv_heads_at
from tests.support.in_process_pair import DECODE, PREFILL, InProcessPair, options_of
from tests.support.transfer_bench import LAYOUT, MEMORY, OPTIONS, Bench, NotedLink, delay_writes
from transfer.agent import describe
from transfer.commands import CancelKv, CancelRoom, KvLost, PagesQuiet, ReserveKv, RoomClosed
from transfer.handshake import refusal_of
from transfer.loopback import Fault
from transfer.messages import (
    PROTOCOL,
    Heartbeat,
    Hello,
    HelloReply,
    KvAbort,
    KvDone,
    KvRequest,
    PoolInfo,
    PoolPart,
    PrefillToDecode,
)
from transfer.peers import Peer
from transfer.sources import Life


@pytest.fixture
def bench() -> Bench:
    """A room whose first write is in progress."""
    bench = Bench(delay_writes)
    bench.open()
    bench.ask()
    bench.chunk(0)
    bench.turn()
    assert bench.sender.counts.num_writes == 1
    return bench


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the processes whose mark is this sender's or receiver's be gone, as the other end sees it."""

    def kill(who: str) -> None:
        module = {"prefill": "transfer.sources", "decode": "transfer.peers"}[who]
        monkeypatch.setattr(f"{module}.is_gone", lambda mark: True)

    return kill


def lost(bench: Bench) -> KvLost:
    [event] = bench.receiver.mailbox.events()
    assert isinstance(event, KvLost)
    return event


# ------------------------------------------------------------------------------------------------ a prefill worker


def test_a_silent_prefill_worker_costs_the_request_but_not_the_pages(bench: Bench):
    """Stopped in the middle of a write: the request fails, its pages are quiet only when the stopped one has said so."""
    bench.sleep(OPTIONS.peer_deadline_s - 1, sender=False)
    assert bench.receiver.mailbox.events() == []
    bench.sleep(2.5, sender=False)
    error = lost(bench).error
    assert (error.leg, error.stage, error.status) == ("prefill", "transfer", 502)
    assert "silent" in error.message
    bench.sleep(10 * OPTIONS.transfer_deadline_s, sender=False)
    assert bench.receiver.mailbox.events() == []
    bench.sleep(3)
    assert bench.receiver.mailbox.events() == [], "the write that was posted is still in progress"
    bench.network.release()
    bench.turn()
    assert bench.receiver.mailbox.events() == [PagesQuiet(bench.ROOM)]


def test_a_dead_prefill_worker_writes_no_more(bench: Bench, dead: Callable[[str], None]):
    """Proven to be gone: the request fails within a second, and its pages are quiet at once."""
    dead("prefill")
    bench.sleep(1, sender=False)
    event, quiet = bench.receiver.mailbox.events()
    assert isinstance(event, KvLost)
    assert event.error.message == "the prefill worker has died"
    assert quiet == PagesQuiet(bench.ROOM)


def test_a_lost_connection_is_no_proof(bench: Bench):
    """The request fails at once; the pages wait for the abort's answer, which comes over the new connection."""
    bench.links[1].lose(PREFILL)
    bench.turn(sender=False)
    assert "connection" in lost(bench).error.message
    bench.sleep(3)
    assert bench.receiver.mailbox.events() == []
    bench.network.release()
    bench.sleep(2)
    assert bench.receiver.mailbox.events() == [PagesQuiet(bench.ROOM)]


def test_an_abort_is_repeated_until_it_is_answered(bench: Bench):
    """The abort itself gets lost."""
    bench.network.faults = lambda what: Fault.DROP if what == "KvAbort" else Fault.NONE
    bench.network.release()
    bench.receiver.mailbox.submit(CancelKv(bench.ROOM, PREFILL, bench.ROOM))
    bench.sleep(3)
    assert bench.receiver.mailbox.events() == []
    bench.network.faults = lambda what: Fault.NONE
    bench.sleep(2)
    assert bench.receiver.mailbox.events() == [PagesQuiet(bench.ROOM)]


def test_a_restarted_prefill_worker_is_proof_that_the_old_one_is_gone(bench: Bench):
    """Another process of the same host answers at the address: the rooms of the old one are lost and quiet, new ones work."""
    bench.start_sender("prefill-2")
    bench.sleep(2)
    event, quiet = bench.receiver.mailbox.events()
    assert isinstance(event, KvLost)
    assert "restarted" in event.error.message
    assert quiet == PagesQuiet(bench.ROOM)
    bench.network.faults = lambda what: Fault.NONE
    bench.open()
    bench.ask()
    bench.chunk(0, 1, 2)
    bench.finish()
    bench.turn()
    assert bench.arrived().room == bench.ROOM


@pytest.mark.parametrize("elsewhere", [{"boot_id": "another"}, {"network_namespace": 1}])
def test_a_process_of_another_host_or_container_at_the_address_proves_nothing(bench: Bench, elsewhere: dict[str, Any]):
    """An address may have moved while the old process still runs: its pages stay in quarantine, whatever the new one says."""
    sender = bench.start_sender("prefill-2")
    sender._processes = (replace(own_mark(), **elsewhere),)
    bench.sleep(2)
    assert "restarted" in lost(bench).error.message
    bench.sleep(10 * OPTIONS.transfer_deadline_s)
    assert bench.receiver.mailbox.events() == []
    assert bench.receiver.num_rooms == 1


def test_what_is_meant_for_a_former_process_does_nothing(bench: Bench):
    """Neither a request nor an abort, and the answer to the abort is no answer."""
    link = bench.links[1]
    request = KvRequest(to="former", room=5, generation=1, pages=[0, 1, 2], prompt_tokens=6, prompt_digest=b"digest")
    link.send(PREFILL, request)
    link.send(PREFILL, KvAbort(to="former", room=bench.ROOM, generation=1))
    bench.turn()
    assert bench.sender.counts.num_dropped == 2
    assert bench.sender.num_rooms == 1
    assert bench.receiver.mailbox.events() == []


def test_nobody_at_the_address():
    """No connection is ever made: the request fails when its peer has been silent for too long, and nobody can have written."""
    bench = Bench()
    del bench.network.agents[PREFILL]
    bench.links[1]._peers.pop(PREFILL)
    bench.ask()
    bench.sleep(OPTIONS.peer_deadline_s + 2, sender=False)
    event, quiet = bench.receiver.mailbox.events()
    assert isinstance(event, KvLost)
    assert quiet == PagesQuiet(bench.ROOM)


def test_a_prefill_worker_that_has_forgotten_this_one_is_greeted_again(bench: Bench):
    """Its answer to a heartbeat says so."""
    bench.network.release()
    bench.receiver.mailbox.submit(CancelKv(bench.ROOM, PREFILL, bench.ROOM))
    bench.turn()
    bench.sender._peers._peers.clear()
    bench.receiver.mailbox.submit(ReserveKv(2, PREFILL, 2))
    bench.sleep(3)
    assert bench.sender._peers.get("decode-0") is not None


def test_an_unused_connection_is_closed_and_made_again(bench: Bench):
    bench.network.release()
    bench.receiver.mailbox.submit(CancelKv(bench.ROOM, PREFILL, bench.ROOM))
    bench.sleep(700)
    assert bench.links[1].dialed == []
    bench.receiver.mailbox.submit(ReserveKv(2, PREFILL, 2))
    bench.sleep(1)
    assert bench.links[1].dialed == [PREFILL]


def test_why_a_prompt_was_given_up_is_told(bench: Bench):
    """So that rows which were refused are heard of, whichever leg the router hears first."""
    bench.network.release()
    bench.sender.mailbox.submit(CancelRoom(bench.ROOM, "a row is missing", "routed_experts_missing"))
    bench.turn()
    event, quiet = bench.receiver.mailbox.events()
    assert isinstance(event, KvLost)
    assert (event.error.code, event.error.leg, event.error.message) == (
        "routed_experts_missing",
        "prefill",
        "a row is missing",
    )
    assert quiet == PagesQuiet(bench.ROOM)


# ------------------------------------------------------------------------------------------------ a decode worker


def test_a_silent_decode_worker_loses_its_rooms(bench: Bench):
    """The prefill side gives up after the same silence, but keeps its pages while a write reads them."""
    bench.sleep(OPTIONS.peer_deadline_s + 1, receiver=False)
    assert bench.sender.mailbox.events() == []
    bench.network.release()
    bench.turn(receiver=False)
    [closed] = bench.sender.mailbox.events()
    assert closed.leg == "decode"
    assert "silent" in (closed.error or "")


def test_a_dead_decode_worker_loses_its_rooms_within_a_second_and_is_forgotten(dead: Callable[[str], None]):
    bench = Bench()
    bench.open()
    bench.ask()
    bench.turn()
    dead("decode")
    bench.sleep(1, receiver=False)
    assert bench.sender.mailbox.events() == [RoomClosed(bench.ROOM, "the decode worker has died", "decode")]
    assert bench.sender._peers.get("decode-0") is None


def test_heartbeats_keep_a_lease():
    """A prompt waits for a seat on its decode worker for much longer than the lease, and is served then."""
    bench = Bench()
    bench.open()
    bench.chunk(0, 1, 2)
    bench.finish()
    bench.receiver.mailbox.submit(ReserveKv(bench.ROOM, PREFILL, bench.ROOM))
    bench.sleep(5 * OPTIONS.lease_s)
    assert bench.sender.num_rooms == 1
    bench.ask()
    bench.turn()
    assert bench.arrived().room == bench.ROOM
    assert bench.sender.mailbox.events() == [RoomClosed(bench.ROOM, None)]


def test_a_lease_without_heartbeats_runs_out():
    bench = Bench()
    bench.open()
    bench.chunk(0, 1, 2)
    bench.finish()
    bench.sleep(OPTIONS.lease_s + 1)
    [closed] = bench.sender.mailbox.events()
    assert "no decode worker has shown interest" in (closed.error or "")


def test_a_stranger_keeps_no_lease():
    """Nor can it take the prompt away from the decode worker that it is for."""
    bench = Bench()
    bench.open()
    bench.chunk(0, 1, 2)
    bench.finish()
    bench.links[1].send(PREFILL, Heartbeat([bench.ROOM]))
    bench.turn()
    bench.ask()
    bench.turn()
    assert bench.arrived().room == bench.ROOM


def test_a_queued_request_reserves_its_prompt(checkpoint_of: Callable[[str], Path]):
    """The decode worker has one seat: the second prompt waits for longer than its lease, and is answered."""
    pair = InProcessPair(checkpoint_of("plain"), transfer=OPTIONS, max_running=1, prefix_cache=False)
    pair.submit("a", [1, 2, 3], options_of(200, ignore_eos=True))
    for _ in range(6):
        pair.turn()
    pair.submit("b", [4, 5, 6], options_of(3, ignore_eos=True))
    for _ in range(60):
        pair.now += 0.5
        pair.turn()
    assert not pair.decode.legs["a"].ended
    assert pair.prefill.legs["b"].finished is not None
    pair.settle()
    assert len(pair.answer("b").output_ids) == 3
    pair.check_pages()


# ------------------------------------------------------------------------------------------------ nonsense


def with_pool(hello: Hello, **fields: Any) -> Hello:
    return replace(hello, pool=replace(hello.pool, **fields))


def with_part(hello: Hello, **fields: Any) -> Hello:
    return with_pool(hello, parts=(replace(hello.pool.parts[0], **fields),))


def check_refused(change: Callable[[Hello], Hello]) -> None:
    """The request fails, and NIXL is not asked."""
    bench = Bench()
    bench.receiver.sources.hello = change(bench.receiver.sources.hello)
    bench.sender._peers._agent.connect = None  # type: ignore[method-assign, assignment]
    bench.open()
    bench.ask()
    bench.turn()
    assert lost_message(bench)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_pages", 0),
        ("num_pages", 2**62),
        ("num_kv_heads", 0),
        ("num_kv_heads", 2),
        ("head_bytes", 5),
        ("page_size", 3),
        ("parts", ()),
    ],
)
def test_numbers_that_cannot_be_addresses_are_refused(field: str, value: Any):
    """Before they are given to NIXL."""
    check_refused(lambda hello: with_pool(hello, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_address", -1),
        ("base_address", 2**63 - 1),
        ("device_id", -1),
        ("first_head", 1),
        ("first_head", -1),
        ("num_heads", 0),
        ("num_heads", 2),
        ("agent", "another"),
        ("agent_metadata", bytes(2**20 + 1)),
    ],
)
def test_a_rank_whose_numbers_cannot_be_addresses_is_refused(field: str, value: Any):
    check_refused(lambda hello: with_part(hello, **{field: value}))


@pytest.mark.parametrize(
    "names", [["decode-0", "decode-0"], ["decode-0", "a" * 300], ["other", "decode-0"], [f"r{i}" for i in range(65)]]
)
def test_ranks_that_are_called_alike_or_are_too_many_are_refused(names: list[str]):
    names = ["decode-0", *names[1:]] if len(names) == 65 else names

    def change(hello: Hello) -> Hello:
        [part] = hello.pool.parts
        return with_pool(hello, parts=tuple(replace(part, agent=name) for name in names))

    check_refused(change)


def test_ranks_that_hold_other_heads_than_their_places_do_are_refused():
    pool = group_pool(2, num_kv_heads=2)
    own = group_pool(1, num_kv_heads=2)
    assert refusal_of(hello_of(pool), own) is None
    swapped = replace(pool, parts=(replace(pool.parts[0], first_head=1), replace(pool.parts[1], first_head=0)))
    for parts in (swapped.parts, (pool.parts[0], replace(pool.parts[1], first_head=0)), pool.parts[:1]):
        assert refusal_of(hello_of(replace(pool, parts=parts)), own) is not None
    assert refusal_of(hello_of(group_pool(3, num_kv_heads=3)), own) is not None


def test_replicated_heads_are_taken():
    assert refusal_of(hello_of(group_pool(4, num_kv_heads=2)), group_pool(1, num_kv_heads=2)) is None


def test_an_agent_of_another_worker_is_not_taken_over():
    """NIXL knows agents by their names alone: forgetting the one worker would cut the other off."""
    bench = Bench()
    peers = bench.sender._peers
    assert peers.greet(DECODE, bench.receiver.sources.hello, 0.0) is None
    other = with_part(replace(bench.receiver.sources.hello, peer="other"), agent="other")
    [part] = other.pool.parts
    parts = (part, replace(part, agent=DECODE))
    refusal = peers.greet("other", with_pool(other, parts=parts), 0.0)
    assert refusal is not None
    assert "another worker's" in refusal


# ------------------------------------------------------------------------------------------------ several ranks


def group_pool(num_ranks: int, *, num_kv_heads: int, name: str = "decode-0") -> PoolInfo:
    parts: list[PoolPart] = []
    for place in range(num_ranks):
        heads = kv_heads_at(place, num_ranks, num_kv_heads)
        part = PoolPart(
            agent=name if place == 0 else f"{name}-{place}",
            agent_metadata=b"",
            process=replace(own_mark(), started_ticks=place),
            base_address=0,
            device_id=place,
            first_head=heads.start,
            num_heads=len(heads),
        )
        parts.append(part)
    layout = replace(LAYOUT, num_kv_heads=num_kv_heads)
    return describe(replace(MEMORY, layout=layout), parts)


def hello_of(pool: PoolInfo) -> Hello:
    return Hello(peer=pool.parts[0].agent, protocol=PROTOCOL, pool=pool)


def test_a_life_of_several_ranks_ends_with_the_last_of_them(monkeypatch: pytest.MonkeyPatch):
    """And neither with a successor at its address, which says nothing about followers, nor with its leader."""
    marks = tuple(replace(own_mark(), started_ticks=ticks) for ticks in (1, 2, 3))
    gone: set[ProcessMark] = set()
    monkeypatch.setattr("transfer.sources.is_gone", lambda mark: mark in gone)
    life = Life("prefill-0", marks, 1)
    successors = tuple(replace(mark, started_ticks=mark.started_ticks + 10) for mark in marks)
    life.meet(Life("prefill-1", successors, 1))
    assert not life.is_gone
    gone |= set(marks[:2])
    assert not life.is_gone
    gone.add(marks[2])
    assert life.is_gone


def test_the_same_processes_begin_another_life_only_when_the_one_before_has_ended():
    marks = tuple(replace(own_mark(), started_ticks=ticks) for ticks in (1, 2, 3))
    life = Life("prefill-0", (own_mark(), *marks), 1)
    life.meet(Life("prefill-1", (own_mark(), *reversed(marks)), 1))
    assert not life.is_gone
    life.meet(Life("prefill-1", (own_mark(), *marks), 1))
    assert life.is_gone


def test_a_decode_worker_of_several_ranks_is_gone_with_the_last_of_them(monkeypatch: pytest.MonkeyPatch):
    peer = Peer(group_pool(2, num_kv_heads=2), 0.0)
    gone: set[ProcessMark] = set()
    monkeypatch.setattr("transfer.peers.is_gone", lambda mark: mark in gone)
    gone.add(peer.pool.parts[0].process)
    assert not peer.is_gone
    gone.add(peer.pool.parts[1].process)
    assert peer.is_gone


@pytest.mark.parametrize("fields", [{"processes": ()}, {"processes": (own_mark(),) * 65}, {"dp": 0}, {"dp": 65}])
def test_an_answer_that_proves_too_much_is_dropped(bench: Bench, fields: dict[str, Any]):
    """Of no processes all have ended."""
    bench.links[0].send(DECODE, replace(HelloReply(peer="new", processes=(own_mark(),)), **fields))
    dropped = bench.receiver.counts.num_dropped
    bench.turn()
    assert bench.receiver.counts.num_dropped == dropped + 1
    assert bench.receiver.mailbox.events() == []


@pytest.mark.parametrize("token_id", [-1, 2**20])
def test_a_first_token_that_is_none_fails_the_request(checkpoint_of: Callable[[str], Path], token_id: int):
    """Before it becomes an index on the device."""
    pair = InProcessPair(checkpoint_of("plain"), transfer=OPTIONS)
    send = pair.prefill_link.send

    def lie(peer: str, message: PrefillToDecode) -> None:
        if isinstance(message, KvDone):
            message = replace(message, first_token=replace(message.first_token, token_id=token_id))
        send(peer, message)

    pair.prefill_link.send = lie  # type: ignore[method-assign,assignment]
    pair.submit("r", [1, 2, 3], options_of(4))
    pair.settle()
    failed = pair.decode.legs["r"].failed
    assert failed is not None
    assert (failed.error.leg, failed.error.stage, failed.error.status) == ("prefill", "transfer", 502)
    pair.check_pages()


@pytest.mark.parametrize("generation", [-1, 0, 2**32, 2**63 - 1])
def test_a_generation_that_no_tag_can_hold_is_refused(bench: Bench, generation: int):
    request = KvRequest(
        to=PREFILL, room=9, generation=generation, pages=[0, 1, 2], prompt_tokens=6, prompt_digest=b"digest"
    )
    bench.links[1].send(PREFILL, request)
    bench.turn()
    assert bench.sender.num_rooms == 1


def lost_message(bench: Bench) -> str:
    event, quiet = bench.receiver.mailbox.events()
    assert isinstance(event, KvLost)
    assert isinstance(quiet, PagesQuiet)
    return event.error.message


def test_a_decode_worker_that_takes_leave_is_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """At once, but for what is being written to it."""
    forgotten: list[str] = []
    monkeypatch.setattr(bench.sender._agent, "forget", forgotten.append)
    bench.receiver.close()
    bench.sleep(1.0, receiver=False)
    assert (bench.sender.num_rooms, forgotten) == (1, [])
    bench.network.release()
    bench.sleep(1.0, receiver=False)
    [closed] = bench.sender.mailbox.events()
    assert closed == RoomClosed(bench.ROOM, "the decode worker has left", "decode")
    assert forgotten == [DECODE]


def test_an_end_that_writes_is_not_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Its address would be another's, which is the proof that it writes no more."""
    with monkeypatch.context() as patched:
        patched.setattr("transfer.sender._CLOSING_S", 0.0)
        assert not bench.sender.close()
    assert PREFILL in bench.network.agents
    bench.network.release()
    assert bench.sender.close()
    assert PREFILL not in bench.network.agents


def test_commands_wake_the_endpoint_that_is_open(monkeypatch: pytest.MonkeyPatch):
    woken: list[str] = []
    monkeypatch.setattr(NotedLink, "wake", lambda link: woken.append(link.address))
    bench = Bench()
    bench.open()
    bench.ask()
    assert woken == [PREFILL, DECODE]
    bench.sender.close()
    bench.receiver.close()
    bench.open()
    bench.ask()
    assert woken == [PREFILL, DECODE]
