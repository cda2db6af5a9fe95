"""The transfer over the loopback, with every fault it can have: pages end quiet, requests end with an answer or a named stage."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.in_process_pair import PREFILL, InProcessPair, options_of
from tests.support.judge import Judge, Tally
from tests.support.prompts import random_prompts
from tests.support.transfer_bench import OPTIONS, Bench, delay_writes
from transfer.endpoint import IDLE_WAIT_S, LANDING_WAIT_S, NAP_S
from transfer.loopback import Fault
from transfer.messages import PROTOCOL, KvAbort, KvRequest
from transfer.plan import WriteTag, complete_pages
from transfer.state import ReceiverState, SenderState, advance


class Script:
    """A fault policy: the n-th thing of a kind meets a fault."""

    def __init__(self, **faults: Fault) -> None:
        self._faults = faults
        self.seen: list[str] = []

    def __call__(self, what: str) -> Fault:
        self.seen.append(what)
        return self._faults.pop(what, Fault.NONE)


def failed_error(pair: InProcessPair, leg: str):
    failed = (pair.decode if leg == "decode" else pair.prefill).legs["r"].failed
    assert failed is not None
    return failed.error


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("plain")


def test_pages_move_chunk_by_chunk(checkpoint: Path):
    """A prompt of 5 pages in chunks of 2 pages is written while it is computed, not at the end."""
    faults = Script()
    pair = InProcessPair(checkpoint, chunk_tokens=32, faults=faults)
    [_] = pair.run([([1], options_of(1))])  # the handshake
    faults.seen.clear()
    num_bytes = pair.decode.endpoint.counts.num_bytes
    pair.submit("r", random_prompts(0, 2)[1][:80], options_of(3, ignore_eos=True), decode_first=True)
    pair.settle()
    assert len(pair.answer("r").output_ids) == 3
    assert faults.seen.count("write") == 3
    assert (
        pair.decode.endpoint.counts.num_bytes
        == pair.prefill.endpoint.counts.num_bytes
        == num_bytes + 5 * pair.decode.engine.kv_pool.layout.page_bytes
    )


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.TRUNCATE, Fault.DUPLICATE, Fault.DELAY])
@pytest.mark.parametrize("what", ["write", "KvRequest", "KvDone", "Hello"])
def test_one_fault(checkpoint: Path, judge_of: Callable[[str], Judge], what: str, fault: Fault):
    """One write or message is lost, cut short, late or doubled: the answer is right, or the error names the stage."""
    pair = InProcessPair(checkpoint, faults=Script(**{what: fault}), transfer=OPTIONS)
    pair.submit("r", [1, 2, 3, 4, 5], options_of(4))
    pair.settle()
    pair.network.release()
    pair.settle()
    if not pair.decode.legs["r"].ended:
        pair.sleep(OPTIONS.transfer_deadline_s + 1)
    if pair.decode.legs["r"].finished is not None:
        tally = Tally()
        answer = pair.answer("r")
        assert answer.rows is not None
        judge_of("plain").add(tally, answer.prompt, answer.output_ids, answer.rows)
        tally.assert_clean()
        pair.check_pages()
        return
    error = failed_error(pair, "decode")
    assert error.stage == "transfer"
    assert error.status in (502, 504)
    assert fault is not Fault.DUPLICATE
    if what == "write" and fault is Fault.DROP:
        # The write is in progress for ever, so both sides keep the pages: nobody may reuse what may still be written.
        assert pair.decode.role.stats(0).pages.quarantined == 1
        assert pair.prefill.role.stats(0).pages.running == 1
    else:
        pair.sleep(3 * OPTIONS.lease_s)
        pair.check_pages()


def test_a_late_write_never_meets_a_new_owner(checkpoint: Path):
    """The request is given up while a write is delayed: its page is not reused until the write has landed."""
    pair = InProcessPair(checkpoint, faults=Script(write=Fault.DELAY), transfer=OPTIONS, pool_tokens=32)
    pair.submit("r", list(range(20)), options_of(10))
    pair.settle()
    pair.abort("r")
    pair.settle()
    assert pair.decode.role.stats(0).pages.quarantined == 2
    pair.submit("next", list(range(30, 50)), options_of(10))
    pair.settle()
    assert not pair.decode.legs["next"].ended, "it waits for the pages in quarantine"
    pair.network.release()
    pair.settle()
    assert pair.answer("next").output_ids
    pair.check_pages()


def test_decode_never_asks(checkpoint: Path):
    """The lease of a prefilled prompt runs out, and its pages come back."""
    pair = InProcessPair(checkpoint, transfer=OPTIONS, prefix_cache=False)
    pair.submit("r", [1, 2, 3], options_of(4), legs=("prefill",))
    pair.settle()
    assert pair.prefill.legs["r"].finished is not None
    assert pair.prefill.role.stats(0).pages.running == 1
    pair.sleep(OPTIONS.lease_s + 1)
    assert pair.prefill.role.stats(0).pages.running == 0


def test_prompts_that_differ_are_refused(checkpoint: Path):
    """Both sides tokenise; a pair that disagrees fails instead of decoding over another prompt's KV."""
    pair = InProcessPair(checkpoint, transfer=OPTIONS)
    pair.submit("r", [1, 2, 3], options_of(4), decode_first=True)
    [request] = pair.decode_role._rooms.values()
    request.prompt[0] = 9
    pair.settle()
    assert "tokenised" in failed_error(pair, "decode").message
    pair.check_pages()


def test_an_abort_of_an_unknown_room_leaves_a_tombstone(checkpoint: Path):
    """The abort overtakes the prefill leg: it is acked, and the late leg starts nothing."""
    pair = InProcessPair(checkpoint, transfer=OPTIONS)
    link = pair.decode_link
    link.send(PREFILL, KvAbort(to="prefill-0", room=1, generation=1))
    pair.settle()
    pair.submit("r", [1, 2, 3], options_of(4))
    pair.settle()
    assert "given this room up" in failed_error(pair, "prefill").message
    assert "closed this room" in failed_error(pair, "decode").message
    pair.check_pages()


def test_a_stranger_is_not_served(checkpoint: Path):
    """A request for pages without a handshake, and one with pages outside of the pool, write nothing."""
    pair = InProcessPair(checkpoint, transfer=OPTIONS)
    request = KvRequest(to="prefill-0", room=1, generation=1, pages=[0], prompt_tokens=3, prompt_digest=b"")
    link = pair.decode_link
    link.send(PREFILL, request)
    pair.settle()
    assert pair.prefill.endpoint.num_rooms == 0
    link.send(PREFILL, pair.receiver.sources.hello)
    for pages in ([10**6], [0, 1]):
        link.send(
            PREFILL, KvRequest(to="prefill-0", room=1, generation=1, pages=pages, prompt_tokens=3, prompt_digest=b"")
        )
    pair.settle()
    assert pair.prefill.endpoint.num_rooms == 0
    assert pair.prefill.endpoint.counts.num_writes == 0
    assert pair.decode.endpoint.counts.num_dropped == 4, "three refusals and an answer to a greeting that was not sent"


def test_layouts_that_differ_are_refused(checkpoint: Path):
    pair = InProcessPair(checkpoint, transfer=OPTIONS)
    hello = pair.receiver.sources.hello
    pair.receiver.sources.hello = replace(hello, pool=replace(hello.pool, layout="other"))
    pair.submit("r", [1, 2, 3], options_of(4))
    pair.settle()
    assert "KV layouts differ" in failed_error(pair, "decode").message
    pair.check_nothing_held(pair.decode)


@pytest.mark.parametrize("protocol", [PROTOCOL - 1, PROTOCOL + 1])
def test_protocols_that_differ_are_refused(checkpoint: Path, protocol: int):
    """An older or newer worker is told so, before a message of its own is taken for one of ours."""
    pair = InProcessPair(checkpoint, transfer=OPTIONS)
    pair.receiver.sources.hello = replace(pair.receiver.sources.hello, protocol=protocol)
    pair.submit("r", [1, 2, 3], options_of(4))
    pair.settle()
    assert f"control protocol {protocol} here, {PROTOCOL} there" in failed_error(pair, "decode").message
    pair.check_nothing_held(pair.decode)


def test_a_prefill_worker_that_was_restarted_is_greeted_again(checkpoint: Path):
    """A new process at the old address has never heard of this worker: it is told who asks, and the request goes on."""
    pair = InProcessPair(checkpoint, transfer=OPTIONS)
    [first] = pair.run([([1, 2, 3], options_of(4))])
    pair.sender._peers._peers.clear()
    [second] = pair.run([([1, 2, 3], options_of(4))])
    assert second.output_ids == first.output_ids
    pair.check_pages()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_random_aborts_and_faults_leak_nothing(
    checkpoint: Path, judge_of: Callable[[str], Judge], seed: int, prefix_cache: bool
):
    """Requests come, finish and are aborted at random moments, with writes and messages delayed: the recount stays exact."""
    rng = random.Random(seed)

    def delays(what: str) -> Fault:
        return rng.choices([Fault.NONE, Fault.DELAY, Fault.DUPLICATE], [8, 2, 1])[0]

    pair = InProcessPair(
        checkpoint,
        faults=delays,
        transfer=OPTIONS,
        pool_tokens=1024,
        chunk_tokens=48,
        prefix_cache=prefix_cache,
        max_running=6,
    )
    prompts = random_prompts(seed, 60, longest=120)
    aborted: set[str] = set()
    for index, prompt in enumerate(prompts):
        options = options_of(rng.choice([1, 3, 20]), stream=rng.random() < 0.5, temperature=0.0)
        pair.submit(f"r{index}", prompt, options, decode_first=rng.random() < 0.5)
        for _ in range(rng.randrange(4)):
            pair.turn()
        if rng.random() < 0.3:
            pair.network.release()
        if rng.random() < 0.4:
            victim = f"r{rng.randrange(index + 1)}"
            if not pair.decode.legs[victim].ended:
                aborted.add(victim)
            pair.abort(victim)
        for side in pair.sides:
            assert side.role.stats(0).pages.unaccounted == 0
    for _ in range(200):
        pair.network.release()
        pair.turn()
    tally = Tally()
    for index in range(len(prompts)):
        rid = f"r{index}"
        if pair.decode.legs[rid].finished is not None and pair.prefill.legs[rid].finished is not None:
            answer = pair.answer(rid)
            assert answer.rows is not None
            judge_of("plain").add(tally, answer.prompt, answer.output_ids, answer.rows)
            leg = pair.decode.legs[rid]
            assert leg.tokens in ([], answer.output_ids)
        else:
            assert rid in aborted, (pair.prefill.legs[rid], pair.decode.legs[rid])
    tally.assert_clean()
    assert tally.requests + len(aborted) >= len(prompts)
    pair.check_pages()


def test_states_are_tables():
    """Terminal states are terminal, and no move is legal that the table does not hold."""
    assert advance(SenderState.OFFERED, SenderState.SENDING) is SenderState.SENDING
    for dead, move in (
        (SenderState.CLOSED, SenderState.SENDING),
        (ReceiverState.ARRIVED, ReceiverState.ABORTING),
        (SenderState.DRAINING, SenderState.SENDING),
    ):
        with pytest.raises(AssertionError, match="not a legal move"):
            advance(dead, move)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_complete_pages_against_a_recount(page_size: int):
    for prompt_tokens in range(1, 40):
        for computed in range(prompt_tokens + 1):
            pages = [range(i, min(i + page_size, prompt_tokens)) for i in range(0, prompt_tokens, page_size)]
            assert complete_pages(computed, prompt_tokens, page_size) == sum(p.stop <= computed for p in pages if p)


def test_write_tags_survive_the_wire():
    tag = WriteTag(2**63 - 1, 7, 12)
    assert WriteTag.decode(tag.encode()) == tag
    assert WriteTag.decode(b"noise") is None


# ------------------------------------------------------------------------------------------------ timings


@pytest.fixture
def bench() -> Bench:
    return Bench(delay_writes)


def test_time_in_which_writes_overlap_counts_once(bench: Bench):
    """Two writes at once from 10 to 14, none until 20, one from 20 to 23: 7 s; the prefill has ended at 20: 3 s are exposed."""
    bench.open()
    bench.ask()
    bench.chunk(0)
    bench.at(10)
    bench.chunk(1)
    bench.at(12)
    bench.network.release()
    bench.at(14)
    bench.chunk(2)
    bench.clock = 20
    bench.finish()
    bench.at(20)
    bench.network.release()
    bench.at(23)
    arrived = bench.arrived()
    assert (arrived.write_seconds, arrived.exposed_seconds, arrived.num_bytes) == (7, 3, 12)


def test_what_the_prefill_hides_is_not_exposed(bench: Bench):
    """All writes have completed when the prefill ends: nothing of them is exposed."""
    bench.open()
    bench.ask()
    bench.chunk(0, 1, 2)
    bench.at(10)
    bench.network.release()
    bench.at(15)
    bench.clock = 30
    bench.finish()
    bench.at(30)
    arrived = bench.arrived()
    assert (arrived.write_seconds, arrived.exposed_seconds) == (5, 0)


def test_a_wait_for_a_seat_is_not_a_transfer(bench: Bench):
    """The decode side asks 40 s after the prefill has ended: what is exposed begins there, and is all of the transfer."""
    bench.open()
    bench.chunk(0, 1, 2)
    bench.clock = 10
    bench.finish()
    bench.at(10)
    bench.ask()
    bench.at(50)
    bench.network.release()
    bench.at(52)
    arrived = bench.arrived()
    assert (arrived.write_seconds, arrived.exposed_seconds) == (2, 2)


def test_the_engine_s_time_counts_from_its_own_thread(bench: Bench):
    """The token waited 4 s for the transfer's thread: the request waited for it too."""
    bench.open()
    bench.ask()
    bench.at(1)
    bench.clock = 10
    bench.chunk(0, 1, 2)
    bench.finish()
    bench.at(14)
    bench.network.release()
    bench.at(15)
    arrived = bench.arrived()
    assert (arrived.write_seconds, arrived.exposed_seconds) == (1, 5)


def test_a_write_that_completes_at_once_needs_no_second_turn():
    """A write between hosts' memories is over when it is posted: the peer hears of it in the turn that posts it."""
    faults = Script()
    bench = Bench(faults)
    bench.open()
    bench.ask()
    bench.at(1)
    bench.chunk(0, 1, 2)
    bench.finish()
    bench.sender.turn(0.0)
    assert faults.seen[-2:] == ["write", "KvDone"]
    bench.at(2)
    assert bench.arrived().num_bytes == 12


def test_pauses_are_short_only_while_a_request_waits_for_the_next_look():
    """The sender naps while it writes, the receiver while all is written and notifications are outstanding."""
    bench = Bench(delay_writes)
    bench.open()
    bench.at(1)
    assert bench.waits == (IDLE_WAIT_S, IDLE_WAIT_S)
    bench.ask()
    bench.at(2)
    assert bench.waits == (IDLE_WAIT_S, LANDING_WAIT_S)
    bench.chunk(0, 1, 2)
    bench.at(3)
    assert bench.waits == (NAP_S, LANDING_WAIT_S)
    bench.finish()
    bench.network.release()
    bench.decode_agent.deaf = True
    bench.at(4)
    assert bench.waits == (IDLE_WAIT_S, NAP_S)
    bench.decode_agent.deaf = False
    bench.at(5)
    assert bench.waits == (IDLE_WAIT_S, IDLE_WAIT_S)
    assert bench.arrived()
